/* Draws a token for each row of fp32 logits by the inverse of the cumulative probability, and its log-probability. */
#include <math.h>

#include "vector.h"

#define BLOCK 256 /* the vocabulary is summed in blocks; only the drawn one then token by token */

/* The highest logit; not a number if some logit is none or infinite. */
INLINE float highest_of(const float *logits, long vocab) {
    __m512 highest = _mm512_set1_ps(-INFINITY), spread = _mm512_setzero_ps();
    for (long i = 0; i < vocab; i += LANES) {
        const __mmask16 mask = first_lanes(vocab - i);
        const __m512 x = _mm512_maskz_loadu_ps(mask, logits + i);
        highest = _mm512_mask_max_ps(highest, mask, highest, x);
        spread = _mm512_fmadd_ps(x, _mm512_setzero_ps(), spread); /* 0 x infinity is no number, and stays so */
    }
    const float sound = _mm512_reduce_add_ps(spread);
    return sound == 0.0f ? _mm512_reduce_max_ps(highest) : NAN;
}

INLINE double sum_weights(const float *logits, long count, float highest, float temperature) {
    const __m512 top = _mm512_set1_ps(highest), divisor = _mm512_set1_ps(temperature);
    __m512 total = _mm512_setzero_ps();
    for (long i = 0; i < count; i += LANES) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 x = _mm512_maskz_loadu_ps(mask, logits + i);
        const __m512 scaled = temperature == 1.0f ? x : _mm512_div_ps(x, divisor);
        const __m512 weight = exponential(_mm512_sub_ps(scaled, top));
        total = _mm512_mask_add_ps(total, mask, total, weight);
    }
    return (double)_mm512_reduce_add_ps(total);
}

/* `forbidden` ids have probability zero in the rows with `short_rows`. `numbers` in [0, 1). `sums`: room for
   rows x (vocab / 256, rounded up). Returns the first row whose logits are not all finite, or -1; such rows are without
   a token. Logits are overwritten meanwhile, and afterwards as before. */
long draw(float *logits, long rows, long vocab, float temperature, const uint8_t *short_rows, const int64_t *forbidden,
          long num_forbidden, const double *numbers, double *sums, int64_t *tokens, float *logprobs, int threads) {
    const long blocks = (vocab + BLOCK - 1) / BLOCK;
    long faulty = rows;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(min : faulty)
    for (long r = 0; r < rows; r++) {
        float *row = logits + r * vocab;
        double *sum = sums + r * blocks, total = 0.0;
        float highest = highest_of(row, vocab), kept[num_forbidden + 1];
        if (isnan(highest)) {
            faulty = r < faulty ? r : faulty;
            continue;
        }
        if (short_rows[r] && num_forbidden) {
            for (long i = 0; i < num_forbidden; i++) kept[i] = row[forbidden[i]], row[forbidden[i]] = -3.0e38f;
            highest = highest_of(row, vocab);
        }
        highest /= temperature;
        for (long b = 0; b < blocks; b++) {
            const long count = vocab - b * BLOCK < BLOCK ? vocab - b * BLOCK : BLOCK;
            total += sum[b] = sum_weights(row + b * BLOCK, count, highest, temperature);
        }
        if (!isfinite(total)) { /* a logit over a small temperature is no number any more */
            faulty = r < faulty ? r : faulty;
            if (short_rows[r])
                for (long i = num_forbidden; i-- > 0;) row[forbidden[i]] = kept[i];
            continue;
        }
        const double target = numbers[r] * total;
        double before = 0.0;
        long block = 0, last = 0;
        for (; block < blocks; block++) {
            if (sum[block] > 0.0) last = block;
            if (before + sum[block] > target) break;
            before += sum[block];
        }
        if (block == blocks) before -= sum[block = last]; /* rounding put the target at the very end */
        long token = -1;
        const long stop = (block + 1) * BLOCK < vocab ? (block + 1) * BLOCK : vocab;
        for (long i = block * BLOCK; i < stop; i++) {
            const float weight = expf(row[i] / temperature - highest);
            if (weight > 0.0f) token = i;
            if (token == i && (before += (double)weight) > target) break;
        }
        tokens[r] = token;
        if (short_rows[r])
            for (long i = num_forbidden; i-- > 0;) row[forbidden[i]] = kept[i];
        logprobs[r] = (float)((double)(row[token] / temperature - highest) - log(total));
    }
    return faulty < rows ? faulty : -1;
}
