/* The two halves of a decoder layer, each the functions of the other files one after the other: a call from Python costs
 * as much as a small one of them. What follows a half, a sum over tensor-parallel ranks, is the caller's.
 */
#include "kernels.h"
#include <stdlib.h>

#if HAS_PRODUCTS
/* What does not change from step to step; mirrored by engine/kernels/layer.py. Products have the weights that `pack` packed,
 * biases may be null. Names and shapes are those of the functions called below. */
typedef struct {
    const real *input_norm, *qkv, *projection, *mlp_norm, *fc1, *fc2, *qkv_bias, *fc1_bias, *cosine, *sine;
    int64_t layer, H, G, R, D, F, turned, window;
    float eps, scale;
} Layer;

/* out[N, H] = projection(attention(qkv(norm(hidden += delta)))) */
int attention_half(const Layer *l, real *hidden, const real *delta, const int64_t *places, const int64_t *positions,
                   real *out, long N) {
    long mixed_width = l->G * (l->R + 2) * l->D, context_width = l->G * l->R * l->D;
    real *normed = malloc(N * (l->H + mixed_width + context_width) * sizeof(real));
    if (!normed) return 1;
    real *mixed = normed + N * l->H, *context = mixed + N * mixed_width;
    add_rms_norm(hidden, delta, l->input_norm, normed, N, l->H, l->eps);
    int failed = product(normed, l->qkv, l->qkv_bias, mixed, N, mixed_width, l->H) ||
                 attend_cached(mixed, l->cosine, l->sine, l->turned, places, positions, l->layer, l->window, context, N,
                               l->G, l->R, l->D, l->scale) ||
                 product(context, l->projection, NULL, out, N, l->H, context_width);
    free(normed);
    return failed;
}

/* out[N, H] = fc2(silu(gate) · value) with gate, value = fc1(norm(hidden += delta)), F columns each; a few rows after
 * another, so that what is in between does not leave the cache */
int feed_forward_half(const Layer *l, real *hidden, const real *delta, real *out, long N) {
    enum { TOGETHER = 256 };
    const long most = N < TOGETHER ? N : TOGETHER;
    real *normed = malloc(most * (l->H + 3 * l->F) * sizeof(real));
    if (!normed) return 1;
    real *inner = normed + most * l->H, *gated = inner + most * 2 * l->F;
    int failed = 0;
    for (long first = 0; first < N && !failed; first += most) {
        const long rows = N - first < most ? N - first : most, at = first * l->H;
        add_rms_norm(hidden + at, delta ? delta + at : NULL, l->mlp_norm, normed, rows, l->H, l->eps);
        failed = product(normed, l->fc1, l->fc1_bias, inner, rows, 2 * l->F, l->H);
        if (!failed) {
            silu_mul(inner, gated, rows, l->F);
            failed = product(gated, l->fc2, NULL, out + at, rows, l->H, l->F);
        }
    }
    free(normed);
    return failed;
}
#endif
