/* Activations and their slopes. All but RELU are x times a logistic curve: GELU's tanh is such a quotient as well. */
#ifndef MESHIFT_ACTIVATIONS_H
#define MESHIFT_ACTIVATIONS_H

#include "vector.h"

enum { NONE = 0, SILU = 1, GELU_TANH = 2, RELU = 3 };

/* 1 / (1 + e^-x). */
INLINE __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(87.0f), least = _mm512_set1_ps(-87.0f);
    const __m512 minus = _mm512_min_ps(_mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), least), most);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(minus)));
}

/* 2 sqrt(2 / pi) (x + 0.044715 x^3): GELU's tanh form is x sigmoid of that. */
INLINE __m512 gelu_argument(__m512 x) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    return _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x), _mm512_set1_ps(1.5957691216f));
}

INLINE __m512 activated(__m512 x, int activation) {
    if (activation == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x); /* in this order NaN stays */
    if (activation == NONE) return x;
    return _mm512_mul_ps(x, sigmoid(activation == GELU_TANH ? gelu_argument(x) : x));
}

INLINE __m512 activation_slope(__m512 x, int activation) {
    const __m512 one = _mm512_set1_ps(1.0f);
    if (activation == NONE) return one;
    if (activation == RELU) return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), one);
    __m512 inner = x, slope = one; /* of x s(inner): s + x s (1 - s) slope */
    if (activation == GELU_TANH) {
        inner = gelu_argument(x);
        slope = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(3 * 0.044715f * 1.5957691216f),
                                _mm512_set1_ps(1.5957691216f));
    }
    const __m512 s = sigmoid(inner), rest = _mm512_mul_ps(_mm512_mul_ps(x, slope), _mm512_sub_ps(one, s));
    return _mm512_fmadd_ps(s, rest, s);
}

#endif
