/* Attention of a decode step over the cached keys and values, one call for all rows.
 *
 * What a training forward rounds on the way is rounded here too (the rotated query and key). Notation as in decode.py:
 * N rows, G key/value heads, R query heads per key/value head, D head dimension.
 */
#include "kernels.h"
#include "rotary.h"
#include <stdlib.h>

typedef float quarter __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
/* lanes of two vectors, quarter by quarter (of four lanes) */
#define EVEN_PAIRS(at) at, at + LANES, at + 1, at + 1 + LANES
#define ODD_PAIRS(at) at + 2, at + 2 + LANES, at + 3, at + 3 + LANES
#define LOW_HALVES(at) at, at + 1, at + LANES, at + 1 + LANES
#define HIGH_HALVES(at) at + 2, at + 3, at + 2 + LANES, at + 3 + LANES
#if LANES == 16
#define EACH(quarter) quarter(0), quarter(4), quarter(8), quarter(12)
#elif LANES == 8
#define EACH(quarter) quarter(0), quarter(4)
#else
#define EACH(quarter) quarter(0)
#endif
enum { MOST_CHUNKS = 256 / LANES, TOGETHER = 4 }; /* D is at most 256; heads, and positions, looked at together */

/* Keys and values [length, D] that lie together. */
typedef struct {
    const real *keys, *values;
    long length;
} Part;

/* to[count] = q · key of keys that lie one after the other; D = LANES · chunks, count is 4 or less */
static inline __attribute__((always_inline)) void dots(const real *q, const real *keys, const int chunks, float *to,
                                                       const int count) {
    floats sum[TOGETHER];
    for (int t = 0; t < count; t++) {
        const real *key = keys + t * chunks * LANES;
#if defined __AVX512BF16__ && !defined FLOAT32
        if (chunks % 2 == 0) {
            __m512 pairs = _mm512_setzero_ps();
            for (int c = 0; c < chunks; c += 2)
                pairs = _mm512_dpbf16_ps(pairs, (__m512bh)_mm512_loadu_si512(q + c * LANES),
                                         (__m512bh)_mm512_loadu_si512(key + c * LANES));
            sum[t] = (floats)pairs;
            continue;
        }
#endif
        sum[t] = (floats){0};
        for (int c = 0; c < chunks; c++) sum[t] += load(q + c * LANES) * load(key + c * LANES);
    }
    for (int t = count; t < TOGETHER; t++) sum[t] = (floats){0};
    /* sums over the lanes of four vectors at once: pairs of lanes, then of pairs, then over the quarters; of fewer in the
     * same order, so that it does not matter where a row's positions are parted */
    floats ab = SHUFFLE(sum[0], sum[1], EACH(EVEN_PAIRS)) + SHUFFLE(sum[0], sum[1], EACH(ODD_PAIRS));
    floats cd = SHUFFLE(sum[2], sum[3], EACH(EVEN_PAIRS)) + SHUFFLE(sum[2], sum[3], EACH(ODD_PAIRS));
    floats all = SHUFFLE(ab, cd, EACH(LOW_HALVES)) + SHUFFLE(ab, cd, EACH(HIGH_HALVES));
    quarter quarters[LANES / 4];
    memcpy(quarters, &all, sizeof all);
    for (int i = 1; i < LANES / 4; i++) quarters[0] += quarters[i];
    memcpy(to, quarters, count * sizeof(float));
}

/* softmax(scale · q · kᵀ) · v of R query heads over the positions of both parts, one after the other: q[R, D],
 * D = LANES · chunks, scores[R, length of both]. Inlined with constants for R and chunks, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void attend(const real *q, const Part *parts, const int R, const int chunks,
                                                         float scale, float *scores, real *out) {
    floats sums[TOGETHER][MOST_CHUNKS];
    const int D = chunks * LANES;
    const long length = parts[0].length + parts[1].length;
    float *score = scores;
    for (const Part *part = parts; part < parts + 2; score += part->length, part++) {
        long t = 0;
        for (; t + TOGETHER <= part->length; t += TOGETHER) {
            /* the values come from memory while the keys are multiplied */
            for (int i = 0; i < TOGETHER * D; i += 64 / (int)sizeof(real)) __builtin_prefetch(part->values + t * D + i);
            for (int r = 0; r < R; r++)
                dots(q + r * D, part->keys + t * D, chunks, score + r * length + t, TOGETHER);
        }
        for (; t < part->length; t++)
            for (int r = 0; r < R; r++) dots(q + r * D, part->keys + t * D, chunks, score + r * length + t, 1);
    }
    for (int r = 0; r < R; r++) {
        float *s = scores + r * length, largest = s[0], total = 0;
#pragma omp simd reduction(max : largest)
        for (long t = 0; t < length; t++) largest = s[t] > largest ? s[t] : largest;
#pragma omp simd reduction(+ : total)
        for (long t = 0; t < length; t++) {
            s[t] = exponential(scale * (s[t] - largest));
            total += s[t];
        }
        float share = 1.0f / total;
        for (long t = 0; t < length; t++) s[t] *= share;
        for (int c = 0; c < chunks; c++) sums[r][c] = (floats){0};
    }
    score = scores;
    for (const Part *part = parts; part < parts + 2; part++)
        for (long t = 0; t < part->length; t++, score++)
            for (int c = 0; c < chunks; c++) {
                floats value = load(part->values + t * D + c * LANES);
                for (int r = 0; r < R; r++) sums[r][c] += score[r * length] * value;
            }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < chunks; c++) store(out + r * D + c * LANES, sums[r][c]);
}

/* `attend` for any number of heads, a few together */
static inline __attribute__((always_inline)) void attend_all(const real *q, const Part *parts, long R,
                                                             const int chunks, float scale, float *scores,
                                                             real *out) {
    const int D = chunks * LANES;
    for (; R > 0; R -= TOGETHER, q += TOGETHER * D, out += TOGETHER * D) {
        if (R == 1) attend(q, parts, 1, chunks, scale, scores, out);
        else if (R == 2) attend(q, parts, 2, chunks, scale, scores, out);
        else if (R == 3) attend(q, parts, 3, chunks, scale, scores, out);
        else attend(q, parts, 4, chunks, scale, scores, out);
    }
}

/* A row's keys and values of a layer and group: `place` is an address and the steps between layers, from keys to values, and
 * between groups. */
static inline Part part_at(const int64_t *place, long layer, long group, long D, long begin, long length) {
    const real *keys = (const real *)place[0] + layer * place[1] + group * place[3] + begin * D;
    return (Part){keys, keys + place[2], length};
}

/* Rotary embedding, storing of the new key and value, and attention over what is cached.
 *
 * mixed[N, G, R + 2, D]    R query heads, key and value of each group
 * cosine, sine             [positions, turned], or turned = 0 for no rotary embedding
 * places[N, 9]             of each row: positions of its prompt, then place of the prompt's keys and values, then of its own
 * positions[N]             of the new tokens; window: positions seen at most, 0 = all
 * out[N, G · R · D]
 * Returns 0, or 1 when there is no memory.
 */
int attend_cached(const real *mixed, const real *cosine, const real *sine, long turned, const int64_t *places,
                  const int64_t *positions, long layer, long window, real *out, long N, long G, long R, long D,
                  float scale) {
    int failed = 0;
    long longest = 0;
    for (long n = 0; n < N; n++) longest = positions[n] > longest ? positions[n] : longest;
#pragma omp parallel
    {
        float *scores = malloc(TOGETHER * (longest + 1) * sizeof(float));
        real *q = malloc(R * D * sizeof(real));
        if (!scores || !q) {
#pragma omp atomic write
            failed = 1;
        }
        /* every key and value first: rows may be the positions of one prompt, and then read each other's */
#pragma omp for schedule(static)
        for (long item = 0; item < N * G; item++) {
            long n = item / G, at = positions[n];
            Part new = part_at(places + 9 * n + 5, layer, item % G, D, at - places[9 * n], 1);
            const real *key = mixed + (item * (R + 2) + R) * D;
            rotate(key, cosine + at * turned, sine + at * turned, turned, D, (real *)new.keys);
            memcpy((real *)new.values, key + D, D * sizeof(real));
        }
#pragma omp for schedule(dynamic, 4)
        for (long item = 0; item < N * G; item++) {
            if (!scores || !q) continue;
            long n = item / G, g = item % G, at = positions[n];
            const int64_t *place = places + 9 * n;
            long prompt = place[0], begin = window && at + 1 > window ? at + 1 - window : 0;
            for (long r = 0; r < R; r++)
                rotate(mixed + (item * (R + 2) + r) * D, cosine + at * turned, sine + at * turned, turned, D, q + r * D);
            long from = begin < prompt ? begin : prompt, own = begin < prompt ? 0 : begin - prompt;
            const Part parts[2] = {part_at(place + 1, layer, g, D, from, prompt - from),
                                   part_at(place + 5, layer, g, D, own, at + 1 - prompt - own)};
            real *o = out + item * R * D;
            if (D == 64) attend_all(q, parts, R, 64 / LANES, scale, scores, o);
            else if (D == 128) attend_all(q, parts, R, 128 / LANES, scale, scores, o);
            else attend_all(q, parts, R, D / LANES, scale, scores, o);
        }
        free(scores);
        free(q);
    }
    return failed;
}
