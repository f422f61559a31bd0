/* 16 by 16 lanes of 32 bits, for processors with AVX-512. */
#ifndef PS_TRANSPOSE_H
#define PS_TRANSPOSE_H

#include "simd.h"

#if PS_LANES == 16
/* Lanes of 32 bits: out row i is column i. */
PS_INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), high = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[i] = _mm512_shuffle_i32x4(low, high, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(low, high, 0xdd);
        low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        high = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(low, high, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(low, high, 0xdd);
    }
    memcpy(r, t, sizeof t);
}
#endif

#endif
