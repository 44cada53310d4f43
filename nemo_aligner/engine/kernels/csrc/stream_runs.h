/* What attention of a stream works on: keys and values of a run of places in panels, and products with them. Described in
 * stream_attention.c. */
#pragma once
#include "kernels.h"
#include "rotary.h"
#include "units.h"
#include <stdlib.h>

enum { QUERIES = HAS_UNITS ? 4 * UNIT : 4 * 14 }; /* looked at together */

/* What does not change over a call; mirrored by engine/kernels/stream_attention.py. cosine and sine are of every place. */
typedef struct {
    const real *mixed, *cosine, *sine;
    const int64_t *spans, *parts;
    int64_t P, N, G, R, D, turned, window; /* window: places seen at most, 0 = all */
    int64_t grain; /* see stream_attention.c */
    float scale;
} Stream;

/* Keys and values of consecutive places of one head, in panels: as outputs (sums over D give scores), and as inputs
 * (sums over keys). `keys` is the length rounded up to panels; gradients are [D, keys]. */
typedef struct {
    long start, offset, length, keys; /* offset: position of the first in its row */
    word *key_outputs, *key_inputs, *value_outputs, *value_inputs;
    float *key_gradient, *value_gradient;
} Run;

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

/* Memory of one thread */
typedef struct {
    Run prefix, own;
    real *rows, *queries, *weights, *across; /* [longest, D], [QUERIES, D], [QUERIES, keys], [D, QUERIES] */
    real *given;                             /* [QUERIES, D] */
    word *panels;                            /* P or dS as [keys / PANEL][words of QUERIES][PANEL] */
    float *scores, *gradients, *sums;        /* [QUERIES, keys] twice, [QUERIES, D rounded up] */
    int units;                               /* whether this thread may use them */
} Memory;

/* multiply(), which may compute rows up to a multiple of UNIT: whatever `x` has there, and `out` has room for */
static void products(const Memory *m, const word *x, long stride, long rows, const word *panels, long step, long count,
                     long outputs, float *out, long width, int add) {
#if HAS_UNITS
    if (m->units && count % UNIT == 0) {
        multiply_units(x, stride, rounded(rows, UNIT), panels, step, count, outputs, out, width, add);
        return;
    }
#endif
    (void)m;
    multiply(x, stride, rows, panels, step, count, outputs, out, width, add);
}

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
    m->given = cut(&from, QUERIES * D * sizeof(real));
    m->across = cut(&from, D * QUERIES * sizeof(real));
    m->weights = cut(&from, QUERIES * keys * sizeof(real));
    m->panels = cut(&from, QUERIES * keys * sizeof(real));
    m->scores = cut(&from, QUERIES * keys * sizeof(float));
    m->gradients = cut(&from, QUERIES * keys * sizeof(float));
    m->sums = cut(&from, QUERIES * wide * sizeof(float));
    return from - begin;
}

/* Keys and values of `length` places into `run`: the first `before` of them from `tail` on, the others from `start` on */
static void fill(const Stream *s, Memory *m, Run *run, long tail, long before, long start, long length, long offset, long g,
                 int backward) {
    const long D = s->D;
    run->start = start - before, run->length = length, run->offset = offset, run->keys = rounded(length, PANEL);
    const long step = run->keys / IN_WORD * PANEL;
    for (long k = 0; k < length; k++) {
        long place = k < before ? tail + k : run->start + k;
        turn(s, head_at(s, place, g, s->R), place, 0, m->rows + k * D);
    }
    pack_outputs(m->rows, length, D, run->key_outputs);
    if (backward) pack_inputs(m->rows, length, D, D, run->key_inputs, step);
    for (long k = 0; k < length; k++)
        memcpy(m->rows + k * D, head_at(s, k < before ? tail + k : run->start + k, g, s->R + 1), D * sizeof(real));
    if (backward) {
        pack_outputs(m->rows, length, D, run->value_outputs);
        memset(run->key_gradient, 0, D * run->keys * sizeof(float));
        memset(run->value_gradient, 0, D * run->keys * sizeof(float));
    } else pack_inputs(m->rows, length, D, D, run->value_inputs, step);
}

/* Of a block of `count` queries from position `first` on: keys of the run that any of them sees */
static long bound_of(const Run *run, long first, long count) { return least(run->length, first + count - run->offset); }

/* Keys [from, to) of a run that the query at `position` sees */
static void seen(const Stream *s, const Run *run, long position, long *from, long *to) {
    long at = position - run->offset;
    *to = least(run->length, at + 1);
    *from = s->window && at + 1 > s->window ? least(at + 1 - s->window, *to) : 0;
}

/* scores[count, keys of both runs] = x[count, D] · outputs, for the keys that the block sees */
static void score(const Stream *s, const Memory *m, const real *x, long first, long count, int values, float *scores) {
    const long W = s->D / IN_WORD, width = m->prefix.keys + m->own.keys;
    const Run *run = &m->prefix;
    for (int i = 0; i < 2; i++, run = &m->own, scores += m->prefix.keys)
        products(m, (const word *)x, W, count, values ? run->value_outputs : run->key_outputs, W * PANEL, W,
                 rounded(bound_of(run, first, count), PANEL), scores, width, 0);
}

/* sums[count, D] = weights · inputs, over the keys that the block sees */
static void sum_up(const Stream *s, const Memory *m, long first, long count, int values) {
    const long wide = rounded(s->D, PANEL), width = (m->prefix.keys + m->own.keys) / IN_WORD;
    const Run *run = &m->prefix;
    const word *x = (const word *)m->weights;
    for (int i = 0; i < 2; i++, run = &m->own, x += m->prefix.keys / IN_WORD)
        products(m, x, width, count, values ? run->value_inputs : run->key_inputs, run->keys / IN_WORD * PANEL,
                 rounded(bound_of(run, first, count), UNIT * IN_WORD) / IN_WORD, wide, m->sums, wide, i);
}
