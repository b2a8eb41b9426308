/* A decoder's work on a few tokens, with nothing between one product and the next.
 *
 * A model that writes one token reads every weight once; operators called one by one add to that what calling costs, and
 * a library's matrix product is made for many rows, not for one. Here a row of weights is read once and meets all
 * tokens while it is near.
 *
 * Every number of a result is summed in one order, however many tokens pass at once. So a block of tokens gives bit for
 * bit what its tokens give one by one, in bfloat16 too: verifying is repeating. (fused.py sends some longer blocks
 * elsewhere.)
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined __AVX512F__ || defined __FMA__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));

/* Numbers are held as float32 (0), as bfloat16 (1), or, those of matrices, in few bits (2): of GROUP of them first a scale and an
 * offset in float32, then codes of 4 bits, the first in the lowest bits */
#define GROUP 32
#define BLOCK (8 + GROUP / 2)

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

/* sum + a b, rounded once: GCC on some processors rounds twice in a loop with a single sum, and once where there are several, and
 * then one token would not give what a block gives */
static inline Vector plus(Vector sum, Vector a, Vector b) {
#ifdef __AVX512F__
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined __FMA__
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

static inline long bytes(long numbers, int kind) { return kind == 2 ? numbers / GROUP * BLOCK : (kind ? 2 : 4) * numbers; }

/* LANES numbers from the c-th behind the i-th; where bits are few, a group begins at i */
static inline Vector load(const void *at, long i, long c, int kind) {
    Vector value;
    if (kind == 2) {
        const char *group = (const char *)at + bytes(i, 2);
        float scale, offset;
        uint32_t eight[LANES / 8];
        memcpy(&scale, group, 4);
        memcpy(&offset, group + 4, 4);
        memcpy(eight, group + 8 + c / 2, sizeof eight);
#ifdef __AVX512F__
        Bits codes = (Bits){eight[0], eight[0], eight[0], eight[0], eight[0], eight[0], eight[0], eight[0],
                            eight[1], eight[1], eight[1], eight[1], eight[1], eight[1], eight[1], eight[1]};
        codes = codes >> (Bits){0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28} & 15;
#else
        Bits codes = ((Bits){0} + eight[0]) >> (Bits){0, 4, 8, 12, 16, 20, 24, 28} & 15;
#endif
        value = plus((Vector){0} + offset, __builtin_convertvector((Whole)codes, Vector), (Vector){0} + scale);
    } else if (kind) {
#ifdef __AVX512F__ /* one instruction, where GCC makes four of the lines below, or six */
        Bits bits = (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)((const uint16_t *)at + i + c))) << 16;
#elif defined __AVX2__ && defined __FMA__
        Bits bits = (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)at + i + c))) << 16;
#else
        Half part;
        memcpy(&part, (const uint16_t *)at + i + c, sizeof part);
        Bits bits = __builtin_convertvector(part, Bits) << 16;
#endif
        memcpy(&value, &bits, sizeof value);
    } else
        memcpy(&value, (const float *)at + i + c, sizeof value);
    return value;
}

/* Fewer than LANES, and zeros behind them: what is left of a row is summed as the row was, and no compiler finds an order of its own */
static __attribute__((noinline)) Vector part(const void *at, long i, long some, int half) {
    float each[LANES] = {0};
    for (long j = 0; j < some; j++) each[j] = number(at, i + j, half);
    return load(each, 0, 0, 0);
}

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Places __attribute__((vector_size(16)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Places){__VA_ARGS__})
#endif

/* lanes i, i + 4 and so on added up */
static inline Four quarter(const Vector *v) {
    Eight eight[LANES / 8];
    Four four[2];
    memcpy(eight, v, sizeof eight);
    for (int i = 1; i < LANES / 8; i++) eight[0] += eight[i];
    memcpy(four, eight, sizeof four);
    return four[0] + four[1];
}

/* lanes 0 and 2, and 1 and 3, of each added up: a, b, a, b */
static inline Four halves(Four a, Four b) { return PICK(a, b, 0, 4, 1, 5) + PICK(a, b, 2, 6, 3, 7); }

/* y[k] = the sum of the lanes of v[k], four of them at once. There is one copy of this code, so that all who add up lanes do it
 * in one order. */
static __attribute__((noinline, noclone)) void totals(const Vector *v, long count, float *y) {
    for (long k = 0; k < count; k += 4) {
        Four ab = halves(quarter(v + k), quarter(v + k + 1)), cd = halves(quarter(v + k + 2), quarter(v + k + 3));
        ab = PICK(ab, cd, 0, 1, 4, 5) + PICK(ab, cd, 2, 3, 6, 7);
        memcpy(y + k, &ab, sizeof ab);
    }
}

/* R rows of weights and T tokens: y[t][r] = (add ? y[t][r] : 0) + sum w[r][i] x[t][i], the rows of y `wide` numbers apart. The sums
 * stay in registers as long as every index of theirs is known to the compiler: so the tail's loop, too, is unrolled */
#define TILE(R, T)                                                                                                        \
    static inline void tile##R##T(const void *w, long at, int kind, const float *x, long n, float *y, long wide, int add) { \
        Vector sum[T][R], lanes[(R * T + 3) / 4 * 4];                                                                     \
        float all[(R * T + 3) / 4 * 4];                                                                                   \
        for (int k = 0; k < R * T; k++) sum[k / R][k % R] = (Vector){0};                                                  \
        long i = 0, step = kind == 2 ? GROUP : LANES;                                                                     \
        for (; i + step <= n; i += step) {                                                                                \
            for (int r = 0; r < R; r++) /* what comes next but one: rows are too short for the processor to foresee */    \
                __builtin_prefetch((const char *)w + bytes(at + (r + 2 * R) * n + i, kind));                              \
            for (long c = 0; c < step; c += LANES)                                                                        \
                for (int r = 0; r < R; r++) {                                                                             \
                    Vector a = load(w, at + r * n + i, c, kind);                                                          \
                    for (int t = 0; t < T; t++) sum[t][r] = plus(sum[t][r], a, load(x, t * n + i, c, 0));                 \
                }                                                                                                         \
        }                                                                                                                 \
        if (i < n)                                                                                                        \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) {                                                         \
                Vector a = part(w, at + r * n + i, n - i, kind);                                                          \
                for (int t = 0; t < T; t++) sum[t][r] = plus(sum[t][r], a, part(x, t * n + i, n - i, 0));                 \
            }                                                                                                             \
        for (int k = R * T; k < (R * T + 3) / 4 * 4; k++) lanes[k] = (Vector){0};                                         \
        for (int k = 0; k < R * T; k++) lanes[k] = sum[k / R][k % R];                                                     \
        totals(lanes, R * T, all);                                                                                        \
        for (int t = 0; t < T; t++)                                                                                       \
            for (int r = 0; r < R; r++) y[t * wide + r] = add ? y[t * wide + r] + all[t * R + r] : all[t * R + r];        \
    }
TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(1, 4) TILE(1, 5) TILE(1, 6) TILE(4, 1) TILE(4, 2) TILE(4, 3) TILE(4, 4)
#ifdef __AVX512F__
TILE(4, 5) TILE(4, 6)
#else /* sixteen registers hold the sums of six tokens for two rows, not for four */
#define TWICE(T)                                                                                                          \
    static inline void tile4##T(const void *w, long at, int kind, const float *x, long n, float *y, long wide, int add) { \
        tile2##T(w, at, kind, x, n, y, wide, add);                                                                        \
        tile2##T(w, at + 2 * n, kind, x, n, y + 2, wide, add);                                                            \
    }
TILE(2, 5) TILE(2, 6) TWICE(5) TWICE(6)
#endif
#define MOST 6 /* tokens that meet a row at once */

/* R rows of weights and all tokens, in as few parts as can be */
#define SOME(R, T)                                                                                                        \
    case T:                                                                                                               \
        kind == 2 ? tile##R##T(w, r * n, 2, x, n, y, wide, add)                                                           \
        : kind    ? tile##R##T(w, r * n, 1, x, n, y, wide, add)                                                           \
                  : tile##R##T(w, r * n, 0, x, n, y, wide, add);                                                          \
        break;
#define ROWS(R)                                                                                                           \
    static void rows##R(const void *w, long r, int kind, const float *x, long n, long tokens, float *y, long wide, int add) { \
        for (long parts = (tokens + MOST - 1) / MOST, some; parts > 0; parts--, tokens -= some, x += some * n, y += some * wide) \
            switch (some = (tokens + parts - 1) / parts) { SOME(R, 1) SOME(R, 2) SOME(R, 3) SOME(R, 4) SOME(R, 5) SOME(R, 6) } \
    }
ROWS(1)
ROWS(4)

/* Which of n things are this thread's; of rows, four by four */
typedef struct {
    long from, to;
} Share;

static Share share(long n, long step) {
    long threads = omp_get_num_threads(), each = ((n + step - 1) / step + threads - 1) / threads * step, from = omp_get_thread_num() * each;
    return (Share){from < n ? from : n, from + each < n ? from + each : n};
}

/* y[t][r] = W x[t], or added to it, for this thread's rows: several products in a row need nobody to wait */
static void product_in(const void *w, long outputs, int kind, const float *x, long n, long tokens, float *y, long wide, int add) {
    Share mine = share(outputs, 4);
    long r = mine.from;
    for (; r + 4 <= mine.to; r += 4) rows4(w, r, kind, x, n, tokens, y + r, wide, add);
    for (; r < mine.to; r++) rows1(w, r, kind, x, n, tokens, y + r, wide, add);
}

/* e^x of -87 to 88, to 2 units in the last place: 2^whole * e^rest, |rest| <= log(2) / 2. Loops over it become vectors. */
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

static void normalize(const float *x, const void *weight, int half, float eps, long n, long tokens, float *y) { /* y may be x */
    for (long t = 0; t < tokens; t++) {
        float squares;
        tile11(x, t * n, 0, x + t * n, n, &squares, 1, 0);
        float scale = 1 / sqrtf(squares / n + eps);
        for (long i = 0; i < n; i++) y[t * n + i] = x[t * n + i] * scale * number(weight, i, half);
    }
}

void last_norm(float *x, const void *weight, int half, float eps, long n, long tokens) { normalize(x, weight, half, eps, n, tokens, x); }

/* What follows with _in is called by every thread of a region, each doing its share; who reads what others wrote waits before.
 * What is cheap, such as a norm, each does for itself: `scratch` begins with tokens * n floats a thread. */

/* Queries, keys and values of x, normalized: y (tokens, queries + 2 keys) */
static void project_in(const float *x, const void *norm, float eps, const void *q, const void *k, const void *v, long queries, long keys,
                       long n, long tokens, int half, int kind, float *scratch, float *y) {
    float *normal = scratch + omp_get_thread_num() * tokens * n;
    long all = queries + 2 * keys;
    normalize(x, norm, half, eps, n, tokens, normal);
    product_in(q, queries, kind, normal, n, tokens, y, all, 0);
    product_in(k, keys, kind, normal, n, tokens, y + queries, all, 0);
    product_in(v, keys, kind, normal, n, tokens, y + queries + keys, all, 0);
}

/* x += o a;  x += down (silu(gate norm(x)) * up norm(x)).  scratch: 2 * tokens * hidden floats more */
static void finish_in(float *x, const float *a, const void *o, long heads, const void *norm, float eps, const void *gate, const void *up,
                      const void *down, long hidden, long n, long tokens, int half, int kind, float *scratch) {
    float *normal = scratch + omp_get_thread_num() * tokens * n;
    float *inner = scratch + omp_get_num_threads() * tokens * n, *other = inner + tokens * hidden;
    product_in(o, n, kind, a, heads, tokens, x, n, 1);
#pragma omp barrier
    normalize(x, norm, half, eps, n, tokens, normal);
    product_in(gate, hidden, kind, normal, n, tokens, inner, hidden, 0);
    product_in(up, hidden, kind, normal, n, tokens, other, hidden, 0);
    Share mine = share(hidden, 4); /* the rows that it made */
    for (long t = 0; t < tokens; t++)
        for (long i = t * hidden + mine.from; i < t * hidden + mine.to; i++) inner[i] = inner[i] / (1 + power(-inner[i])) * other[i];
#pragma omp barrier
    product_in(down, n, kind, inner, hidden, tokens, x, n, 1);
}

void project(const float *x, const void *norm, float eps, const void *q, const void *k, const void *v, long queries, long keys,
             long n, long tokens, int half, int kind, int threads, float *scratch, float *y) {
#pragma omp parallel num_threads(threads)
    project_in(x, norm, eps, q, k, v, queries, keys, n, tokens, half, kind, scratch, y);
}

void finish(float *x, const float *a, const void *o, long heads, const void *norm, float eps, const void *gate, const void *up,
            const void *down, long hidden, long n, long tokens, int half, int kind, int threads, float *scratch) {
#pragma omp parallel num_threads(threads)
    finish_in(x, a, o, heads, norm, eps, gate, up, down, hidden, n, tokens, half, kind, scratch);
}

/* y = W x alone: the output layer */
void product(const float *x, const void *w, long outputs, long n, long tokens, int kind, int threads, float *y) {
#pragma omp parallel num_threads(threads)
    product_in(w, outputs, kind, x, n, tokens, y, outputs, 0);
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

/* What m scores become: their chances, all still to be divided by their sum; 0 where nothing is seen */
static void chances(float *score, long m, const uint8_t *mask, long last) {
    float largest = -INFINITY;
    for (long j = 0; j < m; j++) score[j] = (mask ? mask[j] : j <= last) ? score[j] : -INFINITY;
    for (long j = 0; j < m; j++) largest = score[j] > largest ? score[j] : largest;
    for (long j = 0; j < m; j++) score[j] = score[j] == -INFINITY ? 0 : power(score[j] - largest);
}

/* The sums of four queries' m chances each, one by one from the first to the last, so that what lies unseen between changes nothing */
static Four sums(const float *chance, long m) {
    Four all = {0};
    for (long j = 0; j < m; j++) all += (Four){chance[j], chance[m + j], chance[2 * m + j], chance[3 * m + j]};
    return all;
}

/* sum chance[j] value[j] of four queries, LANES numbers of it; what has no chance does not count, whatever lies there */
static inline void mix(const void *values, long from, int half, const float *chance, long m, long d, long c, Vector *sum) {
    Vector four[4] = {{0}};
    for (long j = 0; j < m; j++) {
        Vector value = load(values, from + j * d, c, half);
        for (int t = 0; t < 4; t++)
            if (chance[t * m + j] != 0) four[t] += chance[t * m + j] * value;
    }
    memcpy(sum, four, sizeof four);
}

/* Writes keys, rotated, and values of n new tokens of text b behind its held[b] old ones, and lets the tokens look at all that they
 * may, four at a time. x: (texts, n, (heads + 2 groups) d): queries, keys, values, as `project` leaves them; cosine, sine: (n, d),
 * one behind the other for each text where `ragged`; keys, values: (texts, groups, room, d); mask: (n, held[0] + n), or NULL for
 * causal; out: (texts, n, heads d); scratch: texts * heads * 4 * (d + n + the largest of held) floats */
static void attend_in(const float *x, const float *cosine, const float *sine, void *keys, void *values, const uint8_t *mask, float *scratch,
                      float *out, long texts, long heads, long groups, long n, const long *held, int ragged, long room, long d, int half) {
    long most = 0, all_heads = heads + 2 * groups;
    for (long b = 0; b < texts; b++) most = held[b] + n > most ? held[b] + n : most;
    Share mine = share(texts * groups, 1);
    for (long g = mine.from; g < mine.to; g++)
        for (long i = 0, b = g / groups, at = ragged ? b * n * d : 0; i < n; i++) {
            const float *key = x + ((b * n + i) * all_heads + heads + g % groups) * d, *value = key + groups * d;
            float *turned = scratch + g * 4 * (most + d);
            rotate(key, cosine + at + i * d, sine + at + i * d, d, turned);
            for (long c = 0; c < d; c++) put(keys, (g * room + held[b] + i) * d + c, turned[c], half);
            for (long c = 0; c < d; c++) put(values, (g * room + held[b] + i) * d + c, value[c], half);
        }
#pragma omp barrier
    mine = share(texts * heads, 1);
    for (long r = mine.from; r < mine.to; r++) {
        long b = r / heads, h = r % heads, from = (b * groups + h / (heads / groups)) * room * d, at = ragged ? b * n * d : 0;
        float *score = scratch + r * 4 * (most + d), *query = score + 4 * most;
        for (long i = 0; i < n; i += 4) {
            long some = n - i < 4 ? n - i : 4, m = held[b] + (mask ? n : i + some), j = 0, c = 0; /* what comes later is not seen */
            float *place = out + ((b * n + i) * heads + h) * d;
            for (long t = 0; t < some; t++) {
                rotate(x + ((b * n + i + t) * all_heads + h) * d, cosine + at + (i + t) * d, sine + at + (i + t) * d, d, query + t * d);
                for (c = 0; c < d; c++) query[t * d + c] /= sqrtf((float)d);
            }
            for (; j + 4 <= m; j += 4) rows4(keys, from / d + j, half, query, d, some, score + j, m, 0);
            for (; j < m; j++) rows1(keys, from / d + j, half, query, d, some, score + j, m, 0);
            memset(score + some * m, 0, (4 - some) * m * sizeof *score);
            for (long t = 0; t < some; t++) chances(score + t * m, m, mask ? mask + (i + t) * m : NULL, held[b] + i + t);
            Four all = sums(score, m);
            for (c = 0; c + LANES <= d; c += LANES) {
                Vector sum[4];
                half ? mix(values, from, 1, score, m, d, c, sum) : mix(values, from, 0, score, m, d, c, sum);
                for (long t = 0; t < some; t++) {
                    sum[t] /= all[t];
                    memcpy(place + t * heads * d + c, sum + t, sizeof *sum);
                }
            }
            for (; c < d; c++)
                for (long t = 0; t < some; t++) {
                    float sum = 0;
                    for (j = 0; j < m; j++)
                        if (score[t * m + j] != 0) sum = fmaf(score[t * m + j], number(values, from + j * d + c, half), sum);
                    place[t * heads * d + c] = sum / all[t];
                }
        }
    }
}

/* All blocks, in one region: waking threads costs more than what a small block has to do. weights: nine a block; sizes: queries,
 * keys, hidden; eps: two a block; kept: keys and values a block; held: tokens of each text. room: for the largest block tokens * (2 queries + 2 keys) floats,
 * and what the parts above call scratch */
void blocks(long count, const void **weights, const long *sizes, const float *eps, void **kept, const float *cosine, const float *sine,
            const uint8_t *mask, float *x, float *room, const long *held, int ragged, long texts, long n, long capacity, long d, long width, int half,
            int kind, int threads) {
    long tokens = texts * n;
#pragma omp parallel num_threads(threads)
    for (long l = 0; l < count; l++) {
        const void **w = weights + 9 * l;
        long queries = sizes[3 * l], keys = sizes[3 * l + 1], hidden = sizes[3 * l + 2];
        float *qkv = room, *seen = qkv + tokens * (queries + 2 * keys), *scratch = seen + tokens * queries;
        project_in(x, w[0], eps[2 * l], w[1], w[2], w[3], queries, keys, width, tokens, half, kind, scratch, qkv);
#pragma omp barrier
        attend_in(qkv, cosine, sine, kept[2 * l], kept[2 * l + 1], mask, scratch, seen, texts, queries / d, keys / d, n, held, ragged, capacity, d, half);
#pragma omp barrier
        finish_in(x, seen, w[4], queries, w[5], eps[2 * l + 1], w[6], w[7], w[8], hidden, width, tokens, half, kind, scratch);
#pragma omp barrier
    }
}
