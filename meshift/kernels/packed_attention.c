/* Causal attention of packed sequences and its gradients, for training and log-probs. Scores, softmax and sums in fp32;
   weights and their gradients are rounded to bfloat16 before they are multiplied, as in flash attention
   (arXiv:2205.14135), and nothing of the size length x length is kept.

   Rows of q, k, v lie `stride` numbers apart (they may be parts of one matrix); sequence s has rows starts[s] to
   starts[s + 1]. A row sees the last `window` rows up to itself (0: all). `dim` is a multiple of 32. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tile.h"

#define WIDTH 32  /* columns of a group: two registers */
#define QUERIES 64
#define KEYS 256
#define KEY_GROUPS (KEYS / WIDTH)

typedef struct {
    const bf16 *q, *k, *v;
    long stride_q, stride_k, stride_v;
    const int64_t *starts;
    long num_sequences, heads, kv_heads, dim, window;
    float scale;
} Call;

static void *allocate(size_t size) {
    void *found = malloc(size);
    if (!found) { /* within a parallel region nobody can be told otherwise */
        fputs("meshift: there is no memory left for attention's keys and values; use shorter sequences\n", stderr);
        abort();
    }
    return found;
}

static long rounded(long length) { return (length + WIDTH - 1) / WIDTH * WIDTH; }

/* Rows [length][dim] as columns: [length / 32][dim / 2][32] pairs, zeros behind the last row. */
static void pack_rows(const bf16 *x, long length, long stride, long dim, uint32_t *to) {
    for (long start = 0; start < rounded(length); start += WIDTH)
        for (long i = 0; i < WIDTH; i++) {
            const uint32_t *from = (const uint32_t *)(x + (start + i) * stride);
            for (long p = 0; p < dim / 2; p++) to[start / 2 * dim + p * WIDTH + i] = start + i < length ? from[p] : 0;
        }
}

/* Rows [length][dim] by pairs of rows: [dim / 32][length / 2][32] pairs. */
static void pack_pairs(const bf16 *x, long length, long stride, long dim, uint32_t *to) {
    for (long d = 0; d < dim; d += WIDTH) {
        uint32_t *group = to + d / WIDTH * (rounded(length) / 2) * WIDTH;
        interleave(x, length, dim, stride, d, WIDTH, group, WIDTH);
        const long done = (length + 1) / 2;
        memset(group + done * WIDTH, 0, (size_t)(rounded(length) / 2 - done) * WIDTH * 4);
    }
}

/* to[key group][rows][32] = the rows times packed keys [first, first + count). */
static void score_block(const bf16 *rows, long num_rows, long stride, long dim, const uint32_t *packed, long first,
                        long count, float *to) {
    for (long key = 0; key < count; key += WIDTH)
        for (long r = 0; r < num_rows; r += TILE) {
            const uint32_t *group = packed + (first + key) / 2 * dim;
            rows_tile(num_rows - r < TILE ? (int)(num_rows - r) : TILE, 2, (const uint32_t *)(rows + r * stride), stride / 2,
                      1, group, dim / 2, to + (key * QUERIES) + r * WIDTH, 1, (const char *)group);
        }
}

/* sums[dim group][rows][32] += weights [rows][KEYS] times packed rows [first, first + count); `sums` has `height`
   rows in a group. */
static void add_weighted(const bf16 *weights, long num_rows, const uint32_t *packed, long length, long first, long count,
                         long dim, float *sums, long height) {
    for (long d = 0; d < dim; d += WIDTH)
        for (long r = 0; r < num_rows; r += TILE) {
            const uint32_t *group = packed + (d / WIDTH * (rounded(length) / 2) + first / 2) * WIDTH;
            rows_tile(num_rows - r < TILE ? (int)(num_rows - r) : TILE, 2, (const uint32_t *)(weights + r * KEYS), KEYS / 2, 1,
                      group, (count + 1) / 2, sums + (d / WIDTH * height + r) * WIDTH, 0, (const char *)group);
        }
}

/* Which of 16 keys from `key` on the query at `row` sees. */
INLINE __mmask16 visible(long row, long key, long window) {
    const __mmask16 before = first_lanes(row - key + 1);
    return window ? before & (__mmask16)~first_lanes(row - window - key + 1) : before;
}

static long first_key(const Call *c, long row) { return c->window && row + 1 > c->window ? row + 1 - c->window : 0; }

/* One block of queries of one head. */
static void forward_block(const Call *c, long start, long length, long head, long first, const uint32_t *keys,
                          const uint32_t *values, bf16 *out, float *lse) {
    float scores[KEY_GROUPS * QUERIES * WIDTH], sums[8 * QUERIES * WIDTH], highest[QUERIES], total[QUERIES];
    bf16 weights[QUERIES * KEYS];
    const long rows = length - first < QUERIES ? length - first : QUERIES, dim = c->dim;
    const bf16 *query = c->q + (start + first) * c->stride_q + head * dim;
    for (long r = 0; r < rows; r++) highest[r] = -INFINITY, total[r] = 0.0f;
    memset(sums, 0, sizeof(float) * (size_t)(dim / WIDTH * QUERIES * WIDTH));
    for (long key = first_key(c, first) / WIDTH * WIDTH; key < first + rows; key += KEYS) {
        const long count = first + rows - key < KEYS ? first + rows - key : KEYS;
        score_block(query, rows, c->stride_q, dim, keys, key, count, scores);
        for (long r = 0; r < rows; r++) {
            __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (long i = 0; i < count; i += LANES) {
                float *place = scores + (i / WIDTH * QUERIES + r) * WIDTH + i % WIDTH;
                const __mmask16 seen = visible(first + r, key + i, c->window);
                const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(place), _mm512_set1_ps(c->scale));
                const __m512 kept = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x);
                _mm512_storeu_ps(place, kept);
                most = _mm512_max_ps(most, kept);
            }
            const float found = _mm512_reduce_max_ps(most), above = found > highest[r] ? found : highest[r];
            const float reference = above == -INFINITY ? 0.0f : above;
            for (long i = 0; i < KEYS; i += LANES) {
                __m512 weight = _mm512_setzero_ps();
                if (i < count) {
                    const __m512 x = _mm512_loadu_ps(scores + (i / WIDTH * QUERIES + r) * WIDTH + i % WIDTH);
                    weight = exponential(_mm512_sub_ps(x, _mm512_set1_ps(reference)));
                }
                sum = _mm512_add_ps(sum, weight);
                store_bf16(weights + r * KEYS + i, weight);
            }
            const float shrink = highest[r] == -INFINITY ? 0.0f : expf(highest[r] - above);
            total[r] = total[r] * shrink + _mm512_reduce_add_ps(sum);
            highest[r] = above;
            if (shrink != 1.0f)
                for (long i = 0; i < dim; i += LANES) {
                    float *place = sums + (i / WIDTH * QUERIES + r) * WIDTH + i % WIDTH;
                    _mm512_storeu_ps(place, _mm512_mul_ps(_mm512_loadu_ps(place), _mm512_set1_ps(shrink)));
                }
        }
        add_weighted(weights, rows, values, length, key, count, dim, sums, QUERIES);
    }
    for (long r = 0; r < rows; r++) {
        const long row = start + first + r;
        if (lse) lse[row * c->heads + head] = highest[r] + logf(total[r]);
        for (long i = 0; i < dim; i += LANES)
            store_bf16(out + (row * c->heads + head) * dim + i,
                       _mm512_mul_ps(_mm512_loadu_ps(sums + (i / WIDTH * QUERIES + r) * WIDTH + i % WIDTH),
                                     _mm512_set1_ps(1.0f / total[r])));
    }
}

/* out [rows][heads][dim]; lse [rows][heads], the logarithm of each softmax's sum, where wanted. */
void packed_attention(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *strides, const int64_t *starts,
                      const int64_t *sizes, float scale, bf16 *out, float *lse, int threads) {
    const Call c = {q, k, v, strides[0], strides[1], strides[2], starts, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], scale};
    const long group = c.heads / c.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < c.num_sequences * c.kv_heads; task++) {
        const long s = task / c.kv_heads, h = task % c.kv_heads, start = starts[s], length = starts[s + 1] - start;
        if (length == 0) continue;
        uint32_t *keys = allocate((size_t)(rounded(length) * c.dim * 2) * 2), *values = keys + rounded(length) * c.dim / 2;
        pack_rows(k + start * c.stride_k + h * c.dim, length, c.stride_k, c.dim, keys);
        pack_pairs(v + start * c.stride_v + h * c.dim, length, c.stride_v, c.dim, values);
        for (long g = 0; g < group; g++)
            for (long first = 0; first < length; first += QUERIES)
                forward_block(&c, start, length, h * group + g, first, keys, values, out, lse);
        free(keys);
    }
}

/* What the backward pass of one key head keeps: packed keys and values, and gradients [dim / 32][length][32] in fp32. */
typedef struct {
    uint32_t *keys, *values, *key_pairs;
    float *to_keys, *to_values;
} Side;

/* dq [dim group][rows][32] of a block of queries; adds to the gradients of keys and values. */
static void backward_block(const Call *c, long start, long length, long head, long first, const Side *side,
                           const bf16 *out, const bf16 *grad, const float *lse, float *to_query) {
    float scores[KEY_GROUPS * QUERIES * WIDTH], slopes[KEY_GROUPS * QUERIES * WIDTH], delta[QUERIES];
    bf16 weights[QUERIES * KEYS], gradients[QUERIES * KEYS];
    uint32_t weight_pairs[QUERIES / 2 * KEYS], gradient_pairs[QUERIES / 2 * KEYS];
    uint32_t query_pairs[8 * QUERIES / 2 * WIDTH], grad_pairs[8 * QUERIES / 2 * WIDTH];
    const long rows = length - first < QUERIES ? length - first : QUERIES, dim = c->dim, width = c->heads * dim;
    const long pairs = (rows + 1) / 2;
    const bf16 *query = c->q + (start + first) * c->stride_q + head * dim;
    const bf16 *incoming = grad + (start + first) * width + head * dim, *given = out + (start + first) * width + head * dim;
    for (long r = 0; r < rows; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < dim; i += LANES)
            sum = _mm512_fmadd_ps(load_bf16(incoming + r * width + i), load_bf16(given + r * width + i), sum);
        delta[r] = _mm512_reduce_add_ps(sum);
    }
    for (long d = 0; d < dim; d += WIDTH) {
        interleave(query, rows, dim, c->stride_q, d, WIDTH, query_pairs + d * QUERIES / 2, WIDTH);
        interleave(incoming, rows, dim, width, d, WIDTH, grad_pairs + d * QUERIES / 2, WIDTH);
    }
    memset(to_query, 0, sizeof(float) * (size_t)(dim / WIDTH * QUERIES * WIDTH));
    for (long key = first_key(c, first) / WIDTH * WIDTH; key < first + rows; key += KEYS) {
        const long count = first + rows - key < KEYS ? first + rows - key : KEYS;
        score_block(query, rows, c->stride_q, dim, side->keys, key, count, scores);
        score_block(incoming, rows, width, dim, side->values, key, count, slopes);
        for (long r = 0; r < rows; r++) {
            const __m512 norm = _mm512_set1_ps(lse[(start + first + r) * c->heads + head]);
            for (long i = 0; i < KEYS; i += LANES) {
                const long place = (i / WIDTH * QUERIES + r) * WIDTH + i % WIDTH;
                const __mmask16 seen = i < count ? visible(first + r, key + i, c->window) : 0;
                const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + place), _mm512_set1_ps(c->scale), norm);
                const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(x));
                const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(slopes + place), _mm512_set1_ps(delta[r]));
                const __m512 gradient = _mm512_mul_ps(_mm512_mul_ps(weight, slope), _mm512_set1_ps(c->scale));
                store_bf16(weights + r * KEYS + i, weight);
                store_bf16(gradients + r * KEYS + i, _mm512_maskz_mov_ps(seen, gradient));
            }
        }
        add_weighted(gradients, rows, side->key_pairs, length, key, count, dim, to_query, QUERIES);
        interleave(weights, rows, KEYS, KEYS, 0, KEYS, weight_pairs, KEYS);
        interleave(gradients, rows, KEYS, KEYS, 0, KEYS, gradient_pairs, KEYS);
        for (long d = 0; d < dim; d += WIDTH)
            for (long i = 0; i < count; i += TILE) {
                const int some = count - i < TILE ? (int)(count - i) : TILE;
                const long place = (d / WIDTH * length + key + i) * WIDTH;
                const uint32_t *right = grad_pairs + d * QUERIES / 2;
                rows_tile(some, 2, weight_pairs + i, 1, KEYS, right, pairs, side->to_values + place, 0, (const char *)right);
                right = query_pairs + d * QUERIES / 2;
                rows_tile(some, 2, gradient_pairs + i, 1, KEYS, right, pairs, side->to_keys + place, 0, (const char *)right);
            }
    }
}

/* fp32 [dim / 32][height][32] -> bfloat16 rows. */
static void unpack(const float *sums, long rows, long height, long dim, bf16 *to, long stride) {
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < dim; i += LANES)
            store_bf16(to + r * stride + i, _mm512_loadu_ps(sums + (i / WIDTH * height + r) * WIDTH + i % WIDTH));
}

/* The gradients of q, k, v, with the strides of `strides`[3..5], from that of `out`. */
void packed_attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *strides, const int64_t *starts,
                               const int64_t *sizes, float scale, const bf16 *out, const float *lse, const bf16 *grad,
                               bf16 *to_q, bf16 *to_k, bf16 *to_v, int threads) {
    const Call c = {q, k, v, strides[0], strides[1], strides[2], starts, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], scale};
    const long group = c.heads / c.kv_heads, dim = c.dim;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < c.num_sequences * c.kv_heads; task++) {
        const long s = task / c.kv_heads, h = task % c.kv_heads, start = starts[s], length = starts[s + 1] - start;
        if (length == 0) continue;
        const long packed = rounded(length) * dim / 2;
        float to_query[8 * QUERIES * WIDTH];
        uint32_t *room = allocate((size_t)(3 * packed + 2 * length * dim) * 4);
        const Side side = {room, room + packed, room + 2 * packed, (float *)(room + 3 * packed),
                           (float *)(room + 3 * packed) + length * dim};
        pack_rows(k + start * c.stride_k + h * dim, length, c.stride_k, dim, side.keys);
        pack_rows(v + start * c.stride_v + h * dim, length, c.stride_v, dim, side.values);
        pack_pairs(k + start * c.stride_k + h * dim, length, c.stride_k, dim, side.key_pairs);
        memset(side.to_keys, 0, (size_t)(2 * length * dim) * sizeof(float));
        for (long g = 0; g < group; g++)
            for (long first = 0; first < length; first += QUERIES) {
                const long head = h * group + g, rows = length - first < QUERIES ? length - first : QUERIES;
                backward_block(&c, start, length, head, first, &side, out, grad, lse, to_query);
                unpack(to_query, rows, QUERIES, dim, to_q + (start + first) * strides[3] + head * dim, strides[3]);
            }
        unpack(side.to_keys, length, length, dim, to_k + start * strides[4] + h * dim, strides[4]);
        unpack(side.to_values, length, length, dim, to_v + start * strides[5] + h * dim, strides[5]);
        free(room);
    }
}
