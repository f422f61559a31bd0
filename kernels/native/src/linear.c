/* Linear layers over bfloat16 weights: x W^T + bias, the sums in float32.
 *
 * The weight lies in panels of PANEL outputs, each contiguous: a step is a pair of columns of all the panel's
 * outputs, two vectors. A tile of up to MOST_ROWS rows goes through a panel with all its sums in registers, so a
 * few rows read the weight once and as fast as memory gives it, and many rows read it from the caches between.
 *
 * Each sum is taken over the pairs in their order whatever the rows beside it, the tile, the chunk or the number
 * of threads, so a row's result is the same bits in any batch.
 */
#include "parallel.h"
#include "transpose.h"

enum {
    PANEL = 32, /* outputs */
    STEP_BYTES = 4 * PANEL,
    MOST_ROWS = 12,    /* with two vectors, 24 of the 32 registers */
    BLOCK_ROWS = 192,  /* that stay in the second-level cache, a chunk at a time */
    CHUNK_PAIRS = 512, /* of columns, where there is more than a tile of rows */
    GROUP_PANELS = 4,  /* whose sums wait while the chunks go by: 96 KiB on the stack */
    TASKS_A_THREAD = 4,       /* few long reads */
    SMALL_TASKS_A_THREAD = 16, /* where arithmetic takes the time */
    FETCHING_ROWS = 4, /* with fewer the processor's own fetching is as fast as memory */
    AHEAD_BYTES = 8192
};

struct linear {
    const char *x, *weight;
    const uint16_t *bias;
    uint16_t *out;
    int64_t x_bytes; /* from row to row */
    int64_t rows, pairs, outputs, panels;
    int64_t block_rows, chunk_pairs, groups;
};

/* sums[r][j] += row r of x times the panel, for `pairs` steps; `rows` is a constant where this is inlined.
 * `ahead` bytes on lies what to fetch meanwhile. */
PS_INLINE void multiply(
    int rows, const char *x, int64_t x_bytes, const char *panel, int64_t pairs, int64_t ahead,
    vf sums[MOST_ROWS][2]) {
    const char *fours[3] = {x, x + 4 * x_bytes, x + 8 * x_bytes};
    vf s[MOST_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        s[r][0] = sums[r][0], s[r][1] = sums[r][1];
    for (const char *end = panel + pairs * STEP_BYTES; panel < end; panel += STEP_BYTES) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(panel);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(panel + 64);
        __builtin_prefetch(panel + ahead, 0, 2);
        __builtin_prefetch(panel + ahead + 64, 0, 2);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, fours[r / 4] + r % 4 * x_bytes, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            s[r][0] = (vf)_mm512_dpbf16_ps((__m512)s[r][0], both, left);
            s[r][1] = (vf)_mm512_dpbf16_ps((__m512)s[r][1], both, right);
        }
#pragma GCC unroll 3
        for (int i = 0; i < (rows + 3) / 4; i++)
            fours[i] += 4;
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        sums[r][0] = s[r][0], sums[r][1] = s[r][1];
}

static void multiply_rows(
    int64_t rows, const char *x, int64_t x_bytes, const char *panel, int64_t pairs, int64_t ahead,
    vf sums[MOST_ROWS][2]) {
#define CASE(n) \
    case n: \
        multiply(n, x, x_bytes, panel, pairs, ahead, sums); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
    default:
        multiply(MOST_ROWS, x, x_bytes, panel, pairs, ahead, sums);
    }
#undef CASE
}

/* Adds the bias and stores rows from `row` on of a panel's outputs, those that exist. */
static void finish(const struct linear *l, int64_t row, int64_t rows, int64_t panel, vf sums[MOST_ROWS][2]) {
    for (int j = 0; j < 2; j++) {
        const int64_t first = panel * PANEL + j * PS_LANES, left = l->outputs - first;
        if (left <= 0)
            break;
        const int64_t count = left < PS_LANES ? left : PS_LANES;
        vf bias = v_set(0);
        if (l->bias)
            bias = count < PS_LANES ? t_load_part(l->bias, first, count, PS_BF16) : v_load_bf16(l->bias + first);
        for (int64_t r = 0; r < rows; r++) {
            uint16_t *out = l->out + (row + r) * l->outputs + first;
            vf sum = l->bias ? sums[r][j] + bias : sums[r][j];
            if (count < PS_LANES)
                t_store_part(out, 0, sum, count, PS_BF16);
            else
                v_store_bf16(out, sum);
        }
    }
}

/* A block of rows by a group of panels. */
static void multiply_block(void *context, int64_t task) {
    const struct linear *l = context;
    const int64_t first = task / l->groups * l->block_rows, group = task % l->groups;
    const int64_t rows = l->rows - first < l->block_rows ? l->rows - first : l->block_rows;
    const int64_t first_panel = group * l->panels / l->groups, end_panel = (group + 1) * l->panels / l->groups;
    const int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    vf waiting[GROUP_PANELS][BLOCK_ROWS][2];

    for (int64_t start = 0; start < l->pairs; start += l->chunk_pairs) {
        const int64_t left = l->pairs - start, pairs = left < l->chunk_pairs ? left : l->chunk_pairs;
        for (int64_t panel = first_panel; panel < end_panel; panel++) {
            const char *weight = l->weight + (panel * l->pairs + start) * STEP_BYTES;
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
                const int64_t ahead = tile || count < FETCHING_ROWS ? 0 : AHEAD_BYTES; /* 0 fetches nothing new */
                vf sums[MOST_ROWS][2], (*kept)[2] = sums;
                if (l->pairs > l->chunk_pairs)
                    kept = &waiting[panel - first_panel][row];
                if (!start)
                    memset(kept, 0, (size_t)count * sizeof *kept);
                multiply_rows(
                    count, l->x + (first + row) * l->x_bytes + start * 4, l->x_bytes, weight, pairs, ahead, kept);
                if (left == pairs)
                    finish(l, first + row, count, panel, kept);
            }
        }
    }
}

/* x [rows, columns] (rows `x_stride` elements apart) times the packed weight, plus bias [outputs] unless that is
 * null -> out [rows, outputs]; all bfloat16. `columns` is even. */
PS_EXPORT int PS_FN(linear)(
    const uint16_t *x, int64_t x_stride, const void *weight, const uint16_t *bias, uint16_t *out, int64_t rows,
    int64_t columns, int64_t outputs, int threads) {
    if (columns % 2)
        return PS_UNSUPPORTED;
    if (!rows || !outputs)
        return PS_OK;
    struct linear l = {
        (const char *)x, weight, bias, out, x_stride * 2, rows, columns / 2, outputs, (outputs + PANEL - 1) / PANEL,
        BLOCK_ROWS, columns / 2, 1};
    if (rows > MOST_ROWS && l.pairs > CHUNK_PAIRS) {
        const int64_t chunks = (l.pairs + CHUNK_PAIRS - 1) / CHUNK_PAIRS;
        l.chunk_pairs = (l.pairs + chunks - 1) / chunks;
    }
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t tasks = threads * (int64_t)(rows > MOST_ROWS ? SMALL_TASKS_A_THREAD : TASKS_A_THREAD);
    const int64_t wanted = threads > 1 ? (tasks + blocks - 1) / blocks : 1;
    const int64_t least = l.pairs > l.chunk_pairs ? (l.panels + GROUP_PANELS - 1) / GROUP_PANELS : 1;
    l.groups = wanted > least ? wanted : least;
    if (l.groups > l.panels)
        l.groups = l.panels;
    ps_parallel(multiply_block, &l, blocks * l.groups, threads);
    return PS_OK;
}

/* Packing. */

struct packing {
    const uint16_t *weight;
    char *packed;
    int64_t stride, outputs, columns;
};

static void pack_panel(void *context, int64_t panel) {
    const struct packing *p = context;
    const int64_t pairs = (p->columns + 1) / 2;
    for (int64_t start = 0; start < pairs; start += 16) {
        const int64_t left = p->columns - 2 * start, count = pairs - start < 16 ? pairs - start : 16;
        const __mmask32 mask = left < 32 ? (1u << left) - 1 : ~0u;
        for (int j = 0; j < 2; j++) {
            __m512i lanes[16];
            for (int i = 0; i < 16; i++) {
                const int64_t row = panel * PANEL + j * 16 + i;
                lanes[i] = row < p->outputs
                               ? _mm512_maskz_loadu_epi16(mask, p->weight + row * p->stride + 2 * start)
                               : _mm512_setzero_si512();
            }
            transpose(lanes);
            char *to = p->packed + (panel * pairs + start) * STEP_BYTES + j * 64;
            for (int64_t i = 0; i < count; i++)
                memcpy(to + i * STEP_BYTES, &lanes[i], 64);
        }
    }
}

/* weight [outputs, columns] (rows `stride` elements apart), bfloat16 -> packed [outputs / PANEL][columns / 2][PANEL]
 * pairs, both rounded up, with zeros for what the weight does not have. */
PS_EXPORT int PS_FN(linear_pack)(
    const uint16_t *weight, int64_t stride, void *packed, int64_t outputs, int64_t columns, int threads) {
    struct packing p = {weight, packed, stride, outputs, columns};
    ps_parallel(pack_panel, &p, (outputs + PANEL - 1) / PANEL, threads);
    return PS_OK;
}
