/* Vectors of PS_LANES floats in the compiler's own vector types, so that one source serves every instruction
 * set; intrinsics only where the compiler would not find the instruction. */
#ifndef PS_SIMD_H
#define PS_SIMD_H

#include "types.h"

#include <math.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define PS_LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define PS_LANES 8
#else
#define PS_LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * PS_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * PS_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * PS_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * PS_LANES)));

PS_INLINE vf v_set(float x) {
    return x - (vf){0};
}

PS_INLINE vf v_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

PS_INLINE void v_store(float *p, vf v) {
    memcpy(p, &v, sizeof v);
}

/* where mask is all ones: a, else b */
PS_INLINE vf v_select(vi mask, vf a, vf b) {
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

/* Of unordered ones b. */
PS_INLINE vf v_max(vf a, vf b) {
#if PS_LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif PS_LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return v_select(a > b, a, b);
#endif
}

PS_INLINE float v_sum(vf v) {
#if PS_LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[PS_LANES], sum;
    v_store(lanes, v);
    for (int width = PS_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    sum = lanes[0];
    return sum;
#endif
}

PS_INLINE float v_highest(vf v) {
#if PS_LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float lanes[PS_LANES];
    v_store(lanes, v);
    for (int i = 1; i < PS_LANES; i++)
        lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
#endif
}

PS_INLINE vf v_round(vf x) {
#if PS_LANES == 16
    return (vf)_mm512_roundscale_ps((__m512)x, 8);
#elif PS_LANES == 8
    return (vf)_mm256_round_ps((__m256)x, 8);
#else
    const vf magic = v_set(12582912.0f); /* 1.5 * 2**23: adding it leaves the nearest integer */
    return (x + magic) - magic;
#endif
}

/* 2**x, to a few units in the last place; 0 below -126, so also for -inf; NaN for NaN. Not for x above 127. */
PS_INLINE vf v_exp2(vf x) {
    vf low = v_max(v_set(-150.0f), x);
    vf whole = v_round(low), part = low - whole;
    vf y = v_set(1.5403530e-4f);
    y = y * part + v_set(1.3333558e-3f);
    y = y * part + v_set(9.6181291e-3f);
    y = y * part + v_set(5.5504109e-2f);
    y = y * part + v_set(2.4022651e-1f);
    y = y * part + v_set(6.9314718e-1f);
    y = y * part + v_set(1.0f);
    vi power = __builtin_convertvector(whole, vi);
    vf scale = (vf)((power + 127) << 23);
    return v_select(low < v_set(-126.0f), v_set(0.0f), y * scale);
}

PS_INLINE float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

PS_INLINE uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

PS_INLINE vf v_load_bf16(const uint16_t *p) {
    vh half;
    memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

/* To nearest even; NaN stays NaN. */
PS_INLINE void v_store_bf16(uint16_t *p, vf v) {
#if defined(__AVX512BF16__)
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &half, sizeof half);
#else
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vu is_nan = (vu)((vi)(bits & 0x7fffffff) > (vi)((vu){0} + 0x7f800000));
    rounded = (is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded);
    vh half = __builtin_convertvector(rounded, vh);
    memcpy(p, &half, sizeof half);
#endif
}

/* Elements of either type; `type` is a constant wherever these are inlined. */

PS_INLINE size_t size_of(int type) {
    return type == PS_BF16 ? 2 : 4;
}

PS_INLINE vf t_load(const void *p, int64_t i, int type) {
    return type == PS_BF16 ? v_load_bf16((const uint16_t *)p + i) : v_load((const float *)p + i);
}

PS_INLINE void t_store(void *p, int64_t i, vf v, int type) {
    if (type == PS_BF16)
        v_store_bf16((uint16_t *)p + i, v);
    else
        v_store((float *)p + i, v);
}

/* `count` < PS_LANES elements, the other lanes 0. */
PS_INLINE vf t_load_part(const void *p, int64_t i, int64_t count, int type) {
    uint32_t buffer[PS_LANES] = {0};
    memcpy(buffer, (const char *)p + (size_t)i * size_of(type), (size_t)count * size_of(type));
    return t_load(buffer, 0, type);
}

PS_INLINE void t_store_part(void *p, int64_t i, vf v, int64_t count, int type) {
    uint32_t buffer[PS_LANES];
    t_store(buffer, 0, v, type);
    memcpy((char *)p + (size_t)i * size_of(type), buffer, (size_t)count * size_of(type));
}

PS_INLINE float t_get(const void *p, int64_t i, int type) {
    return type == PS_BF16 ? bf16_to_float(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

PS_INLINE void t_set(void *p, int64_t i, float x, int type) {
    if (type == PS_BF16)
        ((uint16_t *)p)[i] = float_to_bf16(x);
    else
        ((float *)p)[i] = x;
}

/* What storing and loading would make of v. */
PS_INLINE vf t_rounded(vf v, int type) {
    if (type == PS_F32)
        return v;
    uint16_t buffer[PS_LANES];
    v_store_bf16(buffer, v);
    return v_load_bf16(buffer);
}

#endif
