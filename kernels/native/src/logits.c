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

struct masked_argmax {
    const void *x;
    const uint32_t *words;
    int64_t size, pieces;
    int64_t *ids;
    float *values;
    int type;
};

enum { WORDS_A_PIECE = 1024 };

/* The best of the columns of one piece that the mask allows; the first of equals. */
PS_INLINE void masked_argmax_piece(const struct masked_argmax *a, int64_t piece, int type) {
    const int64_t first = piece * WORDS_A_PIECE, left = (a->size + 31) / 32 - first;
    const int64_t end = first + (left < WORDS_A_PIECE ? left : WORDS_A_PIECE);
    float best = -INFINITY;
    int64_t word_of_best = first;
    for (int64_t word = first; word < end; word++) {
        const uint32_t bits = a->words[word];
        if (!bits)
            continue;
        float here = -INFINITY;
        if (32 * word + 32 <= a->size) {
            vf high = v_set(-INFINITY);
            for (int part = 0; part < 32; part += PS_LANES)
                high = v_max(v_masked(t_load(a->x, 32 * word + part, type), bits >> part), high);
            here = v_highest(high);
        } else {
            for (int64_t i = 32 * word; i < a->size; i++)
                if (bits >> (i & 31) & 1) {
                    float v = t_get(a->x, i, type);
                    here = v > here ? v : here;
                }
        }
        if (here > best) {
            best = here;
            word_of_best = word;
        }
    }
    int64_t id = 32 * word_of_best;
    const int64_t last = id + 32 < a->size ? id + 32 : a->size;
    const uint32_t bits = a->words[word_of_best];
    while (id + 1 < last && !((bits >> (id & 31) & 1) && t_get(a->x, id, type) == best))
        id++;
    a->ids[piece] = id;
    a->values[piece] = best;
}

static void masked_argmax_task(void *context, int64_t piece) {
    const struct masked_argmax *a = context;
    if (a->type == PS_BF16)
        masked_argmax_piece(a, piece, PS_BF16);
    else
        masked_argmax_piece(a, piece, PS_F32);
}

/* x [size], words [ceil(size / 32)] -> ids int64 and values float32 of each piece of 32 * WORDS_A_PIECE
 * columns; a value of -inf where it has nothing. size > 0. */
PS_EXPORT int PS_FN(masked_argmax)(
    const void *x, const uint32_t *words, int64_t *ids, float *values, int64_t size, int type, int threads) {
    const int64_t num_words = (size + 31) / 32;
    struct masked_argmax a = {x, words, size, (num_words + WORDS_A_PIECE - 1) / WORDS_A_PIECE, ids, values, type};
    ps_parallel(masked_argmax_task, &a, a.pieces, threads);
    return PS_OK;
}

struct bitmask {
    float *x;
    const uint32_t *words;
    const int64_t *rows;
    int64_t size, stride, word_stride;
};

static void bitmask_row(void *context, int64_t task) {
    const struct bitmask *m = context;
    float *x = m->x + m->rows[task] * m->stride;
    const uint32_t *words = m->words + task * m->word_stride;
    const int64_t whole = m->size / 32;
    for (int64_t word = 0; word < whole; word++) {
        const uint32_t bits = words[word];
        if (bits == 0xffffffffu)
            continue;
        for (int part = 0; part < 32; part += PS_LANES) {
            float *p = x + 32 * word + part;
            v_store(p, v_masked(v_load(p), bits >> part));
        }
    }
    for (int64_t i = 32 * whole; i < m->size; i++)
        if (!(words[i / 32] >> (i & 31) & 1))
            x[i] = -INFINITY;
}

/* x[rows[n], i] = -inf where bit i of words[n] is 0: x rows of `size` columns every `stride`, words [count] rows
 * every `word_stride`; rows int64 [count], distinct. */
PS_EXPORT int PS_FN(apply_bitmask)(
    float *x, const uint32_t *words, const int64_t *rows, int64_t count, int64_t size, int64_t stride,
    int64_t word_stride, int threads) {
    struct bitmask m = {x, words, rows, size, stride, word_stride};
    ps_parallel(bitmask_row, &m, count, threads);
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
