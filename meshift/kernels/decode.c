/* All layers of a decode step in one call: the kernels one after another, with nothing between them. */
#include "kernels.h"

#define MAX_ROTARIES 4

/* Mirrored by `WholeLayer` in generation/whole_step.py; a pointer may be missing where a bias is. `rotary` counts the
   step's angles; -1: nothing is turned. */
typedef struct {
    const bf16 *attention_norm, *qkv, *qkv_bias, *output, *output_bias;
    const bf16 *mlp_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
    int64_t window, rotary;
    double scale;
} Layer;

/* Mirrored by `WholeShape`. */
typedef struct {
    int64_t hidden, wide, heads, kv_heads, dim, half, activation, plus_one;
    double eps;
} Shape;

/* Mirrored by `WholeRows`: keys and values are those of the first layer, others follow `layer_stride` numbers apart. */
typedef struct {
    int64_t rows, reach, layer_stride, threads;
    bf16 *keys, *values;
    const int64_t *places, *positions;
    const bf16 *cosines[MAX_ROTARIES], *sines[MAX_ROTARIES];
} Step;

/* Numbers of `room` for each row. */
long decode_room(const Shape *s) {
    return s->hidden + (s->heads + 2 * s->kv_heads) * s->dim + s->heads * s->dim + s->wide;
}

/* x [rows][hidden], in place. */
void decode(bf16 *x, const Layer *layers, long num_layers, const Shape *s, const Step *step, bf16 *room) {
    const long rows = step->rows, queries = s->heads * s->dim, keys = s->kv_heads * s->dim, stride = queries + 2 * keys;
    const int threads = (int)step->threads, plus_one = (int)s->plus_one, activation = (int)s->activation;
    bf16 *normed = room, *heads = normed + rows * s->hidden, *attended = heads + rows * stride;
    bf16 *wide = attended + rows * queries;
    for (long i = 0; i < num_layers; i++) {
        const Layer *layer = layers + i;
        bf16 *stored_keys = step->keys + i * step->layer_stride, *stored_values = step->values + i * step->layer_stride;
        rms_norm(x, rows, s->hidden, layer->attention_norm, (float)s->eps, plus_one, normed, 0, threads);
        product(normed, rows, s->hidden, layer->qkv, stride, layer->qkv_bias, 0, 0, heads, 0, threads);
        if (layer->rotary >= 0)
            turn(heads, rows, stride, s->heads + s->kv_heads, s->dim, s->half, step->cosines[layer->rotary],
                 step->sines[layer->rotary], threads);
        put(heads + queries, rows, stride, s->kv_heads, s->dim, step->places, stored_keys, threads);
        put(heads + queries + keys, rows, stride, s->kv_heads, s->dim, step->places, stored_values, threads);
        attend(heads, rows, stride, s->kv_heads, s->heads / s->kv_heads, s->dim, stored_keys, stored_values, step->reach,
               step->positions, layer->window, (float)layer->scale, attended, threads);
        product(attended, rows, queries, layer->output, s->hidden, layer->output_bias, 0, x, x, 0, threads);
        rms_norm(x, rows, s->hidden, layer->mlp_norm, (float)s->eps, plus_one, normed, 0, threads);
        gated_product(normed, rows, s->hidden, layer->gate, layer->up, s->wide, layer->gate_bias, layer->up_bias, activation,
                      wide, 0, 0, threads);
        product(wide, rows, s->wide, layer->down, s->hidden, layer->down_bias, 0, x, x, 0, threads);
    }
}
