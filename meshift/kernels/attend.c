/* Attention of a decode step: one query row to each sequence, its keys and values in the cache. Scores, softmax and
   sums in fp32. A row reads its own slot up to its own position and nothing else. */
#include <math.h>

#include "kernels.h"
#include "vector.h"

#define BLOCK 128 /* positions whose scores are kept at once */
#define MAX_DIM 256
#define MAX_GROUP 16 /* query heads of a key head */

/* Lane i of the result: the sum of the lanes of sums[i]. */
INLINE __m512 sum_each(__m512 sums[LANES]) {
    __m512 eight[8], four[4], two[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) /* within quarters: lanes 0, 2 of one and of another become neighbours */
        eight[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]),
                                 _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d low = _mm512_castps_pd(eight[2 * i]), high = _mm512_castps_pd(eight[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xDD));
}

/* scores[0..count) of one query against neighbouring keys. */
INLINE void score(const bf16 *query, const bf16 *keys, long dim, long count, float scale, float *scores) {
    for (long p = 0; p < count; p += LANES) {
        __m512 sums[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            const bf16 *key = keys + (p + i < count ? p + i : count - 1) * dim;
            sums[i] = _mm512_setzero_ps();
            for (long d = 0; d < dim; d += 2 * LANES)
                sums[i] = dot_pairs(sums[i], _mm512_loadu_si512(query + d), _mm512_loadu_si512(key + d));
        }
        _mm512_storeu_ps(scores + p, _mm512_mul_ps(sum_each(sums), _mm512_set1_ps(scale)));
    }
}

/* Turns scores into weights under a new maximum; returns their sum. Behind `count` they become 0. */
INLINE float weigh(float *scores, long count, float highest) {
    __m512 total = _mm512_setzero_ps();
    for (long p = 0; p < count; p += LANES) {
        const __mmask16 mask = first_lanes(count - p);
        const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(scores + p), _mm512_set1_ps(highest));
        const __m512 weight = _mm512_maskz_mov_ps(mask, exponential(x));
        _mm512_storeu_ps(scores + p, weight);
        total = _mm512_add_ps(total, weight);
    }
    return _mm512_reduce_add_ps(total);
}

INLINE float highest_of(const float *scores, long count) {
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (long p = 0; p < count; p += LANES)
        highest = _mm512_mask_max_ps(highest, first_lanes(count - p), highest, _mm512_loadu_ps(scores + p));
    return _mm512_reduce_max_ps(highest);
}

/* The query heads of one key head over positions [first, last]; `group` x `dim` numbers in and out. */
static void attend_group(const bf16 *query, const bf16 *keys, const bf16 *values, long first, long last, long group,
                         long dim, float scale, bf16 *out) {
    float sums[MAX_GROUP * MAX_DIM], scores[MAX_GROUP][BLOCK], highest[MAX_GROUP], total[MAX_GROUP];
    for (long g = 0; g < group; g++) highest[g] = -INFINITY, total[g] = 0.0f;
    for (long i = 0; i < group * dim; i += LANES) _mm512_storeu_ps(sums + i, _mm512_setzero_ps());
    for (long start = first; start <= last; start += BLOCK) {
        const long count = last - start + 1 < BLOCK ? last - start + 1 : BLOCK;
        for (long g = 0; g < group; g++) {
            score(query + g * dim, keys + start * dim, dim, count, scale, scores[g]);
            const float most = highest_of(scores[g], count), above = most > highest[g] ? most : highest[g];
            const float shrink = start == first ? 0.0f : expf(highest[g] - above);
            total[g] = total[g] * shrink + weigh(scores[g], count, above);
            highest[g] = above;
            if (start != first && shrink != 1.0f)
                for (long d = 0; d < dim; d += LANES)
                    _mm512_storeu_ps(sums + g * dim + d,
                                     _mm512_mul_ps(_mm512_loadu_ps(sums + g * dim + d), _mm512_set1_ps(shrink)));
        }
        for (long g = 0; g < group; g += 4) /* a value is widened once for four heads */
            for (long d = 0; d < dim; d += 2 * LANES) {
                const int heads = group - g < 4 ? (int)(group - g) : 4;
                __m512 acc[4][2];
#pragma GCC unroll 4
                for (int h = 0; h < 4; h++)
#pragma GCC unroll 2
                    for (int c = 0; c < 2; c++)
                        acc[h][c] = h < heads ? _mm512_loadu_ps(sums + (g + h) * dim + d + c * LANES) : _mm512_setzero_ps();
                for (long p = 0; p < count; p++) {
                    const bf16 *value = values + (start + p) * dim + d;
                    const __m512 low = load_bf16(value), high = load_bf16(value + LANES);
#pragma GCC unroll 4
                    for (int h = 0; h < 4; h++) {
                        const __m512 weight = _mm512_set1_ps(scores[g + h < group ? g + h : g][p]);
                        acc[h][0] = _mm512_fmadd_ps(weight, low, acc[h][0]);
                        acc[h][1] = _mm512_fmadd_ps(weight, high, acc[h][1]);
                    }
                }
#pragma GCC unroll 4
                for (int h = 0; h < 4; h++)
#pragma GCC unroll 2
                    for (int c = 0; c < 2; c++)
                        if (h < heads) _mm512_storeu_ps(sums + (g + h) * dim + d + c * LANES, acc[h][c]);
            }
    }
    for (long g = 0; g < group; g++)
        for (long d = 0; d < dim; d += LANES)
            store_bf16(out + g * dim + d,
                       _mm512_mul_ps(_mm512_loadu_ps(sums + g * dim + d), _mm512_set1_ps(1.0f / total[g])));
}

/* Row r is the newest token of slot r, at positions[r]: it sees the last `window` positions up to its own (0: all).
   `query` has rows of `stride` numbers; `keys`, `values` [slots][kv_heads][reach][dim]; `out` [rows][heads][dim].
   `dim` is a multiple of 32 up to 256, `group` at most 16. */
void attend(const bf16 *query, long rows, long stride, long kv_heads, long group, long dim, const bf16 *keys,
            const bf16 *values, long reach, const int64_t *positions, long window, float scale, bf16 *out, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < rows * kv_heads; task++) {
        const long r = task / kv_heads, h = task % kv_heads, last = positions[r];
        const long first = window && last + 1 > window ? last + 1 - window : 0, place = task * reach * dim;
        attend_group(query + r * stride + h * group * dim, keys + place, values + place, first, last, group, dim, scale,
                     out + task * group * dim);
    }
}
