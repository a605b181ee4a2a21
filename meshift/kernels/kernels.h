/* Kernels that other kernels call. What they compute stands where they are defined. */
#ifndef MESHIFT_KERNELS_H
#define MESHIFT_KERNELS_H

#include "vector.h"

void product(const bf16 *a, long rows, long k, const bf16 *packed, long n, const bf16 *bias, int activation,
             const bf16 *other, void *out, int wide, int threads);
void gated_product(const bf16 *a, long rows, long k, const bf16 *gate, const bf16 *up, long n, const bf16 *gate_bias,
                   const bf16 *up_bias, int activation, bf16 *out, bf16 *kept_gate, bf16 *kept_up, int threads);
void rms_norm(const bf16 *x, long rows, long size, const bf16 *weight, float eps, int plus_one, bf16 *out, float *inverses,
              int threads);
void turn(bf16 *x, long rows, long stride, long heads, long dim, long half, const bf16 *cosines, const bf16 *sines,
          int threads);
void put(const bf16 *x, long rows, long stride, long heads, long dim, const int64_t *places, bf16 *to, int threads);
void attend(const bf16 *query, long rows, long stride, long kv_heads, long group, long dim, const bf16 *keys,
            const bf16 *values, long reach, const int64_t *positions, long window, float scale, bf16 *out, int threads);

#endif
