/* The functions that the files of this folder have for each other; described where they are defined. */
#pragma once
#include "numbers.h"

/* 1 where `product` is the fastest there is: on x86 */
#if defined __AVX2__ && defined __FMA__
#define HAS_PRODUCTS 1
#else
#define HAS_PRODUCTS 0
#endif

int product(const real *x, const real *weight, const real *bias, real *out, long M, long N, long K);
void add_rms_norm(real *hidden, const real *delta, const real *weight, real *out, long rows, long width, float eps);
void silu_mul(const real *inner, real *out, long rows, long width);
int attend_cached(const real *mixed, const real *cosine, const real *sine, long turned, const int64_t *places,
                  const int64_t *positions, long layer, long window, real *out, long N, long G, long R, long D,
                  float scale);
