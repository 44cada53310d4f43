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
 * With a grain of some keys, forward alone, a prefix is looked at up to a multiple of it, and its rest as the beginning of
 * each span that goes on from it. Sums over keys are then made in one order, whatever part of a row is in a prefix.
 *
 * Forward:  S = scale · Q Kᵀ,  P = softmax(S),  O = P V
 * Backward: dP = dO Vᵀ,  dS = scale · P ∘ (dP − Σ dO ∘ O),  dQ = dS K,  dKᵀ = Qᵀ dS,  dVᵀ = dOᵀ P
 *           with P = e^(S − L), where the forward pass keeps L = log Σ e^S (Dao et al. 2022, arXiv 2205.14135, B.2)
 */
#include "stream_runs.h"

/* scores[k] = e^(scale · scores[k] − shift) from `from` to `to`, which are multiples of LANES; returns total + their sums */
static floats exponentials(float *scores, long from, long to, float scale, float shift, floats total) {
    for (long k = from; k < to; k += LANES) {
#pragma omp simd
        for (int j = 0; j < LANES; j++) scores[k + j] = exponential(scale * scores[k + j] - shift);
        total += load_floats(scores + k);
    }
    return total;
}

/* The scores of the query at `position` become softmax's weights; returns log Σ e^(scale · score) */
static float soften(const Stream *s, const Memory *m, float *scores, real *weights, long position, long first, long count) {
    const Run *run = &m->prefix;
    float largest = -INFINITY, *one = scores;
    floats sums = {0};
    long from, to;
    for (int i = 0; i < 2; i++, run = &m->own, one += m->prefix.keys) {
        seen(s, run, position, &from, &to);
        for (long k = from / LANES * LANES; k < from; k++) one[k] = -INFINITY; /* whole vectors from here on */
        for (long k = to; k < rounded(to, LANES); k++) one[k] = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (long k = from / LANES * LANES; k < rounded(to, LANES); k++) largest = one[k] > largest ? one[k] : largest;
    }
    run = &m->prefix, one = scores;
    for (int i = 0; i < 2; i++, run = &m->own, one += m->prefix.keys) {
        seen(s, run, position, &from, &to);
        sums = exponentials(one, from / LANES * LANES, rounded(to, LANES), s->scale, s->scale * largest, sums);
    }
    const float total = sum_of(sums), share = 1.0f / total;
    run = &m->prefix, one = scores;
    for (int i = 0; i < 2; i++, run = &m->own, one += m->prefix.keys, weights += m->prefix.keys) {
        seen(s, run, position, &from, &to);
        for (long k = from / LANES * LANES; k < to; k += LANES) store(weights + k, load_floats(one + k) * share);
        memset(weights, 0, from * sizeof(real));
        memset(weights + to, 0, (rounded(bound_of(run, first, count), UNIT * IN_WORD) - to) * sizeof(real));
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
        exponentials(scores, from / LANES * LANES, rounded(to, LANES), s->scale, log_sum, (floats){0});
        for (long k = from / LANES * LANES; k < to; k += LANES) {
            floats found = s->scale * load_floats(scores + k) * (load_floats(gradients + k) - delta);
            memcpy(gradients + k, &found, sizeof found);
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
        for (long q = 0; q < rounded(count, UNIT * IN_WORD); q += IN_WORD)
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

/* gradient[D, keys] of both runs += rowsᵀ · panels, with rows[count, D] */
static void add_gradient(const Stream *s, Memory *m, const real *rows, long first, long count, const word *panels, int values) {
    const long step = QUERIES / IN_WORD * PANEL, inputs = rounded(count, UNIT * IN_WORD) / IN_WORD;
#if HAS_UNITS
    pack_columns(rows, s->D, count, s->D, (word *)m->across, QUERIES / IN_WORD);
#else
    for (long d = 0; d < s->D; d++) {
        for (long q = 0; q < count; q++) m->across[d * QUERIES + q] = rows[q * s->D + d];
        for (long q = count; q < inputs * IN_WORD; q++) m->across[d * QUERIES + q] = 0;
    }
#endif
    Run *run = &m->prefix;
    for (int i = 0; i < 2; i++, run = &m->own, panels += m->prefix.keys / PANEL * step)
        products(m, (const word *)m->across, QUERIES / IN_WORD, s->D, panels, step, inputs,
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
    score(s, m, m->queries, first, count, 0, m->scores);
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
    for (long q = 0; q < count; q++) {
        turn(s, head_at(s, place + q, g, r), place + q, 0, m->queries + q * D);
        memcpy(m->given + q * D, given + q * stride, D * sizeof(real));
    }
    score(s, m, m->queries, first, count, 0, m->scores);
    score(s, m, m->given, first, count, 1, m->gradients);
    for (long q = 0; q < count; q++) {
        floats delta = {0};
        for (long d = 0; d < D; d += LANES) delta += load(given + q * stride + d) * load(found + q * stride + d);
        differentiate(s, m, m->scores + q * keys, m->gradients + q * keys, m->weights + q * keys, first + q, first, count,
                      log_sums[(place + q) * heads + head], sum_of(delta));
    }
    pack_queries(m, m->scores, first, count, m->panels);
    add_gradient(s, m, m->given, first, count, m->panels, 1);
    pack_queries(m, m->gradients, first, count, m->panels);
    add_gradient(s, m, m->queries, first, count, m->panels, 0);
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
        const unsigned mode = flush_tiny();
        Memory memory = {.units = has_units()};
        char *all = aligned_alloc(64, cut_memory(&memory, NULL, s, prefix, own + s->grain - 1));
        if (all) cut_memory(&memory, all, s, prefix, own + s->grain - 1);
        else {
#pragma omp atomic write
            failed = 1;
        }
        if (memory.units) begin_units();
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (long item = 0; item < s->P * s->G; item++) {
            if (failed) continue;
            long g = item % s->G, begin = s->parts[item / s->G], end = s->parts[item / s->G + 1];
            for (long i = begin; i < end; i++) {
                const int64_t *span = s->spans + 4 * i;
                const Run before = memory.prefix, after = memory.own;
                const long whole = span[1] / s->grain * s->grain, rest = span[1] - whole, last = rest + span[3];
                if (i == begin) fill(s, &memory, &memory.prefix, 0, 0, span[0], whole, 0, g, backward);
                if (i > begin && !span[1]) { /* the prefix that the spans before it went on from */
                    memory.own = memory.prefix;
                    memory.prefix.length = memory.prefix.keys = 0;
                    if (memory.own.length < last) fill(s, &memory, &memory.own, 0, 0, span[2], last, 0, g, backward);
                } else fill(s, &memory, &memory.own, span[0] + whole, rest, span[2], last, whole, g, backward);
                for (long r = 0; r < s->R; r++)
                    for (long from = rest; from < last; from += QUERIES) {
                        long count = least(QUERIES, last - from);
                        if (backward)
                            backward_block(s, &memory, g, r, from, count, out, log_sums, out_gradient, mixed_gradient);
                        else forward_block(s, &memory, g, r, from, count, out, log_sums);
                    }
                if (backward) give_back(s, &memory, &memory.own, g, mixed_gradient);
                if (i > begin && !span[1]) memory.prefix = before, memory.own = after;
            }
        }
        if (memory.units) end_units();
        free(all);
        restore(mode);
    }
    return failed;
}
