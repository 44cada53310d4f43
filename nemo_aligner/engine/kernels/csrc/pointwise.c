/* What torch takes ten passes for between the matrix products of a layer, in one pass each; and their gradients.
 *
 * What a training forward rounds between two of these operations is rounded here too (the residual sum, the gate).
 */
#include "kernels.h"
#include "threads.h"
#include <stdlib.h>

/* hidden[N, H] += delta[N, H] (unless it is null); out = hidden / sqrt(mean(hidden²) + eps) · weight[H] */
void add_rms_norm(real *hidden, const real *delta, const real *weight, real *out, long rows, long width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (long row = 0; row < rows; row++) {
        real *h = hidden + row * width, *o = out + row * width;
        floats squares = {0};
        for (long i = 0; i < width; i += LANES) {
            floats x = load_some(h + i, width - i);
            if (delta) {
                store_some(h + i, x + load_some(delta + row * width + i, width - i), width - i);
                x = load_some(h + i, width - i);
            }
            squares += x * x;
        }
        float scale = 1.0f / sqrtf(sum_of(squares) / width + eps);
        for (long i = 0; i < width; i += LANES)
            store_some(o + i, load_some(h + i, width - i) * scale * load_some(weight + i, width - i), width - i);
    }
}

/* out[N, F] = silu(inner[N, :F]) · inner[N, F:] */
void silu_mul(const real *inner, real *out, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (long row = 0; row < rows; row++) {
        const real *gate = inner + row * 2 * width, *value = gate + width;
        real *o = out + row * width;
        for (long i = 0; i < width; i += LANES) {
            floats x = load_some(gate + i, width - i);
            for (int j = 0; j < LANES; j++) {
                float e = exponential(-fabsf(x[j]));
                x[j] *= (x[j] < 0 ? e : 1.0f) / (1.0f + e);
            }
            real gated[LANES];
            store(gated, x);
            store_some(o + i, load(gated) * load_some(value + i, width - i), width - i);
        }
    }
}

/* Of out = x · scale · weight with scale = 1 / sqrt(mean(x²) + eps), from its gradient `given`:
 *     x_gradient = scale · (given · weight − x · scale² · mean(given · weight · x)),  weight_gradient = Σ given · x · scale
 * x, given, x_gradient [N, H], weight, weight_gradient [H]. Returns 0, or 1 without memory. */
int rms_norm_backward(const real *x, const real *weight, const real *given, real *x_gradient, real *weight_gradient,
                      long rows, long width, float eps) {
    const long threads = omp_get_max_threads(), padded = (width + LANES - 1) / LANES * LANES;
    float *sums = calloc(threads * padded, sizeof(float)); /* a thread's own, and added up in the order of threads */
    if (!sums) return 1;
#pragma omp parallel if (rows * width > 8192)
    {
        const unsigned before = flush_tiny();
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            const real *in = x + row * width, *from = given + row * width;
            float *mine = sums + omp_get_thread_num() * padded;
            floats squares = {0}, common = {0};
            for (long i = 0; i < width; i += LANES) {
                floats one = load_some(in + i, width - i);
                squares += one * one;
                common += load_some(from + i, width - i) * load_some(weight + i, width - i) * one;
            }
            const float scale = 1.0f / sqrtf(sum_of(squares) / width + eps), shift = scale * scale * sum_of(common) / width;
            for (long i = 0; i < width; i += LANES) {
                floats one = load_some(in + i, width - i), gradient = load_some(from + i, width - i), total;
                memcpy(&total, mine + i, sizeof total);
                total += gradient * one * scale;
                memcpy(mine + i, &total, sizeof total);
                gradient = scale * (gradient * load_some(weight + i, width - i) - one * shift);
                store_some(x_gradient + row * width + i, gradient, width - i);
            }
        }
        restore(before);
    }
    for (long i = 0; i < width; i += LANES) {
        floats total = {0}, part;
        for (long t = 0; t < threads; t++) {
            memcpy(&part, sums + t * padded + i, sizeof part);
            total += part;
        }
        store_some(weight_gradient + i, total, width - i);
    }
    free(sums);
    return 0;
}

/* Of silu_mul, from the gradient given[N, F] of its output: gradient[N, 2F], with σ the logistic function
 *     ∂ gate = given · value · σ(gate) · (1 + gate · (1 − σ(gate))),  ∂ value = given · silu(gate) */
void silu_mul_backward(const real *inner, const real *given, real *gradient, long rows, long width) {
#pragma omp parallel if (rows * width > 8192)
    {
        const unsigned before = flush_tiny();
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            const real *gate = inner + row * 2 * width, *value = gate + width, *from = given + row * width;
            real *to = gradient + row * 2 * width;
            for (long i = 0; i < width; i += LANES) {
                floats x = load_some(gate + i, width - i), one = load_some(from + i, width - i), share;
                for (int j = 0; j < LANES; j++) {
                    float e = exponential(-fabsf(x[j]));
                    share[j] = (x[j] < 0 ? e : 1.0f) / (1.0f + e);
                }
                real gated[LANES];
                store(gated, x * share);
                store_some(to + i, one * load_some(value + i, width - i) * share * (1.0f + x * (1.0f - share)), width - i);
                store_some(to + width + i, one * load(gated), width - i);
            }
        }
        restore(before);
    }
}
