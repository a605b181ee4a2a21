/* Causal attention of packed sequences and its gradients, for training and log-probs. Scores, softmax and sums in fp32;
   weights and their gradients are rounded to bfloat16 before they are multiplied, as in flash attention
   (arXiv:2205.14135), and nothing of the size length x length is kept.

   Rows of q, k, v lie `stride` numbers apart (they may be parts of one matrix); piece s has rows starts[s] to
   starts[s + 1]. A piece is a sequence, or what is left of one after the rows that it has in common with others:
   those are piece before[s] (itself: none), which continues no other. A row sees the last `window` rows up to
   itself (0: all). `dim` is a multiple of 32. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tile.h"

#define WIDTH 32  /* columns of a group: two registers */
#define QUERIES 64
#define KEYS 256
#define KEY_GROUPS (KEYS / WIDTH)
#define MOST_GIVEN ((size_t)64 << 20) /* bytes of gradients that pieces give, between two times that they are added, */
#define LEAST_TASKS 4                 /* unless these are less than so many a thread */

typedef struct {
    const bf16 *q, *k, *v;
    long stride_q, stride_k, stride_v;
    const int64_t *starts, *before;
    long num_pieces, heads, kv_heads, dim, window;
    float scale;
} Call;

/* Of a piece: its rows `start` to `start + own`, and `shared` rows from `first` on that come before them. */
typedef struct {
    long start, own, first, shared;
} Piece;

static Piece piece_of(const Call *c, long s) {
    const long b = c->before[s], start = c->starts[s], own = c->starts[s + 1] - start;
    if (b == s) return (Piece){start, own, start, 0};
    return (Piece){start, own, c->starts[b], c->starts[b + 1] - c->starts[b]};
}

/* Within a parallel region nobody can be told otherwise. */
static void no_memory(void) {
    fputs("meshift: there is no memory left for attention's keys and values; use shorter sequences\n", stderr);
    abort();
}

static void *allocate(size_t size) {
    void *found = malloc(size);
    if (!found) no_memory();
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

/* All rows of a piece one after another, which are copied to `room` where they are not so already. */
static const bf16 *whole_rows(const bf16 *x, long *stride, long dim, const Piece *piece, bf16 *room) {
    if (piece->shared == 0) return x + piece->start * *stride;
    for (long r = 0; r < piece->shared + piece->own; r++) {
        const long row = r < piece->shared ? piece->first + r : piece->start + r - piece->shared;
        memcpy(room + r * dim, x + row * *stride, (size_t)dim * sizeof(bf16));
    }
    *stride = dim;
    return room;
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

/* One block of queries of one head: rows from `first` on of `length` whose row 0 would be row `start` of q. */
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
                      const int64_t *before, const int64_t *sizes, float scale, bf16 *out, float *lse, int threads) {
    const Call c = {q, k, v, strides[0], strides[1], strides[2], starts, before, sizes[0], sizes[1], sizes[2], sizes[3],
                    sizes[4], scale};
    const long group = c.heads / c.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < c.num_pieces * c.kv_heads; task++) {
        const long h = task % c.kv_heads;
        const Piece piece = piece_of(&c, task / c.kv_heads);
        const long length = piece.shared + piece.own;
        if (piece.own == 0) continue;
        const size_t packed = (size_t)(rounded(length) * c.dim) / 2;
        uint32_t *keys = allocate((2 * packed + (size_t)(length * c.dim) / 2) * 4), *values = keys + packed;
        bf16 *room = (bf16 *)(values + packed);
        long stride = c.stride_k;
        const bf16 *rows = whole_rows(k + h * c.dim, &stride, c.dim, &piece, room);
        pack_rows(rows, length, stride, c.dim, keys);
        stride = c.stride_v;
        rows = whole_rows(v + h * c.dim, &stride, c.dim, &piece, room);
        pack_pairs(rows, length, stride, c.dim, values);
        for (long g = 0; g < group; g++)
            for (long first = piece.shared; first < length; first += QUERIES)
                forward_block(&c, piece.start - piece.shared, length, h * group + g, first, keys, values, out, lse);
        free(keys);
    }
}

/* What the backward pass of one key head keeps: packed keys and values, and gradients [dim / 32][length][32] in fp32. */
typedef struct {
    uint32_t *keys, *values, *key_pairs;
    float *to_keys, *to_values;
} Side;

/* dq [dim group][rows][32] of a block of queries (as in forward_block); adds to the gradients of keys and values. */
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

/* Gradients of a backward pass and their strides. For each piece and key head, fp32 as in `Side`, keys' before values':
   what a piece gives the rows before it, until that is added; and for one that is continued, what it was given. */
typedef struct {
    const bf16 *out, *grad;
    const float *lse;
    bf16 *q, *k, *v;
    long stride_q, stride_k, stride_v;
    float **given, **taken;
} Gradients;

/* One piece and key head: writes its own rows' gradients. What it gives to the rows before it is kept; a piece that
   others continue takes in theirs. */
static void backward_piece(const Call *c, const Gradients *g, long s, long h) {
    const Piece piece = piece_of(c, s);
    const long length = piece.shared + piece.own, group = c->heads / c->kv_heads, dim = c->dim;
    const size_t packed = (size_t)(rounded(length) * dim) / 2, sums = (size_t)(length * dim);
    float to_query[8 * QUERIES * WIDTH];
    uint32_t *memory = allocate((3 * packed + 2 * sums + sums / 2) * 4);
    const Side side = {memory, memory + packed, memory + 2 * packed, (float *)(memory + 3 * packed),
                       (float *)(memory + 3 * packed) + sums};
    bf16 *room = (bf16 *)(side.to_values + sums);
    long stride = c->stride_k;
    const bf16 *rows = whole_rows(c->k + h * dim, &stride, dim, &piece, room);
    pack_rows(rows, length, stride, dim, side.keys);
    pack_pairs(rows, length, stride, dim, side.key_pairs);
    stride = c->stride_v;
    rows = whole_rows(c->v + h * dim, &stride, dim, &piece, room);
    pack_rows(rows, length, stride, dim, side.values);
    const float *taken = g->taken[s * c->kv_heads + h];
    if (taken)
        memcpy(side.to_keys, taken, 2 * sums * sizeof(float));
    else
        memset(side.to_keys, 0, 2 * sums * sizeof(float));
    for (long own = 0; own < group; own++)
        for (long first = piece.shared; first < length; first += QUERIES) {
            const long head = h * group + own, count = length - first < QUERIES ? length - first : QUERIES;
            const long row = piece.start - piece.shared;
            backward_block(c, row, length, head, first, &side, g->out, g->grad, g->lse, to_query);
            unpack(to_query, count, QUERIES, dim, g->q + (row + first) * g->stride_q + head * dim, g->stride_q);
        }
    const long skipped = piece.shared * WIDTH;
    unpack(side.to_keys + skipped, piece.own, length, dim, g->k + piece.start * g->stride_k + h * dim, g->stride_k);
    unpack(side.to_values + skipped, piece.own, length, dim, g->v + piece.start * g->stride_v + h * dim, g->stride_v);
    if (piece.shared) {
        const size_t width = (size_t)skipped;
        float *kept = allocate(2 * (size_t)(piece.shared * dim) * sizeof(float));
        for (long part = 0; part < 2 * dim / WIDTH; part++)
            memcpy(kept + (size_t)part * width, side.to_keys + part * length * WIDTH, width * sizeof(float));
        g->given[s * c->kv_heads + h] = kept;
    }
    free(memory);
}

/* Adds what pieces have given to what the piece that they continue takes, in their order, and frees it. */
static void take_given(const Call *c, const Gradients *g, long base, long h) {
    const size_t size = 2 * (size_t)((c->starts[base + 1] - c->starts[base]) * c->dim);
    float **taken = g->taken + base * c->kv_heads + h;
    for (long s = base + 1; s < c->num_pieces && c->before[s] == base; s++) {
        float **given = g->given + s * c->kv_heads + h;
        if (!*given) continue;
        if (!*taken) memset(*taken = allocate(size * sizeof(float)), 0, size * sizeof(float));
        for (size_t i = 0; i < size; i++) (*taken)[i] += (*given)[i];
        free(*given);
        *given = NULL;
    }
}

/* The gradients of q, k, v, with the strides of `strides`[3..5], from that of `out`. */
void packed_attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *strides, const int64_t *starts,
                               const int64_t *before, const int64_t *sizes, float scale, const bf16 *out,
                               const float *lse, const bf16 *grad, bf16 *to_q, bf16 *to_k, bf16 *to_v, int threads) {
    const Call c = {q, k, v, strides[0], strides[1], strides[2], starts, before, sizes[0], sizes[1], sizes[2], sizes[3],
                    sizes[4], scale};
    const long num_tasks = c.num_pieces * c.kv_heads;
    float **kept = calloc(2 * (size_t)num_tasks + 1, sizeof(float *));
    if (!kept) no_memory();
    const Gradients g = {out, grad, lse, to_q, to_k, to_v, strides[3], strides[4], strides[5], kept, kept + num_tasks};
    /* First the pieces that come after others, some at a time, so that little of what they give is kept at once. */
    for (long from = 0, to = 0; from < num_tasks; from = to) {
        for (size_t size = 0; to < num_tasks && (size < MOST_GIVEN || to < from + LEAST_TASKS * threads); to++)
            size += 2 * (size_t)(piece_of(&c, to / c.kv_heads).shared * c.dim) * sizeof(float);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (long task = from; task < to; task++) {
            const long s = task / c.kv_heads;
            if (before[s] != s && starts[s + 1] > starts[s]) backward_piece(&c, &g, s, task % c.kv_heads);
        }
        const long base = before[from / c.kv_heads];
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (long task = base * c.kv_heads; task < to; task++)
            take_given(&c, &g, task / c.kv_heads, task % c.kv_heads);
    }
    /* Then those that take in what these give. */
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < num_tasks; task++) {
        const long s = task / c.kv_heads;
        if (before[s] == s && starts[s + 1] > starts[s]) backward_piece(&c, &g, s, task % c.kv_heads);
    }
    for (long i = 0; i < 2 * num_tasks; i++) free(kept[i]);
    free(kept);
}
