/* y = W x, token by token, for W in 4-bit codes, groups of 32 along a row: w = scale * (code - zero_point).
 *
 * Two codes a byte, the first in the low half. Scales are bfloat16: the upper half of a float32.
 *
 * Codes made floats cost more than the bytes that they save. Where the processor multiplies bytes (VNNI), x is split, once
 * for all rows, into three: x = step * X, X = 65536 high + 256 middle + low a whole number of 23 bits and a sign, so that x
 * is off by at most 2^-23 of the largest of its group (a group below 1e-30 becomes 0); and a group of weights is three products of bytes.
 *
 * The zero point: sum (code - zero_point) X = sum code X - zero_point * sum X. Where inputs lie on one side of 0 both parts
 * grow along a row, and their difference does not: as two totals of floats, each rounded at its own size, they lost up to 40
 * times what a product in float32 loses. So they are subtracted group by group, in whole numbers, which an int32 holds exactly
 * (four products of at most 15 * 2^23 each): nothing is rounded before it cancels. The sums of X are shared by all rows.
 *
 * A token that bytes cannot hold (infinite, not a number, far out of range) is multiplied in floats, code - zero_point first:
 * infinity times a weight of 0 is no number, times another it is infinite, as in a product of floats. So is every token where
 * the processor has no such products. Numbers of more than 1e37 may become infinite on the way. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#include <immintrin.h>
#define DOT _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#include <immintrin.h>
#define DOT _mm256_dpbusd_avx_epi32
#endif

/* 32 inputs, even positions first, as the halves of bytes lie: as they are, or as bytes and the sums of each four of them. */
typedef union {
    float at[32];
    struct {
        int8_t high[32], middle[32], low[32];
        int32_t sum[8];
    } bytes;
} Group;

/* What all rows share of a token. A step of 0 says that its groups are floats. */
typedef struct {
    Group *group;
    float *step;
} Token;

static float bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static void split(const float *at, Group *to, float *step) {
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = fabsf(at[i]) > largest ? fabsf(at[i]) : largest;
    *step = largest > 1e-30f ? largest / 8355000 : 1; /* three bytes hold 8355711 = 127 * (65536 + 256 + 1): room to round */
    memset(to->bytes.sum, 0, sizeof to->bytes.sum);
    for (int i = 0; i < 32; i++) {
        int whole = (int)(at[i] / *step + (at[i] < 0 ? -0.5f : 0.5f));
        to->bytes.sum[i / 4] += whole;
        to->bytes.low[i] = (int8_t)whole;
        whole = (whole - to->bytes.low[i]) >> 8;
        to->bytes.middle[i] = (int8_t)whole;
        to->bytes.high[i] = (int8_t)((whole - to->bytes.middle[i]) >> 8);
    }
}

static int fits_bytes(const float *x, long n) {
    float largest = 0;
    int numbers = 1;
    for (long i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        numbers &= size == size;
        largest = size > largest ? size : largest;
    }
    return numbers && (largest == 0 || (1e-20f < largest && largest < 1e36f));
}

static void prepare(const float *x, Token to, long groups) {
    int as_bytes = 0;
#ifdef DOT
    as_bytes = fits_bytes(x, 32 * groups);
#endif
    for (long g = 0; g < groups; g++) {
        float at[32];
        for (int i = 0; i < 32; i++) at[i] = x[32 * g + 2 * (i % 16) + i / 16];
        to.step[g] = 0;
        if (as_bytes) split(at, to.group + g, to.step + g);
        else memcpy(to.group[g].at, at, sizeof at);
    }
}

#ifdef DOT
static float bytes_row(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero_point, Token x, long groups) {
    const __m256i halves = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4), nibble = _mm256_set1_epi8(15);
    __m256 lanes = _mm256_setzero_ps();
    for (long g = 0; g < groups; g++, codes += 16) {
        const __m256i *bytes = (const __m256i *)(x.group + g);
        __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
        __m256i q = _mm256_and_si256(_mm256_srlv_epi32(twice, halves), nibble);
        __m256i sum = DOT(_mm256_setzero_si256(), q, _mm256_loadu_si256(bytes));
        sum = DOT(_mm256_slli_epi32(sum, 8), q, _mm256_loadu_si256(bytes + 1));
        sum = DOT(_mm256_slli_epi32(sum, 8), q, _mm256_loadu_si256(bytes + 2));
        __m256i zero = _mm256_set1_epi32(zero_point ? zero_point[g] : 8);
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, _mm256_loadu_si256(bytes + 3)));
        __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(x.step[g]));
        __m256i wide = _mm256_slli_epi32(_mm256_set1_epi16((short)scale[g]), 16); /* as in bfloat16() */
        lanes = _mm256_fmadd_ps(product, _mm256_castsi256_ps(wide), lanes);
    }
    float acc[8], total = 0;
    _mm256_storeu_ps(acc, lanes);
    for (int i = 0; i < 8; i++) total += acc[i];
    return total;
}
#endif

static float floats_row(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero_point, Token x, long groups) {
    float acc[16] = {0}, total = 0; /* sixteen lanes, added up once a row */
    for (long g = 0; g < groups; g++) {
        const uint8_t *byte = codes + 16 * g;
        const float *at = x.group[g].at;
        float s = bfloat16(scale[g]);
        int8_t zero = zero_point ? (int8_t)zero_point[g] : 8;
#pragma omp simd
        for (int i = 0; i < 16; i++) {
            int8_t first = (int8_t)((byte[i] & 15) - zero), second = (int8_t)((byte[i] >> 4) - zero);
            acc[i] += s * ((float)first * at[i] + (float)second * at[16 + i]);
        }
    }
    for (int i = 0; i < 16; i++) total += acc[i];
    return total;
}

static float row(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero_point, Token x, long groups) {
#ifdef DOT
    if (x.step[0] != 0) return bytes_row(codes, scale, zero_point, x, groups);
#endif
    return floats_row(codes, scale, zero_point, x, groups);
}

/* room: 33 floats for every 32 of x, of the caller, so that nothing here can fail. */
void matvec_int4(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero_point, const float *x, float *y, float *room,
                 long rows, long columns, long tokens, int threads) {
    long groups = columns / 32;
    Group *group = (Group *)room;
    float *step = room + 32 * groups * tokens;
    for (long t = 0; t < tokens; t++) prepare(x + t * columns, (Token){group + t * groups, step + t * groups}, groups);
    /* A token's bytes stay in the nearest cache for sixteen rows: 132 of them a group, against 19 of the codes. */
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * columns > 400000) /* below, waking a thread costs more */
    for (long first = 0; first < rows; first += 16)
        for (long t = 0; t < tokens; t++)
            for (long r = first; r < rows && r < first + 16; r++) {
                const uint8_t *zeros = zero_point ? zero_point + r * groups : NULL;
                Token token = {group + t * groups, step + t * groups};
                y[t * rows + r] = row(codes + r * groups * 16, scale + r * groups, zeros, token, groups);
            }
}
