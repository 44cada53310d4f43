/* Matrix products with bf16 weights, for the few to some hundred rows of a decode step.
 *
 * A weight [N, K] is kept in panels of 32 outputs (the last one has what is left), in the order in which it is read:
 *
 *     panels[N / 32][K / 2][32][2]      pairs of inputs side by side, as the processor multiplies them
 *
 * so every product reads it once, from the first byte to the last, and the next panel is on its way from memory while
 * this one is multiplied with all rows. A panel lies where its 32 rows lay, so packing needs no memory of its own. Every
 * output is one chain of float32 sums over its inputs in their order, so a row's result does not depend on the rows
 * beside it.
 */
#include "kernels.h"
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads(void) { return 1; }
#endif

enum { PANEL = 32, TILE = 14, BLOCK = 256 }; /* outputs of a panel; rows multiplied together; rows kept in cache */

/* 1 where `product` is the fastest there is: with bf16 dot products, but without matrix units, which oneDNN uses. */
int has_products(void) {
#if defined __AVX512BF16__ && !defined __AMX_BF16__ && !defined FLOAT32
    return 1;
#else
    return 0;
#endif
}

static long panels_of(long N) { return (N + PANEL - 1) / PANEL; }

static long columns_of(long p, long N) { return N - p * PANEL < PANEL ? N - p * PANEL : PANEL; }

/* from[columns, K] into a panel, or back */
static void pack_panel(const bf16 *from, bf16 *panel, long columns, long K) {
    for (long c = 0; c < columns; c++)
        for (long k = 0; k < K; k += 2) memcpy(panel + k * columns + 2 * c, from + c * K + k, 2 * sizeof(bf16));
}

static void unpack_panel(const bf16 *panel, bf16 *to, long columns, long K) {
    for (long c = 0; c < columns; c++)
        for (long k = 0; k < K; k += 2) memcpy(to + c * K + k, panel + k * columns + 2 * c, 2 * sizeof(bf16));
}

/* A weight[N, K], K even, into panels in its own place; or, with `back`, out of them. Returns 0, or 1 without memory, and
 * then nothing has changed. */
int pack(bf16 *weight, long N, long K, int back) {
    int failed = 0;
#pragma omp parallel
    {
        bf16 *copy = malloc(PANEL * K * sizeof(bf16));
        if (!copy) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long p = 0; p < panels_of(N); p++) {
            if (failed) continue;
            bf16 *place = weight + p * PANEL * K;
            memcpy(copy, place, columns_of(p, N) * K * sizeof(bf16));
            (back ? unpack_panel : pack_panel)(copy, place, columns_of(p, N), K);
        }
        free(copy);
    }
    return failed;
}

/* out[M, K]: rows `ids` of the weight[N, K] that was packed */
void rows_of(const bf16 *panels, const int64_t *ids, bf16 *out, long M, long N, long K) {
#pragma omp parallel for schedule(static)
    for (long m = 0; m < M; m++) {
        long p = ids[m] / PANEL, columns = columns_of(p, N);
        const bf16 *from = panels + p * PANEL * K + 2 * (ids[m] % PANEL);
        for (long k = 0; k < K; k += 2) memcpy(out + m * K + k, from + k * columns, 2 * sizeof(bf16));
    }
}

#ifdef __AVX512BF16__
#include <immintrin.h>

/* Of one panel with `columns` outputs in use: out[R, columns] = x[R, K] · panel (+ bias). `ahead` to `end` is fetched
 * into the cache meanwhile. Inlined with constants for R, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void tile(const bf16 *x, long stride, const bf16 *panel, const bf16 *bias,
                                                       bf16 *out, long K, long N, long columns, const int R,
                                                       const char *ahead, const char *end) {
    enum { LINE = 64, TOGETHER = 16 }; /* bytes of a cache line; inputs between two looks ahead */
    __m512 sums[TILE][2];
    const __mmask16 first = columns < 16 ? (1u << columns) - 1 : 0xffff;
    const __mmask16 second = columns < 16 ? 0 : columns < 32 ? (1u << (columns - 16)) - 1 : 0xffff;
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    const long steps = (K + TOGETHER - 1) / TOGETHER, lines = ((end - ahead) / LINE + steps - 1) / steps;
    for (long begin = 0; begin < K; begin += TOGETHER) {
        for (long i = 0; i < lines && ahead < end; i++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
        for (long k = begin; k < K && k < begin + TOGETHER; k += 2, panel += 2 * columns) {
            __m512bh left = (__m512bh)_mm512_maskz_loadu_epi32(first, panel);
            __m512bh right = (__m512bh)_mm512_maskz_loadu_epi32(second, panel + PANEL);
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) {
                int32_t pair;
                memcpy(&pair, x + r * stride + k, sizeof pair);
                __m512bh inputs = (__m512bh)_mm512_set1_epi32(pair);
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], inputs, left);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], inputs, right);
            }
        }
    }
    const __mmask32 used = first | (__mmask32)second << 16;
    __m512 added[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (bias) {
        __m512i both = _mm512_maskz_loadu_epi16(used, bias);
        added[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
        added[1] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    }
    for (int r = 0; r < R; r++) {
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_add_ps(sums[r][1], added[1]), _mm512_add_ps(sums[r][0], added[0]));
        _mm512_mask_storeu_epi16(out + r * N, used, (__m512i)both);
    }
}

/* `tile` for any number of rows, a few together */
static void multiply(const bf16 *x, long stride, const bf16 *panel, const bf16 *bias, bf16 *out, long rows, long K,
                     long N, long columns, const char *ahead, const char *end) {
    long tiles = (rows + TILE - 1) / TILE;
    for (long t = 0; t < tiles; t++) {
        long m = rows * t / tiles, count = rows * (t + 1) / tiles - m, lines = (end - ahead) / 64;
        const char *from = ahead + lines * t / tiles * 64, *to = ahead + lines * (t + 1) / tiles * 64;
#define CASE(R) \
    case R: tile(x + m * stride, stride, panel, bias, out + m * N, K, N, columns, R, from, to); break;
        switch (count) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
            CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
        }
#undef CASE
    }
}

/* out[M, N] = x[M, K] · weightᵀ (+ bias[N], unless it is null), summed in float32. Returns 0, or 1 without memory. */
int product(const bf16 *x, const bf16 *panels, const bf16 *bias, bf16 *out, long M, long N, long K) {
    /* rows that lie a multiple of 2 KB apart would drive each other out of the cache */
    long stride = K % 1024 ? K : K + 32;
    bf16 *copy = stride == K ? NULL : malloc(M * stride * sizeof(bf16));
    if (stride != K && !copy) return 1;
    const bf16 *rows = copy ? copy : x;
#pragma omp parallel
    {
        if (copy) {
#pragma omp for schedule(static)
            for (long m = 0; m < M; m++) memcpy(copy + m * stride, x + m * K, K * sizeof(bf16));
        }
        long blocks = (M + BLOCK - 1) / BLOCK, count = panels_of(N);
        for (long b = 0; b < blocks; b++) {
            long first = M * b / blocks, size = M * (b + 1) / blocks - first;
            /* more threads than panels: each panel's rows are shared out */
            long parts = (omp_get_num_threads() + count - 1) / count;
#pragma omp for schedule(static) nowait
            for (long item = 0; item < count * parts; item++) {
                long p = item / parts, begin = size * (item % parts) / parts, end = size * (item % parts + 1) / parts;
                const bf16 *panel = panels + p * PANEL * K;
                const char *next = (const char *)(panel + PANEL * K);
                long ahead = p + 1 < count ? columns_of(p + 1, N) * K * sizeof(bf16) : 0, column = p * PANEL;
                multiply(rows + (first + begin) * stride, stride, panel, bias ? bias + column : NULL,
                         out + (first + begin) * N + column, end - begin, K, N, columns_of(p, N), next, next + ahead);
            }
        }
    }
    free(copy);
    return 0;
}
#endif
