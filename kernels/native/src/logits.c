/* Passes over rows of logits: the best of each, and weights of a softmax. */
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
