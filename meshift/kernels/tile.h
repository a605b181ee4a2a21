/* The inner loop of every product: a few rows against a group of columns, sums in registers. */
#ifndef MESHIFT_TILE_H
#define MESHIFT_TILE_H

#include "vector.h"

#define TILE 8 /* rows that are multiplied at once */

/* sums[rows][16 parts] (+)= a b over `pairs` pairs of k, in ascending order.

   `a`: the pair of row r at p is at a[r * row_stride + p * pair_stride]; `b`: [pairs][16 parts] pairs, in one stream.
   `ahead` is brought into the second cache meanwhile, a line for each pair. */
INLINE void tile(const int rows, const int parts, const uint32_t *a, long row_stride, long pair_stride, const uint32_t *b,
                 long pairs, float *sums, int begin, const char *ahead) {
    __m512 acc[TILE][3];
    const long width = parts * LANES;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < parts; c++)
            acc[r][c] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * width + c * LANES);
    for (long p = 0; p < pairs; p++) {
        __m512i right[3];
#pragma GCC unroll 3
        for (int c = 0; c < parts; c++) right[c] = _mm512_loadu_si512(b + c * LANES);
        _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const __m512i left = _mm512_set1_epi32((int)a[r * row_stride + p * pair_stride]);
#pragma GCC unroll 3
            for (int c = 0; c < parts; c++) acc[r][c] = dot_pairs(acc[r][c], left, right[c]);
        }
        b += width;
        ahead += 64;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < parts; c++) _mm512_storeu_ps(sums + r * width + c * LANES, acc[r][c]);
}

/* `tile` for a number of rows that is known when it runs, 1 to 8. */
INLINE void rows_tile(int rows, const int parts, const uint32_t *a, long row_stride, long pair_stride, const uint32_t *b,
                      long pairs, float *sums, int begin, const char *ahead) {
    switch (rows) {
    case 1: tile(1, parts, a, row_stride, pair_stride, b, pairs, sums, begin, ahead); break;
    case 2: tile(2, parts, a, row_stride, pair_stride, b, pairs, sums, begin, ahead); break;
    case 3: tile(3, parts, a, row_stride, pair_stride, b, pairs, sums, begin, ahead); break;
    case 4: tile(4, parts, a, row_stride, pair_stride, b, pairs, sums, begin, ahead); break;
    case 5: tile(5, parts, a, row_stride, pair_stride, b, pairs, sums, begin, ahead); break;
    case 6: tile(6, parts, a, row_stride, pair_stride, b, pairs, sums, begin, ahead); break;
    case 7: tile(7, parts, a, row_stride, pair_stride, b, pairs, sums, begin, ahead); break;
    default: tile(8, parts, a, row_stride, pair_stride, b, pairs, sums, begin, ahead); break;
    }
}

/* Interleave rows 2p and 2p + 1 of `x` (`stride` apart), columns [start, start + width): to[p][width] pairs. Rows and
   columns that are not there are zero; `to` has `gap` pairs from one p to the next. */
INLINE void interleave(const bf16 *x, long rows, long columns, long stride, long start, long width, uint32_t *to, long gap) {
    for (long p = 0; p < (rows + 1) / 2; p++) {
        const bf16 *even = x + 2 * p * stride + start, *odd = even + stride;
        const long last = 2 * p + 1 < rows ? columns - start : 0;
        for (long c = 0; c < width; c += LANES) {
            const __mmask16 mask = first_lanes(width - c);
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask & first_lanes(columns - start - c), even + c));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask & first_lanes(last - c), odd + c));
            _mm512_mask_storeu_epi32(to + p * gap + c, mask, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

#endif
