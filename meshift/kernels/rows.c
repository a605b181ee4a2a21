/* What happens to bfloat16 rows between products: norms, rotary turns, writes to the key-value cache. In fp32 inside,
   rounded once. */
#include <string.h>

#include "kernels.h"
#include "activations.h"

#define FEW 4096 /* numbers below which a second thread costs more than it saves */

/* out = x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight). `inverses` [rows] gets the factor, where wanted. */
void rms_norm(const bf16 *x, long rows, long size, const bf16 *weight, float eps, int plus_one, bf16 *out, float *inverses,
              int threads) {
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
        if (inverses) inverses[r] = _mm512_cvtss_f32(scale);
        for (long i = 0; i < size; i += LANES) {
            const __mmask16 mask = first_lanes(size - i);
            const __m512 w = _mm512_add_ps(load_bf16_part(weight + i, mask), one);
            store_bf16_part(out + r * size + i, mask,
                            _mm512_mul_ps(_mm512_mul_ps(load_bf16_part(from + i, mask), scale), w));
        }
    }
}

#define CHUNK 64 /* rows whose share of a weight's gradient is summed by itself: the order is then always the same */

/* With h = x inverse: to_x = inverse (w g - h mean(w g h)), to_weight[size] = sum over rows of g h, in fp32.
   `shares`: room for one row of fp32 to each 64 rows. */
void rms_norm_backward(const bf16 *x, const bf16 *grad, const float *inverses, long rows, long size, const bf16 *weight,
                       int plus_one, bf16 *to_x, float *shares, float *to_weight, int threads) {
    const __m512 one = _mm512_set1_ps(plus_one ? 1.0f : 0.0f);
    const long chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long chunk = 0; chunk < chunks; chunk++) {
        float *share = shares + chunk * size;
        memset(share, 0, (size_t)size * sizeof(float));
        for (long r = chunk * CHUNK; r < rows && r < (chunk + 1) * CHUNK; r++) {
            const __m512 inverse = _mm512_set1_ps(inverses[r]);
            __m512 products = _mm512_setzero_ps();
            for (long i = 0; i < size; i += LANES) {
                const __mmask16 mask = first_lanes(size - i);
                const __m512 w = _mm512_add_ps(load_bf16_part(weight + i, mask), one);
                const __m512 h = _mm512_mul_ps(load_bf16_part(x + r * size + i, mask), inverse);
                const __m512 gh = _mm512_mul_ps(load_bf16_part(grad + r * size + i, mask), h);
                products = _mm512_fmadd_ps(w, gh, products);
                _mm512_mask_storeu_ps(share + i, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, share + i), gh));
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(products) / (float)size);
            for (long i = 0; i < size; i += LANES) {
                const __mmask16 mask = first_lanes(size - i);
                const __m512 w = _mm512_add_ps(load_bf16_part(weight + i, mask), one);
                const __m512 h = _mm512_mul_ps(load_bf16_part(x + r * size + i, mask), inverse);
                const __m512 wg = _mm512_mul_ps(w, load_bf16_part(grad + r * size + i, mask));
                store_bf16_part(to_x + r * size + i, mask, _mm512_mul_ps(inverse, _mm512_fnmadd_ps(h, mean, wg)));
            }
        }
    }
    memset(to_weight, 0, (size_t)size * sizeof(float));
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long i = 0; i < size; i++) to_weight[i] += shares[chunk * size + i];
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

/* From gate and up [rows][n] and the gradient of act(gate) * up: that product once more, and the gradients of gate and
   up beside each other, [rows][2 n]. */
void gate_backward(const bf16 *gate, const bf16 *up, const bf16 *grad, long rows, long n, int activation, bf16 *product,
                   bf16 *to_both, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < n; i += LANES) {
            const __mmask16 mask = first_lanes(n - i);
            const long place = r * n + i;
            const __m512 x = load_bf16_part(gate + place, mask), y = load_bf16_part(up + place, mask);
            const __m512 g = load_bf16_part(grad + place, mask), active = activated(x, activation);
            store_bf16_part(product + place, mask, _mm512_mul_ps(active, y));
            store_bf16_part(to_both + r * 2 * n + i, mask, _mm512_mul_ps(_mm512_mul_ps(g, y), activation_slope(x, activation)));
            store_bf16_part(to_both + r * 2 * n + n + i, mask, _mm512_mul_ps(g, active));
        }
}

/* Copy heads of `dim` numbers to their places, counted in heads: `places` [rows][heads]. */
void put(const bf16 *x, long rows, long stride, long heads, long dim, const int64_t *places, bf16 *to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * dim > FEW)
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++)
            memcpy(to + places[r * heads + h] * dim, x + r * stride + h * dim, (size_t)dim * sizeof(bf16));
}
