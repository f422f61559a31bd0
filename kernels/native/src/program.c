/* Calls of the library's functions one after the other, on one team of threads: a whole step in one call.
 *
 * A call holds its arguments apart by type, in the order in which its function takes them. How many rows it has
 * is one of the numbers given when the calls are made: that of tokens, of sequences or of what is sampled.
 */
#include "parallel.h"

#include <string.h>

enum {
    GATHER, NORM, LINEAR, INT8_LINEAR, ROTATE_AND_WRITE, PAGED_ATTENTION, SILU_MUL, ARGMAX, VARLEN_ATTENTION, GELU_MUL,
    GELU
};
enum { MOST_POINTERS = 7, MOST_NUMBERS = 10, MOST_FLOATS = 2 };

/* As Call in program.py. */
struct call {
    int64_t kind, rows;
    void *function;
    void *p[MOST_POINTERS];
    int64_t n[MOST_NUMBERS];
    float f[MOST_FLOATS];
};

/* out[i] = table[ids[i]]: a row has n[0] bytes, the table n[1] rows. */
static int gather(const struct call *c, int64_t rows) {
    const int64_t *ids = c->p[1], bytes = c->n[0];
    for (int64_t i = 0; i < rows; i++) {
        if (ids[i] < 0 || ids[i] >= c->n[1])
            return PS_BAD_INDEX;
        memcpy((char *)c->p[2] + i * bytes, (const char *)c->p[0] + ids[i] * bytes, (size_t)bytes);
    }
    return PS_OK;
}

typedef int (*norm_fn)(
    const void *, void *, const void *, const void *, void *, int64_t, int64_t, float, int, int, int);
typedef int (*linear_fn)(
    const void *, int64_t, const void *, const void *, void *, int64_t, int64_t, int64_t, int, int);
typedef int (*int8_linear_fn)(
    const void *, int64_t, const void *, const float *, const float *, void *, void *, int64_t, int64_t, int64_t,
    int, int);
typedef int (*rotate_and_write_fn)(
    void *, void *, const int64_t *, const void *, const void *, const void *, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, float, int, int);
typedef int (*paged_attention_fn)(
    const void *, const void *, void *, const int64_t *, const int64_t *, const int64_t *, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float, const float *, int, int);
typedef int (*varlen_attention_fn)(
    const void *, const void *, const void *, void *, const int32_t *, const float *, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, int, int);
typedef int (*gated_fn)(const void *, void *, int64_t, int64_t, int64_t, int, int);
typedef int (*gelu_fn)(const void *, void *, int64_t, int64_t, int, int);
typedef int (*argmax_fn)(const void *, int64_t *, float *, int64_t, int64_t, int64_t, int, int);

static int run_call(const struct call *c, int64_t rows, int threads) {
    void *const *p = c->p;
    const int64_t *n = c->n;
    switch (c->kind) {
    case GATHER:
        return gather(c, rows);
    case NORM:
        return ((norm_fn)c->function)(
            p[0], p[1], p[2], p[3], p[4], rows, n[0], c->f[0], (int)n[1], (int)n[2], threads);
    case LINEAR:
        return ((linear_fn)c->function)(p[0], n[0], p[1], p[2], p[3], rows, n[1], n[2], (int)n[3], threads);
    case INT8_LINEAR:
        return ((int8_linear_fn)c->function)(
            p[0], n[0], p[1], p[2], p[3], p[4], p[5], rows, n[1], n[2], (int)n[3], threads);
    case ROTATE_AND_WRITE:
        return ((rotate_and_write_fn)c->function)(
            p[0], p[1], p[2], p[3], p[4], p[5], rows, n[0], n[1], n[2], n[3], n[4], n[5], n[6], c->f[0], (int)n[7],
            threads);
    case PAGED_ATTENTION:
        return ((paged_attention_fn)c->function)(
            p[0], p[1], p[2], p[3], p[4], p[5], n[0], n[1], rows, n[2], n[3], n[4], n[5], n[6], n[7], c->f[0],
            c->f[1], p[6], (int)n[8], threads);
    case VARLEN_ATTENTION: /* query, key and value lie in one row */
        return ((varlen_attention_fn)c->function)(
            p[0], p[1], p[2], p[3], p[4], p[5], n[0], n[0], n[0], rows, n[1], n[2], n[3], n[4], n[5], n[6], c->f[0],
            (int)n[7], threads);
    case SILU_MUL:
    case GELU_MUL:
        return ((gated_fn)c->function)(p[0], p[1], rows, n[0], n[1], (int)n[2], threads);
    case GELU:
        return ((gelu_fn)c->function)(p[0], p[1], rows, n[0], (int)n[1], threads);
    case ARGMAX:
        return ((argmax_fn)c->function)(p[0], p[1], p[2], rows, n[0], n[1], (int)n[2], threads);
    }
    return PS_UNSUPPORTED;
}

struct run {
    const struct call *calls;
    int64_t count;
    const int64_t *rows;
    int threads, result;
};

static void run_all(void *context) {
    struct run *run = context;
    for (int64_t i = 0; i < run->count && run->result == PS_OK; i++) {
        const struct call *call = &run->calls[i];
        if (run->rows[call->rows])
            run->result = run_call(call, run->rows[call->rows], run->threads);
    }
}

/* rows: of tokens, sequences and samples. Ends with the first call that fails, and its result. */
PS_EXPORT int PS_FN(run_program)(const void *calls, int64_t count, const int64_t *rows, int threads) {
    struct run run = {calls, count, rows, threads, PS_OK};
    ps_with_team(run_all, &run, threads);
    return run.result;
}
