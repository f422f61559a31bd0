/* Products of rows with an int8 weight: rows are rounded to int8 with a scale each, sums are exact int32, and
 * scales, bias and the narrow type come in one pass at the end.
 *
 * The weight lies in panels of 16 outputs, [outputs / 16][columns / 4][16 outputs][4 columns] bytes; what the
 * last panel and the last four columns lack are codes of 0. A code is stored as code + 128, because the dot
 * product of unsigned with signed bytes is what x86 has: each row's sum starts at -128 times the sum of its own
 * codes. Sums wrap modulo 2**32 on the way and are exact at the end, up to 2**17 columns.
 */
#if defined(__GNUC__) && !defined(__clang__)
/* It keeps copies of a tile's sums, and there are no registers for them. */
#pragma GCC optimize("no-tree-pre")
#endif

#include "int8_tiles.h"
#include "parallel.h"

enum { BLOCK_ROWS = 64, ALONE_BELOW = 1 << 18 };

typedef int8_t v_byte __attribute__((vector_size(PS_LANES)));
typedef int16_t v_short __attribute__((vector_size(2 * PS_LANES)));

struct rows {
    const char *x;
    int64_t stride, rows, columns, padded; /* stride in elements; padded to a multiple of 4 */
    void *codes;
    float *scale;
    int32_t *start; /* -128 * sum of the row's codes, or null */
    int type, offset;
};

/* A row's scale, and what to multiply by to get codes; 0 if the row is not finite. Magnitudes compare as
 * integers: that order puts infinity after all numbers and NaN after infinity. */
PS_INLINE float row_scale(const char *x, int64_t columns, int type, float *scale) {
    const int64_t whole = columns / PS_LANES * PS_LANES;
    vi largest = {0};
    for (int64_t k = 0; k < columns; k += PS_LANES) {
        vf v = k < whole ? t_load(x, k, type) : t_load_part(x, k, columns - k, type);
        vi bits = (vi)v & 0x7fffffff, more = bits > largest;
        largest = (more & bits) | (~more & largest);
    }
    int32_t bits = 0x0d800000; /* at least 2**-100: below it 127 / amax might overflow */
    for (int lane = 0; lane < PS_LANES; lane++)
        bits = largest[lane] > bits ? largest[lane] : bits;
    float amax;
    memcpy(&amax, &bits, 4);
    *scale = bits < 0x7f800000 ? amax * (1.0f / 127.0f) : NAN;
    return bits < 0x7f800000 ? 127.0f / amax : 0;
}

PS_INLINE vi row_codes(const char *x, int64_t k, int64_t columns, float inverse, int type) {
    vf v = k + PS_LANES <= columns ? t_load(x, k, type) : t_load_part(x, k, columns - k, type);
    return __builtin_convertvector(v_round(v * inverse), vi);
}

/* Codes in the order that the products read, the row's rest zeros. */
PS_INLINE void row_for_products(const struct rows *r, int64_t row, int type) {
    const char *x = r->x + (size_t)(row * r->stride) * size_of(type);
    code_t *codes = (code_t *)r->codes + row * r->padded;
    float inverse = row_scale(x, r->columns, type, r->scale + row);
    if (inverse == 0) {
        memset(codes, 0, (size_t)r->padded * sizeof *codes);
        r->start[row] = 0;
        return;
    }
    vi sum = {0};
    for (int64_t k = 0; k < r->columns; k += PS_LANES) {
        vi v = row_codes(x, k, r->columns, inverse, type);
        sum += v;
#if PS_LANES == 16
        v_byte narrow = __builtin_convertvector(v, v_byte);
#else
        v_short narrow = __builtin_convertvector(v, v_short);
        narrow = (v_short)_mm_shuffle_epi8(
            (__m128i)narrow, _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
#endif
        int64_t count = r->padded - k < PS_LANES ? r->padded - k : PS_LANES;
        if (count == PS_LANES)
            memcpy(codes + k, &narrow, sizeof narrow);
        else
            memcpy(codes + k, &narrow, (size_t)count * sizeof *codes);
    }
    int32_t total = 0;
    for (int lane = 0; lane < PS_LANES; lane++)
        total += sum[lane];
    r->start[row] = -128 * total;
}

static void quantize_for_products(void *context, int64_t task) {
    const struct rows *r = context;
    int64_t end = (task + 1) * MAX_ROWS;
    for (int64_t row = task * MAX_ROWS; row < (end < r->rows ? end : r->rows); row++)
        r->type == PS_BF16 ? row_for_products(r, row, PS_BF16) : row_for_products(r, row, PS_F32);
}

/* Codes + offset as plain bytes. */
PS_INLINE void row_as_bytes(const struct rows *r, int64_t row, int type) {
    const char *x = r->x + (size_t)(row * r->stride) * size_of(type);
    int8_t *codes = (int8_t *)r->codes + row * r->columns;
    float inverse = row_scale(x, r->columns, type, r->scale + row);
    if (inverse == 0) {
        memset(codes, r->offset, (size_t)r->columns);
        return;
    }
    for (int64_t k = 0; k < r->columns; k += PS_LANES) {
        v_byte narrow = __builtin_convertvector(row_codes(x, k, r->columns, inverse, type) + r->offset, v_byte);
        if (k + PS_LANES <= r->columns)
            memcpy(codes + k, &narrow, sizeof narrow);
        else
            memcpy(codes + k, &narrow, (size_t)(r->columns - k));
    }
}

static void quantize_as_bytes(void *context, int64_t task) {
    const struct rows *r = context;
    int64_t end = (task + 1) * MAX_ROWS;
    for (int64_t row = task * MAX_ROWS; row < (end < r->rows ? end : r->rows); row++)
        r->type == PS_BF16 ? row_as_bytes(r, row, PS_BF16) : row_as_bytes(r, row, PS_F32);
}

PS_INLINE void quantize(struct rows *r, ps_task task, int threads) {
    int few = r->rows * r->columns < ALONE_BELOW;
    ps_parallel(task, r, (r->rows + MAX_ROWS - 1) / MAX_ROWS, few ? 1 : threads);
}

/* x [rows, columns] in `type`, `stride` elements from row to row -> codes [rows, columns], each a byte that is
 * code + offset, and scale [rows]. A row that is not finite: codes of 0 and a scale that is NaN. */
PS_EXPORT int PS_FN(int8_rows)(
    const void *x, int64_t stride, void *codes, float *scale, int64_t rows, int64_t columns, int offset,
    int type, int threads) {
    struct rows r = {x, stride, rows, columns, columns, codes, scale, 0, type, offset};
    quantize(&r, quantize_as_bytes, threads);
    return PS_OK;
}

PS_INLINE int64_t divide_up(int64_t count, int64_t by) {
    return (count + by - 1) / by;
}

/* Rows of a tile such that all tiles of `rows` rows are about alike. */
PS_INLINE int64_t tile_rows(int64_t rows) {
    return divide_up(rows, divide_up(rows, MAX_ROWS));
}

static void multiply(void *context, int64_t task) {
    const struct product *p = context;
    int64_t panel = task / p->row_blocks * p->panels, row = task % p->row_blocks * p->block_rows;
    int64_t end = row + p->block_rows < p->rows ? row + p->block_rows : p->rows;
    int64_t left = divide_up(p->outputs, PANEL) - panel, at_once = tile_rows(p->block_rows);
    int width = left < p->panels ? (int)left : p->panels;
#if PS_LANES == 16
    if (p->rows <= MAX_ROWS) {
        few[p->rows - 1](p, panel, width);
        return;
    }
#endif
    while (row < end) {
        int64_t height = end - row < at_once ? end - row : at_once;
        tiles[height - 1][width - 1](p, row, panel);
        row += height;
    }
}

/* Panels of a tile: as many as registers allow, fewer if that divides the work better. */
static int tile_panels(int64_t panels, int64_t rows, int threads) {
    int most = MAX_PANELS == 4 && rows > 6 ? 3 : MAX_PANELS, best = most;
    if (threads <= 1)
        return most;
    int64_t least = INT64_MAX; /* panels of the thread that has most */
    for (int width = most; width >= 2; width--) { /* a tile of one panel multiplies more slowly */
        int64_t time = divide_up(divide_up(panels, width), threads) * width;
        if (time < least) {
            least = time;
            best = width;
        }
    }
    return best;
}

/* out = x @ weight.T + bias. x [rows, columns], `stride` elements from row to row; weight as said above;
 * weight_scale and bias (or null) [outputs padded to 16] float; out [rows, outputs], of x's type. scratch has
 * rows * (2 * padded columns + 8) bytes, aligned to 4. */
PS_EXPORT int PS_FN(int8_linear)(
    const void *x, int64_t stride, const void *weight, const float *weight_scale, const float *bias, void *out,
    void *scratch, int64_t rows, int64_t columns, int64_t outputs, int type, int threads) {
    if (!rows)
        return PS_OK;
    const int64_t padded = divide_up(columns, 4) * 4, panels = divide_up(outputs, PANEL);
    float *scale = scratch;
    int32_t *start = (int32_t *)(scale + rows);
    code_t *codes = (code_t *)(start + rows);
    struct rows r = {x, stride, rows, columns, padded, codes, scale, start, type, 0};
    quantize(&r, quantize_for_products, threads);
    if (rows * columns * outputs < ALONE_BELOW)
        threads = 1;
    struct product p = {
        codes, weight, scale, weight_scale, bias, start, out, rows, padded, outputs, 0, 0, 0, type};
    p.row_blocks = divide_up(rows, BLOCK_ROWS);
    p.block_rows = divide_up(rows, p.row_blocks);
    p.panels = tile_panels(panels, tile_rows(p.block_rows), p.row_blocks > 1 ? 1 : threads);
    ps_parallel(multiply, &p, divide_up(panels, p.panels) * p.row_blocks, threads);
    return PS_OK;
}
