// Gated DeltaNet: causal convolution, and the recurrence token by token. A task is a part of the channels, or some columns of one
// head's state, of one sequence: no result depends on how work is shared out or on how many tokens a call has.
// T tokens, S sequences, C channels, H value heads, k key head size, v value head size. Steps are in bytes between rows.
#pragma once

#include "packed_parallel.h"
#include "packed_rows.h"
#include "packed_simd.h"
#include "shared_structs.h"

enum { MAX_KEY_DIM = 256, STATE_VECTORS = 4, STATE_COLUMNS = STATE_VECTORS * LANES, CONV_CHANNELS = 512,
       CONV_TASK_ELEMENTS = 1 << 13 };

// query_starts [S + 1]; reads and writes [S]: state slots, a read of -1 begins; kept_starts [S + 1], kept_rows and
// kept_slots [W]: the state is also kept after so many rows, or 0
#define SEQUENCES_FIELDS(FIELD) FIELD(const int32_t *, query_starts) FIELD(const int32_t *, reads) \
    FIELD(const int32_t *, writes) FIELD(const int32_t *, kept_starts) FIELD(const int32_t *, kept_rows) \
    FIELD(const int32_t *, kept_slots) FIELD(long, num_seqs)
DEFINE_STRUCT(Sequences, SEQUENCES_FIELDS);

// Slots to write of one sequence: `next` counts those that it has passed.
typedef struct { const int32_t *rows, *slots; long next, end, last_row, last_slot; } Writes;

INLINE Writes writes_of(const Sequences *seqs, long seq) {
    long first = seqs->kept_starts ? seqs->kept_starts[seq] : 0, end = seqs->kept_starts ? seqs->kept_starts[seq + 1] : 0;
    return (Writes){seqs->kept_rows, seqs->kept_slots, first, end,
                    seqs->query_starts[seq + 1] - seqs->query_starts[seq], seqs->writes[seq]};
}

// The slot to write after `num_rows` rows of the sequence, or -1
INLINE long slot_after(Writes *writes, long num_rows) {
    if (writes->next < writes->end && writes->rows[writes->next] == num_rows) return writes->slots[writes->next++];
    return num_rows == writes->last_row ? writes->last_slot : -1;
}

// ---- convolution: weight [K, C] of the model's dtype, slots [N, K - 1, C], oldest row first

#define CONV_FIELDS(FIELD) FIELD(const char *, x) FIELD(const char *, weight) FIELD(char *, slots) FIELD(char *, out) \
    FIELD(long, step) FIELD(long, width) FIELD(long, kernel) FIELD(long, dtype) FIELD(const Sequences *, seqs)
DEFINE_STRUCT(Conv, CONV_FIELDS);

INLINE long num_conv_parts(const Conv *call) { return ceil_div(call->width, CONV_CHANNELS); }

// The row that is `back` rows before row t of the call; rows before the call's are in the slot that is read.
INLINE const char *conv_row(const Conv *call, long first, long t, long back, const char *before) {
    if (t - back >= 0) return call->x + (first + t - back) * call->step;
    return before ? before + (call->kernel - 1 + t - back) * call->width * dtype_bytes(call->dtype) : 0;
}

INLINE void conv_part(const Dtype dtype, const Conv *call, long seq, long channel, long end) {
    long bytes = dtype_bytes(dtype), row_bytes = call->width * bytes, slot_bytes = (call->kernel - 1) * row_bytes;
    long first = call->seqs->query_starts[seq], num_rows = call->seqs->query_starts[seq + 1] - first;
    const char *before = call->seqs->reads[seq] < 0 ? 0 : call->slots + call->seqs->reads[seq] * slot_bytes;
    Writes writes = writes_of(call->seqs, seq);
    for (long t = 0; t < num_rows; t++) {
        for (long c = channel; c < end; c += LANES) {
            f32x16 sum = splat(0.0f);
            for (long back = call->kernel - 1; back >= 0; back--) {
                const char *row = conv_row(call, first, t, back, before);
                if (row) sum = fma16(load_n(dtype, row + c * bytes, end - c),
                                     load_n(dtype, call->weight + (call->kernel - 1 - back) * row_bytes + c * bytes, end - c), sum);
            }
            store_n(dtype, call->out + (first + t) * row_bytes + c * bytes, silu16(sum), end - c);
        }
        long slot = slot_after(&writes, t + 1);
        for (long back = call->kernel - 2; slot >= 0 && back >= 0; back--) {
            const char *row = conv_row(call, first, t, back, before);
            char *to = call->slots + slot * slot_bytes + (call->kernel - 2 - back) * row_bytes + channel * bytes;
            if (row) memcpy(to, row + channel * bytes, (end - channel) * bytes);
            else memset(to, 0, (end - channel) * bytes);
        }
    }
}

static void conv_task(const void *context, long task) {
    const Conv *call = context;
    long num_parts = num_conv_parts(call), seq = task / num_parts, channel = task % num_parts * CONV_CHANNELS;
    long end = min_long(call->width, channel + CONV_CHANNELS);
    if (call->dtype == BF16) conv_part(BF16, call, seq, channel, end);
    else if (call->dtype == F16) conv_part(F16, call, seq, channel, end);
    else conv_part(F32, call, seq, channel, end);
}

// ---- recurrence

// qkv [T, 2 * key heads * k + H * v], ba [T, 2 * H], rate and bias [H], slots [N, H, k, v], out [T, H, v]
#define DELTA_RULE_FIELDS(FIELD) FIELD(const char *, qkv) FIELD(const char *, ba) FIELD(const float *, rate) \
    FIELD(const float *, bias) FIELD(float *, slots) FIELD(char *, out) FIELD(long, qkv_step) FIELD(long, ba_step) \
    FIELD(long, num_key_heads) FIELD(long, num_heads) FIELD(long, key_dim) FIELD(long, value_dim) FIELD(long, dtype) \
    FIELD(const Sequences *, seqs)
DEFINE_STRUCT(DeltaRule, DELTA_RULE_FIELDS);

INLINE long num_delta_parts(const DeltaRule *call) { return ceil_div(call->value_dim, STATE_COLUMNS); }

// log(1 + e^x), without overflow: max(x, 0) + log1p(e^-|x|), the latter by the series of 2 atanh(u / (2 + u))
INLINE float softplus(float x) {
    float u = exp16(splat(x > 0.0f ? -x : x))[0];
    float s = u / (2.0f + u), s2 = s * s, p = 1.0f / 15.0f;
    for (int odd = 13; odd >= 1; odd -= 2) p = __builtin_fmaf(p, s2, 1.0f / (float)odd);
    return (x > 0.0f ? x : 0.0f) + 2.0f * s * p;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp16(splat(x < -88.0f ? 88.0f : -x))[0]); }

INLINE float element(const Dtype dtype, const char *row, long i) { return load_n(dtype, row + i * dtype_bytes(dtype), 1)[0]; }

// x / |x| * scale, as floats
INLINE void normalize(const Dtype dtype, const char *x, float *out, long size, float scale) {
    f32x16 squares = splat(0.0f);
    for (long i = 0; i < size; i += LANES) {
        f32x16 v = load_n(dtype, x + i * dtype_bytes(dtype), size - i);
        squares = fma16(v, v, squares);
    }
    f32x16 factor = splat(1.0f) / __builtin_elementwise_sqrt(splat(sum_lanes(squares) + 1e-6f)) * splat(scale);
    for (long i = 0; i < size; i += LANES)
        store_f32(out + i, load_n(dtype, x + i * dtype_bytes(dtype), size - i) * factor);
}

// One token, on the columns that `state` holds. Sums over k: even and odd k apart, then added; S q is made of the old state:
// S' q = decay (S q) + (k q) delta, so that the state is passed over twice only.
INLINE void delta_token(float *state, const float *q, const float *k, long key_dim, float kq, f32x16 decay, f32x16 beta,
                        const f32x16 *v, f32x16 *out) {
    f32x16 sk[2][STATE_VECTORS], sq[2][STATE_VECTORS];
    for (int j = 0; j < STATE_VECTORS; j++) sk[0][j] = sk[1][j] = sq[0][j] = sq[1][j] = splat(0.0f);
    long i = 0;
    for (; i + 2 <= key_dim; i += 2)
        for (int odd = 0; odd < 2; odd++)
            for (int j = 0; j < STATE_VECTORS; j++) {
                f32x16 s = load_f32(state + (i + odd) * STATE_COLUMNS + j * LANES);
                sk[odd][j] = fma16(s, splat(k[i + odd]), sk[odd][j]);
                sq[odd][j] = fma16(s, splat(q[i + odd]), sq[odd][j]);
            }
    for (; i < key_dim; i++)
        for (int j = 0; j < STATE_VECTORS; j++) {
            f32x16 s = load_f32(state + i * STATE_COLUMNS + j * LANES);
            sk[0][j] = fma16(s, splat(k[i]), sk[0][j]);
            sq[0][j] = fma16(s, splat(q[i]), sq[0][j]);
        }
    f32x16 delta[STATE_VECTORS];
    for (int j = 0; j < STATE_VECTORS; j++) {
        delta[j] = (v[j] - decay * (sk[0][j] + sk[1][j])) * beta;
        out[j] = fma16(splat(kq), delta[j], decay * (sq[0][j] + sq[1][j]));
    }
    for (i = 0; i < key_dim; i++)
        for (int j = 0; j < STATE_VECTORS; j++) {
            float *s = state + i * STATE_COLUMNS + j * LANES;
            store_f32(s, fma16(splat(k[i]), delta[j], decay * load_f32(s)));
        }
}

INLINE void load_state(float *state, const float *slot, long key_dim, long value_dim, long columns) {
    for (long i = 0; i < key_dim; i++)
        for (long j = 0; j < STATE_COLUMNS; j += LANES)
            store_f32(state + i * STATE_COLUMNS + j,
                      slot && j < columns ? load_n(F32, slot + i * value_dim + j, columns - j) : splat(0.0f));
}

INLINE void store_state(const float *state, float *slot, long key_dim, long value_dim, long columns) {
    for (long i = 0; i < key_dim; i++)
        for (long j = 0; j < columns; j += LANES)
            store_n(F32, slot + i * value_dim + j, load_f32(state + i * STATE_COLUMNS + j), columns - j);
}

INLINE void delta_part(const Dtype dtype, const DeltaRule *call, long seq, long head, long column) {
    float state[MAX_KEY_DIM * STATE_COLUMNS] __attribute__((aligned(64)));
    float q[MAX_KEY_DIM + LANES], k[MAX_KEY_DIM + LANES];
    long bytes = dtype_bytes(dtype), key_dim = call->key_dim, value_dim = call->value_dim;
    long columns = min_long(STATE_COLUMNS, value_dim - column), key_width = call->num_key_heads * key_dim;
    long key_head = head / (call->num_heads / call->num_key_heads), slot_size = call->num_heads * key_dim * value_dim;
    long at = head * key_dim * value_dim + column;
    long read = call->seqs->reads[seq], first = call->seqs->query_starts[seq];
    Writes writes = writes_of(call->seqs, seq);
    load_state(state, read < 0 ? 0 : call->slots + read * slot_size + at, key_dim, value_dim, columns);
    float scale = 1.0f / __builtin_sqrtf((float)key_dim);
    for (long t = first; t < call->seqs->query_starts[seq + 1]; t++) {
        const char *row = call->qkv + t * call->qkv_step, *ba = call->ba + t * call->ba_step;
        normalize(dtype, row + key_head * key_dim * bytes, q, key_dim, scale);
        normalize(dtype, row + (key_width + key_head * key_dim) * bytes, k, key_dim, 1.0f);
        f32x16 products = splat(0.0f);
        for (long i = 0; i < key_dim; i += LANES)
            products = fma16(load_n(F32, q + i, key_dim - i), load_n(F32, k + i, key_dim - i), products);
        float beta = sigmoid(element(dtype, ba, head)), a = element(dtype, ba, call->num_heads + head);
        f32x16 decay = exp16(splat(call->rate[head] * softplus(a + call->bias[head])));
        const char *value = row + (2 * key_width + head * value_dim + column) * bytes;
        f32x16 v[STATE_VECTORS], out[STATE_VECTORS];
        for (long j = 0; j < STATE_VECTORS; j++)
            v[j] = j * LANES < columns ? load_n(dtype, value + j * LANES * bytes, columns - j * LANES) : splat(0.0f);
        delta_token(state, q, k, key_dim, sum_lanes(products), decay, splat(beta), v, out);
        char *to = call->out + ((t * call->num_heads + head) * value_dim + column) * bytes;
        for (long j = 0; j * LANES < columns; j++) store_n(dtype, to + j * LANES * bytes, out[j], columns - j * LANES);
        long slot = slot_after(&writes, t + 1 - first);
        if (slot >= 0) store_state(state, call->slots + slot * slot_size + at, key_dim, value_dim, columns);
    }
}

static void delta_task(const void *context, long task) {
    const DeltaRule *call = context;
    long num_parts = num_delta_parts(call), seq = task / (call->num_heads * num_parts);
    long head = task / num_parts % call->num_heads, column = task % num_parts * STATE_COLUMNS;
    if (call->dtype == BF16) delta_part(BF16, call, seq, head, column);
    else if (call->dtype == F16) delta_part(F16, call, seq, head, column);
    else delta_part(F32, call, seq, head, column);
}
