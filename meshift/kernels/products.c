/* Products of few or many bfloat16 rows with packed weights, sums in fp32, rounded once at the end.

   Weights [n, k] are laid out as the inner loop reads them: groups of 48 columns (the last one filled up with
   zeros), and in a group [k / 2][48][2], so that a group is one stream through memory. Every number is summed over k
   in ascending order whatever the number of rows: a row's bits do not depend on its company, nor on the threads. */
#include "kernels.h"
#include <string.h>

#include "activations.h"
#include "tile.h"

#define PARTS 3 /* registers of a group */
#define GROUP (PARTS * LANES)
#define BLOCK_ROWS 128   /* rows that share a pass over a group */
#define BLOCK_PAIRS 1024 /* pairs of k at a time: a group's part then stays in the second cache */

static long groups_of(long n) { return (n + GROUP - 1) / GROUP; }

static long pairs_of(long k) { return (k + 1) / 2; }

/* Numbers of a packed matrix. */
long packed_size(long n, long k) { return groups_of(n) * GROUP * pairs_of(k) * 2; }

/* Sixteen rows of sixteen become sixteen columns. */
INLINE void transpose(__m512i rows[LANES]) {
    __m512i pairs[LANES], fours[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) { /* fours[i + c], quarter q: column 4 q + c of rows i to i + 3 */
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i even_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xDD);
        const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xDD);
        rows[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        rows[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
        rows[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
    }
}

/* Pack weights as they are stored, [n][k], k even. */
void pack(const bf16 *weight, long n, long k, bf16 *packed, int threads) {
    const long pairs = pairs_of(k);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long g = 0; g < groups_of(n); g++) {
        uint32_t *to = (uint32_t *)packed + g * pairs * GROUP;
        for (long first = 0; first < pairs; first += LANES) /* a line of each row at a time */
            for (long column = 0; column < GROUP; column += LANES) {
                __m512i rows[LANES];
                for (int i = 0; i < LANES; i++) {
                    const long row = g * GROUP + column + i;
                    const uint32_t *from = (const uint32_t *)(weight + (row < n ? row : 0) * k) + first;
                    rows[i] = _mm512_maskz_loadu_epi32(row < n ? first_lanes(pairs - first) : 0, from);
                }
                transpose(rows);
                for (int i = 0; i < LANES && first + i < pairs; i++)
                    _mm512_storeu_si512(to + (first + i) * GROUP + column, rows[i]);
            }
    }
}

/* Pack the transposed of what is stored, [k][n], as the pairs from `first` on of a matrix of `pairs` in all. */
void pack_columns(const bf16 *stored, long n, long k, long first, long pairs, bf16 *packed, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long g = 0; g < groups_of(n); g++)
        interleave(stored, k, n, n, g * GROUP, GROUP, (uint32_t *)packed + (g * pairs + first) * GROUP, GROUP);
}

/* Rows as the inner loop reads them: in memory as they are, or in panels of 8 with their pairs beside each other. */
typedef struct {
    const uint32_t *pairs;
    long row_stride, pair_stride, tile_stride;
} Rows;

/* sums[rows][48] = the rows times one group; what lies behind the group is brought near meanwhile. */
static void group_sums(Rows a, long rows, long pairs, const uint32_t *group, float *sums) {
    const long tiles = (rows + TILE - 1) / TILE;
    if (pairs == 0) memset(sums, 0, (size_t)(rows * GROUP) * sizeof(float));
    for (long first = 0; first < pairs; first += BLOCK_PAIRS) {
        const long part = pairs - first < BLOCK_PAIRS ? pairs - first : BLOCK_PAIRS;
        const uint32_t *here = group + first * GROUP;
        const long share = (part * PARTS + tiles - 1) / tiles; /* lines that each tile brings */
        for (long t = 0; t < tiles; t++) {
            const int count = rows - t * TILE < TILE ? (int)(rows - t * TILE) : TILE;
            const char *ahead = tiles > 1 ? (const char *)(here + part * GROUP) + t * share * 64 : (const char *)here + 2048;
            rows_tile(count, PARTS, a.pairs + t * a.tile_stride + first * a.pair_stride, a.row_stride, a.pair_stride, here,
                      part, sums + t * TILE * GROUP, first == 0, ahead);
        }
    }
}

static Rows rows_of(const bf16 *a, long k) {
    const Rows found = {(const uint32_t *)a, k / 2, 1, TILE * (k / 2)};
    return found;
}

INLINE __m512 with_bias(__m512 x, const bf16 *bias, long column, __mmask16 mask) {
    return bias ? _mm512_add_ps(x, load_bf16_part(bias + column, mask)) : x;
}

/* out[rows][n] = activation(a packed + bias) + other; out in fp32 where `wide`. `bias` and `other` may be missing.
   `a` has k numbers a row, an even count. */
void product(const bf16 *a, long rows, long k, const bf16 *packed, long n, const bf16 *bias, int activation,
             const bf16 *other, void *out, int wide, int threads) {
    const long groups = groups_of(n), blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long task = 0; task < blocks * groups; task++) {
        float sums[BLOCK_ROWS * GROUP];
        const long block = task / groups, g = task % groups, first = block * BLOCK_ROWS;
        const long count = rows - first < BLOCK_ROWS ? rows - first : BLOCK_ROWS;
        group_sums(rows_of(a + first * k, k), count, pairs_of(k), (const uint32_t *)packed + g * pairs_of(k) * GROUP, sums);
        for (int c = 0; c < PARTS; c++) {
            const long column = g * GROUP + c * LANES;
            const __mmask16 mask = first_lanes(n - column);
            if (!mask) break;
            for (long r = 0; r < count; r++) {
                const long place = (first + r) * n + column;
                __m512 x = with_bias(_mm512_loadu_ps(sums + r * GROUP + c * LANES), bias, column, mask);
                x = activated(x, activation);
                if (other) x = _mm512_add_ps(x, load_bf16_part(other + place, mask));
                if (wide) _mm512_mask_storeu_ps((float *)out + place, mask, x);
                else store_bf16_part((bf16 *)out + place, mask, x);
            }
        }
    }
}

/* out[rows][n] = activation(a gate + gate_bias) * (a up + up_bias). The two products too, where they are `kept`. */
void gated_product(const bf16 *a, long rows, long k, const bf16 *gate, const bf16 *up, long n, const bf16 *gate_bias,
                   const bf16 *up_bias, int activation, bf16 *out, bf16 *kept_gate, bf16 *kept_up, int threads) {
    const long groups = groups_of(n), blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long task = 0; task < blocks * groups; task++) {
        float gates[BLOCK_ROWS * GROUP], ups[BLOCK_ROWS * GROUP];
        const long block = task / groups, g = task % groups, first = block * BLOCK_ROWS;
        const long count = rows - first < BLOCK_ROWS ? rows - first : BLOCK_ROWS, start = g * pairs_of(k) * GROUP;
        group_sums(rows_of(a + first * k, k), count, pairs_of(k), (const uint32_t *)gate + start, gates);
        group_sums(rows_of(a + first * k, k), count, pairs_of(k), (const uint32_t *)up + start, ups);
        for (int c = 0; c < PARTS; c++) {
            const long column = g * GROUP + c * LANES;
            const __mmask16 mask = first_lanes(n - column);
            if (!mask) break;
            for (long r = 0; r < count; r++) {
                const long place = r * GROUP + c * LANES;
                const __m512 x = with_bias(_mm512_loadu_ps(gates + place), gate_bias, column, mask);
                const __m512 y = with_bias(_mm512_loadu_ps(ups + place), up_bias, column, mask);
                const long target = (first + r) * n + column;
                if (kept_gate) store_bf16_part(kept_gate + target, mask, x), store_bf16_part(kept_up + target, mask, y);
                store_bf16_part(out + target, mask, _mm512_mul_ps(activated(x, activation), y));
            }
        }
    }
}

#define PANEL_COLUMNS 3072 /* columns of a gradient whose panels exist at the same time */

/* Columns [start, stop) of [rows][n] as panels of 8: [(stop - start) / 8][rows / 2][8] pairs. A line of 32 columns is read
   once for four panels. */
static void pack_panels(const bf16 *grad, long rows, long start, long stop, long stride, uint32_t *panels, int threads) {
    const long pairs = pairs_of(rows);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = start; first < stop; first += 4 * TILE)
        for (long p = 0; p < pairs; p++) {
            uint32_t line[4 * TILE];
            interleave(grad + 2 * p * stride, rows - 2 * p < 2 ? 1 : 2, stop, stride, first, 4 * TILE, line, 0);
            for (long t = first; t < first + 4 * TILE && t < stop; t += TILE)
                _mm256_storeu_si256((__m256i *)(panels + ((t - start) / TILE * pairs + p) * TILE),
                                    _mm256_loadu_si256((const __m256i *)(line + t - first)));
        }
}

/* Numbers of scratch memory that `gradient` needs. */
long gradient_scratch(long rows, long n, long k) {
    const long columns = n < PANEL_COLUMNS ? n : PANEL_COLUMNS;
    return packed_size(k, rows) + (columns + TILE - 1) / TILE * TILE * pairs_of(rows) * 2;
}

/* Add sums[count][48], group g of the rows of a gradient from `first` on, to where they belong: see `gradient`. */
static void add_sums(const float *part, long first, long count, long g, long k, float *const *sums, const int64_t *ends) {
    long layer = 0;
    for (long r = 0; r < count; r++) {
        while (first + r >= ends[layer]) layer++;
        float *row = sums[layer] + (first + r - (layer ? ends[layer - 1] : 0)) * k;
        for (long column = g * GROUP; column < (g + 1) * GROUP && column < k; column += LANES) {
            const __mmask16 mask = first_lanes(k - column);
            const __m512 x = _mm512_loadu_ps(part + r * GROUP + column - g * GROUP);
            _mm512_mask_storeu_ps(row + column, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, row + column), x));
        }
    }
}

/* The gradients of the weights of linear layers with one input, in fp32 and in place: [n][k] += grad[rows][n]' x[rows][k].
   The rows of `grad` are `stride` numbers apart. Of the n columns of `grad`, those before ends[0] are the first
   layer's, whose gradient is at sums[0], those before ends[1] the second one's, and so on. */
void gradient(const bf16 *grad, long n, long stride, const bf16 *x, long k, long rows, bf16 *scratch, float *const *sums,
              const int64_t *ends, int threads) {
    const long groups = groups_of(k), pairs = pairs_of(rows);
    uint32_t *panels = (uint32_t *)scratch + packed_size(k, rows) / 2;
    if (rows == 0) return;
    pack_columns(x, k, rows, 0, pairs, scratch, threads);
    for (long start = 0; start < n; start += PANEL_COLUMNS) {
        const long stop = start + PANEL_COLUMNS < n ? start + PANEL_COLUMNS : n;
        const long blocks = (stop - start + BLOCK_ROWS - 1) / BLOCK_ROWS;
        pack_panels(grad, rows, start, stop, stride, panels, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (long task = 0; task < blocks * groups; task++) {
            float part[BLOCK_ROWS * GROUP];
            const long g = task % groups, first = start + task / groups * BLOCK_ROWS;
            const long count = stop - first < BLOCK_ROWS ? stop - first : BLOCK_ROWS;
            const Rows a = {panels + (first - start) * pairs, 1, TILE, TILE * pairs};
            group_sums(a, count, pairs, (const uint32_t *)scratch + g * pairs * GROUP, part);
            add_sums(part, first, count, g, k, sums, ends);
        }
    }
}
