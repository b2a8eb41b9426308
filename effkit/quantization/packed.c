/* y = W x, token by token, for W in 4-bit codes, groups of 32 along a row: w = scale * (code - zero_point).
 *
 * Inside a group, sum w x = scale * (sum code x - zero_point * sum x), so codes meet x alone; scale and zero point enter
 * once a group, and the sums of x are shared by all rows.
 * Two codes a byte, the first in the low half. Scales are bfloat16: the upper half of a float32.
 *
 * Codes made floats cost more than the bytes that they save. Where the processor multiplies bytes (VNNI), x is split, once
 * for all rows, into three: x = step * (65536 high + 256 middle + low), as exact as a float's 24 bits, and a group of weights
 * is three products of bytes. Four products of at most 15 * 2^23 fit an int32. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#include <immintrin.h>
#define DOT _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#include <immintrin.h>
#define DOT _mm256_dpbusd_avx_epi32
#endif

static float bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* What all rows share: for each group of x its sum, and its numbers, even positions first, as the halves of bytes lie. */
typedef struct {
    float *sum, *step, *at;
    int8_t *bytes; /* 32 high ones a group, 32 middle ones, 32 low ones */
} Inputs;

static void prepare(const float *x, Inputs to, long g) {
    float *at = to.at + 32 * g, largest = 0;
    to.sum[g] = 0;
    for (int i = 0; i < 32; i++) {
        at[i] = x[32 * g + 2 * (i % 16) + i / 16];
        to.sum[g] += at[i];
        float size = at[i] < 0 ? -at[i] : at[i];
        largest = size > largest ? size : largest;
    }
    to.step[g] = largest > 1e-30f ? largest / 8355000 : 1; /* three bytes hold 8355711 = 127 * (65536 + 256 + 1): room to round */
#ifdef DOT
    if (largest <= 1e-30f && to.sum[g] == to.sum[g]) to.sum[g] = 0; /* all bytes will be 0, and so the group is */
#endif
    int8_t *bytes = to.bytes + 96 * g;
    for (int i = 0; i < 32; i++) {
        int whole = (int)(at[i] / to.step[g] + (at[i] < 0 ? -0.5f : 0.5f)); /* of NaN and infinity anything: `sum` keeps them */
        bytes[64 + i] = (int8_t)whole;
        whole = (whole - bytes[64 + i]) >> 8;
        bytes[32 + i] = (int8_t)whole;
        bytes[i] = (int8_t)((whole - bytes[32 + i]) >> 8);
    }
}

static float row(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero_point, Inputs x, long groups) {
    float total = 0;
#pragma omp simd reduction(- : total)
    for (long g = 0; g < groups; g++) total -= bfloat16(scale[g]) * (zero_point ? zero_point[g] : 8) * x.sum[g];
#ifdef DOT
    __m256 lanes = _mm256_setzero_ps();
    for (long g = 0; g < groups; g++) {
        const __m256i *bytes = (const __m256i *)(x.bytes + 96 * g);
        __m128i both = _mm_loadu_si128((const __m128i *)(codes + 16 * g));
        __m256i q = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15));
        __m256i sum = DOT(_mm256_setzero_si256(), q, _mm256_loadu_si256(bytes));
        sum = DOT(_mm256_slli_epi32(sum, 8), q, _mm256_loadu_si256(bytes + 1));
        sum = DOT(_mm256_slli_epi32(sum, 8), q, _mm256_loadu_si256(bytes + 2));
        lanes = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(bfloat16(scale[g]) * x.step[g]), lanes);
    }
    float acc[8];
    _mm256_storeu_ps(acc, lanes);
    for (int i = 0; i < 8; i++) total += acc[i];
#else
    float acc[16] = {0}; /* sixteen lanes, added up once a row */
    for (long g = 0; g < groups; g++) {
        const uint8_t *byte = codes + 16 * g;
        const float *at = x.at + 32 * g;
        float s = bfloat16(scale[g]);
#pragma omp simd
        for (int i = 0; i < 16; i++) acc[i] += s * ((float)(byte[i] & 15) * at[i] + (float)(byte[i] >> 4) * at[16 + i]);
    }
    for (int i = 0; i < 16; i++) total += acc[i];
#endif
    return total;
}

void matvec_int4(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero_point, const float *x, float *y,
                 long rows, long columns, long tokens, int threads) {
    long groups = columns / 32, all = groups * tokens;
    float *floats = malloc(sizeof(float) * 34 * all);
    Inputs to = {floats, floats + all, floats + 2 * all, malloc(96 * all)};
    for (long g = 0; g < all; g++) prepare(x, to, g);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * columns > 400000) /* below, waking a thread costs more */
    for (long r = 0; r < rows; r++) {
        const uint8_t *zeros = zero_point ? zero_point + r * groups : NULL;
        for (long t = 0, at = 0; t < tokens; t++, at += groups) {
            Inputs token = {to.sum + at, to.step + at, to.at + 32 * at, to.bytes + 96 * at};
            y[t * rows + r] = row(codes + r * groups * 16, scale + r * groups, zeros, token, groups);
        }
    }
    free(to.bytes);
    free(floats);
}
