/* Attention of new tokens over their sequences' paged keys and values, decodes and chunks of prompts alike.
 *
 * The rows of one key/value head (its query heads at each new token) go in groups of up to MOST_QUERIES over
 * the keys. Keys are cut at fixed positions: chunks of CHUNK tokens under an online softmax, and segments of
 * SEGMENT tokens that are computed apart and summed up in their order. So a row's result depends neither on the
 * rows beside it nor on how the segments are divided over threads.
 */
#include "parallel.h"
#include "softmax.h"

#include <stdatomic.h>
#include <stdlib.h>

enum {
    MOST_QUERIES = 32,
    CHUNK = 128,
    SEGMENT = 512,
    CHUNK_TILES = CHUNK / PS_TILE,
    SEGMENT_TILES = SEGMENT / PS_TILE,
    MOST_DIMS = 256,
    TASKS_A_THREAD = 4
};

struct attention {
    const char *query;
    const char *cache;
    char *out;
    const int64_t *query_lens, *seq_lens, *tables;
    int64_t query_stride, table_stride; /* elements */
    int64_t num_seqs, num_heads, kv_heads, dim, blocks, block_size, window;
    float scale, soft_cap;
    const float *slopes;
    int type;
};

/* Rows of one group: their keys lie in [first_key, end_key). */
struct group {
    int64_t seq, kv_head, first_token; /* of the step, the sequence's first */
    int64_t first_row, rows;           /* among the sequence's query_len * heads / kv_heads */
    int64_t first_key, end_key;
};

/* Softmax state of a group's rows; `sum` and `out` are relative to 2**high. */
struct state {
    float high[MOST_QUERIES], sum[MOST_QUERIES];
    float out[MOST_QUERIES * MOST_DIMS]; /* [rows][padded dim] */
};

struct split {
    atomic_int left; /* segments not yet done */
    int64_t first_part;
};

struct plan {
    const struct attention *a;
    const struct group *groups;
    int64_t *task_starts; /* [groups + 1], where segments are divided over tasks */
    int64_t num_groups;
    struct split *splits;
    float *parts; /* states of segments: high, sum, out, each for all rows */
};

static int64_t position_of(const struct attention *a, const struct group *g, int64_t row) {
    int64_t share = a->num_heads / a->kv_heads;
    return a->seq_lens[g->seq] - a->query_lens[g->seq] + (g->first_row + row) / share;
}

static int64_t first_visible(const struct attention *a, int64_t position) {
    return a->window > 0 && position >= a->window ? position - a->window + 1 : 0;
}

/* The row of the query, and of the output, that a group's row is: an offset in elements. */
static int64_t place_of(const struct attention *a, const struct group *g, int64_t row, int64_t token_stride) {
    int64_t share = a->num_heads / a->kv_heads, index = g->first_row + row;
    return (g->first_token + index / share) * token_stride + (g->kv_head * share + index % share) * a->dim;
}

/* The rows as the products want them: consecutive, and widened if the mode asks for it. */
static void take_queries(const struct attention *a, const struct group *g, char *rows) {
    const int type = a->type;
    const int mode = mode_of(type);
    for (int64_t r = 0; r < g->rows; r++) {
        const char *from = a->query + (size_t)place_of(a, g, r, a->query_stride) * size_of(type);
        if (mode == MODE_WIDE) {
            float *to = (float *)rows + r * a->dim;
            for (int64_t d = 0; d < a->dim; d++)
                to[d] = t_get(from, d, type);
        } else {
            memcpy(rows + (size_t)(r * a->dim) * size_of(type), from, (size_t)a->dim * size_of(type));
        }
    }
}

/* Scores of one row to logits in powers of two: scaled, capped, biased, -inf where the row does not see. */
PS_INLINE float finish_scores(
    const struct attention *a, float *scores, int64_t columns, int64_t first_key, int64_t position, float slope) {
    const int64_t low = first_visible(a, position) - first_key, high = position + 1 - first_key;
    const int masked = low > 0 || high < columns;
    vf best = v_set(-INFINITY);
    for (int64_t i = 0; i < columns; i += PS_LANES) {
        vf s = v_load(scores + i);
        const vi column = indices() + (int32_t)i;
        if (a->soft_cap > 0) {
            /* tanh(x) = 1 - 2 / (e**2x + 1) */
            vf twice = s * v_set(2 * LOG2_E * a->scale / a->soft_cap);
            twice = v_select(twice > v_set(126.0f), v_set(126.0f), twice);
            s = v_set(a->soft_cap) - v_set(2 * a->soft_cap) / (v_exp2(twice) + v_set(1));
            s *= v_set(LOG2_E);
        } else {
            s *= v_set(a->scale * LOG2_E);
        }
        if (slope != 0) {
            vf away = __builtin_convertvector(column + (int32_t)(first_key - position), vf);
            s += away * v_set(slope * LOG2_E);
        }
        if (masked) {
            vi seen = (column >= (vi){0} + (int32_t)low) & (column < (vi){0} + (int32_t)high);
            s = v_select(seen, s, v_set(-INFINITY));
        }
        v_store(scores + i, s);
        best = v_max(s, best);
    }
    return v_highest(best);
}

/* A copy of a tile's values in which tokens from `tokens` on, which are nobody's, are 0: times a weight of 0
 * they might be NaN. */
PS_INLINE void clean_values(const char *values, int64_t tokens, int64_t dim, char *clean, int type) {
    const size_t size = size_of(type);
    memcpy(clean, values, (size_t)(PS_TILE * padded(dim)) * size);
    for (int64_t t = tokens; t < PS_TILE; t++)
        for (int64_t d = 0; d < dim; d++)
            t_set(clean, value_at(t, d, dim, type) - PS_TILE * dim, 0, type);
}

/* Addresses of a group's tiles [first, first + count). */
static void find_tiles(
    const struct attention *a, const struct group *g, int64_t first, int64_t count, const char **tiles) {
    const int64_t tiles_a_block = a->block_size / PS_TILE;
    const int64_t *table = a->tables + g->seq * a->table_stride;
    for (int64_t t = 0; t < count; t++) {
        int64_t tile = first + t, block = table[tile / tiles_a_block];
        int64_t index = (block * a->kv_heads + g->kv_head) * tiles_a_block + tile % tiles_a_block;
        tiles[t] = a->cache + (size_t)(index * tile_size(a->dim)) * size_of(a->type);
    }
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* The tiles that follow those of a segment of g which ends with tile `end`: its own next ones, else the first
 * of the group that comes after it in memory's order, else again its last. Always CHUNK_TILES addresses. */
static void find_next_tiles(
    const struct attention *a, const struct group *g, const struct group *after, int64_t end, const char **tiles) {
    const int64_t own = least((g->end_key + PS_TILE - 1) / PS_TILE - end, CHUNK_TILES);
    int64_t found = own > 0 ? own : 0;
    find_tiles(a, g, end, found, tiles);
    if (!found && after && (after->seq != g->seq || after->kv_head != g->kv_head)) {
        const int64_t first = after->first_key / PS_TILE;
        found = least((after->end_key + PS_TILE - 1) / PS_TILE - first, CHUNK_TILES);
        find_tiles(a, after, first, found, tiles);
    }
    for (; found < CHUNK_TILES; found++)
        tiles[found] = tiles[-1];
}

/* One segment, keys [first, end), of a group: a state of its own. `after` is the next group, or null. */
PS_INLINE void attend_segment_of(
    const struct attention *a, const struct group *g, const struct group *after, const char *queries, int64_t first,
    int64_t end, struct state *state, int type) {
    const int mode = mode_of(type);
    const size_t size = size_of(type);
    const int64_t dim = a->dim, width = padded(dim), rows = g->rows, share = a->num_heads / a->kv_heads;
    const int64_t seq_len = a->seq_lens[g->seq];
    const int64_t query_stride = dim * (mode == MODE_WIDE ? 4 : (int64_t)size);
    const int64_t value_offset = PS_TILE * dim * (int64_t)size, row_bytes = width * 4;
    const int64_t steps = type == PS_BF16 ? dim / 2 : dim;
    const int64_t weight_bytes = mode == MODE_PAIR ? 2 : 4;
    const char *tiles[SEGMENT_TILES + CHUNK_TILES];
    float scores[MOST_QUERIES * CHUNK];
    char weights[MOST_QUERIES * CHUNK * 4];
    char clean[PS_TILE * MOST_DIMS * 4];

    _Static_assert(CHUNK_TILES % TILES_AT_ONCE == 0, "a chunk's tiles and their successors stay in the array");
    const int64_t first_tile = first / PS_TILE, num_tiles = (end + PS_TILE - 1) / PS_TILE - first_tile;
    find_tiles(a, g, first_tile, num_tiles, tiles);
    /* Also read beside the last ones where their number is odd, and then not looked at. */
    find_next_tiles(a, g, after, first_tile + num_tiles, tiles + num_tiles);
    for (int64_t r = 0; r < rows; r++) {
        state->high[r] = -INFINITY;
        state->sum[r] = 0;
    }
    memset(state->out, 0, (size_t)(rows * width) * sizeof(float));

    for (int64_t t = 0; t < num_tiles;) {
        const int64_t chunk_key = (first_tile + t) * PS_TILE;
        /* Up to the next multiple of CHUNK, so that chunks are the same for every row that sees them. */
        int64_t count = CHUNK_TILES - (first_tile + t) % CHUNK_TILES;
        count = count < num_tiles - t ? count : num_tiles - t;
        const int64_t columns = count * PS_TILE;
        for (int64_t r = 0; r < rows; r += MOST_ROWS)
            for (int64_t i = 0; i < count; i += TILES_AT_ONCE) {
                const char *const *next = r == 0 ? tiles + t + count + i : 0;
#define SCORE(n) \
    score_rows( \
        mode, n, queries + r * query_stride, query_stride, tiles + t + i, next, steps, \
        scores + r * CHUNK + i * PS_TILE, CHUNK)
                PS_WITH_ROWS(rows - r, SCORE)
#undef SCORE
            }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t index = g->first_row + r;
            const float slope = a->slopes ? a->slopes[g->kv_head * share + index % share] : 0;
            const float best =
                finish_scores(a, scores + r * CHUNK, columns, chunk_key, position_of(a, g, r), slope);
            const float high = best > state->high[r] ? best : state->high[r];
            float *out = state->out + r * width;
            if (high != state->high[r]) {
                const float factor = exp2_of(state->high[r] - or_zero(high));
                state->sum[r] *= factor;
                for (int64_t d = 0; d < width; d += PS_LANES)
                    v_store(out + d, v_load(out + d) * factor);
                state->high[r] = high;
            }
            state->sum[r] += to_weights(
                scores + r * CHUNK, columns, or_zero(high), weights + r * CHUNK * weight_bytes, mode);
        }
        const char *values[CHUNK_TILES], *next_values[CHUNK_TILES];
        for (int64_t i = 0; i < count; i++) {
            values[i] = tiles[t + i] + value_offset;
            next_values[i] = tiles[t + count + i] + value_offset;
            const int64_t filled = seq_len - (chunk_key + i * PS_TILE);
            if (filled < PS_TILE) {
                clean_values(values[i], filled, dim, clean, type);
                values[i] = clean;
            }
        }
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            const char *const *next = r == 0 ? next_values : 0;
            int64_t d = 0;
#define WEIGH(n) \
    weigh_rows( \
        mode, n, VALUES_AT_ONCE, weights + r * CHUNK * weight_bytes, CHUNK * weight_bytes, values, next, (int)count, \
        d * 4, row_bytes, state->out + r * width + d, width)
            for (; d + VALUES_AT_ONCE * PS_LANES <= width; d += VALUES_AT_ONCE * PS_LANES)
                PS_WITH_ROWS(rows - r, WEIGH)
#undef WEIGH
#define WEIGH(n) \
    weigh_rows( \
        mode, n, 1, weights + r * CHUNK * weight_bytes, CHUNK * weight_bytes, values, next, (int)count, d * 4, \
        row_bytes, state->out + r * width + d, width)
            for (; d < width; d += PS_LANES)
                PS_WITH_ROWS(rows - r, WEIGH)
#undef WEIGH
        }
        t += count;
    }
}

static void attend_segment(
    const struct attention *a, const struct group *g, const struct group *after, const char *queries, int64_t first,
    int64_t end, struct state *state) {
    if (a->type == PS_BF16)
        attend_segment_of(a, g, after, queries, first, end, state, PS_BF16);
    else
        attend_segment_of(a, g, after, queries, first, end, state, PS_F32);
}

/* total += part, both states of `rows` rows: always in the order of the segments. */
static void add_state(
    float *total_high, float *total_sum, float *total_out, const float *high, const float *sum, const float *out,
    int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++) {
        const float best = total_high[r] > high[r] ? total_high[r] : high[r];
        const float old = exp2_of(total_high[r] - or_zero(best)), new = exp2_of(high[r] - or_zero(best));
        float *to = total_out + r * width;
        const float *from = out + r * width;
        total_high[r] = best;
        total_sum[r] = total_sum[r] * old + sum[r] * new;
        for (int64_t d = 0; d < width; d += PS_LANES)
            v_store(to + d, v_load(to + d) * old + v_load(from + d) * new);
    }
}

static void write_out(const struct attention *a, const struct group *g, const float *sum, const float *out) {
    const int type = a->type;
    const int64_t dim = a->dim, width = padded(dim), whole = dim / PS_LANES * PS_LANES;
    for (int64_t r = 0; r < g->rows; r++) {
        char *to = a->out + (size_t)place_of(a, g, r, a->num_heads * dim) * size_of(type);
        const float factor = 1.0f / sum[r], *from = out + r * width;
        for (int64_t d = 0; d < whole; d += PS_LANES)
            t_store(to, d, v_load(from + d) * factor, type);
        if (whole < dim)
            t_store_part(to, whole, v_load(from + whole) * factor, dim - whole, type);
    }
}

PS_INLINE int64_t first_segment(const struct group *g) {
    return g->first_key / SEGMENT;
}

PS_INLINE int64_t num_segments(const struct group *g) {
    return (g->end_key + SEGMENT - 1) / SEGMENT - first_segment(g);
}

PS_INLINE void segment_keys(const struct group *g, int64_t segment, int64_t *first, int64_t *end) {
    *first = (first_segment(g) + segment) * SEGMENT;
    *end = *first + SEGMENT < g->end_key ? *first + SEGMENT : g->end_key;
    *first = *first > g->first_key ? *first : g->first_key;
}

static void attend_whole(void *context, int64_t index) {
    const struct plan *p = context;
    const struct attention *a = p->a;
    const struct group *g = &p->groups[index], *after = index + 1 < p->num_groups ? g + 1 : 0;
    char queries[MOST_QUERIES * MOST_DIMS * 4];
    struct state total, part;
    int64_t first, end;
    take_queries(a, g, queries);
    segment_keys(g, 0, &first, &end);
    attend_segment(a, g, after, queries, first, end, &total);
    for (int64_t s = 1; s < num_segments(g); s++) {
        segment_keys(g, s, &first, &end);
        attend_segment(a, g, after, queries, first, end, &part);
        add_state(total.high, total.sum, total.out, part.high, part.sum, part.out, g->rows, padded(a->dim));
    }
    write_out(a, g, total.sum, total.out);
}

/* One segment of a group whose segments are divided; whoever does the last one sums up. */
static void attend_part(const struct plan *p, int64_t index, int64_t segment) {
    const struct attention *a = p->a;
    const struct group *g = &p->groups[index];
    struct split *split = &p->splits[index];
    const int64_t width = padded(a->dim), part_size = MOST_QUERIES * (2 + width), rows = g->rows;
    char queries[MOST_QUERIES * MOST_DIMS * 4];
    struct state state;
    int64_t first, end;
    take_queries(a, g, queries);
    segment_keys(g, segment, &first, &end);
    attend_segment(a, g, 0, queries, first, end, &state);
    float *parts = p->parts + split->first_part * part_size, *own = parts + segment * part_size;
    memcpy(own, state.high, (size_t)rows * sizeof(float));
    memcpy(own + MOST_QUERIES, state.sum, (size_t)rows * sizeof(float));
    memcpy(own + 2 * MOST_QUERIES, state.out, (size_t)(rows * width) * sizeof(float));
    if (atomic_fetch_sub_explicit(&split->left, 1, memory_order_acq_rel) != 1)
        return;
    for (int64_t s = 1; s < num_segments(g); s++) {
        const float *other = parts + s * part_size;
        add_state(
            parts, parts + MOST_QUERIES, parts + 2 * MOST_QUERIES, other, other + MOST_QUERIES,
            other + 2 * MOST_QUERIES, rows, width);
    }
    write_out(a, g, parts + MOST_QUERIES, parts + 2 * MOST_QUERIES);
}

static void attend_split(void *context, int64_t task) {
    const struct plan *p = context;
    int64_t index = 0;
    while (task >= p->task_starts[index + 1])
        index++;
    attend_part(p, index, task - p->task_starts[index]);
}

/* PS_OK, or what is wrong with the batch. */
static int check(const struct attention *a) {
    if (a->dim > MOST_DIMS || a->dim % 2 || a->block_size % PS_TILE)
        return PS_UNSUPPORTED;
    for (int64_t s = 0; s < a->num_seqs; s++) {
        int64_t used = (a->seq_lens[s] + a->block_size - 1) / a->block_size;
        if (used > a->table_stride || a->query_lens[s] > a->seq_lens[s])
            return PS_BAD_INDEX;
        for (int64_t i = 0; i < used; i++)
            if (a->tables[s * a->table_stride + i] < 0 || a->tables[s * a->table_stride + i] >= a->blocks)
                return PS_BAD_INDEX;
    }
    return PS_OK;
}

static int64_t groups_of(const struct attention *a, int64_t seq) {
    int64_t rows = a->query_lens[seq] * (a->num_heads / a->kv_heads);
    return a->seq_lens[seq] ? (rows + MOST_QUERIES - 1) / MOST_QUERIES : 0;
}

/* All groups, of each sequence the last and longest first: short ones fill the gaps at the end. */
static void make_groups(const struct attention *a, struct group *groups) {
    const int64_t share = a->num_heads / a->kv_heads;
    int64_t first_token = 0;
    for (int64_t s = 0; s < a->num_seqs; s++) {
        const int64_t rows = a->query_lens[s] * share;
        for (int64_t i = groups_of(a, s) - 1; i >= 0; i--)
            for (int64_t h = 0; h < a->kv_heads; h++) {
                struct group g = {s, h, first_token, i * MOST_QUERIES, 0, 0, 0};
                g.rows = rows - g.first_row < MOST_QUERIES ? rows - g.first_row : MOST_QUERIES;
                g.first_key = first_visible(a, position_of(a, &g, 0));
                g.end_key = position_of(a, &g, g.rows - 1) + 1;
                *groups++ = g;
            }
        first_token += a->query_lens[s];
    }
}

/* Divides segments over tasks where there are fewer groups than keep the threads busy. */
static int run(const struct attention *a, const struct group *groups, int64_t count, int threads) {
    struct plan p = {a, groups, 0, count, 0, 0};
    int64_t segments = 0;
    for (int64_t i = 0; i < count; i++)
        segments += num_segments(&groups[i]);
    if (threads <= 1 || segments == count || count >= TASKS_A_THREAD * threads) {
        ps_parallel(attend_whole, &p, count, threads);
        return PS_OK;
    }
    const size_t part_size = (size_t)(MOST_QUERIES * (2 + padded(a->dim))) * sizeof(float);
    p.task_starts = malloc((size_t)(count + 1) * sizeof *p.task_starts);
    p.splits = malloc((size_t)count * sizeof *p.splits);
    p.parts = malloc((size_t)segments * part_size);
    int result = p.task_starts && p.splits && p.parts ? PS_OK : PS_NO_MEMORY;
    if (result == PS_OK) {
        p.task_starts[0] = 0;
        for (int64_t i = 0; i < count; i++) {
            p.task_starts[i + 1] = p.task_starts[i] + num_segments(&groups[i]);
            p.splits[i].first_part = p.task_starts[i];
            atomic_init(&p.splits[i].left, (int)num_segments(&groups[i]));
        }
        ps_parallel(attend_split, &p, segments, threads);
    }
    free(p.task_starts);
    free(p.splits);
    free(p.parts);
    return result;
}

/* query [tokens, num_heads, dim], a token every `query_stride` elements; cache of `blocks` blocks as layout.h
 * says; tables [num_seqs, table_stride]; query_lens, seq_lens [num_seqs], a seq_len of 0 is padding; out
 * [tokens, num_heads, dim]; window 0: none; soft_cap 0: none; slopes [num_heads] or null. */
PS_EXPORT int PS_FN(paged_attention)(
    const void *query, const void *cache, void *out, const int64_t *query_lens, const int64_t *seq_lens,
    const int64_t *tables, int64_t query_stride, int64_t table_stride, int64_t num_seqs, int64_t num_heads,
    int64_t kv_heads, int64_t dim, int64_t blocks, int64_t block_size, int64_t window, float scale, float soft_cap,
    const float *slopes, int type, int threads) {
    const struct attention a = {query,        cache,        out,      query_lens, seq_lens, tables, query_stride,
                                table_stride, num_seqs,     num_heads, kv_heads,  dim,      blocks, block_size,
                                window,       scale,        soft_cap, slopes,     type};
    int result = check(&a);
    if (result != PS_OK)
        return result;
    int64_t count = 0;
    for (int64_t s = 0; s < num_seqs; s++)
        count += groups_of(&a, s) * kv_heads;
    struct group few[64], *groups = count <= 64 ? few : malloc((size_t)count * sizeof *groups);
    if (!groups)
        return PS_NO_MEMORY;
    make_groups(&a, groups);
    int64_t work = 0; /* bytes read, and a byte for each 8 products: about equal in time */
    for (int64_t i = 0; i < count; i++) {
        int64_t keys = groups[i].end_key - groups[i].first_key;
        work += keys * dim * (2 * (int64_t)size_of(type) + groups[i].rows / 4);
    }
    enum { WORTH_THREADS = 200000 };
    result = run(&a, groups, count, work < WORTH_THREADS ? 1 : threads);
    if (groups != few)
        free(groups);
    return result;
}
