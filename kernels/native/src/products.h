/* The two products of attention, a few rows by a few vectors at a time, the sums in registers.
 *
 * Both multiply rows of A with a matrix B whose 32-bit lanes lie as the cache has them (layout.h), in one of
 * three modes. A's elements are what one step of a row needs.
 */
#ifndef PS_PRODUCTS_H
#define PS_PRODUCTS_H

#include "layout.h"
#include "simd.h"

enum {
    MODE_F32,  /* A float, a lane of B a float */
    MODE_WIDE, /* A two floats, a lane of B two bfloat16, which are widened */
    MODE_PAIR  /* A two bfloat16, a lane of B two bfloat16: one instruction multiplies and sums the pairs */
};

#if PS_LANES == 16
enum { MOST_ROWS = 8, TILES_AT_ONCE = 2, VALUES_AT_ONCE = 2 };
#elif PS_LANES == 8
enum { MOST_ROWS = 4, TILES_AT_ONCE = 1, VALUES_AT_ONCE = 2 };
#else
enum { MOST_ROWS = 2, TILES_AT_ONCE = 1, VALUES_AT_ONCE = 4 };
#endif
enum { VECTORS_A_TILE = PS_TILE / PS_LANES, MOST_VECTORS = 4, LANE_BYTES = 4, VECTOR_BYTES = 4 * PS_LANES };

/* Bytes of one step of a row of A. */
PS_INLINE int64_t step_bytes(int mode) {
    return mode == MODE_WIDE ? 8 : 4;
}

/* sums[r][j] += a[r] * b[j] for one step; everything but the pointers is a constant where this is inlined. */
PS_INLINE void multiply_add(
    int mode, int rows, int vectors, vf sums[MOST_ROWS][MOST_VECTORS], const char *a, int64_t a_stride,
    const char *const *b, int64_t offset) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
        vu lanes;
        memcpy(&lanes, b[j] + offset, sizeof lanes);
        vf even = (vf)(lanes << 16), odd = (vf)(lanes & 0xffff0000u);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const char *element = a + r * a_stride;
            if (mode == MODE_PAIR) {
#if defined(__AVX512BF16__)
                int32_t pair;
                memcpy(&pair, element, 4);
                sums[r][j] = (vf)_mm512_dpbf16_ps(
                    (__m512)sums[r][j], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)lanes);
#endif
            } else if (mode == MODE_WIDE) {
                float pair[2];
                memcpy(pair, element, 8);
                sums[r][j] += even * pair[0];
                sums[r][j] += odd * pair[1];
            } else {
                float one;
                memcpy(&one, element, 4);
                sums[r][j] += (vf)lanes * one;
            }
        }
    }
}

/* Both products fetch, beside their work, what `next` points to where it is not null: tiles that come a chunk
 * later. Memory then never waits for arithmetic, nor the other way round. */

/* scores[r][16 * t + i] = query row r . key i of tiles[t], for TILES_AT_ONCE tiles. */
PS_INLINE void score_rows(
    int mode, int rows, const char *query, int64_t query_stride, const char *const *tiles, const char *const *next,
    int64_t steps, float *scores, int64_t scores_stride) {
    enum { VECTORS = TILES_AT_ONCE * VECTORS_A_TILE };
    vf sums[MOST_ROWS][MOST_VECTORS];
    const char *b[MOST_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECTORS; j++)
            sums[r][j] = v_set(0);
    for (int j = 0; j < VECTORS; j++)
        b[j] = tiles[j / VECTORS_A_TILE] + j % VECTORS_A_TILE * VECTOR_BYTES;
    for (int64_t i = 0; i < steps; i++) {
        const int64_t offset = i * PS_TILE * LANE_BYTES;
        if (next)
            for (int t = 0; t < TILES_AT_ONCE; t++)
                __builtin_prefetch(next[t] + offset, 0, 2);
        multiply_add(mode, rows, VECTORS, sums, query + i * step_bytes(mode), query_stride, b, offset);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECTORS; j++)
            v_store(scores + r * scores_stride + j * PS_LANES, sums[r][j]);
}

/* out[r] += weights row r @ values of `count` tiles, for `vectors` vectors of dimensions from `first` on (bytes
 * into a row of values). */
PS_INLINE void weigh_rows(
    int mode, int rows, int vectors, const char *weights, int64_t weights_stride, const char *const *values,
    const char *const *next, int count, int64_t first, int64_t row_bytes, float *out, int64_t out_stride) {
    const int steps = mode == MODE_F32 ? PS_TILE : PS_TILE / 2;
    vf sums[MOST_ROWS][MOST_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++)
            sums[r][j] = v_load(out + r * out_stride + j * PS_LANES);
    for (int t = 0; t < count; t++) {
        const char *b[MOST_VECTORS];
        for (int j = 0; j < vectors; j++)
            b[j] = values[t] + first + j * VECTOR_BYTES;
        for (int i = 0; i < steps; i++) {
            if (next)
                for (int j = 0; j < vectors; j++)
                    __builtin_prefetch(next[t] + first + j * VECTOR_BYTES + i * row_bytes, 0, 2);
            multiply_add(
                mode, rows, vectors, sums, weights + (t * steps + i) * step_bytes(mode), weights_stride, b,
                i * row_bytes);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++)
            v_store(out + r * out_stride + j * PS_LANES, sums[r][j]);
}

/* CALL(rows) with `rows` a constant, for a number of rows in [1, MOST_ROWS]. */
#if PS_LANES == 16
#define PS_WITH_ROWS(rows, CALL) \
    switch (rows) { \
    case 1: CALL(1); break; \
    case 2: CALL(2); break; \
    case 3: CALL(3); break; \
    case 4: CALL(4); break; \
    case 5: CALL(5); break; \
    case 6: CALL(6); break; \
    case 7: CALL(7); break; \
    default: CALL(8); \
    }
#elif PS_LANES == 8
#define PS_WITH_ROWS(rows, CALL) \
    switch (rows) { \
    case 1: CALL(1); break; \
    case 2: CALL(2); break; \
    case 3: CALL(3); break; \
    default: CALL(4); \
    }
#else
#define PS_WITH_ROWS(rows, CALL) \
    switch (rows) { \
    case 1: CALL(1); break; \
    default: CALL(2); \
    }
#endif

#endif
