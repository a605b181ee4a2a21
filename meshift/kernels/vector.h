/* What the kernels share: bfloat16 rows in AVX-512 registers, and the exponential. AVX512-BF16 is used where it is. */
#ifndef MESHIFT_VECTOR_H
#define MESHIFT_VECTOR_H

#include <immintrin.h>
#include <stdint.h>

#define LANES 16 /* numbers of an fp32 register */

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

/* 16 bfloat16 numbers as fp32. */
INLINE __m512 widen(__m256i narrow) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16)); }

INLINE __m512 load_bf16(const bf16 *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }

INLINE __m512 load_bf16_part(const bf16 *from, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, from)); }

/* To the nearest bfloat16, ties to even, as torch rounds; numbers below 1.2e-38 become 0. */
#ifdef __AVX512BF16__
INLINE __m256i narrow(__m512 wide) { return (__m256i)_mm512_cvtneps_pbh(wide); }
#else
INLINE __m256i narrow(__m512 wide) {
    const __m512i bits = _mm512_castps_si512(wide), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), one);
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), odd));
    const __mmask16 none = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q); /* which rounding could make infinite */
    rounded = _mm512_mask_or_epi32(rounded, none, bits, _mm512_set1_epi32(0x400000));
    const __mmask16 tiny = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
    rounded = _mm512_mask_and_epi32(rounded, tiny, bits, _mm512_set1_epi32(INT32_MIN));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif

INLINE void store_bf16(bf16 *to, __m512 wide) { _mm256_storeu_si256((__m256i *)to, narrow(wide)); }

INLINE void store_bf16_part(bf16 *to, __mmask16 mask, __m512 wide) { _mm256_mask_storeu_epi16(to, mask, narrow(wide)); }

INLINE float from_bf16(bf16 number) {
    union { uint32_t bits; float value; } both = {(uint32_t)number << 16};
    return both.value;
}

/* The first `count` lanes; all of them from 16 on. */
INLINE __mmask16 first_lanes(long count) { return count >= LANES ? 0xFFFF : (__mmask16)((1u << (count > 0 ? count : 0)) - 1); }

/* acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1], for 16 pairs of bfloat16, the latter product first. */
#ifdef __AVX512BF16__
INLINE __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#else
INLINE __m512 upper(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_epi32(pairs, _mm512_set1_epi32(-65536))); }

INLINE __m512 lower(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

INLINE __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(lower(a), lower(b), _mm512_fmadd_ps(upper(a), upper(b), acc));
}
#endif

/* e^x within 2 units in the last place; 0 below -87.3: x = n ln 2 + r, e^r by its Taylor polynomial, times 2^n. */
INLINE __m512 exponential(__m512 x) {
    const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 power = _mm512_set1_ps(1.0f / 5040);
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f / 720));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f / 120));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f / 24));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f / 6));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(0.5f));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps((__mmask16)~tiny, power, n);
}

#endif
