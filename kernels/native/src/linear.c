/* Linear layers over bfloat16 or float32 weights: x W^T + bias, the sums in float32.
 *
 * The weight lies in panels of PANEL outputs, each contiguous: a step is a lane of 32 bits, a pair of columns in
 * bfloat16 and one in float32, of all the panel's outputs: two vectors. A tile of up to MOST_ROWS rows goes through
 * a panel with all its sums in registers, so a few rows read the weight once and as fast as memory gives it, and
 * many rows read it from the caches between.
 *
 * Each sum is taken over the steps in their order whatever the rows beside it, the tile, the chunk or the number
 * of threads, so a row's result is the same bits in any batch.
 */
#include "parallel.h"
#include "transpose.h"

enum {
    PANEL = 32, /* outputs */
    STEP_BYTES = 4 * PANEL,
    MOST_ROWS = 12,    /* with two vectors, 24 of the 32 registers */
    BLOCK_ROWS = 192,  /* that stay in the second-level cache, a chunk at a time */
    CHUNK_STEPS = 512, /* where there is more than a tile of rows */
    GROUP_PANELS = 4,  /* whose sums wait while the chunks go by: 96 KiB on the stack */
    TASKS_A_THREAD = 4,       /* few long reads */
    SMALL_TASKS_A_THREAD = 16, /* where arithmetic takes the time */
    FETCHING_ROWS = 4, /* with fewer the processor's own fetching is as fast as memory */
    AHEAD_BYTES = 8192
};

struct linear {
    const char *x, *weight, *bias;
    char *out;
    int64_t x_bytes; /* from row to row */
    int64_t rows, steps, outputs, panels;
    int64_t chunk_steps, groups;
    int type;
};

PS_INLINE int suits(int type) {
#if defined(__AVX512BF16__)
    if (type == PS_BF16)
        return 1;
#endif
    return type == PS_F32;
}

/* sum + the products of one step; `type` is a constant where this is inlined. */
PS_INLINE vf add_step(vf sum, const char *x, vf weights, int type) {
#if defined(__AVX512BF16__)
    if (type == PS_BF16) {
        int32_t pair;
        memcpy(&pair, x, 4);
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weights);
    }
#endif
    (void)type;
    float one;
    memcpy(&one, x, 4);
    return (vf)_mm512_fmadd_ps(_mm512_set1_ps(one), (__m512)weights, (__m512)sum);
}

/* sums[r][j] += row r of x times the panel, for `steps`, or the product alone where they are fresh; `rows` is a
 * constant where this is inlined. `ahead` bytes on lies what to fetch meanwhile. */
PS_INLINE void multiply(
    int type, int rows, const char *x, int64_t x_bytes, const char *panel, int64_t steps, int64_t ahead,
    int fresh, vf sums[MOST_ROWS][2]) {
    const char *fours[3] = {x, x + 4 * x_bytes, x + 8 * x_bytes};
    vf s[MOST_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        s[r][0] = fresh ? v_set(0) : sums[r][0], s[r][1] = fresh ? v_set(0) : sums[r][1];
    for (const char *end = panel + steps * STEP_BYTES; panel < end; panel += STEP_BYTES) {
        const vf left = v_load((const float *)panel), right = v_load((const float *)panel + PS_LANES);
        __builtin_prefetch(panel + ahead, 0, 2);
        __builtin_prefetch(panel + ahead + 64, 0, 2);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            s[r][0] = add_step(s[r][0], fours[r / 4] + r % 4 * x_bytes, left, type);
            s[r][1] = add_step(s[r][1], fours[r / 4] + r % 4 * x_bytes, right, type);
        }
#pragma GCC unroll 3
        for (int i = 0; i < (rows + 3) / 4; i++)
            fours[i] += 4;
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        sums[r][0] = s[r][0], sums[r][1] = s[r][1];
}

PS_INLINE void multiply_rows(
    int type, int64_t rows, const char *x, int64_t x_bytes, const char *panel, int64_t steps, int64_t ahead,
    int fresh, vf sums[MOST_ROWS][2]) {
#define CASE(n) \
    case n: \
        multiply(type, n, x, x_bytes, panel, steps, ahead, fresh, sums); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
    default:
        multiply(type, MOST_ROWS, x, x_bytes, panel, steps, ahead, fresh, sums);
    }
#undef CASE
}

/* Adds the bias and stores rows from `row` on of a panel's outputs, those that exist. */
PS_INLINE void finish(
    const struct linear *l, int type, int64_t row, int64_t rows, int64_t panel, vf sums[MOST_ROWS][2]) {
    for (int j = 0; j < 2; j++) {
        const int64_t first = panel * PANEL + j * PS_LANES, left = l->outputs - first;
        if (left <= 0)
            break;
        const int64_t count = left < PS_LANES ? left : PS_LANES;
        vf bias = v_set(0);
        if (l->bias)
            bias = count < PS_LANES ? t_load_part(l->bias, first, count, type) : t_load(l->bias, first, type);
        for (int64_t r = 0; r < rows; r++) {
            vf sum = l->bias ? sums[r][j] + bias : sums[r][j];
            const int64_t at = (row + r) * l->outputs + first;
            if (count < PS_LANES)
                t_store_part(l->out, at, sum, count, type);
            else
                t_store(l->out, at, sum, type);
        }
    }
}

/* A block of rows by a group of panels. */
PS_INLINE void multiply_block_of(const struct linear *l, int64_t task, int type) {
    const int64_t first = task / l->groups * BLOCK_ROWS, group = task % l->groups;
    const int64_t rows = l->rows - first < BLOCK_ROWS ? l->rows - first : BLOCK_ROWS;
    const int64_t first_panel = group * l->panels / l->groups;
    const int64_t panels = (group + 1) * l->panels / l->groups - first_panel;
    const int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    vf waiting[GROUP_PANELS][BLOCK_ROWS][2];

    for (int64_t start = 0; start < l->steps; start += l->chunk_steps) {
        const int64_t left = l->steps - start, steps = left < l->chunk_steps ? left : l->chunk_steps;
        /* In bfloat16 a panel stays in the first cache while the tiles go by, in float32, half as dense, a tile while
         * the panels do. */
        for (int64_t i = 0; i < tiles * panels; i++) {
            const int64_t tile = type == PS_F32 ? i / panels : i % tiles;
            const int64_t panel = type == PS_F32 ? i % panels : i / tiles;
            const char *weight = l->weight + ((first_panel + panel) * l->steps + start) * STEP_BYTES;
            const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
            const int64_t ahead = tile || count < FETCHING_ROWS ? 0 : AHEAD_BYTES; /* 0 fetches nothing new */
            vf sums[MOST_ROWS][2], (*kept)[2] = sums;
            if (l->steps > l->chunk_steps)
                kept = &waiting[panel][row];
            multiply_rows(
                type, count, l->x + (first + row) * l->x_bytes + start * 4, l->x_bytes, weight, steps, ahead,
                !start, kept);
            if (left == steps)
                finish(l, type, first + row, count, first_panel + panel, kept);
        }
    }
}

static void multiply_block(void *context, int64_t task) {
    const struct linear *l = context;
#if defined(__AVX512BF16__)
    if (l->type == PS_BF16) {
        multiply_block_of(l, task, PS_BF16);
        return;
    }
#endif
    multiply_block_of(l, task, PS_F32);
}

/* x [rows, columns] (rows `x_stride` elements apart) times the packed weight, plus bias [outputs] unless that is
 * null -> out [rows, outputs]; all of one type. `columns` of bfloat16 is even, and needs pair products. */
PS_EXPORT int PS_FN(linear)(
    const void *x, int64_t x_stride, const void *weight, const void *bias, void *out, int64_t rows, int64_t columns,
    int64_t outputs, int type, int threads) {
    if (!suits(type) || (type == PS_BF16 && columns % 2))
        return PS_UNSUPPORTED;
    if (!rows || !outputs)
        return PS_OK;
    const int64_t steps = type == PS_BF16 ? columns / 2 : columns, panels = (outputs + PANEL - 1) / PANEL;
    struct linear l = {
        x, weight, bias, out, x_stride * (int64_t)size_of(type), rows, steps, outputs, panels, steps, 1, type};
    if (rows > MOST_ROWS && steps > CHUNK_STEPS) {
        const int64_t chunks = (steps + CHUNK_STEPS - 1) / CHUNK_STEPS;
        l.chunk_steps = (steps + chunks - 1) / chunks;
    }
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t tasks = threads * (int64_t)(rows > MOST_ROWS ? SMALL_TASKS_A_THREAD : TASKS_A_THREAD);
    const int64_t wanted = threads > 1 ? (tasks + blocks - 1) / blocks : 1;
    const int grouped = l.steps > l.chunk_steps || (type == PS_F32 && rows > MOST_ROWS);
    const int64_t least = grouped ? (panels + GROUP_PANELS - 1) / GROUP_PANELS : 1;
    l.groups = wanted > least ? wanted : least;
    if (l.groups > l.panels)
        l.groups = l.panels;
    ps_parallel(multiply_block, &l, blocks * l.groups, threads);
    return PS_OK;
}

/* Packing. */

struct packing {
    const char *weight;
    char *packed;
    int64_t stride, outputs, lanes, rest; /* stride in bytes; rest: bytes of a row that fill no lane */
};

/* `count` lanes of a row from `start` on, the others 0. */
PS_INLINE __m512i load_lanes(const struct packing *p, int64_t row, int64_t start, int64_t count) {
    const char *from = p->weight + row * p->stride + start * 4;
    if (count == 16 && (!p->rest || start + 16 < p->lanes))
        return _mm512_loadu_si512(from);
    char lanes[64] = {0};
    memcpy(lanes, from, (size_t)(count * 4 - (start + count == p->lanes && p->rest ? 4 - p->rest : 0)));
    return _mm512_loadu_si512(lanes);
}

static void pack_panel(void *context, int64_t panel) {
    const struct packing *p = context;
    for (int64_t start = 0; start < p->lanes; start += 16) {
        const int64_t count = p->lanes - start < 16 ? p->lanes - start : 16;
        for (int j = 0; j < 2; j++) {
            __m512i lanes[16];
            for (int i = 0; i < 16; i++) {
                const int64_t row = panel * PANEL + j * 16 + i;
                lanes[i] = row < p->outputs ? load_lanes(p, row, start, count) : _mm512_setzero_si512();
            }
            transpose(lanes);
            char *to = p->packed + (panel * p->lanes + start) * STEP_BYTES + j * 64;
            for (int64_t i = 0; i < count; i++)
                memcpy(to + i * STEP_BYTES, &lanes[i], 64);
        }
    }
}

/* weight [outputs, columns] (rows `stride` elements apart) -> packed [outputs / PANEL][columns][PANEL], of bfloat16
 * [columns / 2][PANEL] pairs, rounded up, with zeros for what the weight does not have. */
PS_EXPORT int PS_FN(linear_pack)(
    const void *weight, int64_t stride, void *packed, int64_t outputs, int64_t columns, int type, int threads) {
    const int64_t bytes = columns * (int64_t)size_of(type);
    struct packing p = {weight, packed, stride * (int64_t)size_of(type), outputs, (bytes + 3) / 4, bytes % 4};
    ps_parallel(pack_panel, &p, (outputs + PANEL - 1) / PANEL, threads);
    return PS_OK;
}
