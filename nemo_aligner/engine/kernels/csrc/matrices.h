/* Products of matrices in scratch memory, whose right side lies in panels, summed in float32. */
#pragma once
#include "tiles.h"
#include <stdlib.h>

#if defined __AMX_BF16__ && !defined FLOAT32
#define HAS_UNITS 1
enum { UNIT = 16 }; /* words of inputs that are multiplied together */
#else
#define HAS_UNITS 0
enum { UNIT = 1 };
#endif

static inline floats load_floats(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

static long rounded(long n, long to) { return (n + to - 1) / to * to; }

static long least(long a, long b) { return a < b ? a : b; }

/* The words of LANES outputs, whose inputs are in `rows` vectors `stride` numbers apart, the first `count` of them there */
static inline words together(const real *rows, long stride, long count) {
    words found = {0};
    for (long i = 0; i < IN_WORD && i < count; i++) {
#ifdef FLOAT32
        memcpy(&found, rows + i * stride, sizeof found);
#else
        found |= load_halves(rows + i * stride) << (16 * i);
#endif
    }
    return found;
}

/* rows[n, D], `stride` numbers apart → panels[D / PANEL][words of n][PANEL], the rows being inputs; `step` words from panel
 * to panel. Numbers that are missing from the last UNIT words are 0. */
static void pack_inputs(const real *rows, long n, long stride, long D, word *panels, long step) {
    for (long column = 0; column < D; column += PANEL, panels += step)
        for (long k = 0; k < rounded(n, UNIT * IN_WORD); k += IN_WORD)
            for (long d = column; d < column + PANEL; d += LANES) {
                words found = d < D ? together(rows + k * stride + d, stride, n - k) : (words){0};
                memcpy(panels + k / IN_WORD * PANEL + d - column, &found, sizeof found);
            }
}

static inline __attribute__((always_inline)) void multiply_tile(const word *x, long stride, const word *panel, long count,
                                                                float *out, long width, int add, const int R) {
    floats sums[TILE][2];
    UNROLLED
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            sums[r][half] = add ? load_floats(out + r * width + half * LANES) : (floats){0};
    add_products(sums, x, stride, panel, count, PANEL, R);
    UNROLLED
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) memcpy(out + r * width + half * LANES, &sums[r][half], sizeof(floats));
}

/* out[rows, outputs] (+)= x[rows, count words] · panels `step` words apart; rows of x and out lie `stride` words and
 * `width` numbers apart */
static void multiply(const word *x, long stride, long rows, const word *panels, long step, long count, long outputs,
                     float *out, long width, int add) {
    const long tiles = (rows + TILE - 1) / TILE;
    for (long column = 0; column < outputs; column += PANEL, panels += step)
        for (long t = 0; t < tiles; t++) {
            long m = rows * t / tiles;
            float *to = out + m * width + column;
#define CASE(R) \
    case R: multiply_tile(x + m * stride, stride, panels, count, to, width, add, R); break;
            switch (rows * (t + 1) / tiles - m) { EACH_TILE(CASE) }
#undef CASE
        }
}
