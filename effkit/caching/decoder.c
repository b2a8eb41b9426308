/* A decoder's work on a few tokens, with nothing between one product and the next.
 *
 * A model that writes one token reads every weight once; operators called one by one add to that what calling costs, and
 * a library's matrix product is made for many rows, not for one. Here a row of weights is read once and meets all
 * tokens while it is near.
 *
 * Every number of a result is summed in one order, however many tokens pass at once. So a block of tokens gives bit for
 * bit what its tokens give one by one, in bfloat16 too: verifying is repeating. (What passes here: fused.py sends longer
 * blocks elsewhere.)
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));

static inline float wide(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t narrow(float value) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float number(const void *at, long i, int half) { return half ? wide(((const uint16_t *)at)[i]) : ((const float *)at)[i]; }

/* LANES numbers, from float32 or bfloat16 */
static inline Vector load(const void *at, long i, int half) {
    Vector value;
    if (half) {
        Half part;
        memcpy(&part, (const uint16_t *)at + i, sizeof part);
        Bits bits = __builtin_convertvector(part, Bits) << 16;
        memcpy(&value, &bits, sizeof value);
    } else
        memcpy(&value, (const float *)at + i, sizeof value);
    return value;
}

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

static __attribute__((noinline)) float total(Vector v) { /* out of line: one order of adding for all who add up lanes */
    Eight eight[2];
    Four four[2];
    memcpy(eight, &v, sizeof v);
    eight[0] += eight[1];
    memcpy(four, eight, sizeof four);
    four[0] += four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

/* R rows of weights and T tokens: y[t][r] = sum w[r][i] x[t][i], the rows of y `wide` numbers apart */
#define TILE(R, T)                                                                                                        \
    static inline void tile##R##T(const void *w, long at, int half, const float *x, long n, float *y, long wide) {        \
        Vector sum[R][T] = {{{0}}}, next[R][T] = {{{0}}};                                                                 \
        long i = 0;                                                                                                       \
        for (; i + 2 * LANES <= n; i += 2 * LANES)                                                                        \
            for (int r = 0; r < R; r++) {                                                                                 \
                Vector a = load(w, at + r * n + i, half), b = load(w, at + r * n + i + LANES, half);                      \
                for (int t = 0; t < T; t++) {                                                                             \
                    sum[r][t] += a * load(x, t * n + i, 0);                                                               \
                    next[r][t] += b * load(x, t * n + i + LANES, 0);                                                      \
                }                                                                                                         \
            }                                                                                                             \
        for (int r = 0; r < R; r++)                                                                                       \
            for (int t = 0; t < T; t++) {                                                                                 \
                float rest = 0;                                                                                           \
                for (long j = i; j < n; j++) rest = fmaf(number(w, at + r * n + j, half), x[t * n + j], rest);            \
                y[t * wide + r] = total(sum[r][t] + next[r][t]) + rest;                                                   \
            }                                                                                                             \
    }
TILE(1, 1)
TILE(1, 4)
TILE(2, 1)
TILE(2, 4)

/* R rows of weights and all tokens */
#define ROWS(R)                                                                                                           \
    static void rows##R(const void *w, long r, int half, const float *x, long n, long tokens, float *y, long wide) {      \
        long t = 0;                                                                                                       \
        for (; t + 4 <= tokens; t += 4)                                                                                   \
            half ? tile##R##4(w, r * n, 1, x + t * n, n, y + t * wide, wide) : tile##R##4(w, r * n, 0, x + t * n, n, y + t * wide, wide); \
        for (; t < tokens; t++)                                                                                           \
            half ? tile##R##1(w, r * n, 1, x + t * n, n, y + t * wide, wide) : tile##R##1(w, r * n, 0, x + t * n, n, y + t * wide, wide); \
    }
ROWS(1)
ROWS(2)

/* y[t][r] = W x[t] for all rows, two at a time; the loop is shared by the threads of the region around it */
static void product_in(const void *w, long outputs, int half, const float *x, long n, long tokens, float *y, long wide) {
#pragma omp for schedule(static)
    for (long r = 0; r < outputs; r += 2)
        if (r + 2 <= outputs)
            rows2(w, r, half, x, n, tokens, y + r, wide);
        else
            rows1(w, r, half, x, n, tokens, y + r, wide);
}

/* e^x, to 2 units in the last place: 2^whole * e^rest, |rest| <= log(2) / 2. Loops over it become vectors. */
static inline float power(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float whole = rintf(x * 1.44269504f), rest = fmaf(whole, -0.693145752f, x);
    rest = fmaf(whole, -1.42860677e-6f, rest);
    float p = 1.98756915e-4f;
    p = fmaf(p, rest, 1.39819995e-3f);
    p = fmaf(p, rest, 8.33345205e-3f);
    p = fmaf(p, rest, 4.16657962e-2f);
    p = fmaf(p, rest, 1.66666653e-1f);
    p = fmaf(p, rest, 0.5f);
    p = fmaf(p * rest, rest, rest) + 1;
    uint32_t bits = (uint32_t)((int)whole + 127) << 23;
    float two;
    memcpy(&two, &bits, 4);
    return p * two;
}

static void normalize(const float *x, const void *weight, int half, float eps, long n, long tokens, float *y) {
    for (long t = 0; t < tokens; t++) {
        float squares;
        tile11(x, t * n, 0, x + t * n, n, &squares, 1);
        float scale = 1 / sqrtf(squares / n + eps);
        for (long i = 0; i < n; i++) y[t * n + i] = x[t * n + i] * scale * number(weight, i, half);
    }
}

/* Queries, keys and values of x, normalized: y (tokens, queries + 2 keys).  scratch: tokens * n floats */
void project(const float *x, const void *norm, float eps, const void *q, const void *k, const void *v, long queries, long keys,
             long n, long tokens, int half, int threads, float *scratch, float *y) {
    long all = queries + 2 * keys;
    normalize(x, norm, half, eps, n, tokens, scratch);
#pragma omp parallel num_threads(threads)
    {
        product_in(q, queries, half, scratch, n, tokens, y, all);
        product_in(k, keys, half, scratch, n, tokens, y + queries, all);
        product_in(v, keys, half, scratch, n, tokens, y + queries + keys, all);
    }
}

/* x += o a;  x += down (silu(gate norm(x)) * up norm(x)).  scratch: tokens * (2 n + 2 hidden) floats */
void finish(float *x, const float *a, const void *o, long heads, const void *norm, float eps, const void *gate, const void *up,
            const void *down, long hidden, long n, long tokens, int half, int threads, float *scratch) {
    float *added = scratch, *normal = added + tokens * n, *inner = normal + tokens * n, *other = inner + tokens * hidden;
#pragma omp parallel num_threads(threads)
    {
        product_in(o, n, half, a, heads, tokens, added, n);
#pragma omp single
        {
            for (long i = 0; i < tokens * n; i++) x[i] += added[i];
            normalize(x, norm, half, eps, n, tokens, normal);
        }
        product_in(gate, hidden, half, normal, n, tokens, inner, hidden);
        product_in(up, hidden, half, normal, n, tokens, other, hidden);
#pragma omp for schedule(static)
        for (long i = 0; i < tokens * hidden; i++) inner[i] = inner[i] / (1 + power(-inner[i])) * other[i];
        product_in(down, n, half, inner, hidden, tokens, added, n);
#pragma omp for schedule(static)
        for (long i = 0; i < tokens * n; i++) x[i] += added[i];
    }
}

/* y = W x alone: the output layer */
void product(const float *x, const void *w, long outputs, long n, long tokens, int half, int threads, float *y) {
#pragma omp parallel num_threads(threads)
    product_in(w, outputs, half, x, n, tokens, y, outputs);
}

static void rotate(const float *x, const float *cosine, const float *sine, long d, float *y) {
    for (long i = 0; i < d / 2; i++) {
        y[i] = x[i] * cosine[i] - x[i + d / 2] * sine[i];
        y[i + d / 2] = x[i + d / 2] * cosine[i + d / 2] + x[i] * sine[i + d / 2];
    }
}

static void put(void *where, long i, float value, int half) {
    if (half)
        ((uint16_t *)where)[i] = narrow(value);
    else
        ((float *)where)[i] = value;
}

/* Writes keys, rotated, and values of n new tokens behind `held` old ones, and lets the tokens look at all that they may.
 * x: (texts, n, (heads + 2 groups) d): queries, keys, values, as `project` leaves them; keys, values: (texts, groups, room, d);
 * mask: (n, held + n), or NULL for causal; out: (texts, n, heads d); scratch: texts * heads * (held + n + 2 d) floats */
void attend(const float *x, const float *cosine, const float *sine, void *keys, void *values, const uint8_t *mask, float *scratch,
            float *out, long texts, long heads, long groups, long n, long held, long room, long d, int half, int threads) {
    long m = held + n, all_heads = heads + 2 * groups;
    for (long b = 0; b < texts; b++)
        for (long g = 0; g < groups; g++)
            for (long i = 0; i < n; i++) {
                long at = ((b * groups + g) * room + held + i) * d;
                const float *key = x + ((b * n + i) * all_heads + heads + g) * d, *value = key + groups * d;
                rotate(key, cosine + i * d, sine + i * d, d, scratch);
                for (long c = 0; c < d; c++) put(keys, at + c, scratch[c], half);
                for (long c = 0; c < d; c++) put(values, at + c, value[c], half);
            }
    /* however little there is to do: fewer threads than the regions around it have would cost more than it saves */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < texts * heads; r++) {
        long b = r / heads, h = r % heads, from = (b * groups + h / (heads / groups)) * room * d;
        float *weight = scratch + r * (m + 2 * d), *query = weight + m, *sum = query + d;
        for (long i = 0; i < n; i++) {
            float largest = -INFINITY, all = 0;
            rotate(x + ((b * n + i) * all_heads + h) * d, cosine + i * d, sine + i * d, d, query);
            for (long c = 0; c < d; c++) query[c] /= sqrtf((float)d), sum[c] = 0;
            for (long j = 0; j < m; j++) {
                if (mask ? !mask[i * m + j] : j > held + i)
                    weight[j] = -INFINITY;
                else
                    rows1(keys, (from + j * d) / d, half, query, d, 1, weight + j, 1);
                largest = weight[j] > largest || weight[j] != weight[j] ? weight[j] : largest;
            }
            for (long j = 0; j < m; j++) weight[j] = weight[j] == -INFINITY ? 0 : power(weight[j] - largest);
            for (long j = 0; j < m; j++) {
                if (weight[j] == 0) continue; /* what is not seen does not count, whatever lies there */
                all += weight[j];
                for (long c = 0; c < d; c++) sum[c] = fmaf(weight[j], number(values, from + j * d + c, half), sum[c]);
            }
            for (long c = 0; c < d; c++) out[((b * n + i) * heads + h) * d + c] = sum[c] / all;
        }
    }
}

/* All blocks. weights: nine a block; sizes: queries, keys, hidden; eps: two a block; kept: keys and values a block.
 * room: for the largest block tokens * (2 queries + 2 keys) floats, and what the parts above call scratch */
void blocks(long count, const void **weights, const long *sizes, const float *eps, void **kept, const float *cosine, const float *sine,
            const uint8_t *mask, float *x, float *room, long texts, long n, long held, long capacity, long d, long width, int half, int threads) {
    long tokens = texts * n;
    for (long l = 0; l < count; l++, weights += 9, sizes += 3, eps += 2, kept += 2) {
        long queries = sizes[0], keys = sizes[1], hidden = sizes[2];
        float *qkv = room, *seen = qkv + tokens * (queries + 2 * keys), *scratch = seen + tokens * queries;
        project(x, weights[0], eps[0], weights[1], weights[2], weights[3], queries, keys, width, tokens, half, threads, scratch, qkv);
        attend(qkv, cosine, sine, kept[0], kept[1], mask, scratch, seen, texts, queries / d, keys / d, n, held, capacity, d, half, threads);
        finish(x, seen, weights[4], queries, weights[5], eps[1], weights[6], weights[7], weights[8], hidden, width, tokens, half, threads, scratch);
    }
}
