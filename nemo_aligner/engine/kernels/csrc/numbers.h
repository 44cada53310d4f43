/* Numbers as the C kernels have them: stored as bf16, or as float32 with FLOAT32 defined; computed with as float32. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

/* numbers in a vector of the processor: wider ones are slow */
#if defined __AVX512F__
#define LANES 16
#elif defined __AVX2__
#define LANES 8
#else
#define LANES 4
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#ifdef FLOAT32
typedef float real;

static inline float wide(real value) { return value; }

static inline floats load(const real *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline void store(real *to, floats values) { memcpy(to, &values, sizeof values); }
#else
typedef uint16_t real; /* the upper half of a float32 */

static inline float wide(real value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* LANES numbers in the lower halves of words */
static inline words load_halves(const real *from) {
#ifdef __AVX512F__ /* one instruction, of which the compiler makes four */
    return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#else
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(bits, words);
#endif
}

static inline floats load(const real *from) { return (floats)(load_halves(from) << 16); }

static inline void store(real *to, floats values) { /* to the nearest, ties to even */
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)values));
#else
    words bits = (words)values;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    halves narrowed = __builtin_convertvector(bits, halves);
    memcpy(to, &narrowed, sizeof narrowed);
#endif
}
#endif

/* the same of the first `count` numbers, the others being 0, where fewer are left than a vector has */
static inline floats load_some(const real *from, long count) {
    if (count >= LANES) return load(from);
    real padded[LANES] = {0};
    memcpy(padded, from, count * sizeof(real));
    return load(padded);
}

static inline void store_some(real *to, floats values, long count) {
    if (count >= LANES) {
        store(to, values);
        return;
    }
    real padded[LANES];
    store(padded, values);
    memcpy(to, padded, count * sizeof(real));
}

/* Numbers below 1e-38, of which gradients that fade out are full and which take a hundred times as long, count as 0 on this
 * thread until `restore`. */
static inline unsigned flush_tiny(void) {
#ifdef __SSE2__
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

static inline void restore(unsigned before) {
#ifdef __SSE2__
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* −∞ of none; NaN is passed over, and found in the sums that follow */
static inline float largest_number(const real *from, long count) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (long i = 0; i < count; i++) largest = wide(from[i]) > largest ? wide(from[i]) : largest;
    return largest;
}

static inline float sum_of(floats values) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += values[i];
    return total;
}

/* e^x for x <= 0, relative error below 2e-7: 2^n · e^r with |r| <= ln(2)/2 and a polynomial for e^r. Written out so that
 * the compiler makes vectors of it. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}
