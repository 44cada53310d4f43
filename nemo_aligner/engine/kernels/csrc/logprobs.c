/* The sum in every log-probability of a row of logits, and the gradient of one of them: a row stays in the cache meanwhile.
 *
 *     L = log Σ_v e^l(v) over v < V,   log p(t) = l(t) − L,   ∂ log p(t) / ∂ l(v) = [v = t] − e^(l(v) − L)
 */
#include "numbers.h"

enum { TOKENS = 256 }; /* whose float32 sum is added to the float64 one of the row */

/* Σ e^(logits − largest) of `count` tokens */
static float sum_of_powers(const real *logits, long count, float largest) {
    floats sums = {0};
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        floats x = load(logits + i) - largest;
        for (int j = 0; j < LANES; j++) x[j] = exponential(x[j]);
        sums += x;
    }
    float total = sum_of(sums);
    for (; i < count; i++) total += exponential(wide(logits[i]) - largest);
    return total;
}

/* out[N] = L of rows of logits that lie `stride` numbers apart */
void log_sums(const real *logits, long stride, float *out, long N, long V) {
#pragma omp parallel for schedule(static) if (N * V > 8192)
    for (long row = 0; row < N; row++) {
        const real *l = logits + row * stride;
        const float largest = largest_number(l, V);
        double total = 0;
        for (long i = 0; i < V; i += TOKENS) total += sum_of_powers(l + i, V - i < TOKENS ? V - i : TOKENS, largest);
        out[row] = largest + log(total);
    }
}

/* gradient[N, W] of given[N] · log p(targets[N]), from the L of log_sums[N]; 0 from V on. A target below 0 is none of these. */
void logprobs_backward(const real *logits, const float *log_sums, const float *given, const int64_t *targets,
                       real *gradient, long N, long W, long V) {
#pragma omp parallel if (N * W > 8192)
    {
        const unsigned before = flush_tiny();
#pragma omp for schedule(static)
        for (long row = 0; row < N; row++) {
            const real *l = logits + row * W;
            real *to = gradient + row * W;
            for (long i = 0; i < V; i += LANES) {
                floats x = load_some(l + i, V - i) - log_sums[row];
                for (int j = 0; j < LANES; j++) x[j] = exponential(x[j]);
                store_some(to + i, x * -given[row], V - i);
            }
            memset(to + V, 0, (W - V) * sizeof(real));
            if (targets[row] >= 0) { /* from the logit again: what was stored is rounded */
                floats one = {given[row] * -expm1f(wide(l[targets[row]]) - log_sums[row])};
                store_some(to + targets[row], one, 1);
            }
        }
        restore(before);
    }
}
