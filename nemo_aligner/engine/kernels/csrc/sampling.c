/* Drawing tokens from logits in one pass per row that stays in the cache; algorithms/sampling.py has the definition.
 *
 * Probabilities are float32 and summed in blocks of 256 tokens; the sums of blocks are float64.
 */
#include "numbers.h"
#include <stdlib.h>

enum { TOKENS = 256 }; /* of a block */

/* ids[0..n-1] cannot be drawn */
typedef struct {
    const int64_t *ids;
    long n;
} Excluded;

/* exp((logits - largest) · factor) of the block that begins with token `first`, 0 for what is excluded; returns the sum */
static float block_weights(const real *logits, long first, long count, float largest, float factor, Excluded excluded,
                           float *out) {
    float total = 0;
    int hit = 0;
    for (long i = 0; i < count; i += LANES) {
        floats x = (load_some(logits + first + i, count - i) - largest) * factor;
        memcpy(out + i, &x, sizeof x);
    }
#pragma omp simd reduction(+ : total)
    for (long i = 0; i < count; i++) {
        out[i] = exponential(out[i]);
        total += out[i];
    }
    for (long j = 0; j < excluded.n; j++)
        if (first <= excluded.ids[j] && excluded.ids[j] < first + count) {
            out[excluded.ids[j] - first] = 0;
            hit = 1;
        }
    if (hit) {
        total = 0;
        for (long i = 0; i < count; i++) total += out[i];
    }
    return total;
}

/* largest logit of what is not excluded */
static float largest_of(const real *logits, long V, Excluded excluded) {
    float largest = largest_number(logits, V);
    int hit = 0;
    for (long j = 0; j < excluded.n; j++) hit |= wide(logits[excluded.ids[j]]) == largest;
    if (!hit) return largest;
    largest = -INFINITY;
    for (long i = 0; i < V; i++) {
        int allowed = 1;
        for (long j = 0; j < excluded.n; j++) allowed &= excluded.ids[j] != i;
        if (allowed && wide(logits[i]) > largest) largest = wide(logits[i]);
    }
    return largest;
}

/* One token per row from softmax(logits · factor), by inverting its cumulative distribution at `uniform`[N].
 *
 * logits[N, stride]   of which the first V are used
 * ids[n]              cannot be drawn in rows with forbidden[N] true
 * tokens, logprobs, drawn_from [N]: what is drawn, and its log-probability under softmax(logits) and under what it was
 * drawn from.
 * Returns 0, or 1 when there is no memory.
 */
int draw_tokens(const real *logits, long stride, float factor, const double *uniform, const uint8_t *forbidden,
                const int64_t *ids, long n, int64_t *tokens, float *logprobs, float *drawn_from, long N, long V) {
    long blocks = (V + TOKENS - 1) / TOKENS;
    int failed = 0;
#pragma omp parallel
    {
        float weights[TOKENS], *sums = malloc(blocks * sizeof(float));
        if (!sums) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long row = 0; row < N; row++) {
            if (!sums) continue;
            const real *l = logits + row * stride;
            Excluded excluded = {ids, forbidden && forbidden[row] ? n : 0};
            float largest = largest_of(l, V, excluded);
            double all = 0, allowed = 0; /* sums under the model, and under what is drawn from */
            for (long b = 0; b < blocks; b++) {
                long first = b * TOKENS, count = V - first < TOKENS ? V - first : TOKENS;
                if (factor != 1) all += block_weights(l, first, count, largest, 1, excluded, weights);
                sums[b] = block_weights(l, first, count, largest, factor, excluded, weights);
                allowed += sums[b];
            }
            if (factor == 1) all = allowed;
            for (long j = 0; j < excluded.n; j++) all += exp(wide(l[ids[j]]) - largest);
            double target = uniform[row] * allowed;
            long b = 0, token = 0, last = -1; /* the last that has any weight, should rounding lead past it */
            while (b < blocks - 1 && target >= sums[b]) target -= sums[b++];
            while (b > 0 && !(sums[b] > 0)) target = sums[--b];
            long first = b * TOKENS, count = V - first < TOKENS ? V - first : TOKENS;
            block_weights(l, first, count, largest, factor, excluded, weights);
            for (; token < count && target >= weights[token]; token++) {
                if (weights[token] > 0) last = token;
                target -= weights[token];
            }
            if (token == count) token = last;
            tokens[row] = first + token;
            float logit = wide(l[first + token]) - largest;
            logprobs[row] = logit - log(all);
            drawn_from[row] = logit * factor - log(allowed);
        }
        free(sums);
    }
    return failed;
}
