/* The inner loops of int8.c: exact products of a few rows with a few panels of the weight, for each instruction
 * set, and what is done with the sums. */
#ifndef PS_INT8_TILES_H
#define PS_INT8_TILES_H

#include "simd.h"

enum { PANEL = 16 }; /* outputs */

/* How codes of rows lie, and the largest tile that registers hold. */
#if PS_LANES == 16
typedef int8_t code_t;
enum { MAX_ROWS = 8, MAX_PANELS = 4 };
#else
typedef int16_t code_t; /* of each four columns first and third, then second and fourth */
enum { MAX_ROWS = 4, MAX_PANELS = 1 };
#endif

struct product {
    const code_t *codes;
    const uint8_t *weight;
    const float *scale, *weight_scale, *bias;
    const int32_t *start;
    char *out;
    int64_t rows, padded, outputs, row_blocks, block_rows;
    int panels, type; /* panels of a tile */
};

/* Scales, bias and type of one row's sums for PS_LANES outputs from `column` on. */
PS_INLINE void finish(const struct product *p, vi sums, int64_t row, int64_t column, int type) {
    int64_t left = p->outputs - column;
    if (left <= 0)
        return;
    vf v = __builtin_convertvector(sums, vf) * v_load(p->weight_scale + column) * p->scale[row];
    if (p->bias)
        v += v_load(p->bias + column);
    char *out = p->out + (size_t)(row * p->outputs) * size_of(type);
    if (left >= PS_LANES)
        t_store(out, column, v, type);
    else
        t_store_part(out, column, v, left, type);
}

PS_INLINE void finish_any(const struct product *p, vi sums, int64_t row, int64_t column) {
    p->type == PS_BF16 ? finish(p, sums, row, column, PS_BF16) : finish(p, sums, row, column, PS_F32);
}

/* `height` rows from `row` on by `width` panels from `panel` on; both constant wherever this is inlined. */
#if PS_LANES == 16
PS_INLINE void tile(const struct product *p, int64_t row, int64_t panel, int height, int width) {
    const int64_t padded = p->padded;
    const code_t *codes = p->codes + row * padded;
    const uint8_t *weight = p->weight + panel * PANEL * padded;
    __m512i sums[MAX_ROWS][MAX_PANELS];
#pragma GCC unroll 8
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int j = 0; j < width; j++)
            sums[i][j] = _mm512_set1_epi32(p->start[row + i]);
    for (int64_t k = 0; k < padded; k += 4) {
        __m512i w[MAX_PANELS];
#pragma GCC unroll 4
        for (int j = 0; j < width; j++)
            w[j] = _mm512_loadu_si512(weight + (j * padded + k) * PANEL);
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
            int32_t four;
            memcpy(&four, codes + i * padded + k, 4);
            __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int j = 0; j < width; j++)
                sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], w[j], x);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int j = 0; j < width; j++)
            finish_any(p, (vi)sums[i][j], row + i, (panel + j) * PANEL);
}
#else
/* Without a dot product of bytes: even and odd columns as 16-bit numbers, whose pair sums cannot overflow. */
PS_INLINE void tile(const struct product *p, int64_t row, int64_t panel, int height, int width) {
    const int64_t padded = p->padded;
    const code_t *codes = p->codes + row * padded;
    const uint8_t *weight = p->weight + panel * PANEL * padded;
    const __m256i low = _mm256_set1_epi16(0xff);
    __m256i sums[MAX_ROWS][2];
    (void)width;
#pragma GCC unroll 4
    for (int i = 0; i < height; i++)
        sums[i][0] = sums[i][1] = _mm256_set1_epi32(p->start[row + i]);
    for (int64_t k = 0; k < padded; k += 4) {
        const __m256i first = _mm256_loadu_si256((const __m256i *)(weight + k * PANEL));
        const __m256i second = _mm256_loadu_si256((const __m256i *)(weight + k * PANEL + 32));
        const __m256i even[2] = {_mm256_and_si256(first, low), _mm256_and_si256(second, low)};
        const __m256i odd[2] = {_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8)};
#pragma GCC unroll 4
        for (int i = 0; i < height; i++) {
            int32_t pair[2];
            memcpy(pair, codes + i * padded + k, 8);
            const __m256i x = _mm256_set1_epi32(pair[0]), y = _mm256_set1_epi32(pair[1]);
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(even[j], x));
                sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(odd[j], y));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < height; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
            finish_any(p, (vi)sums[i][j], row + i, panel * PANEL + j * PS_LANES);
}
#endif

typedef void (*tile_fn)(const struct product *p, int64_t row, int64_t panel);

#define TILE(height, width)                                                                                    \
    static void tile_##height##_##width(const struct product *p, int64_t row, int64_t panel) {                 \
        tile(p, row, panel, height, width);                                                                    \
    }
#if PS_LANES == 16
/* Few rows, whose weight comes from memory: a panel after the other, as one stream is read faster than several.
 * Each row's sums are divided over `chains` by their columns, since one chain would wait for itself; `height` and
 * `chains` are constant wherever this is inlined. */
enum { MOST_CHAINS = 4, FETCHING_ROWS = 3, AHEAD_BYTES = 8192 };

PS_INLINE void panels_of_few(const struct product *p, int64_t panel, int64_t width, int height, int chains) {
    const int64_t padded = p->padded, whole = padded - padded % (4 * chains);
    for (int64_t end = panel + width; panel < end; panel++) {
        const uint8_t *weight = p->weight + panel * PANEL * padded;
        __m512i sums[MAX_ROWS][MOST_CHAINS];
#pragma GCC unroll 8
        for (int i = 0; i < height; i++)
#pragma GCC unroll 4
            for (int c = 0; c < chains; c++)
                sums[i][c] = _mm512_set1_epi32(c ? 0 : p->start[i]);
        for (int64_t k = 0; k < padded; k += 4 * chains)
#pragma GCC unroll 4
            for (int c = 0; c < chains; c++) {
                const int64_t column = k + 4 * c;
                if (k >= whole && column >= padded)
                    break;
                const __m512i w = _mm512_loadu_si512(weight + column * PANEL);
                if (height >= FETCHING_ROWS)
                    __builtin_prefetch(weight + column * PANEL + AHEAD_BYTES, 0, 2);
#pragma GCC unroll 8
                for (int i = 0; i < height; i++) {
                    int32_t four;
                    memcpy(&four, p->codes + i * padded + column, 4);
                    sums[i][c] = _mm512_dpbusd_epi32(sums[i][c], w, _mm512_set1_epi32(four));
                }
            }
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
            for (int c = 1; c < chains; c++)
                sums[i][0] = _mm512_add_epi32(sums[i][0], sums[i][c]);
            finish_any(p, (vi)sums[i][0], i, panel * PANEL);
        }
    }
}

#define FEW(height, chains)                                                                                    \
    static void few_##height(const struct product *p, int64_t panel, int64_t width) {                          \
        panels_of_few(p, panel, width, height, chains);                                                        \
    }
FEW(1, 4) FEW(2, 4) FEW(3, 4) FEW(4, 4) FEW(5, 2) FEW(6, 2) FEW(7, 2) FEW(8, 2)
static void (*const few[MAX_ROWS])(const struct product *, int64_t, int64_t) = {
    few_1, few_2, few_3, few_4, few_5, few_6, few_7, few_8};

#define TILES(height) TILE(height, 1) TILE(height, 2) TILE(height, 3) TILE(height, 4)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
TILE(7, 1) TILE(7, 2) TILE(7, 3) TILE(8, 1) TILE(8, 2) TILE(8, 3)
#define ALL(height) {tile_##height##_1, tile_##height##_2, tile_##height##_3, tile_##height##_4}
#define THREE(height) {tile_##height##_1, tile_##height##_2, tile_##height##_3, 0}
static const tile_fn tiles[MAX_ROWS][MAX_PANELS] = {ALL(1), ALL(2), ALL(3),   ALL(4),
                                                    ALL(5), ALL(6), THREE(7), THREE(8)};
#else
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1)
static const tile_fn tiles[MAX_ROWS][MAX_PANELS] = {{tile_1_1}, {tile_2_1}, {tile_3_1}, {tile_4_1}};
#endif

#endif
