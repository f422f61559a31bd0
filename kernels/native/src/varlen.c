/* Attention inside each of several inputs that lie end to end: no cache, no padding.
 *
 * A task is a block of one input's rows by one key/value head. It packs the keys and values that the block sees as
 * the cache would have them (layout.h), and takes MOST_ROWS rows at a time over chunks of CHUNK keys under an
 * online softmax. Blocks, rows and chunks are cut by positions in the input, so a row's result depends neither on
 * the inputs beside it nor on the number of threads.
 */
#include "parallel.h"
#include "softmax.h"
#include "transpose.h"

#include <stdlib.h>

enum {
    BLOCK_ROWS = 256, /* of a task: packing costs little beside so many rows */
    CHUNK = 512,
    CHUNK_TILES = CHUNK / PS_TILE,
    MOST_DIMS = 256
};

struct varlen {
    const char *query, *key, *value;
    char *out;
    const int32_t *starts;
    const float *bias;
    int64_t query_stride, key_stride, value_stride; /* elements from token to token */
    int64_t heads, kv_heads, dim, before, after, reach;
    float scale;
    int type;
};

struct block {
    int32_t input, kv_head;
    int64_t first_row, rows; /* in the input */
};

struct plan {
    const struct varlen *v;
    const struct block *blocks;
    _Atomic int result;
};

/* Keys of up to 16 tokens from `from` on (`stride` bytes apart) as a tile has them; the others 0. */
static void pack_keys(const char *from, int64_t stride, int64_t tokens, int64_t lanes, char *tile) {
    int64_t lane = 0;
#if PS_LANES == 16
    for (; lane + 16 <= lanes; lane += 16) {
        __m512i rows[16];
        for (int64_t t = 0; t < PS_TILE; t++)
            rows[t] = t < tokens ? _mm512_loadu_si512(from + t * stride + lane * 4) : _mm512_setzero_si512();
        transpose(rows);
        memcpy(tile + lane * PS_TILE * 4, rows, sizeof rows);
    }
#endif
    for (; lane < lanes; lane++)
        for (int64_t t = 0; t < PS_TILE; t++) {
            uint32_t bits = 0;
            if (t < tokens)
                memcpy(&bits, from + t * stride + lane * 4, 4);
            memcpy(tile + (lane * PS_TILE + t) * 4, &bits, 4);
        }
}

PS_INLINE void pack_values(const char *from, int64_t stride, int64_t tokens, int64_t dim, char *tile, int type) {
    const int64_t width = padded(dim);
    if (type == PS_F32) {
        for (int64_t t = 0; t < PS_TILE; t++) {
            char *to = tile + t * width * 4;
            if (t < tokens)
                memcpy(to, from + t * stride, (size_t)dim * 4);
            else
                memset(to, 0, (size_t)dim * 4);
            memset(to + dim * 4, 0, (size_t)(width - dim) * 4);
        }
        return;
    }
    static const uint16_t zeros[MOST_DIMS];
    for (int64_t t = 0; t < PS_TILE; t += 2) {
        const uint16_t *even = t < tokens ? (const uint16_t *)(from + t * stride) : zeros;
        const uint16_t *odd = t + 1 < tokens ? (const uint16_t *)(from + (t + 1) * stride) : zeros;
        uint32_t *to = (uint32_t *)(tile + t / 2 * width * 4);
        for (int64_t d = 0; d < dim; d++)
            to[d] = (uint32_t)even[d] | (uint32_t)odd[d] << 16;
        memset(to + dim, 0, (size_t)(width - dim) * 4);
    }
}

/* Scores of one row, at `row` of its input, for keys from `first` on, to logits in powers of two; the largest. */
PS_INLINE float finish_scores(
    const struct varlen *v, const float *bias, float *scores, int64_t columns, int64_t first, int64_t row,
    int64_t length) {
    int64_t low = v->before < 0 || row < v->before ? 0 : row - v->before;
    int64_t high = v->after < 0 || row + v->after >= length ? length : row + v->after + 1;
    low -= first;
    high -= first;
    vf best = v_set(-INFINITY);
    for (int64_t i = 0; i < columns; i += PS_LANES) {
        vf s = v_load(scores + i) * v_set(v->scale * LOG2_E);
        if (bias) {
            const int64_t away = first + i - row + v->reach, last = 2 * v->reach;
            vf added;
            if (away >= 0 && away + PS_LANES <= last + 1)
                added = v_load(bias + away);
            else
                for (int j = 0; j < PS_LANES; j++)
                    added[j] = bias[away + j < 0 ? 0 : away + j > last ? last : away + j];
            s += added * v_set(LOG2_E);
        }
        if (i < low || i + PS_LANES > high) {
            const vi column = indices() + (int32_t)i;
            vi seen = (column >= (vi){0} + (int32_t)low) & (column < (vi){0} + (int32_t)high);
            s = v_select(seen, s, v_set(-INFINITY));
        }
        v_store(scores + i, s);
        best = v_max(s, best);
    }
    return v_highest(best);
}

/* Up to MOST_ROWS rows of one query head, from `row` of the input on, over the packed tiles, which begin with key
 * `first_key`. */
PS_INLINE void attend_rows(
    const struct varlen *v, int64_t start, int64_t length, int64_t head, int64_t row, int64_t rows,
    int64_t first_key, const char *packed, int type) {
    const int mode = mode_of(type);
    const size_t size = size_of(type);
    const int64_t dim = v->dim, width = padded(dim), tile_bytes = tile_size(dim) * (int64_t)size;
    const int64_t steps = type == PS_BF16 ? dim / 2 : dim, weight_bytes = mode == MODE_PAIR ? 2 : 4;
    const float *bias = v->bias ? v->bias + head * (2 * v->reach + 1) : 0;
    float high[MOST_ROWS], sum[MOST_ROWS], out[MOST_ROWS * MOST_DIMS], scores[MOST_ROWS * CHUNK];
    char weights[MOST_ROWS * CHUNK * 4];
    float wide[MOST_ROWS * MOST_DIMS];

    const char *queries = v->query + (size_t)((start + row) * v->query_stride + head * dim) * size;
    int64_t query_bytes = v->query_stride * (int64_t)size;
    if (mode == MODE_WIDE) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t d = 0; d < dim; d++)
                wide[r * dim + d] = t_get(queries + r * query_bytes, d, type);
        queries = (const char *)wide;
        query_bytes = dim * 4;
    }
    for (int64_t r = 0; r < rows; r++) {
        high[r] = -INFINITY;
        sum[r] = 0;
    }
    memset(out, 0, (size_t)(rows * width) * sizeof(float));

    const int64_t last = row + rows - 1;
    const int64_t low = v->before < 0 || row < v->before ? 0 : row - v->before;
    const int64_t end = v->after < 0 || last + v->after >= length ? length : last + v->after + 1;
    const int64_t first_tile = (low - first_key) / PS_TILE, end_tile = (end - first_key + PS_TILE - 1) / PS_TILE;
    for (int64_t t = first_tile; t < end_tile; t += CHUNK_TILES) {
        const int64_t count = end_tile - t < CHUNK_TILES ? end_tile - t : CHUNK_TILES, columns = count * PS_TILE;
        const char *tiles[CHUNK_TILES + 1], *values[CHUNK_TILES];
        for (int64_t i = 0; i < count; i++) {
            tiles[i] = packed + (t + i) * tile_bytes;
            values[i] = tiles[i] + PS_TILE * dim * (int64_t)size;
        }
        tiles[count] = tiles[count - 1]; /* read beside the last where their number is odd */
        for (int64_t i = 0; i < count; i += TILES_AT_ONCE) {
#define SCORE(n) \
    score_rows( \
        mode, n, queries, query_bytes, tiles + i, (const char *const *)0, steps, scores + i * PS_TILE, CHUNK)
            PS_WITH_ROWS(rows, SCORE)
#undef SCORE
        }
        for (int64_t r = 0; r < rows; r++) {
            float *row_scores = scores + r * CHUNK, *row_out = out + r * width;
            const float best =
                finish_scores(v, bias, row_scores, columns, first_key + t * PS_TILE, row + r, length);
            const float now = best > high[r] ? best : high[r];
            if (now != high[r]) {
                const float factor = exp2_of(high[r] - or_zero(now));
                sum[r] *= factor;
                for (int64_t d = 0; d < width; d += PS_LANES)
                    v_store(row_out + d, v_load(row_out + d) * factor);
                high[r] = now;
            }
            sum[r] += to_weights(row_scores, columns, or_zero(now), weights + r * CHUNK * weight_bytes, mode);
        }
        int64_t d = 0;
#define WEIGH(n) \
    weigh_rows( \
        mode, n, VALUES_AT_ONCE, weights, CHUNK * weight_bytes, values, (const char *const *)0, (int)count, d * 4, \
        width * 4, out + d, width)
        for (; d + VALUES_AT_ONCE * PS_LANES <= width; d += VALUES_AT_ONCE * PS_LANES)
            PS_WITH_ROWS(rows, WEIGH)
#undef WEIGH
#define WEIGH(n) \
    weigh_rows( \
        mode, n, 1, weights, CHUNK * weight_bytes, values, (const char *const *)0, (int)count, d * 4, width * 4, \
        out + d, width)
        for (; d < width; d += PS_LANES)
            PS_WITH_ROWS(rows, WEIGH)
#undef WEIGH
    }
    const int64_t whole = dim / PS_LANES * PS_LANES;
    for (int64_t r = 0; r < rows; r++) {
        char *to = v->out + (size_t)(((start + row + r) * v->heads + head) * dim) * size;
        const float factor = 1.0f / sum[r], *from = out + r * width;
        for (int64_t d = 0; d < whole; d += PS_LANES)
            t_store(to, d, v_load(from + d) * factor, type);
        if (whole < dim)
            t_store_part(to, whole, v_load(from + whole) * factor, dim - whole, type);
    }
}

PS_INLINE int attend_block_of(const struct varlen *v, const struct block *b, int type) {
    const int64_t size = (int64_t)size_of(type), dim = v->dim, share = v->heads / v->kv_heads;
    const int64_t start = v->starts[b->input], length = v->starts[b->input + 1] - start;
    const int64_t end_row = b->first_row + b->rows;
    int64_t first = v->before < 0 || b->first_row < v->before ? 0 : b->first_row - v->before;
    first = first / PS_TILE * PS_TILE;
    const int64_t end = v->after < 0 || end_row + v->after >= length ? length : end_row + v->after;
    const int64_t tiles = (end - first + PS_TILE - 1) / PS_TILE, tile_bytes = tile_size(dim) * size;
    char *packed = malloc((size_t)(tiles * tile_bytes));
    if (!packed)
        return PS_NO_MEMORY;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t token = first + t * PS_TILE, tokens = end - token < PS_TILE ? end - token : PS_TILE;
        char *tile = packed + t * tile_bytes;
        pack_keys(
            v->key + ((start + token) * v->key_stride + b->kv_head * dim) * size, v->key_stride * size, tokens,
            dim * size / 4, tile);
        pack_values(
            v->value + ((start + token) * v->value_stride + b->kv_head * dim) * size, v->value_stride * size, tokens,
            dim, tile + PS_TILE * dim * size, type);
    }
    for (int64_t h = b->kv_head * share; h < (b->kv_head + 1) * share; h++)
        for (int64_t row = b->first_row; row < end_row; row += MOST_ROWS)
            attend_rows(
                v, start, length, h, row, end_row - row < MOST_ROWS ? end_row - row : MOST_ROWS, first, packed, type);
    free(packed);
    return PS_OK;
}

static void attend_block(void *context, int64_t task) {
    struct plan *p = context;
    const int result = p->v->type == PS_BF16 ? attend_block_of(p->v, &p->blocks[task], PS_BF16)
                                             : attend_block_of(p->v, &p->blocks[task], PS_F32);
    if (result != PS_OK)
        p->result = result;
}

/* query [tokens, heads, dim], key and value [tokens, kv_heads, dim], a token every `..._stride` elements; out
 * [tokens, heads, dim]; starts [inputs + 1], of non-empty inputs; before and after: tokens seen, below 0 all; bias
 * [heads, 2 * reach + 1] or null. bfloat16 needs an even dim. */
PS_EXPORT int PS_FN(varlen_attention)(
    const void *query, const void *key, const void *value, void *out, const int32_t *starts, const float *bias,
    int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t inputs, int64_t heads, int64_t kv_heads,
    int64_t dim, int64_t before, int64_t after, int64_t reach, float scale, int type, int threads) {
    if (dim > MOST_DIMS || (type == PS_BF16 && dim % 2))
        return PS_UNSUPPORTED;
    const struct varlen v = {query,        key,   value,    out, starts, bias,  query_stride, key_stride,
                             value_stride, heads, kv_heads, dim, before, after, reach,        scale, type};
    int64_t count = 0, work = 0;
    for (int64_t i = 0; i < inputs; i++) {
        const int64_t length = starts[i + 1] - starts[i];
        count += (length + BLOCK_ROWS - 1) / BLOCK_ROWS * kv_heads;
        work += length * (length + 64) * heads * dim;
    }
    struct block few[64], *blocks = count <= 64 ? few : malloc((size_t)count * sizeof *blocks);
    if (!blocks)
        return PS_NO_MEMORY;
    struct block *next = blocks;
    for (int64_t i = 0; i < inputs; i++) {
        const int64_t length = starts[i + 1] - starts[i];
        for (int64_t row = 0; row < length; row += BLOCK_ROWS)
            for (int64_t h = 0; h < kv_heads; h++) {
                struct block b = {(int32_t)i, (int32_t)h, row, length - row < BLOCK_ROWS ? length - row : BLOCK_ROWS};
                *next++ = b;
            }
    }
    struct plan p = {&v, blocks, PS_OK};
    enum { WORTH_THREADS = 1 << 20 }; /* products; some 20 us of one thread */
    ps_parallel(attend_block, &p, count, work < WORTH_THREADS ? 1 : threads);
    if (blocks != few)
        free(blocks);
    return p.result;
}
