/* Activations of rows: silu and gelu times the second half of a row, and gelu alone. */
#include "parallel.h"
#include "simd.h"

enum { COLUMNS_A_TASK = 4096 };
enum { SILU_MUL, GELU_MUL, GELU };

struct rows {
    int64_t rows, size, out_stride, pieces;
    const void *x;
    void *out;
    int type, kind;
};

PS_INLINE vf silu(vf x) {
    vf power = x * v_set(-1.44269504f);
    const vi far = power > v_set(126.0f); /* v_exp2 ends there, and the quotient is 0 */
    vf value = x / (v_set(1.0f) + v_exp2(v_select(far, v_set(0), power)));
    return v_select(far, x * v_set(0), value);
}

/* x * Phi(x) by the complement of the error function of |x| / sqrt(2), to 1.5e-7 (Abramowitz and Stegun, 7.1.26);
 * taken from x where x is positive, so that the tail of a negative one loses nothing. */
PS_INLINE vf gelu(vf x) {
    vf z = v_select(x < v_set(0), -x, x) * v_set(0.70710678f);
    vf t = v_set(1.0f) / (v_set(1.0f) + z * v_set(0.3275911f));
    vf y = v_set(1.061405429f);
    y = y * t + v_set(-1.453152027f);
    y = y * t + v_set(1.421413741f);
    y = y * t + v_set(-0.284496736f);
    y = y * t + v_set(0.254829592f);
    vf power = z * z * v_set(-1.44269504f);
    vf tail = x * v_set(0.5f) * y * t * v_exp2(power);
    return v_select(x < v_set(0), tail, x - tail);
}

PS_INLINE vf activated(int kind, vf x, vf up) {
    if (kind == GELU)
        return gelu(x);
    return (kind == SILU_MUL ? silu(x) : gelu(x)) * up;
}

PS_INLINE void activate_piece(const struct rows *s, int64_t task, int type, int kind) {
    const int64_t row = task / s->pieces, first = task % s->pieces * COLUMNS_A_TASK;
    const int64_t left = s->size - first, count = left < COLUMNS_A_TASK ? left : COLUMNS_A_TASK;
    const int64_t width = kind == GELU ? s->size : 2 * s->size;
    const char *x = (const char *)s->x + (size_t)(row * width + first) * size_of(type);
    const char *up = kind == GELU ? x : x + (size_t)s->size * size_of(type);
    char *out = (char *)s->out + (size_t)(row * s->out_stride + first) * size_of(type);
    int64_t i = 0;
    for (; i + PS_LANES <= count; i += PS_LANES)
        t_store(out, i, activated(kind, t_load(x, i, type), t_load(up, i, type)), type);
    if (i < count) {
        vf v = activated(kind, t_load_part(x, i, count - i, type), t_load_part(up, i, count - i, type));
        t_store_part(out, i, v, count - i, type);
    }
}

PS_INLINE void activate_kind(const struct rows *s, int64_t task, int kind) {
    s->type == PS_BF16 ? activate_piece(s, task, PS_BF16, kind) : activate_piece(s, task, PS_F32, kind);
}

static void activate(void *context, int64_t task) {
    const struct rows *s = context;
    if (s->kind == SILU_MUL)
        activate_kind(s, task, SILU_MUL);
    else if (s->kind == GELU_MUL)
        activate_kind(s, task, GELU_MUL);
    else
        activate_kind(s, task, GELU);
}

static int run(
    int kind, const void *x, void *out, int64_t rows, int64_t size, int64_t out_stride, int type, int threads) {
    struct rows s = {rows, size, out_stride, (size + COLUMNS_A_TASK - 1) / COLUMNS_A_TASK, x, out, type, kind};
    ps_parallel(activate, &s, rows * s.pieces, threads);
    return PS_OK;
}

/* x [rows, 2 * size] -> out [rows, size], rows `out_stride` elements apart */
PS_EXPORT int PS_FN(silu_mul)(
    const void *x, void *out, int64_t rows, int64_t size, int64_t out_stride, int type, int threads) {
    return run(SILU_MUL, x, out, rows, size, out_stride, type, threads);
}

/* As silu_mul. */
PS_EXPORT int PS_FN(gelu_mul)(
    const void *x, void *out, int64_t rows, int64_t size, int64_t out_stride, int type, int threads) {
    return run(GELU_MUL, x, out, rows, size, out_stride, type, threads);
}

/* x [rows, size] -> out [rows, size], which may be x */
PS_EXPORT int PS_FN(gelu)(const void *x, void *out, int64_t rows, int64_t size, int type, int threads) {
    return run(GELU, x, out, rows, size, size, type, threads);
}
