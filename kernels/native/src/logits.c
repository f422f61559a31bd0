/* Passes over rows of logits: the best of each, masks, and weights of a softmax. */
#include "parallel.h"
#include "simd.h"

enum { COLUMNS_A_BLOCK = 1024 };

struct argmax {
    const void *x;
    int64_t size, stride;
    int64_t *ids;
    float *values;
    int type;
};

/* The largest element, the first of equals; a NaN anywhere makes the value NaN.
 * The maximum of each block first: only the block that holds the row's is looked through for its place. */
PS_INLINE void argmax_row(const struct argmax *a, int64_t row, int type) {
    const char *x = (const char *)a->x + (size_t)(row * a->stride) * size_of(type);
    float best = -INFINITY;
    int64_t block = 0;
    int has_nan = 0;
    for (int64_t first = 0; first < a->size; first += COLUMNS_A_BLOCK) {
        int64_t left = a->size - first, count = left < COLUMNS_A_BLOCK ? left : COLUMNS_A_BLOCK, i = 0;
        vf high = v_set(-INFINITY), second = high;
        vi ordered = (vi){0} - 1;
        for (; i + 2 * PS_LANES <= count; i += 2 * PS_LANES) {
            vf v = t_load(x, first + i, type), w = t_load(x, first + i + PS_LANES, type);
            ordered &= (v == v) & (w == w);
            high = v_max(v, high);
            second = v_max(w, second);
        }
        float here = v_highest(v_max(high, second));
        for (; i < count; i++) {
            float v = t_get(x, first + i, type);
            has_nan |= v != v;
            here = v > here ? v : here;
        }
        for (int lane = 0; lane < PS_LANES; lane++)
            has_nan |= !ordered[lane];
        if (here > best) {
            best = here;
            block = first;
        }
    }
    int64_t id = block, end = block + COLUMNS_A_BLOCK < a->size ? block + COLUMNS_A_BLOCK : a->size;
    while (id + 1 < end && !(t_get(x, id, type) == best))
        id++;
    a->ids[row] = id;
    a->values[row] = has_nan ? NAN : best;
}

static void argmax_task(void *context, int64_t row) {
    const struct argmax *a = context;
    if (a->type == PS_BF16)
        argmax_row(a, row, PS_BF16);
    else
        argmax_row(a, row, PS_F32);
}

/* x [rows, size], a row every `stride` elements -> ids int64 [rows], values float32 [rows]. size > 0. */
PS_EXPORT int PS_FN(argmax)(
    const void *x, int64_t *ids, float *values, int64_t rows, int64_t size, int64_t stride, int type, int threads) {
    struct argmax a = {x, size, stride, ids, values, type};
    ps_parallel(argmax_task, &a, rows, threads);
    return PS_OK;
}

/* A word of a mask has the bits of 32 columns. -inf where a lane's bit, from the lowest, is 0. */
PS_INLINE vf v_masked(vf v, uint32_t bits) {
#if PS_LANES == 16
    return (vf)_mm512_mask_mov_ps((__m512)v_set(-INFINITY), (__mmask16)bits, (__m512)v);
#else
    vi numbers;
    for (int lane = 0; lane < PS_LANES; lane++)
        numbers[lane] = lane;
    return v_select((((vi){0} + (int32_t)bits) >> numbers & 1) != 0, v, v_set(-INFINITY));
#endif
}

struct masked {
    const void *x;
    const int64_t *rows, *masks;
    const uint32_t *words;
    float *out;
    int64_t size, stride, word_stride, width, pieces;
    int64_t *ids;
    float *values;
    int type;
};

enum { WORDS_A_PIECE = 1024 };

/* The best of the columns of one piece of one row that its mask allows; the first of equals. With `copy` the
 * masked columns go to `out`, and with the row's last piece -inf for the columns beyond its size. */
PS_INLINE void masked_piece(const struct masked *m, int64_t task, int type, int copy) {
    const int64_t n = task / m->pieces, first = task % m->pieces * WORDS_A_PIECE;
    const int64_t left = (m->size + 31) / 32 - first;
    const int64_t end = first + (left < WORDS_A_PIECE ? left : WORDS_A_PIECE);
    const char *x = (const char *)m->x + (size_t)(m->rows[n] * m->stride) * size_of(type);
    const uint32_t *words = m->masks[n] < 0 ? 0 : m->words + m->masks[n] * m->word_stride;
    float *out = copy ? m->out + n * m->width : 0;
    float best = -INFINITY;
    int64_t word_of_best = first;
    for (int64_t word = first; word < end; word++) {
        const uint32_t bits = words ? words[word] : 0xffffffffu;
        if (!copy && !bits)
            continue;
        float here = -INFINITY;
        if (32 * word + 32 <= m->size) {
            vf high = v_set(-INFINITY);
            for (int part = 0; part < 32; part += PS_LANES) {
                vf v = v_masked(t_load(x, 32 * word + part, type), bits >> part);
                if (copy)
                    v_store(out + 32 * word + part, v);
                high = v_max(v, high);
            }
            here = v_highest(high);
        } else {
            for (int64_t i = 32 * word; i < m->size; i++) {
                float v = bits >> (i & 31) & 1 ? t_get(x, i, type) : -INFINITY;
                if (copy)
                    out[i] = v;
                here = v > here ? v : here;
            }
        }
        if (here > best) {
            best = here;
            word_of_best = word;
        }
    }
    if (copy && first + left == end)
        for (int64_t i = m->size; i < m->width; i++)
            out[i] = -INFINITY;
    int64_t id = 32 * word_of_best;
    const int64_t last = id + 32 < m->size ? id + 32 : m->size;
    const uint32_t bits = words ? words[word_of_best] : 0xffffffffu;
    while (id + 1 < last && !((bits >> (id & 31) & 1) && t_get(x, id, type) == best))
        id++;
    m->ids[task] = id;
    m->values[task] = best;
}

static void masked_task(void *context, int64_t task) {
    const struct masked *m = context;
    if (m->type == PS_BF16)
        m->out ? masked_piece(m, task, PS_BF16, 1) : masked_piece(m, task, PS_BF16, 0);
    else
        m->out ? masked_piece(m, task, PS_F32, 1) : masked_piece(m, task, PS_F32, 0);
}

/* The best id and value of each of `count` rows of x [., size], row n being rows[n], a row every `stride`
 * elements, among the columns whose bit in row masks[n] of `words`, one every `word_stride`, is 1; all where
 * masks[n] < 0. With `out` [count, width] these columns are copied there, and -inf stands for the others.
 * ids, values have room for the pieces of 32 * WORDS_A_PIECE columns of all rows; the first `count` are the
 * results, a value of -inf where a row has nothing. size > 0, without NaN. */
PS_EXPORT int PS_FN(masked_rows)(
    const void *x, const int64_t *rows, const int64_t *masks, const uint32_t *words, float *out, int64_t *ids,
    float *values, int64_t count, int64_t size, int64_t stride, int64_t word_stride, int64_t width, int type,
    int threads) {
    const int64_t pieces = ((size + 31) / 32 + WORDS_A_PIECE - 1) / WORDS_A_PIECE;
    struct masked m = {x, rows, masks, words, out, size, stride, word_stride, width, pieces, ids, values, type};
    ps_parallel(masked_task, &m, count * pieces, threads);
    for (int64_t n = 0; n < count; n++) {
        int64_t best = n * pieces;
        for (int64_t piece = best + 1; piece < (n + 1) * pieces; piece++)
            best = values[piece] > values[best] ? piece : best;
        ids[n] = ids[best];
        values[n] = values[best];
    }
    return PS_OK;
}

enum { COLUMNS_A_TASK = 1 << 15 };

struct weights {
    float *x;
    const float *best, *temperature;
    int64_t size, stride, pieces;
};

static void weigh_piece(void *context, int64_t task) {
    const struct weights *w = context;
    const int64_t row = task / w->pieces, first = task % w->pieces * COLUMNS_A_TASK;
    const int64_t left = w->size - first, count = left < COLUMNS_A_TASK ? left : COLUMNS_A_TASK;
    float *x = w->x + row * w->stride + first;
    const vf best = v_set(w->best[row]), factor = v_set(1.44269504f / w->temperature[row]);
    int64_t i = 0;
    for (; i + PS_LANES <= count; i += PS_LANES)
        v_store(x + i, v_exp2((v_load(x + i) - best) * factor));
    if (i < count) {
        vf v = t_load_part(x, i, count - i, PS_F32);
        t_store_part(x, i, v_exp2((v - best) * factor), count - i, PS_F32);
    }
}

/* x = exp((x - best) / temperature) in place: x [rows, size], a row every `stride` elements; best, temperature
 * [rows], best the maximum of its row. */
PS_EXPORT int PS_FN(to_weights)(
    float *x, const float *best, const float *temperature, int64_t rows, int64_t size, int64_t stride, int threads) {
    struct weights w = {x, best, temperature, size, stride, (size + COLUMNS_A_TASK - 1) / COLUMNS_A_TASK};
    ps_parallel(weigh_piece, &w, rows * w.pieces, threads);
    return PS_OK;
}
