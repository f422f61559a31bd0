/* RMS norm and rotation of query and key heads in place, keys and values into the cache: one pass a token. */
#include "layout.h"
#include "parallel.h"
#include "simd.h"

enum { MOST_DIMS = 256, TOKENS_A_TASK = 8 };

struct write {
    void *heads;
    int64_t tokens, stride; /* of a token, in elements */
    int64_t num_heads, kv_heads, dim, rotary_dim;
    const int64_t *slots;
    const void *cos, *sin, *norm_weight;
    float eps;
    void *cache;
    int64_t block_size;
    int type;
};

/* One head: normed, rotated, stored back. */
PS_INLINE void ready_head(const struct write *w, void *head, int64_t token, const void *weight, int type) {
    const int64_t dim = w->dim, half = w->rotary_dim / 2;
    float wide[MOST_DIMS];
    for (int64_t i = 0; i < dim; i++)
        wide[i] = t_get(head, i, type);
    if (weight) {
        vf square = v_set(0);
        int64_t i = 0;
        for (; i + PS_LANES <= dim; i += PS_LANES)
            square += v_load(wide + i) * v_load(wide + i);
        float sum = v_sum(square);
        for (; i < dim; i++)
            sum += wide[i] * wide[i];
        const float factor = 1.0f / sqrtf(sum / (float)dim + w->eps);
        for (i = 0; i < dim; i++)
            wide[i] *= factor * t_get(weight, i, type);
    }
    if (half) {
        const char *cos = (const char *)w->cos + (size_t)(token * 2 * half) * size_of(type);
        const char *sin = (const char *)w->sin + (size_t)(token * 2 * half) * size_of(type);
        for (int64_t i = 0; i < half; i++) {
            float first = wide[i], second = wide[i + half];
            wide[i] = first * t_get(cos, i, type) + second * t_get(sin, i, type);
            wide[i + half] = second * t_get(cos, i + half, type) + first * t_get(sin, i + half, type);
        }
    }
    for (int64_t i = 0; i < dim; i++)
        t_set(head, i, wide[i], type);
}

PS_INLINE void write_token(const struct write *w, int64_t token, int type) {
    const size_t size = size_of(type);
    const int64_t dim = w->dim;
    char *heads = (char *)w->heads + (size_t)(token * w->stride) * size;
    if (w->norm_weight || w->rotary_dim)
        for (int64_t h = 0; h < w->num_heads + w->kv_heads; h++) {
            const char *weight = w->norm_weight;
            ready_head(w, heads + (size_t)(h * dim) * size, token, weight ? weight + (size_t)(h * dim) * size : 0, type);
        }
    const int64_t slot = w->slots[token];
    if (slot < 0)
        return;
    const int64_t tiles = w->block_size / PS_TILE, offset = slot % w->block_size, place = offset % PS_TILE;
    const int64_t block = slot / w->block_size;
    const char *key = heads + (size_t)(w->num_heads * dim) * size;
    const char *value = key + (size_t)(w->kv_heads * dim) * size;
    for (int64_t h = 0; h < w->kv_heads; h++) {
        int64_t tile_index = (block * w->kv_heads + h) * tiles + offset / PS_TILE;
        char *tile = (char *)w->cache + (size_t)(tile_index * tile_size(dim)) * size;
        const char *k = key + (size_t)(h * dim) * size, *v = value + (size_t)(h * dim) * size;
        if (type == PS_BF16) {
            for (int64_t d = 0; d < dim; d += 2)
                memcpy(tile + (size_t)key_at(place, d, type) * size, k + (size_t)d * size, 4);
            for (int64_t d = 0; d < dim; d++)
                memcpy(tile + (size_t)value_at(place, d, dim, type) * size, v + (size_t)d * size, 2);
        } else {
            for (int64_t d = 0; d < dim; d++)
                memcpy(tile + (size_t)key_at(place, d, type) * size, k + (size_t)d * size, 4);
            memcpy(tile + (size_t)value_at(place, 0, dim, type) * size, v, (size_t)dim * size);
        }
    }
}

static void write_tokens(void *context, int64_t task) {
    const struct write *w = context;
    int64_t end = (task + 1) * TOKENS_A_TASK;
    for (int64_t token = task * TOKENS_A_TASK; token < (end < w->tokens ? end : w->tokens); token++) {
        if (w->type == PS_BF16)
            write_token(w, token, PS_BF16);
        else
            write_token(w, token, PS_F32);
    }
}

/* heads [tokens, num_heads + 2 * kv_heads, dim], a token every `stride` elements; slots [tokens], below 0 for
 * padding; cos, sin [tokens, rotary_dim] where rotary_dim > 0; norm_weight [num_heads + kv_heads, dim] or null;
 * cache of `blocks` blocks as layout.h says. Nothing changes when a slot lies outside: PS_BAD_INDEX. */
PS_EXPORT int PS_FN(rotate_and_write)(
    void *heads, void *cache, const int64_t *slots, const void *cos, const void *sin, const void *norm_weight,
    int64_t tokens, int64_t stride, int64_t num_heads, int64_t kv_heads, int64_t dim, int64_t rotary_dim,
    int64_t blocks, int64_t block_size, float eps, int type, int threads) {
    struct write w = {heads, tokens, stride, num_heads, kv_heads, dim,        rotary_dim, slots,
                      cos,   sin,    norm_weight, eps,   cache,    block_size, type};
    if (dim > MOST_DIMS || dim % 2)
        return PS_UNSUPPORTED;
    for (int64_t i = 0; i < tokens; i++)
        if (slots[i] >= blocks * block_size)
            return PS_BAD_INDEX;
    ps_parallel(write_tokens, &w, (tokens + TOKENS_A_TASK - 1) / TOKENS_A_TASK, threads);
    return PS_OK;
}
