/* silu(gate) * up over rows whose first half is the gate. */
#include "parallel.h"
#include "simd.h"

enum { COLUMNS_A_TASK = 4096 };

struct silu {
    int64_t rows, size, pieces;
    const void *x;
    void *out;
    int type;
};

PS_INLINE vf silu_times(vf gate, vf up) {
    vf power = gate * v_set(-1.44269504f);
    const vi far = power > v_set(126.0f); /* v_exp2 ends there, and the quotient is 0 */
    vf value = gate / (v_set(1.0f) + v_exp2(v_select(far, v_set(0), power)));
    return v_select(far, gate * v_set(0), value) * up;
}

PS_INLINE void silu_piece(const struct silu *s, int64_t task, int type) {
    const int64_t row = task / s->pieces, first = task % s->pieces * COLUMNS_A_TASK;
    const int64_t left = s->size - first, count = left < COLUMNS_A_TASK ? left : COLUMNS_A_TASK;
    const char *gate = (const char *)s->x + (size_t)(row * 2 * s->size + first) * size_of(type);
    const char *up = gate + (size_t)s->size * size_of(type);
    char *out = (char *)s->out + (size_t)(row * s->size + first) * size_of(type);
    int64_t i = 0;
    for (; i + PS_LANES <= count; i += PS_LANES)
        t_store(out, i, silu_times(t_load(gate, i, type), t_load(up, i, type)), type);
    if (i < count) {
        vf v = silu_times(t_load_part(gate, i, count - i, type), t_load_part(up, i, count - i, type));
        t_store_part(out, i, v, count - i, type);
    }
}

static void silu_bf16(void *context, int64_t task) {
    silu_piece(context, task, PS_BF16);
}

static void silu_f32(void *context, int64_t task) {
    silu_piece(context, task, PS_F32);
}

/* x [rows, 2 * size] -> out [rows, size] */
PS_EXPORT int PS_FN(silu_mul)(const void *x, void *out, int64_t rows, int64_t size, int type, int threads) {
    struct silu s = {rows, size, (size + COLUMNS_A_TASK - 1) / COLUMNS_A_TASK, x, out, type};
    ps_parallel(type == PS_BF16 ? silu_bf16 : silu_f32, &s, rows * s.pieces, threads);
    return PS_OK;
}
