/* Rotary position embedding of one head. */
#pragma once
#include "numbers.h"

/* The first `turned` of D dimensions of a head by rotary position embedding, halves form; cos and signed sin of a position */
static inline void rotate(const real *head, const real *cosine, const real *sine, long turned, long D, real *out) {
    long half = turned / 2;
    for (long d = 0; d < half; d += LANES) {
        long left = half - d;
        floats a = load_some(head + d, left), b = load_some(head + half + d, left);
        store_some(out + d, a * load_some(cosine + d, left) + b * load_some(sine + d, left), left);
        store_some(out + half + d, b * load_some(cosine + half + d, left) + a * load_some(sine + half + d, left), left);
    }
    memcpy(out + turned, head + turned, (D - turned) * sizeof(real));
}
