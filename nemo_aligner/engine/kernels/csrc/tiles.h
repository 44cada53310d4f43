/* The inner loop of every matrix product: a few rows times the outputs of one panel, with all sums in registers.
 *
 * Inputs are read as words of four bytes, which hold two bf16 or one float32. A panel has the same word of PANEL outputs
 * side by side, word after word, as the processor multiplies them.
 */
#pragma once
#include "numbers.h"

typedef int32_t word;
enum { PANEL = 2 * LANES, IN_WORD = sizeof(word) / sizeof(real) }; /* outputs of a panel; numbers in a word */

/* rows multiplied together: two sums of each, and the weights, fill the processor's registers */
#if LANES == 16
#define TILE 14
#elif defined FLOAT32
#define TILE 6
#else
#define TILE 4
#endif

/* a loop over rows, whose sums are in registers only if no loop is left */
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 14")
#endif

/* F(R) for every R of a tile: `case`s with constants, so that F is compiled for each */
#if TILE > 6
#define EACH_TILE(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13) F(14)
#elif TILE > 4
#define EACH_TILE(F) F(1) F(2) F(3) F(4) F(5) F(6)
#else
#define EACH_TILE(F) F(1) F(2) F(3) F(4)
#endif

/* sums + the products of the inputs in `x` with those of LANES outputs in `weights` */
static inline floats multiply_add(floats sums, word x, words weights) {
#ifdef FLOAT32
    float input;
    memcpy(&input, &x, sizeof input);
    return sums + input * (floats)weights;
#elif defined __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(x), (__m512bh)weights);
#else
    float even = wide(x), odd = wide((uint32_t)x >> 16);
    return sums + even * (floats)(weights << 16) + odd * (floats)(weights & (int32_t)0xffff0000);
#endif
}

/* The first `count` of LANES words, the others being 0 */
static inline words words_at(const word *from, long count) {
#ifdef __AVX512F__
    return (words)_mm512_maskz_loadu_epi32(count >= LANES ? 0xffff : count > 0 ? (1u << count) - 1 : 0, from);
#else
    words found = {0};
    if (count >= LANES) memcpy(&found, from, sizeof found);
    else if (count > 0) memcpy(&found, from, count * sizeof(word));
    return found;
#endif
}

/* sums[R] += x[R, count words] · a panel with `columns` outputs in use. Inlined with a constant for R. */
static inline __attribute__((always_inline)) void add_products(floats sums[TILE][2], const word *x, long stride,
                                                               const word *panel, long count, long columns,
                                                               const int R) {
    for (long w = 0; w < count; w++, panel += columns) {
        words weights[2] = {words_at(panel, columns), words_at(panel + LANES, columns - LANES)};
        UNROLLED
        for (int r = 0; r < R; r++) {
            word inputs = x[r * stride + w];
            sums[r][0] = multiply_add(sums[r][0], inputs, weights[0]);
            sums[r][1] = multiply_add(sums[r][1], inputs, weights[1]);
        }
    }
}
