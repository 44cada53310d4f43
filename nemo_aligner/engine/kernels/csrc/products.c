/* Matrix products for the few to some hundred rows of a decode step.
 *
 * A weight [N, K] is kept in panels of as many outputs as two vectors have (the last panel has what is left), in the order
 * in which it is read. With words of four bytes, which hold two bf16 or one float32 and of which a row has W:
 *
 *     panels[N / PANEL][W][PANEL]      the same inputs of PANEL outputs side by side, as the processor multiplies them
 *
 * so every product reads it once, from the first byte to the last, and the next panel is on its way from memory while
 * this one is multiplied with all rows. A panel lies where its rows lay, so packing needs no memory of its own. Every
 * output is one chain of float32 sums over its inputs in their order, so a row's result does not depend on the rows
 * beside it. Units for matrices, where there are any, multiply the whole panels.
 */
#include "kernels.h"
#include "threads.h"
#include "units.h"
#include <stdlib.h>

enum { BLOCK = 256 }; /* rows kept in cache */

int has_products(void) { return HAS_PRODUCTS; }

static long words_of(long K) { return K * sizeof(real) / sizeof(word); }

static long panels_of(long N) { return (N + PANEL - 1) / PANEL; }

static long columns_of(long p, long N) { return N - p * PANEL < PANEL ? N - p * PANEL : PANEL; }

/* from[columns, W] into a panel, or back */
static void pack_panel(const word *from, word *panel, long columns, long W) {
    for (long c = 0; c < columns; c++)
        for (long w = 0; w < W; w++) panel[w * columns + c] = from[c * W + w];
}

static void unpack_panel(const word *panel, word *to, long columns, long W) {
    for (long c = 0; c < columns; c++)
        for (long w = 0; w < W; w++) to[c * W + w] = panel[w * columns + c];
}

/* A weight[N, K] of whole words into panels in its own place; or, with `back`, out of them. Returns 0, or 1 without memory,
 * and then nothing has changed. */
int pack(word *weight, long N, long K, int back) {
    const long W = words_of(K);
    int failed = 0;
#pragma omp parallel
    {
        word *copy = malloc(PANEL * W * sizeof(word));
        if (!copy) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long p = 0; p < panels_of(N); p++) {
            if (failed) continue;
            word *place = weight + p * PANEL * W;
            memcpy(copy, place, columns_of(p, N) * W * sizeof(word));
            (back ? unpack_panel : pack_panel)(copy, place, columns_of(p, N), W);
        }
        free(copy);
    }
    return failed;
}

/* out[M, K]: rows `ids` of the weight[N, K] that was packed */
void rows_of(const word *panels, const int64_t *ids, word *out, long M, long N, long K) {
    const long W = words_of(K);
#pragma omp parallel for schedule(static)
    for (long m = 0; m < M; m++) {
        long p = ids[m] / PANEL, columns = columns_of(p, N);
        const word *from = panels + p * PANEL * W + ids[m] % PANEL;
        for (long w = 0; w < W; w++) out[m * W + w] = from[w * columns];
    }
}

#if HAS_PRODUCTS
/* Of one panel with `columns` outputs in use: out[R, columns] = x[R, W] · panel (+ bias). `ahead` to `end` is fetched
 * into the cache meanwhile. Inlined with constants for R, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void tile(const word *x, long stride, const word *panel, const real *bias,
                                                       real *out, long W, long N, long columns, const int R,
                                                       const char *ahead, const char *end) {
    enum { LINE = 64, TOGETHER = 8 }; /* bytes of a cache line; words between two looks ahead */
    floats sums[TILE][2];
    const long right = columns - LANES;
    UNROLLED
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = (floats){0};
    const long steps = (W + TOGETHER - 1) / TOGETHER, lines = ((end - ahead) / LINE + steps - 1) / steps;
    for (long begin = 0; begin < W; begin += TOGETHER) {
        for (long i = 0; i < lines && ahead < end; i++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
        long count = W - begin < TOGETHER ? W - begin : TOGETHER;
        add_products(sums, x + begin, stride, panel, count, columns, R);
        panel += count * columns;
    }
    floats added[2] = {{0}, {0}};
    if (bias) {
        added[0] = load_some(bias, columns);
        if (right > 0) added[1] = load_some(bias + LANES, right);
    }
    UNROLLED
    for (int r = 0; r < R; r++) {
        store_some(out + r * N, sums[r][0] + added[0], columns);
        if (right > 0) store_some(out + r * N + LANES, sums[r][1] + added[1], right);
    }
}

/* `tile` for any number of rows, a few together */
static void multiply_rows(const word *x, long stride, const word *panel, const real *bias, real *out, long rows, long W,
                          long N, long columns, const char *ahead, const char *end) {
    long tiles = (rows + TILE - 1) / TILE;
    for (long t = 0; t < tiles; t++) {
        long m = rows * t / tiles, count = rows * (t + 1) / tiles - m, lines = (end - ahead) / 64;
        const char *from = ahead + lines * t / tiles * 64, *to = ahead + lines * (t + 1) / tiles * 64;
#define CASE(R) \
    case R: tile(x + m * stride, stride, panel, bias, out + m * N, W, N, columns, R, from, to); break;
        switch (count) {
            EACH_TILE(CASE)
        }
#undef CASE
    }
}

#if HAS_UNITS
/* product() for the whole panels, by this thread's share of them. x has rows up to a multiple of UNIT, `stride` words apart. */
static void multiply_whole_panels(const word *x, long stride, const word *panels, const real *bias, real *out, long M,
                                  long N, long W) {
    enum { NEIGHBOURS = 8 }; /* panels whose outputs are written together, as far as threads have enough to do */
    const long whole = N / PANEL, most = whole / (4 * omp_get_num_threads());
    const long together = M <= 2 * UNIT || most < 1 ? 1 : least(most, NEIGHBOURS), blocks = (M + BLOCK - 1) / BLOCK;
    /* more than a cache holds is written past it, where lines are whole */
    const int passes_by = M * N > 1 << 22 && !(((uintptr_t)out | N * sizeof(real)) % 64);
    float sums[2 * UNIT * PANEL] __attribute__((aligned(64)));
    begin_units();
#pragma omp for schedule(static) collapse(2) nowait
    for (long b = 0; b < blocks; b++)
        for (long begin = 0; begin < whole; begin += together)
            for (long m = b * BLOCK; m < least(M, (b + 1) * BLOCK); m += 2 * UNIT)
                for (long p = begin; p < least(whole, begin + together); p++) {
                    const long count = least(2 * UNIT, M - m);
                    multiply_units(x + m * stride, stride, rounded(count, UNIT), panels + p * PANEL * W, 0, W, PANEL, sums,
                                   PANEL, 0);
                    for (long r = 0; r < count; r++) {
                        const float *found = sums + r * PANEL;
                        real *to = out + (m + r) * N + p * PANEL;
                        floats low = load_floats(found), high = load_floats(found + LANES);
                        if (bias) low += load(bias + p * PANEL), high += load(bias + p * PANEL + LANES);
                        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
                        if (passes_by) _mm512_stream_si512((void *)to, both);
                        else _mm512_storeu_si512(to, both);
                    }
                }
    if (passes_by) _mm_sfence();
    end_units();
}
#endif

/* out[M, N] = x[M, K] · weightᵀ (+ bias[N], unless it is null), summed in float32. Returns 0, or 1 without memory. */
int product(const real *x, const real *weight, const real *bias, real *out, long M, long N, long K) {
    const word *panels = (const word *)weight;
    const long W = words_of(K);
    const int units = has_units() && W % UNIT == 0;
    /* rows that lie a multiple of 2 KB apart would drive each other out of the cache; units take UNIT rows at a time */
    const long stride = W % 512 ? W : W + 16, padded = units ? rounded(M, UNIT) : M;
    const int copies = stride != W || padded != M;
    word *copy = copies ? malloc(padded * stride * sizeof(word)) : NULL;
    if (copies && !copy) return 1;
    const word *rows = copy ? copy : (const word *)x;
#pragma omp parallel
    {
        if (copy) {
#pragma omp for schedule(static)
            for (long m = 0; m < M; m++) memcpy(copy + m * stride, x + m * K, K * sizeof(real));
        }
        long done = 0;
#if HAS_UNITS
        if (units) {
            multiply_whole_panels(rows, stride, panels, bias, out, M, N, W);
            done = N / PANEL;
        }
#endif
        long blocks = (M + BLOCK - 1) / BLOCK, count = panels_of(N);
        for (long b = 0; b < blocks; b++) {
            long first = M * b / blocks, size = M * (b + 1) / blocks - first;
            /* more threads than panels: each panel's rows are shared out */
            long parts = (omp_get_num_threads() + count - 1) / count;
#pragma omp for schedule(static) nowait
            for (long item = done * parts; item < count * parts; item++) {
                long p = item / parts, begin = size * (item % parts) / parts, end = size * (item % parts + 1) / parts;
                const word *panel = panels + p * PANEL * W;
                const char *next = (const char *)(panel + PANEL * W);
                long ahead = p + 1 < count ? columns_of(p + 1, N) * W * sizeof(word) : 0, column = p * PANEL;
                multiply_rows(rows + (first + begin) * stride, stride, panel, bias ? bias + column : NULL,
                              out + (first + begin) * N + column, end - begin, W, N, columns_of(p, N), next, next + ahead);
            }
        }
    }
    free(copy);
    return 0;
}
#endif
