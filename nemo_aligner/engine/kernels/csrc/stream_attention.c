/* Causal attention of a stream of rows, and its gradient, for training.
 *
 * A span is a run of places that see themselves causally and, before that, the places of a prefix:
 *
 *     spans[S, 4]     first place and length of the prefix (0: there is none), first place and length of the span
 *     parts[P + 1]    the spans from parts[i] to parts[i + 1] go on from one prefix, which is the last of them
 *
 * Keys, values and softmax's weights are multiplied as they are stored, and summed in float32. Notation as in decode.py:
 * N places, G key/value heads, R query heads of each, D dimensions, a multiple of 16.
 *
 * Forward:  S = scale · Q Kᵀ,  P = softmax(S),  O = P V
 * Backward: dP = dO Vᵀ,  dS = scale · P ∘ (dP − Σ dO ∘ O),  dQ = dS K,  dKᵀ = Qᵀ dS,  dVᵀ = dOᵀ P
 *           with P = e^(S − L), where the forward pass keeps L = log Σ e^S (Dao et al. 2022, arXiv 2205.14135, B.2)
 */
#include "kernels.h"
#include "rotary.h"
#include "tiles.h"
#include <stdlib.h>

enum { QUERIES = 4 * 14 }; /* looked at together */

/* What does not change over a call; mirrored by engine/kernels/stream_attention.py. cosine and sine are of every place. */
typedef struct {
    const real *mixed, *cosine, *sine;
    const int64_t *spans, *parts;
    int64_t P, N, G, R, D, turned, window; /* window: places seen at most, 0 = all */
    float scale;
} Stream;

/* Keys and values of consecutive places of one head, in panels: as outputs (sums over D give scores), and as inputs
 * (sums over keys). `keys` is the length rounded up to panels; gradients are [D, keys]. */
typedef struct {
    long start, offset, length, keys; /* offset: position of the first in its row */
    word *key_outputs, *key_inputs, *value_outputs, *value_inputs;
    float *key_gradient, *value_gradient;
} Run;

static inline floats load_floats(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

static long rounded(long n, long to) { return (n + to - 1) / to * to; }

static long least(long a, long b) { return a < b ? a : b; }

static const real *head_at(const Stream *s, long place, long g, long head) {
    return s->mixed + ((place * s->G + g) * (s->R + 2) + head) * s->D;
}

/* to[D]: a head turned by its place's rotary angle; `back`, by the opposite one */
static void turn(const Stream *s, const real *head, long place, int back, real *to) {
    const real *cosine = s->cosine + place * s->turned, *sine = s->sine + place * s->turned;
    /* the signs of sine are opposite in its halves, and its values the same */
    real opposite[256];
    if (back) {
        memcpy(opposite, sine + s->turned / 2, s->turned / 2 * sizeof(real));
        memcpy(opposite + s->turned / 2, sine, s->turned / 2 * sizeof(real));
    }
    rotate(head, cosine, back ? opposite : sine, s->turned, s->D, to);
}

/* rows[n, D] → panels[n / PANEL][D words][PANEL], the rows being outputs */
static void pack_outputs(const real *rows, long n, long D, word *panels) {
    const long W = D / IN_WORD;
    for (long first = 0; first < n; first += PANEL, panels += W * PANEL)
        for (long c = 0; c < PANEL; c++)
            for (long w = 0; w < W; w++)
                if (first + c < n) memcpy(panels + w * PANEL + c, rows + (first + c) * D + w * IN_WORD, sizeof(word));
                else panels[w * PANEL + c] = 0;
}

/* The words of LANES outputs, whose inputs are in `rows` vectors `stride` numbers apart, the first `count` of them there */
static inline words together(const real *rows, long stride, long count) {
    words found = {0};
    for (long i = 0; i < IN_WORD && i < count; i++) {
#ifdef FLOAT32
        memcpy(&found, rows + i * stride, sizeof found);
#else
        halves bits;
        memcpy(&bits, rows + i * stride, sizeof bits);
        found |= __builtin_convertvector(bits, words) << (16 * i);
#endif
    }
    return found;
}

/* rows[n, D] → panels[D / PANEL][words of n][PANEL], the rows being inputs; `step` words from panel to panel */
static void pack_inputs(const real *rows, long n, long D, word *panels, long step) {
    for (long d = 0; d < rounded(D, PANEL); d += LANES)
        for (long k = 0; k < n; k += IN_WORD) {
            words found = d < D ? together(rows + k * D + d, D, n - k) : (words){0};
            memcpy(panels + d / PANEL * step + k / IN_WORD * PANEL + d % PANEL, &found, sizeof found);
        }
}

static inline __attribute__((always_inline)) void multiply_tile(const word *x, long stride, const word *panel, long count,
                                                                float *out, long width, int add, const int R) {
    floats sums[TILE][2];
    UNROLLED
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            sums[r][half] = add ? load_floats(out + r * width + half * LANES) : (floats){0};
    add_products(sums, x, stride, panel, count, PANEL, R);
    UNROLLED
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) memcpy(out + r * width + half * LANES, &sums[r][half], sizeof(floats));
}

/* out[rows, outputs] (+)= x[rows, count words] · panels `step` words apart; rows of x and out lie `stride` words and
 * `width` numbers apart */
static void multiply(const word *x, long stride, long rows, const word *panels, long step, long count, long outputs,
                     float *out, long width, int add) {
    const long tiles = (rows + TILE - 1) / TILE;
    for (long column = 0; column < outputs; column += PANEL, panels += step)
        for (long t = 0; t < tiles; t++) {
            long m = rows * t / tiles;
            float *to = out + m * width + column;
#define CASE(R) \
    case R: multiply_tile(x + m * stride, stride, panels, count, to, width, add, R); break;
            switch (rows * (t + 1) / tiles - m) { EACH_TILE(CASE) }
#undef CASE
        }
}

/* Memory of one thread */
typedef struct {
    Run prefix, own;
    real *rows, *queries, *weights, *across; /* [longest, D], [QUERIES, D], [QUERIES, keys], [D, QUERIES] */
    word *panels;                            /* P or dS as [keys / PANEL][words of QUERIES][PANEL] */
    float *scores, *gradients, *sums;        /* [QUERIES, keys] twice, [QUERIES, D rounded up] */
} Memory;

static void *cut(char **from, long bytes) {
    char *found = *from;
    *from += rounded(bytes, 64);
    return found;
}

/* Cuts `from` up; with null, only counts bytes */
static long cut_memory(Memory *m, char *from, const Stream *s, long prefix, long own) {
    char *begin = from;
    const long D = s->D, wide = rounded(D, PANEL), keys = rounded(prefix, PANEL) + rounded(own, PANEL);
    for (Run *run = &m->prefix;; run = &m->own) {
        long width = rounded(run == &m->prefix ? prefix : own, PANEL);
        run->key_outputs = cut(&from, width * D * sizeof(real));
        run->value_outputs = cut(&from, width * D * sizeof(real));
        run->key_inputs = cut(&from, width * wide * sizeof(real));
        run->value_inputs = cut(&from, width * wide * sizeof(real));
        run->key_gradient = cut(&from, width * D * sizeof(float));
        run->value_gradient = cut(&from, width * D * sizeof(float));
        if (run == &m->own) break;
    }
    m->rows = cut(&from, (prefix > own ? prefix : own) * D * sizeof(real));
    m->queries = cut(&from, QUERIES * D * sizeof(real));
    m->across = cut(&from, D * QUERIES * sizeof(real));
    m->weights = cut(&from, QUERIES * keys * sizeof(real));
    m->panels = cut(&from, QUERIES * keys * sizeof(real));
    m->scores = cut(&from, QUERIES * keys * sizeof(float));
    m->gradients = cut(&from, QUERIES * keys * sizeof(float));
    m->sums = cut(&from, QUERIES * wide * sizeof(float));
    return from - begin;
}

/* Keys and values of `length` places from `start` on into `run` */
static void fill(const Stream *s, Memory *m, Run *run, long start, long length, long offset, long g, int backward) {
    const long D = s->D;
    run->start = start, run->length = length, run->offset = offset, run->keys = rounded(length, PANEL);
    const long step = run->keys / IN_WORD * PANEL;
    for (long k = 0; k < length; k++) turn(s, head_at(s, start + k, g, s->R), start + k, 0, m->rows + k * D);
    pack_outputs(m->rows, length, D, run->key_outputs);
    if (backward) pack_inputs(m->rows, length, D, run->key_inputs, step);
    for (long k = 0; k < length; k++) memcpy(m->rows + k * D, head_at(s, start + k, g, s->R + 1), D * sizeof(real));
    if (backward) {
        pack_outputs(m->rows, length, D, run->value_outputs);
        memset(run->key_gradient, 0, D * run->keys * sizeof(float));
        memset(run->value_gradient, 0, D * run->keys * sizeof(float));
    } else pack_inputs(m->rows, length, D, run->value_inputs, step);
}

/* Of a block of `count` queries from position `first` on: keys of the run that any of them sees */
static long bound_of(const Run *run, long first, long count) { return least(run->length, first + count - run->offset); }

/* Keys [from, to) of a run that the query at `position` sees */
static void seen(const Stream *s, const Run *run, long position, long *from, long *to) {
    long at = position - run->offset;
    *to = least(run->length, at + 1);
    *from = s->window && at + 1 > s->window ? least(at + 1 - s->window, *to) : 0;
}

/* scores[count, keys of both runs] = x · outputs, for the keys that the block sees */
static void score(const Stream *s, const Memory *m, const real *x, long stride, long first, long count, int values,
                  float *scores) {
    const long W = s->D / IN_WORD, width = m->prefix.keys + m->own.keys;
    const Run *run = &m->prefix;
    for (int i = 0; i < 2; i++, run = &m->own, scores += m->prefix.keys)
        multiply((const word *)x, stride / IN_WORD, count, values ? run->value_outputs : run->key_outputs, W * PANEL, W,
                 rounded(bound_of(run, first, count), PANEL), scores, width, 0);
}

/* sums[count, D] = weights · inputs, over the keys that the block sees */
static void sum_up(const Stream *s, const Memory *m, long first, long count, int values) {
    const long wide = rounded(s->D, PANEL), width = (m->prefix.keys + m->own.keys) / IN_WORD;
    const Run *run = &m->prefix;
    const word *x = (const word *)m->weights;
    for (int i = 0; i < 2; i++, run = &m->own, x += m->prefix.keys / IN_WORD)
        multiply(x, width, count, values ? run->value_inputs : run->key_inputs, run->keys / IN_WORD * PANEL,
                 (bound_of(run, first, count) + IN_WORD - 1) / IN_WORD, wide, m->sums, wide, i);
}

/* The scores of the query at `position` become softmax's weights; returns log Σ e^(scale · score) */
static float soften(const Stream *s, const Memory *m, float *scores, real *weights, long position, long first, long count) {
    const Run *run = &m->prefix;
    float largest = -INFINITY, total = 0, *one = scores;
    long from, to;
    for (int i = 0; i < 2; i++, run = &m->own, one += m->prefix.keys) {
        seen(s, run, position, &from, &to);
#pragma omp simd reduction(max : largest)
        for (long k = from; k < to; k++) largest = one[k] > largest ? one[k] : largest;
    }
    run = &m->prefix, one = scores;
    for (int i = 0; i < 2; i++, run = &m->own, one += m->prefix.keys) {
        seen(s, run, position, &from, &to);
#pragma omp simd reduction(+ : total)
        for (long k = from; k < to; k++) {
            one[k] = exponential(s->scale * (one[k] - largest));
            total += one[k];
        }
    }
    const float share = 1.0f / total;
    run = &m->prefix, one = scores;
    for (int i = 0; i < 2; i++, run = &m->own, one += m->prefix.keys, weights += m->prefix.keys) {
        seen(s, run, position, &from, &to);
        memset(weights, 0, from * sizeof(real));
        for (long k = from; k < to; k += LANES) store_some(weights + k, load_floats(one + k) * share, to - k);
        memset(weights + to, 0, (rounded(bound_of(run, first, count), IN_WORD) - to) * sizeof(real));
    }
    return s->scale * largest + logf(total);
}

/* Scores and dP of the query at `position` become P and dS; what it does not see gets 0 */
static void differentiate(const Stream *s, const Memory *m, float *scores, float *gradients, real *weights, long position,
                          long first, long count, float log_sum, float delta) {
    const Run *run = &m->prefix;
    for (int i = 0; i < 2; i++, run = &m->own) {
        long from, to, end = rounded(bound_of(run, first, count), PANEL);
        seen(s, run, position, &from, &to);
#pragma omp simd
        for (long k = from; k < to; k++) {
            float p = exponential(s->scale * scores[k] - log_sum);
            scores[k] = p;
            gradients[k] = s->scale * p * (gradients[k] - delta);
        }
        float *both[2] = {scores, gradients};
        for (int j = 0; j < 2; j++) {
            memset(both[j], 0, from * sizeof(float));
            memset(both[j] + to, 0, (end - to) * sizeof(float));
        }
        for (long k = 0; k < end; k += LANES) store(weights + k, load_floats(gradients + k));
        scores += m->prefix.keys, gradients += m->prefix.keys, weights += m->prefix.keys;
    }
}

/* from[count, keys] of both runs → panels[keys / PANEL][words of QUERIES][PANEL], the queries being inputs */
static void pack_queries(const Memory *m, const float *from, long first, long count, word *panels) {
    const long width = m->prefix.keys + m->own.keys, step = QUERIES / IN_WORD * PANEL;
    const Run *run = &m->prefix;
    for (int i = 0; i < 2; i++, run = &m->own) {
        long end = rounded(bound_of(run, first, count), PANEL);
        for (long q = 0; q < count; q += IN_WORD)
            for (long k = 0; k < end; k += LANES) {
                real narrow[IN_WORD][LANES];
                for (long j = 0; j < IN_WORD && q + j < count; j++)
                    store(narrow[j], load_floats(from + (q + j) * width + k));
                words found = together(narrow[0], LANES, count - q);
                memcpy(panels + k / PANEL * step + q / IN_WORD * PANEL + k % PANEL, &found, sizeof found);
            }
        from += m->prefix.keys, panels += m->prefix.keys / PANEL * step;
    }
}

/* gradient[D, keys] of both runs += rowsᵀ · panels, with rows[count, D] `stride` numbers apart */
static void add_gradient(const Stream *s, Memory *m, const real *rows, long stride, long first, long count,
                         const word *panels, int values) {
    const long step = QUERIES / IN_WORD * PANEL, words_ = (count + IN_WORD - 1) / IN_WORD;
    for (long d = 0; d < s->D; d++) {
        for (long q = 0; q < count; q++) m->across[d * QUERIES + q] = rows[q * stride + d];
        for (long q = count; q < words_ * IN_WORD; q++) m->across[d * QUERIES + q] = 0;
    }
    Run *run = &m->prefix;
    for (int i = 0; i < 2; i++, run = &m->own, panels += m->prefix.keys / PANEL * step)
        multiply((const word *)m->across, QUERIES / IN_WORD, s->D, panels, step, words_,
                 rounded(bound_of(run, first, count), PANEL), values ? run->value_gradient : run->key_gradient, run->keys, 1);
}

/* Gradients of a run's keys and values to where they belong in mixed_gradient[N, G, R + 2, D] */
static void give_back(const Stream *s, Memory *m, const Run *run, long g, real *mixed_gradient) {
    for (long k = 0; k < run->length; k++) {
        real *key = mixed_gradient + (head_at(s, run->start + k, g, s->R) - s->mixed), *value = key + s->D;
        for (long d = 0; d < s->D; d++) {
            m->sums[d] = run->key_gradient[d * run->keys + k];
            m->sums[s->D + d] = run->value_gradient[d * run->keys + k];
        }
        for (long d = 0; d < s->D; d += LANES) {
            store(m->rows + d, load_floats(m->sums + d));
            store(value + d, load_floats(m->sums + s->D + d));
        }
        turn(s, m->rows, run->start + k, 1, key);
    }
}

/* Queries of head r, `count` of them from the own run's number `from` on: O and L */
static void forward_block(const Stream *s, Memory *m, long g, long r, long from, long count, real *out, float *log_sums) {
    const long D = s->D, heads = s->G * s->R, head = g * s->R + r, first = m->own.offset + from, place = m->own.start + from;
    const long keys = m->prefix.keys + m->own.keys, wide = rounded(D, PANEL);
    for (long q = 0; q < count; q++) turn(s, head_at(s, place + q, g, r), place + q, 0, m->queries + q * D);
    score(s, m, m->queries, D, first, count, 0, m->scores);
    for (long q = 0; q < count; q++)
        log_sums[(place + q) * heads + head] =
            soften(s, m, m->scores + q * keys, m->weights + q * keys, first + q, first, count);
    sum_up(s, m, first, count, 1);
    for (long q = 0; q < count; q++)
        for (long d = 0; d < D; d += LANES)
            store(out + ((place + q) * heads + head) * D + d, load_floats(m->sums + q * wide + d));
}

/* Of the same: dQ, and what they add to the gradients of both runs */
static void backward_block(const Stream *s, Memory *m, long g, long r, long from, long count, const real *out,
                           const float *log_sums, const real *out_gradient, real *mixed_gradient) {
    const long D = s->D, heads = s->G * s->R, head = g * s->R + r, first = m->own.offset + from, place = m->own.start + from;
    const long keys = m->prefix.keys + m->own.keys, wide = rounded(D, PANEL), stride = heads * D;
    const real *given = out_gradient + (place * heads + head) * D, *found = out + (place * heads + head) * D;
    for (long q = 0; q < count; q++) turn(s, head_at(s, place + q, g, r), place + q, 0, m->queries + q * D);
    score(s, m, m->queries, D, first, count, 0, m->scores);
    score(s, m, given, stride, first, count, 1, m->gradients);
    for (long q = 0; q < count; q++) {
        floats delta = {0};
        for (long d = 0; d < D; d += LANES) delta += load(given + q * stride + d) * load(found + q * stride + d);
        differentiate(s, m, m->scores + q * keys, m->gradients + q * keys, m->weights + q * keys, first + q, first, count,
                      log_sums[(place + q) * heads + head], sum_of(delta));
    }
    pack_queries(m, m->scores, first, count, m->panels);
    add_gradient(s, m, given, stride, first, count, m->panels, 1);
    pack_queries(m, m->gradients, first, count, m->panels);
    add_gradient(s, m, m->queries, D, first, count, m->panels, 0);
    sum_up(s, m, first, count, 0);
    for (long q = 0; q < count; q++) {
        for (long d = 0; d < D; d += LANES) store(m->rows + d, load_floats(m->sums + q * wide + d));
        turn(s, m->rows, place + q, 1, mixed_gradient + (head_at(s, place + q, g, r) - s->mixed));
    }
}

/* out[N, G · R · D] and log_sums[N, G · R]; or, with out_gradient, mixed_gradient[N, G, R + 2, D] from those. Places of no
 * span are left alone. Returns 0, or 1 without memory, and then nothing has been written. */
int stream_attention(const Stream *s, real *out, float *log_sums, const real *out_gradient, real *mixed_gradient) {
    long prefix = 0, own = 0;
    int failed = 0, backward = out_gradient != NULL;
    for (long i = 0; i < s->parts[s->P]; i++) {
        if (s->spans[4 * i + 1] > prefix) prefix = s->spans[4 * i + 1];
        if (s->spans[4 * i + 3] > own) own = s->spans[4 * i + 3];
    }
#pragma omp parallel
    {
        const unsigned before_all = flush_tiny();
        Memory memory;
        char *all = aligned_alloc(64, cut_memory(&memory, NULL, s, prefix, own));
        if (all) cut_memory(&memory, all, s, prefix, own);
        else {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (long item = 0; item < s->P * s->G; item++) {
            if (failed) continue;
            long g = item % s->G, begin = s->parts[item / s->G], end = s->parts[item / s->G + 1];
            for (long i = begin; i < end; i++) {
                const int64_t *span = s->spans + 4 * i;
                const Run before = memory.prefix, after = memory.own;
                if (i == begin) fill(s, &memory, &memory.prefix, span[0], span[1], 0, g, backward);
                if (i > begin && !span[1]) { /* the prefix that the spans before it went on from */
                    memory.own = memory.prefix;
                    memory.prefix.length = memory.prefix.keys = 0;
                } else fill(s, &memory, &memory.own, span[2], span[3], span[1], g, backward);
                for (long r = 0; r < s->R; r++)
                    for (long from = 0; from < span[3]; from += QUERIES) {
                        long count = least(QUERIES, span[3] - from);
                        if (backward)
                            backward_block(s, &memory, g, r, from, count, out, log_sums, out_gradient, mixed_gradient);
                        else forward_block(s, &memory, g, r, from, count, out, log_sums);
                    }
                if (backward) give_back(s, &memory, &memory.own, g, mixed_gradient);
                if (i > begin && !span[1]) memory.prefix = before, memory.own = after;
            }
        }
        free(all);
        restore(before_all);
    }
    return failed;
}
