/* The softmax between the two products, in powers of two: what every attention here has in common. */
#ifndef PS_SOFTMAX_H
#define PS_SOFTMAX_H

#include "products.h"

#define LOG2_E 1.44269504f

/* How elements of `type` are multiplied here. */
PS_INLINE int mode_of(int type) {
#if defined(__AVX512BF16__)
    return type == PS_F32 ? MODE_F32 : MODE_PAIR;
#else
    return type == PS_F32 ? MODE_F32 : MODE_WIDE;
#endif
}

PS_INLINE vi indices(void) {
    vi v;
    for (int i = 0; i < PS_LANES; i++)
        v[i] = i;
    return v;
}

PS_INLINE float exp2_of(float x) {
    return v_exp2(v_set(x))[0];
}

/* -inf where nothing has been seen, of which 0 must take the place in differences. */
PS_INLINE float or_zero(float high) {
    return high == -INFINITY ? 0 : high;
}

/* The weights of a row, as the second product wants them, from its logits; their sum. */
PS_INLINE float to_weights(const float *scores, int64_t columns, float high, char *weights, int mode) {
    vf sum = v_set(0);
    for (int64_t i = 0; i < columns; i += PS_LANES) {
        vf w = v_exp2(v_load(scores + i) - v_set(high));
        sum += w;
        if (mode == MODE_PAIR)
            v_store_bf16((uint16_t *)weights + i, w);
        else
            v_store((float *)weights + i, w);
    }
    return v_sum(sum);
}

#endif
