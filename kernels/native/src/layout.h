/* How keys and values lie in the cache that these functions share.
 *
 * A tile holds 16 tokens of one key/value head: first the keys, then the values.
 *   float32:  keys [dim][16 tokens], values [16 tokens][padded dim]
 *   bfloat16: keys [dim / 2][16 tokens][2 dims], values [8][padded dim][2 tokens]
 * so that 16 tokens, or 16 dimensions, are one load, and in bfloat16 each 32-bit lane holds the pair that one
 * multiply-add sums. The cache is [blocks, kv_heads, block_size / 16, tile]; padded dim is the next multiple
 * of 16, and what lies there is never looked at.
 */
#ifndef PS_LAYOUT_H
#define PS_LAYOUT_H

#include "types.h"

enum { PS_TILE = 16 };

PS_INLINE int64_t padded(int64_t dim) {
    return (dim + 15) / 16 * 16;
}

/* Elements of a tile. */
PS_INLINE int64_t tile_size(int64_t dim) {
    return PS_TILE * (dim + padded(dim));
}

/* Elements from the start of a tile to a token's key element or value element. */
PS_INLINE int64_t key_at(int64_t token, int64_t d, int type) {
    return type == PS_BF16 ? (d / 2 * PS_TILE + token) * 2 + d % 2 : d * PS_TILE + token;
}

PS_INLINE int64_t value_at(int64_t token, int64_t d, int64_t dim, int type) {
    return PS_TILE * dim +
           (type == PS_BF16 ? (token / 2 * padded(dim) + d) * 2 + token % 2 : token * padded(dim) + d);
}

#endif
