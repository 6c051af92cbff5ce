// Attention over a paged KV cache. One layer's cache is [num_blocks][2][G][...]: keys transposed [d][B], so that 16
// positions are one vector, values [B][d].
// G key/value heads, H query heads (H/G of them share keys), d head size, B block size, S sequences,
// M blocks of a table
//
// Positions are taken in chunks of 64, whatever the block size: scores, then softmax rescaled chunk by chunk, sums in
// position order. A row's chunks, and what it adds in each, follow from its own position only, so its result does not
// depend on the rows computed beside it.
#pragma once

#include "packed_gemm.h"
#include "packed_parallel.h"
#include "shared_structs.h"

enum { CHUNK = 64, MAX_HEAD_DIM = 256, TILE_PAIRS = 64, HEAD_LD = MAX_HEAD_DIM + 16, CHUNK_LD = CHUNK + 16 };

#define ATTENTION_FIELDS(FIELD) \
    FIELD(const char *, q)              /* [T, H, d], q_step bytes between tokens */ \
    FIELD(const char *, cache) \
    FIELD(char *, out)                  /* [T, H, d] */ \
    FIELD(const int32_t *, query_starts) FIELD(const int32_t *, context_lens)      /* [S + 1], [S] */ \
    FIELD(const int32_t *, block_tables)                                            /* [S, M] */ \
    FIELD(long, q_step) FIELD(long, num_seqs) FIELD(long, table_width) FIELD(long, num_heads) \
    FIELD(long, num_kv_heads) FIELD(long, head_dim) FIELD(long, block_size) FIELD(long, dtype) \
    FIELD(long, sliding_window) FIELD(float, scale)
DEFINE_STRUCT(Attention, ATTENTION_FIELDS);

// A tile: tokens [token, token + num_tokens) of one sequence with the query heads of one key/value head
typedef struct { int32_t seq, kv_head, token, num_tokens, head, num_heads; } AttentionTask;

typedef struct {
    float q[TILE_PAIRS * HEAD_LD];          // pair = token of the tile * num_heads + head
    float keys[MAX_HEAD_DIM * CHUNK];       // [d][64]
    float values[CHUNK * HEAD_LD];          // [64][d]
    float scores[TILE_PAIRS * CHUNK_LD];    // then exp(score - highest)
    float sums[TILE_PAIRS * HEAD_LD];
    float highest[TILE_PAIRS], total[TILE_PAIRS];
} __attribute__((aligned(64))) TileState;

typedef struct { const Attention *call; const AttentionTask *tasks; } AttentionJob;

INLINE const char *head_block(const Dtype dtype, const Attention *a, long seq, long kv_head, long position, int is_value) {
    long block = a->block_tables[seq * a->table_width + position / a->block_size];
    return a->cache + ((block * 2 + is_value) * a->num_kv_heads + kv_head) * a->head_dim * a->block_size * dtype_bytes(dtype);
}

// While keys are widened, the values of the same positions are fetched, and the keys of the next chunk while values
// are: blocks lie anywhere, so the CPU cannot guess them.
INLINE void load_keys(const Dtype dtype, const Attention *a, const AttentionTask *t, long chunk, long end, float *keys) {
    long bytes = dtype_bytes(dtype), run = min_long(LANES, a->block_size);
    for (long p = chunk; p < end; p += run) {
        const char *from = head_block(dtype, a, t->seq, t->kv_head, p, 0) + p % a->block_size * bytes;
        const char *values = head_block(dtype, a, t->seq, t->kv_head, p, 1) + p % a->block_size * a->head_dim * bytes;
        for (long i = 0; i < a->head_dim; i++) {
            __builtin_prefetch(values + i * run * bytes, 0, 2);
            store_f32_n(keys + i * CHUNK + (p - chunk), load_n(dtype, from + i * a->block_size * bytes, run), run);
        }
    }
}

INLINE void load_values(const Dtype dtype, const Attention *a, const AttentionTask *t, long chunk, long end, long next_end,
                        float *values) {
    long row_bytes = a->head_dim * dtype_bytes(dtype);
    for (long p = chunk; p < end; p++) {
        if (p + CHUNK < next_end) {
            const char *next = head_block(dtype, a, t->seq, t->kv_head, p + CHUNK, 0) + p % a->block_size * row_bytes;
            for (long i = 0; i < row_bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
        }
        widen(dtype, values + (p - chunk) * HEAD_LD,
              head_block(dtype, a, t->seq, t->kv_head, p, 1) + p % a->block_size * row_bytes, a->head_dim);
    }
}

// Turns scores of positions [first, last) of the chunk into weights, rescales what the row has summed so far
INLINE void softmax_row(const Attention *a, TileState *s, long pair, long first, long last, const int is_whole) {
    float *scores = s->scores + pair * CHUNK_LD;
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 score[CHUNK / LANES], best = splat(-__builtin_inff());
    for (int v = 0; v < CHUNK / LANES; v++) {
        score[v] = load_f32(scores + v * LANES) * splat(a->scale);
        if (!is_whole) {
            i32x16 at = lanes + v * LANES;
            i32x16 seen = (at >= (int)first) & (at < (int)last);
            score[v] = select16(seen, score[v], splat(-__builtin_inff()));
        }
        best = max16(score[v], best);
    }
    float highest = max_lanes(best);
    if (highest < s->highest[pair]) highest = s->highest[pair];
    f32x16 sum = splat(0.0f);
    for (int v = 0; v < CHUNK / LANES; v++) {
        f32x16 weight = exp16(score[v] - splat(highest));
        store_f32(scores + v * LANES, weight);
        sum += weight;
    }
    if (highest != s->highest[pair]) {
        f32x16 factor = exp16(splat(s->highest[pair] - highest));
        s->total[pair] *= factor[0];
        for (long i = 0; i < a->head_dim; i += LANES) {
            float *at = s->sums + pair * HEAD_LD + i;
            store_f32(at, load_f32(at) * factor);
        }
    }
    s->highest[pair] = highest;
    s->total[pair] += sum_lanes(sum);
}

INLINE void start_tile(const Dtype dtype, const Attention *a, const AttentionTask *t, TileState *s) {
    for (long i = 0; i < t->num_tokens; i++)
        for (long h = 0; h < t->num_heads; h++) {
            long pair = i * t->num_heads + h;
            widen(dtype, s->q + pair * HEAD_LD,
                  a->q + (t->token + i) * a->q_step + (t->head + h) * a->head_dim * dtype_bytes(dtype), a->head_dim);
            for (long j = 0; j < a->head_dim; j += LANES) store_f32(s->sums + pair * HEAD_LD + j, splat(0.0f));
            s->highest[pair] = -__builtin_inff();
            s->total[pair] = 0.0f;
        }
}

INLINE void finish_tile(const Dtype dtype, const Attention *a, const AttentionTask *t, const TileState *s) {
    for (long pair = 0; pair < t->num_tokens * t->num_heads; pair++) {
        long token = t->token + pair / t->num_heads, head = t->head + pair % t->num_heads;
        char *out = a->out + (token * a->num_heads + head) * a->head_dim * dtype_bytes(dtype);
        for (long i = 0; i < a->head_dim; i += LANES)
            store_n(dtype, out + i * dtype_bytes(dtype), load_f32(s->sums + pair * HEAD_LD + i) / splat(s->total[pair]),
                    a->head_dim - i);
    }
}

INLINE void attention_tile(const Dtype dtype, const Attention *a, const AttentionTask *t) {
    TileState s;
    long position = a->context_lens[t->seq] - (a->query_starts[t->seq + 1] - t->token);       // of the tile's first token
    long end = position + t->num_tokens, window = a->sliding_window, num_vecs = ceil_div(a->head_dim, LANES);
    start_tile(dtype, a, t, &s);
    for (long chunk = max_long(0, position + 1 - window) / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
        long chunk_end = min_long(end, chunk + CHUNK);
        load_keys(dtype, a, t, chunk, chunk_end, s.keys);
        load_values(dtype, a, t, chunk, chunk_end, end, s.values);
        long score_vecs = ceil_div(chunk_end - chunk, LANES), num_pairs = t->num_tokens * t->num_heads;
        multiply_f32(num_pairs, score_vecs, s.q, HEAD_LD, s.keys, CHUNK, a->head_dim, s.scores, CHUNK_LD, 0);
        if (position + 1 >= chunk + CHUNK && end - window <= chunk) {          // every token sees the whole chunk
            for (long pair = 0; pair < num_pairs; pair++) softmax_row(a, &s, pair, 0, CHUNK, 1);
            multiply_f32(num_pairs, num_vecs, s.scores, CHUNK_LD, s.values, HEAD_LD, CHUNK, s.sums, HEAD_LD, 1);
            continue;
        }
        for (long i = 0; i < t->num_tokens; i++) {
            long first = max_long(0, position + i + 1 - window - chunk), last = min_long(CHUNK, position + i + 1 - chunk);
            if (first >= last) continue;
            long pair = i * t->num_heads;       // only positions that the token sees are touched: others may hold NaN
            for (long h = 0; h < t->num_heads; h++) softmax_row(a, &s, pair + h, first, last, 0);
            multiply_f32(t->num_heads, num_vecs, s.scores + pair * CHUNK_LD + first, CHUNK_LD, s.values + first * HEAD_LD,
                         HEAD_LD, last - first, s.sums + pair * HEAD_LD, HEAD_LD, 1);
        }
    }
    finish_tile(dtype, a, t, &s);
}

static void attention_task(const void *context, long task) {
    const AttentionJob *job = context;
    if (job->call->dtype == BF16) attention_tile(BF16, job->call, job->tasks + task);
    else if (job->call->dtype == F16) attention_tile(F16, job->call, job->tasks + task);
    else attention_tile(F32, job->call, job->tasks + task);
}

// Longest contexts first, so that no thread begins a long tile last. With tasks == 0 it only counts.
static long list_attention_tasks(AttentionTask *tasks, const Attention *a) {
    long count = 0, group = a->num_heads / a->num_kv_heads, tile_heads = min_long(group, TILE_PAIRS);
    long tile_tokens = max_long(1, TILE_PAIRS / group);
    for (long seq = 0; seq < a->num_seqs; seq++) {
        long begin = a->query_starts[seq], num_tokens = a->query_starts[seq + 1] - begin;
        for (long tile = ceil_div(num_tokens, tile_tokens) - 1; tile >= 0; tile--)
            for (long g = 0; g < a->num_kv_heads; g++)
                for (long h = 0; h < group; h += tile_heads, count++)
                    if (tasks) tasks[count] = (AttentionTask){
                        (int32_t)seq, (int32_t)g, (int32_t)(begin + tile * tile_tokens),
                        (int32_t)min_long(tile_tokens, num_tokens - tile * tile_tokens), (int32_t)(g * group + h),
                        (int32_t)min_long(tile_heads, group - h)};
    }
    return count;
}

// ---- writing keys and values

typedef struct {
    char *cache;
    const char *k, *v;              // [T, G, d], a step in bytes between tokens
    const int64_t *slots;           // [T] block * block size + offset
    long num_tokens, k_step, v_step, num_kv_heads, head_dim, block_size, bytes;
} KvWrite;

static void write_kv_token(const KvWrite *w, long token) {
    long block = w->slots[token] / w->block_size, offset = w->slots[token] % w->block_size;
    long head_bytes = w->head_dim * w->bytes;
    for (long g = 0; g < w->num_kv_heads; g++) {
        const char *k = w->k + token * w->k_step + g * head_bytes, *v = w->v + token * w->v_step + g * head_bytes;
        char *keys = w->cache + (block * 2 * w->num_kv_heads + g) * head_bytes * w->block_size;
        char *values = w->cache + ((block * 2 + 1) * w->num_kv_heads + g) * head_bytes * w->block_size;
        memcpy(values + offset * head_bytes, v, head_bytes);
        for (long i = 0; i < w->head_dim; i++) {
            char *to = keys + (i * w->block_size + offset) * w->bytes;
            if (w->bytes == 2) memcpy(to, k + i * 2, 2);
            else memcpy(to, k + i * 4, 4);
        }
    }
}
