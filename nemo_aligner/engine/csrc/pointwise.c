/* What torch takes ten passes for between the matrix products of a decode step, in one pass each.
 *
 * What a training forward rounds between two of these operations is rounded here too (the residual sum, the gate).
 */
#include "numbers.h"

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
