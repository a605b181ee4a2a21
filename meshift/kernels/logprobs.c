/* What training reads of fp32 logits, a block of rows at a time: log-probs, entropies, and the gradient of log-probs. */
#include <math.h>

#include "vector.h"

/* For each row of logits [rows][vocab], -inf where a token is ruled out, after division by the temperature:
   its normaliser log sum exp, the log-prob of its target; the entropy and whether the target is the likeliest token,
   where wanted. */
void logprobs(const float *logits, long rows, long vocab, float temperature, const int64_t *targets, float *normalisers,
              float *found, float *entropies, float *likeliest, int threads) {
    const __m512 sharpness = _mm512_set1_ps(1.0f / temperature);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const float *row = logits + r * vocab;
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (long i = 0; i < vocab; i += LANES)
            most = _mm512_mask_max_ps(most, first_lanes(vocab - i), most, _mm512_maskz_loadu_ps(first_lanes(vocab - i), row + i));
        const float highest = _mm512_reduce_max_ps(most);
        const __m512 top = _mm512_set1_ps(highest);
        __m512 total = _mm512_setzero_ps(), mean = _mm512_setzero_ps();
        for (long i = 0; i < vocab; i += LANES) {
            const __mmask16 mask = first_lanes(vocab - i);
            const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + i), top), sharpness);
            const __m512 weight = exponential(x);
            total = _mm512_mask_add_ps(total, mask, total, weight);
            const __mmask16 some = _mm512_mask_cmp_ps_mask(mask, weight, _mm512_setzero_ps(), _CMP_GT_OQ);
            if (entropies) mean = _mm512_mask3_fmadd_ps(weight, x, mean, some);
        }
        const float sum = _mm512_reduce_add_ps(total), scaled = highest / temperature;
        /* a logit that is no number hides from maxima; the sum shows it */
        normalisers[r] = scaled + logf(sum);
        found[r] = (row[targets[r]] - highest) / temperature - logf(sum);
        if (entropies) entropies[r] = logf(sum) - _mm512_reduce_add_ps(mean) / sum;
        if (likeliest) { /* the first of equals, as argmax gives it */
            long first = 0;
            while (first < vocab - 1 && row[first] != highest) first++;
            likeliest[r] = first == targets[r] ? 1.0f : 0.0f;
        }
    }
}

/* gradients[rows][vocab] of scales[r] x log-prob in the logits, in bfloat16. */
void logprob_gradients(const float *logits, long rows, long vocab, float temperature, const int64_t *targets,
                       const float *normalisers, const float *scales, bf16 *gradients, int threads) {
    const __m512 sharpness = _mm512_set1_ps(1.0f / temperature);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const float *row = logits + r * vocab, slope = scales[r] / temperature;
        bf16 *to = gradients + r * vocab;
        const __m512 norm = _mm512_set1_ps(normalisers[r]), minus = _mm512_set1_ps(-slope);
        for (long i = 0; i < vocab; i += LANES) {
            const __mmask16 mask = first_lanes(vocab - i);
            const __m512 x = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, row + i), sharpness, norm);
            store_bf16_part(to + i, mask, _mm512_mul_ps(exponential(x), minus));
        }
        const float probability = expf(row[targets[r]] / temperature - normalisers[r]);
        store_bf16_part(to + targets[r], 1, _mm512_set1_ps(slope * (1.0f - probability)));
    }
}
