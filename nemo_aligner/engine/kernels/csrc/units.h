/* Products of bf16 by the processor's units for matrices (AMX): 16 rows times 16 outputs, 16 words of inputs at a time.
 *
 * The system has to allow a process to use them, and each thread to set them up. They read `x` and panels as multiply() does.
 */
#pragma once
#include "matrices.h"

int has_units(void);

#if HAS_UNITS

/* Between these two, this thread may multiply_units */
static inline void begin_units(void) {
    struct __attribute__((aligned(64))) {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = UNIT * sizeof(word), shape.rows[i] = UNIT;
    __asm__ volatile("" : : "m"(shape)); /* gcc thinks that only its first bytes are read */
    _tile_loadconfig(&shape);
}

static inline void end_units(void) { _tile_release(); }

/* out[16 R, 16 C] (+)= x · panel, with all sums in tiles 0 to 3 */
static inline __attribute__((always_inline)) void multiply_block(const word *x, long stride, const word *panel, long count,
                                                                 float *out, long width, int add, const int R, const int C) {
    float *const right = out + UNIT, *const below = out + UNIT * width, *const corner = below + UNIT;
    const long line = width * sizeof(float), row = stride * sizeof(word), words = PANEL * sizeof(word);
    if (add) {
        _tile_loadd(0, out, line);
        if (C > 1) _tile_loadd(1, right, line);
        if (R > 1) _tile_loadd(2, below, line);
        if (R > 1 && C > 1) _tile_loadd(3, corner, line);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long w = 0; w < count; w += UNIT, panel += UNIT * PANEL) {
        _tile_loadd(6, panel, words);
        _tile_loadd(4, x + w, row);
        _tile_dpbf16ps(0, 4, 6);
        if (C > 1) {
            _tile_loadd(7, panel + UNIT, words);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (R > 1) {
            _tile_loadd(5, x + UNIT * stride + w, row);
            _tile_dpbf16ps(2, 5, 6);
            if (C > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, line);
    if (C > 1) _tile_stored(1, right, line);
    if (R > 1) _tile_stored(2, below, line);
    if (R > 1 && C > 1) _tile_stored(3, corner, line);
}

/* multiply() of multiples of UNIT in rows, outputs and count */
static void multiply_units(const word *x, long stride, long rows, const word *panels, long step, long count, long outputs,
                           float *out, long width, int add) {
    for (long column = 0; column < outputs; column += PANEL, panels += step)
        for (long m = 0; m < rows; m += 2 * UNIT) {
            float *to = out + m * width + column;
            const word *from = x + m * stride;
            switch (2 * (rows - m > UNIT) + (outputs - column > UNIT)) {
            case 3: multiply_block(from, stride, panels, count, to, width, add, 2, 2); break;
            case 2: multiply_block(from, stride, panels, count, to, width, add, 2, 1); break;
            case 1: multiply_block(from, stride, panels, count, to, width, add, 1, 2); break;
            default: multiply_block(from, stride, panels, count, to, width, add, 1, 1);
            }
        }
}

/* The transpose of 16 vectors of 16 words */
static inline void transpose(words rows[UNIT]) {
    __m512i a[UNIT], b[UNIT];
    for (int i = 0; i < UNIT; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    for (int i = 0; i < UNIT; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        __m512i even[2], odd[2];
        for (int half = 0; half < 2; half++) {
            even[half] = _mm512_shuffle_i32x4(b[8 * half + j], b[8 * half + j + 4], 0x88);
            odd[half] = _mm512_shuffle_i32x4(b[8 * half + j], b[8 * half + j + 4], 0xdd);
        }
        rows[j] = (words)_mm512_shuffle_i32x4(even[0], even[1], 0x88);
        rows[4 + j] = (words)_mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        rows[8 + j] = (words)_mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        rows[12 + j] = (words)_mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}

/* rows[n, columns], `stride` numbers apart → across[columns][words of n], `step` words apart; numbers that are missing from
 * the last UNIT words are 0. `columns` is a multiple of UNIT. */
static void pack_columns(const real *rows, long stride, long n, long columns, word *across, long step) {
    for (long k = 0; k < n; k += UNIT * IN_WORD)
        for (long c = 0; c < columns; c += UNIT) {
            words block[UNIT];
            for (long w = 0; w < UNIT; w++)
                block[w] = together(rows + (k + w * IN_WORD) * stride + c, stride, n - k - w * IN_WORD);
            transpose(block);
            for (long i = 0; i < UNIT; i++) memcpy(across + (c + i) * step + k / IN_WORD, &block[i], sizeof block[i]);
        }
}
#else
static inline void begin_units(void) {}
static inline void end_units(void) {}
#endif
