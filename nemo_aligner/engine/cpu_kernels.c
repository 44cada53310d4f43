/* What lies between the matrix products of a decode step, for bf16 on a CPU: one pass each, where torch makes ten.
 *
 * Numbers are stored as bf16 and computed with as float32; what a training forward rounds between two operations of one
 * kernel is rounded here too (the residual sum, the rotated query and key). Notation as in decode.py: N rows, H hidden,
 * G key/value heads, R query heads per key/value head, D head dimension.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float wide(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline bf16 narrow(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* e^x for x <= 0, relative error below 2e-7: 2^n · e^r with |r| <= ln(2)/2 and a polynomial for e^r. Written out so that
 * the compiler makes vectors of it. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* hidden[N, H] += delta[N, H] (unless it is null); out = hidden / sqrt(mean(hidden²) + eps) · weight[H] */
void add_rms_norm(bf16 *hidden, const bf16 *delta, const bf16 *weight, bf16 *out, long rows, long width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (long row = 0; row < rows; row++) {
        bf16 *h = hidden + row * width, *o = out + row * width;
        float squares = 0;
        if (delta) {
            const bf16 *d = delta + row * width;
            for (long i = 0; i < width; i++) h[i] = narrow(wide(h[i]) + wide(d[i]));
        }
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < width; i++) squares += wide(h[i]) * wide(h[i]);
        float scale = 1.0f / sqrtf(squares / width + eps);
        for (long i = 0; i < width; i++) o[i] = narrow(wide(h[i]) * scale * wide(weight[i]));
    }
}

/* out[N, F] = silu(inner[N, :F]) · inner[N, F:] */
void silu_mul(const bf16 *inner, bf16 *out, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (long row = 0; row < rows; row++) {
        const bf16 *gate = inner + row * 2 * width, *value = gate + width;
        bf16 *o = out + row * width;
        for (long i = 0; i < width; i++) {
            float x = wide(gate[i]), e = exponential(-fabsf(x));
            float sigmoid = (x < 0 ? e : 1.0f) / (1.0f + e);
            o[i] = narrow(wide(narrow(x * sigmoid)) * wide(value[i]));
        }
    }
}

/* The first `turned` of D dimensions of a head by rotary position embedding, halves form; cos and signed sin of a position */
static inline void rotate(const bf16 *head, const bf16 *cosine, const bf16 *sine, long turned, long D, bf16 *out) {
    long half = turned / 2;
    for (long d = 0; d < half; d++) {
        float a = wide(head[d]), b = wide(head[half + d]);
        out[d] = narrow(a * wide(cosine[d]) + b * wide(sine[d]));
        out[half + d] = narrow(b * wide(cosine[half + d]) + a * wide(sine[half + d]));
    }
    for (long d = turned; d < D; d++) out[d] = head[d];
}

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
enum { LANES = 16, MOST_CHUNKS = 16, TOGETHER = 4 }; /* D is at most 256 */

static inline floats load(const bf16 *from) {
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

static inline float sum_of(floats values) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += values[i];
    return total;
}

/* softmax(q · kᵀ) · v of R query heads over positions 0..length-1: q[R, D] floats, k and v [length, D], D = 16 · chunks.
 * Inlined with constants for R and chunks, so that the query and the sums stay in registers. */
static inline __attribute__((always_inline)) void attend(const float *q, const bf16 *k, const bf16 *v, long length,
                                                         const int R, const int chunks, float *scores, bf16 *out) {
    floats query[TOGETHER][MOST_CHUNKS], sums[TOGETHER][MOST_CHUNKS];
    const int D = chunks * LANES;
    memset(sums, 0, sizeof sums);
    for (int r = 0; r < R; r++) memcpy(query[r], q + r * D, D * sizeof(float));
    for (long t = 0; t < length; t++) {
        floats dots[TOGETHER];
        for (int r = 0; r < R; r++) dots[r] = (floats){0};
        for (int c = 0; c < chunks; c++) {
            floats key = load(k + t * D + c * LANES);
            for (int r = 0; r < R; r++) dots[r] += query[r][c] * key;
        }
        for (int r = 0; r < R; r++) scores[r * length + t] = sum_of(dots[r]);
    }
    for (int r = 0; r < R; r++) {
        float *s = scores + r * length, largest = s[0], total = 0;
#pragma omp simd reduction(max : largest)
        for (long t = 0; t < length; t++) largest = s[t] > largest ? s[t] : largest;
#pragma omp simd reduction(+ : total)
        for (long t = 0; t < length; t++) {
            s[t] = exponential(s[t] - largest);
            total += s[t];
        }
        float scale = 1.0f / total;
        for (long t = 0; t < length; t++) s[t] *= scale;
    }
    for (long t = 0; t < length; t++) {
        for (int c = 0; c < chunks; c++) {
            floats value = load(v + t * D + c * LANES);
            for (int r = 0; r < R; r++) sums[r][c] += scores[r * length + t] * value;
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < chunks; c++)
            for (int i = 0; i < LANES; i++) out[r * D + c * LANES + i] = narrow(sums[r][c][i]);
}

/* `attend` for any number of heads, a few together */
static inline __attribute__((always_inline)) void attend_all(const float *q, const bf16 *k, const bf16 *v, long length,
                                                             long R, const int chunks, float *scores, bf16 *out) {
    const int D = chunks * LANES;
    for (; R > 0; R -= TOGETHER, q += TOGETHER * D, out += TOGETHER * D) {
        if (R == 1) attend(q, k, v, length, 1, chunks, scores, out);
        else if (R == 2) attend(q, k, v, length, 2, chunks, scores, out);
        else if (R == 3) attend(q, k, v, length, 3, chunks, scores, out);
        else attend(q, k, v, length, 4, chunks, scores, out);
    }
}

/* Rotary embedding, storing of the new key and value, and attention over what is cached.
 *
 * mixed[N, G, R + 2, D]    R query heads, key and value of each group
 * cosine, sine             [positions, turned], or turned = 0 for no rotary embedding
 * places[N, 4]             of each row: address of its first layer's keys, and in elements: layer to layer, keys to values,
 *                          group to group
 * positions[N]             of the new tokens; window: positions seen at most, 0 = all
 * out[N, G · R · D]
 * Returns 0, or 1 when there is no memory.
 */
int attend_cached(const bf16 *mixed, const bf16 *cosine, const bf16 *sine, long turned, const int64_t *places,
                  const int64_t *positions, long layer, long window, bf16 *out, long N, long G, long R, long D,
                  float scale) {
    int failed = 0;
    long longest = 0;
    for (long n = 0; n < N; n++) longest = positions[n] > longest ? positions[n] : longest;
#pragma omp parallel
    {
        float *scores = malloc((TOGETHER * (longest + 1) + R * D) * sizeof(float));
        bf16 *turned_head = malloc(D * sizeof(bf16));
        if (!scores || !turned_head) {
#pragma omp atomic write
            failed = 1;
        }
        float *q = scores + TOGETHER * (longest + 1);
#pragma omp for schedule(dynamic, 4)
        for (long item = 0; item < N * G; item++) {
            if (!scores || !turned_head) continue;
            long n = item / G, g = item % G, at = positions[n];
            const int64_t *place = places + 4 * n;
            bf16 *keys = (bf16 *)place[0] + layer * place[1] + g * place[3], *values = keys + place[2];
            const bf16 *heads = mixed + item * (R + 2) * D;
            const bf16 *c = cosine + at * turned, *s = sine + at * turned;
            for (long r = 0; r < R; r++) {
                rotate(heads + r * D, c, s, turned, D, turned_head);
                for (long d = 0; d < D; d++) q[r * D + d] = wide(turned_head[d]) * scale;
            }
            rotate(heads + R * D, c, s, turned, D, keys + at * D);
            memcpy(values + at * D, heads + (R + 1) * D, D * sizeof(bf16));
            long begin = window && at + 1 > window ? at + 1 - window : 0, length = at + 1 - begin;
            const bf16 *k = keys + begin * D, *v = values + begin * D;
            bf16 *o = out + item * R * D;
            if (D == 64) attend_all(q, k, v, length, R, 4, scores, o);
            else if (D == 128) attend_all(q, k, v, length, R, 8, scores, o);
            else attend_all(q, k, v, length, R, D / LANES, scores, o);
        }
        free(scores);
        free(turned_head);
    }
    return failed;
}
