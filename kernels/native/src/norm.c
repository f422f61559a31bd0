/* RMS and layer norm of rows, with an addition before them if wanted. */
#include "parallel.h"
#include "simd.h"

enum { ROWS_A_TASK = 4 };

struct norm {
    int64_t rows, size;
    const void *x;
    void *residual;
    const void *weight, *bias;
    void *out;
    float eps;
    int centred, type;
};

/* out = norm(x) or, with a residual, residual += x, out = norm(residual) */
PS_INLINE void norm_row(const struct norm *n, int64_t row, int centred, int type) {
    const int64_t size = n->size, whole = size / PS_LANES * PS_LANES, rest = size - whole;
    const size_t offset = (size_t)(row * size) * size_of(type);
    const char *x = (const char *)n->x + offset;
    char *out = (char *)n->out + offset;
    vf square = v_set(0), sum = v_set(0);
    if (n->residual) {
        char *residual = (char *)n->residual + offset;
        for (int64_t i = 0; i < whole; i += PS_LANES) {
            vf v = t_rounded(t_load(x, i, type) + t_load(residual, i, type), type);
            t_store(residual, i, v, type);
            square += v * v;
            sum += v;
        }
        if (rest) {
            vf v = t_load_part(x, whole, rest, type) + t_load_part(residual, whole, rest, type);
            v = t_rounded(v, type);
            t_store_part(residual, whole, v, rest, type);
            square += v * v;
            sum += v;
        }
        x = residual;
    } else {
        for (int64_t i = 0; i < whole; i += PS_LANES) {
            vf v = t_load(x, i, type);
            square += v * v;
            sum += v;
        }
        if (rest) {
            vf v = t_load_part(x, whole, rest, type);
            square += v * v;
            sum += v;
        }
    }
    float mean = centred ? v_sum(sum) / (float)size : 0;
    if (centred) { /* a second pass: the difference of two large numbers would not do */
        square = v_set(0);
        for (int64_t i = 0; i < whole; i += PS_LANES) {
            vf v = t_load(x, i, type) - mean;
            square += v * v;
        }
        for (int64_t i = whole; i < size; i++) {
            float v = t_get(x, i, type) - mean;
            square[0] += v * v;
        }
    }
    const float factor = 1.0f / sqrtf(v_sum(square) / (float)size + n->eps);
    const void *weight = n->weight, *bias = n->bias;
    for (int64_t i = 0; i < whole; i += PS_LANES) {
        vf v = (t_load(x, i, type) - mean) * factor;
        if (weight)
            v *= t_load(weight, i, type);
        if (bias)
            v += t_load(bias, i, type);
        t_store(out, i, v, type);
    }
    if (rest) {
        vf v = (t_load_part(x, whole, rest, type) - mean) * factor;
        if (weight)
            v *= t_load_part(weight, whole, rest, type);
        if (bias)
            v += t_load_part(bias, whole, rest, type);
        t_store_part(out, whole, v, rest, type);
    }
}

static void norm_rows(void *context, int64_t task) {
    const struct norm *n = context;
    int64_t end = (task + 1) * ROWS_A_TASK;
    for (int64_t row = task * ROWS_A_TASK; row < (end < n->rows ? end : n->rows); row++) {
        if (n->type == PS_BF16)
            n->centred ? norm_row(n, row, 1, PS_BF16) : norm_row(n, row, 0, PS_BF16);
        else
            n->centred ? norm_row(n, row, 1, PS_F32) : norm_row(n, row, 0, PS_F32);
    }
}

/* x, out [rows, size]; residual the same or null; weight and bias [size] or null; `centred` is layer norm. */
PS_EXPORT int PS_FN(norm)(
    const void *x, void *residual, const void *weight, const void *bias, void *out, int64_t rows, int64_t size,
    float eps, int centred, int type, int threads) {
    struct norm n = {rows, size, x, residual, weight, bias, out, eps, centred, type};
    ps_parallel(norm_rows, &n, (rows + ROWS_A_TASK - 1) / ROWS_A_TASK, threads);
    return PS_OK;
}
