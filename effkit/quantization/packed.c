/* y = W x for W in 4-bit codes, groups of 32 along a row: w = scale * (code - zero_point).
 *
 * Inside a group, sum w x = scale * (sum code x - zero_point * sum x), so the codes are only converted and multiplied;
 * scale and zero point enter once a group, and the sums of x are shared by all rows.
 * Two codes a byte, the first in the low half. Scales are bfloat16: the upper half of a float32. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static float bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

void matvec_int4(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero_point, const float *x, float *y,
                 long rows, long columns, int threads) {
    long groups = columns / 32;
    float *even_odd = malloc(sizeof(float) * columns); /* x of a group, even positions first: matches low and high halves */
    float *sums = malloc(sizeof(float) * groups);
    for (long g = 0; g < groups; g++) {
        float sum = 0;
        for (int i = 0; i < 16; i++) {
            even_odd[32 * g + i] = x[32 * g + 2 * i];
            even_odd[32 * g + 16 + i] = x[32 * g + 2 * i + 1];
            sum += x[32 * g + 2 * i] + x[32 * g + 2 * i + 1];
        }
        sums[g] = sum;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * columns > 400000) /* below, waking a thread costs more */
    for (long r = 0; r < rows; r++) {
        float acc[16] = {0}, total = 0; /* sixteen lanes, added up once a row */
        for (long g = 0; g < groups; g++) {
            const uint8_t *byte = codes + (r * groups + g) * 16;
            const float *xs = even_odd + 32 * g;
            float s = bfloat16(scale[r * groups + g]);
#pragma omp simd
            for (int i = 0; i < 16; i++)
                acc[i] += s * ((float)(byte[i] & 15) * xs[i] + (float)(byte[i] >> 4) * xs[16 + i]);
            total -= s * (zero_point ? zero_point[r * groups + g] : 8) * sums[g];
        }
        for (int i = 0; i < 16; i++) total += acc[i];
        y[r] = total;
    }
    free(even_odd);
    free(sums);
}
