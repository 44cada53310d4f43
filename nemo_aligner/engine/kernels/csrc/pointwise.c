/* What torch takes ten passes for between the matrix products of a decode step, in one pass each.
 *
 * What a training forward rounds between two of these operations is rounded here too (the residual sum, the gate).
 */
#include "kernels.h"

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
