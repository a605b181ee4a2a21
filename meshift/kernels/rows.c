/* What happens to bfloat16 rows between products: norms, rotary turns, writes to the key-value cache. In fp32 inside,
   rounded once. */
#include <string.h>

#include "vector.h"

#define FEW 4096 /* numbers below which a second thread costs more than it saves */

/* out = x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight). */
void rms_norm(const bf16 *x, long rows, long size, const bf16 *weight, float eps, int plus_one, bf16 *out, int threads) {
    const __m512 one = _mm512_set1_ps(plus_one ? 1.0f : 0.0f);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > FEW)
    for (long r = 0; r < rows; r++) {
        const bf16 *from = x + r * size;
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < size; i += LANES) {
            const __m512 part = load_bf16_part(from + i, first_lanes(size - i));
            squares = _mm512_fmadd_ps(part, part, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / (float)size;
        const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + eps));
        for (long i = 0; i < size; i += LANES) {
            const __mmask16 mask = first_lanes(size - i);
            const __m512 w = _mm512_add_ps(load_bf16_part(weight + i, mask), one);
            store_bf16_part(out + r * size + i, mask,
                            _mm512_mul_ps(_mm512_mul_ps(load_bf16_part(from + i, mask), scale), w));
        }
    }
}

/* Turn the first 2 half numbers of each head by the row's angles, in place: the first half pairs with the second.
   `x` has rows of `stride` numbers that begin with `heads` heads; `half` is a multiple of 16. */
void turn(bf16 *x, long rows, long stride, long heads, long dim, long half, const bf16 *cosines, const bf16 *sines,
          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * dim > FEW)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < half; i += LANES) {
            const __m512 c = load_bf16(cosines + r * half + i), s = load_bf16(sines + r * half + i);
            for (long h = 0; h < heads; h++) {
                bf16 *first = x + r * stride + h * dim + i, *second = first + half;
                const __m512 a = load_bf16(first), b = load_bf16(second);
                store_bf16(first, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
                store_bf16(second, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
            }
        }
}

/* Copy heads of `dim` numbers to their places, counted in heads: `places` [rows][heads]. */
void put(const bf16 *x, long rows, long stride, long heads, long dim, const int64_t *places, bf16 *to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * dim > FEW)
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++)
            memcpy(to + places[r * heads + h] * dim, x + r * stride + h * dim, (size_t)dim * sizeof(bf16));
}
