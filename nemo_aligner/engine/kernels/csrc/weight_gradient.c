/* The gradient of a weight, added to what earlier micro-batches gave, by the processor's units for matrices.
 *
 * A library multiplies a transposed matrix at a third of their speed, and makes a bf16 matrix that is yet to be added up.
 */
#include "threads.h"
#include "units.h"

/* places that are multiplied at once, not a power of two, or columns would drive each other out of the cache; outputs, at
 * most, whose inputs stay there */
enum { TOGETHER = 1376, BLOCK = 256 };

#if HAS_UNITS
/* gradient[O, I] += givenᵀ · x, in float32, from x[N, I] and given[N, O]; O and I are multiples of UNIT. Returns 0, or 1
 * without memory, and then nothing has changed. */
int add_weight_gradient(const real *x, const real *given, float *gradient, long N, long I, long O) {
    const long step = TOGETHER / IN_WORD * PANEL, panels = (I + PANEL - 1) / PANEL, threads = omp_get_max_threads();
    const long block = least(BLOCK, rounded((O + threads - 1) / threads, UNIT)); /* every thread has one */
    int failed = 0;
    word *inputs = aligned_alloc(64, panels * step * sizeof(word));
    if (!inputs) return 1;
#pragma omp parallel
    {
        word *across = aligned_alloc(64, block * TOGETHER / IN_WORD * sizeof(word));
        if (!across) {
#pragma omp atomic write
            failed = 1;
        }
        begin_units();
#pragma omp barrier
        for (long first = 0; first < N && !failed; first += TOGETHER) {
            const long n = least(TOGETHER, N - first), count = rounded(n, UNIT * IN_WORD) / IN_WORD;
#pragma omp for schedule(static)
            for (long p = 0; p < panels; p++)
                pack_inputs(x + first * I + p * PANEL, n, I, least(PANEL, I - p * PANEL), inputs + p * step, step);
#pragma omp for schedule(dynamic)
            for (long o = 0; o < O; o += block) {
                const long rows = least(block, O - o);
                pack_columns(given + first * O + o, O, n, rows, across, TOGETHER / IN_WORD);
                multiply_units(across, TOGETHER / IN_WORD, rows, inputs, step, count, I, gradient + o * I, I, 1);
            }
        }
        end_units();
        free(across);
    }
    free(inputs);
    return failed;
}
#endif
