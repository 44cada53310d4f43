/* The functions that the files of this folder have for each other; described where they are defined. */
#pragma once
#include "numbers.h"

int product(const bf16 *x, const bf16 *panels, const bf16 *bias, bf16 *out, long M, long N, long K);
void add_rms_norm(bf16 *hidden, const bf16 *delta, const bf16 *weight, bf16 *out, long rows, long width, float eps);
void silu_mul(const bf16 *inner, bf16 *out, long rows, long width);
int attend_cached(const bf16 *mixed, const bf16 *cosine, const bf16 *sine, long turned, const int64_t *places,
                  const int64_t *positions, long layer, long window, bf16 *out, long N, long G, long R, long D,
                  float scale);
