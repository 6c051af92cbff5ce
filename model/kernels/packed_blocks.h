// What a layer does in one call: choosing experts, experts whose rows stay here, attention and gated DeltaNet
// from rows to rows. They are
// made of the calls of packed_cpu.c, which includes this after them, and round where those do.
// T tokens, D hidden size, N experts of the layer, K experts per token, H query heads, G key/value heads, d head size
#pragma once

#include "packed_gate.h"
#include "packed_scratch.h"

// ---- gate

EXPORT long packed_choose_experts(const Linear *gate, const char *x, long x_step, long num_tokens, long num_choices,
                                  long normalizes, long rounds, float *weights, int64_t *ids, long num_threads) {
    if (num_tokens == 0) return OK;
    char *logits = scratch(GATE_LOGITS, num_tokens * gate->n * dtype_bytes(gate->dtype));
    if (!logits) return NO_MEMORY;
    packed_linear(gate, x, x_step, num_tokens, 0, logits, gate->dtype, num_threads);
    GateCall call = {logits, weights, ids, num_tokens, gate->n, num_choices, normalizes, rounds, gate->dtype,
                     max_long(1, ROW_TASK_ELEMENTS / (gate->n * (2 + num_choices)))};
    parallel_for(ceil_div(num_tokens, call.tokens_per_task), num_threads, gate_task, &call);
    return OK;
}

// ---- the expert that takes every row, added to what the others gave

// sums [T, D] + expert(x) * sigmoid(gate(x)), rounded after each of the three
EXPORT long packed_add_shared_expert(const Experts *expert, const Linear *gate, const char *x, long x_step,
                                     long num_tokens, char *sums, long num_threads) {
    long size = expert->hidden, bytes = dtype_bytes(expert->dtype);
    if (num_tokens == 0) return OK;
    char *gates = scratch(GATE_LOGITS, num_tokens * bytes), *rows = scratch(EXPERT_OUTPUTS, num_tokens * size * bytes);
    if (!gates || !rows) return NO_MEMORY;
    long status = packed_experts(expert, x, x_step, num_tokens, &num_tokens, rows, num_threads);
    if (status) return status;
    packed_linear(gate, x, x_step, num_tokens, 0, gates, gate->dtype, num_threads);
    packed_times_sigmoid(rows, size * bytes, num_tokens, size, gates, bytes, 1, rows, expert->dtype, num_threads);
    RowsCall add = {.sum = sums, .delta = rows, .step = size * bytes, .num_tokens = num_tokens, .num_heads = 1,
                    .size = size, .dtype = expert->dtype};
    run_rows(&add, add_task, size, num_threads);
    return OK;
}

// ---- experts that are all here

typedef struct {
    const char *x;
    long x_step, row_bytes, num_rows, num_choices, tokens_per_task;
    const int64_t *place;       // [T, K]
    char *rows;
} PickCall;

// Copies each token's row to its K places
static void pick_task(const void *context, long task) {
    const PickCall *call = context;
    long end = min_long(call->num_rows, (task + 1) * call->tokens_per_task);
    for (long t = task * call->tokens_per_task; t < end; t++)
        for (long k = 0; k < call->num_choices; k++)
            memcpy(call->rows + call->place[t * call->num_choices + k] * call->row_bytes, call->x + t * call->x_step,
                   call->row_bytes);
}

// Counts each expert's rows and finds each (token, choice) its place among all rows, sorted by expert, then token
static long sort_by_expert(const int64_t *ids, long num_pairs, long num_experts, long *num_rows_E, int64_t *place) {
    memset(num_rows_E, 0, num_experts * sizeof *num_rows_E);
    for (long i = 0; i < num_pairs; i++) {
        if (ids[i] < 0 || ids[i] >= num_experts) return BAD_ID;
        place[i] = num_rows_E[ids[i]]++;
    }
    long first[num_experts], next = 0;
    for (long e = 0; e < num_experts; next += num_rows_E[e], e++) first[e] = next;
    for (long i = 0; i < num_pairs; i++) place[i] += first[ids[i]];
    return OK;
}

// x [T, D], weights and ids [T, K] -> out [T, D], and each expert's number of rows
EXPORT long packed_local_experts(const Experts *experts, const char *x, long x_step, long num_tokens, long num_choices,
                                 const float *weights, const int64_t *ids, char *out, long *num_rows_E,
                                 long num_threads) {
    long num_pairs = num_tokens * num_choices, row_bytes = experts->hidden * dtype_bytes(experts->dtype);
    int64_t *place = (int64_t *)scratch(EXPERT_PLACES, num_pairs * sizeof *place);
    char *rows = scratch(EXPERT_ROWS, num_pairs * row_bytes), *outputs = scratch(EXPERT_OUTPUTS, num_pairs * row_bytes);
    if (!place || !rows || !outputs) return NO_MEMORY;
    long status = sort_by_expert(ids, num_pairs, experts->num_experts, num_rows_E, place);
    if (status || num_pairs == 0) return status;
    PickCall pick = {x, x_step, row_bytes, num_tokens, num_choices,
                     max_long(1, ROW_TASK_ELEMENTS / (num_choices * experts->hidden)), place, rows};
    parallel_for(ceil_div(num_tokens, pick.tokens_per_task), num_threads, pick_task, &pick);
    status = packed_experts(experts, rows, row_bytes, num_pairs, num_rows_E, outputs, num_threads);
    if (status) return status;
    packed_combine(outputs, row_bytes, place, weights, num_tokens, num_choices, experts->hidden, out, experts->dtype,
                   num_threads);
    return OK;
}

// ---- attention, from x [T, D] to out [T, D]

// Of a layer. Norms and biases: 0, or there are some. Rows of qkv: q, k, v, and the output's gate where there is one.
#define ATTENTION_BLOCK_FIELDS(FIELD) \
    FIELD(const void *, qkv) FIELD(const void *, out)       /* Linear */ \
    FIELD(const char *, qkv_bias) FIELD(const char *, out_bias) \
    FIELD(const char *, q_norm) FIELD(const char *, k_norm) FIELD(long, norm_dtype) \
    FIELD(long, num_heads) FIELD(long, num_kv_heads) FIELD(long, head_dim) FIELD(long, is_gated) \
    FIELD(long, sliding_window) FIELD(float, scale) FIELD(float, eps)
DEFINE_STRUCT(AttentionBlock, ATTENTION_BLOCK_FIELDS);

// Of a step: AttentionBatch of protocol.py, and the rotary embedding at its positions
#define ATTENTION_STEP_FIELDS(FIELD) \
    FIELD(const int32_t *, query_starts) FIELD(const int32_t *, context_lens) FIELD(const int32_t *, block_tables) \
    FIELD(const int64_t *, slots) FIELD(const char *, cos) FIELD(const char *, sin) FIELD(long, rope_step) \
    FIELD(long, rotary_size) FIELD(long, num_tokens) FIELD(long, num_seqs) FIELD(long, table_width) \
    FIELD(long, block_size)
DEFINE_STRUCT(AttentionStep, ATTENTION_STEP_FIELDS);

typedef struct {
    const AttentionBlock *block;
    const AttentionStep *step;
    char *rows;                 // qkv, changed where they are
    KvWrite write;
    long row_bytes, tokens_per_task, dtype;
} HeadsCall;

INLINE void turn_heads(const Dtype dtype, const HeadsCall *call, long token, char *heads, long num_heads, const char *norm) {
    const AttentionBlock *block = call->block;
    const AttentionStep *step = call->step;
    long head_bytes = block->head_dim * dtype_bytes(dtype);
    const float *cos = (const float *)(step->cos + token * step->rope_step);
    const float *sin = (const float *)(step->sin + token * step->rope_step);
    for (char *head = heads; head < heads + num_heads * head_bytes; head += head_bytes) {
        if (norm) norm_row(dtype, head, norm, block->norm_dtype, 0, head, block->head_dim, block->eps);
        rotate_row(dtype, head, cos, sin, head, block->head_dim, step->rotary_size);
    }
}

// Norms and turns the queries and keys of some tokens, and writes their keys and values to the cache
static void heads_task(const void *context, long task) {
    const HeadsCall *call = context;
    const AttentionBlock *block = call->block;
    long end = min_long(call->step->num_tokens, (task + 1) * call->tokens_per_task);
    for (long token = task * call->tokens_per_task; token < end; token++) {
        char *q = call->rows + token * call->row_bytes;
        char *k = q + block->num_heads * block->head_dim * dtype_bytes(call->dtype);
#define TURN(DTYPE) do { turn_heads(DTYPE, call, token, q, block->num_heads, block->q_norm); \
                         turn_heads(DTYPE, call, token, k, block->num_kv_heads, block->k_norm); } while (0)
        if (call->dtype == BF16) TURN(BF16);
        else if (call->dtype == F16) TURN(F16);
        else TURN(F32);
#undef TURN
        write_kv_token(&call->write, token);
    }
}

static long attend(const AttentionBlock *block, const AttentionStep *step, char *cache, const char *rows, long row_bytes,
                   long dtype, char *out, long num_threads) {
    Attention attention = {
        .q = rows, .cache = cache, .out = out, .query_starts = step->query_starts, .context_lens = step->context_lens,
        .block_tables = step->block_tables, .q_step = row_bytes, .num_seqs = step->num_seqs,
        .table_width = step->table_width, .num_heads = block->num_heads, .num_kv_heads = block->num_kv_heads,
        .head_dim = block->head_dim, .block_size = step->block_size, .dtype = dtype,
        .sliding_window = block->sliding_window, .scale = block->scale};
    return packed_attention(&attention, num_threads);
}

EXPORT long packed_attention_block(const AttentionBlock *block, const AttentionStep *step, const char *x, long x_step,
                                   char *cache, char *out, long num_threads) {
    const Linear *qkv = block->qkv, *out_weight = block->out;
    long bytes = dtype_bytes(qkv->dtype), head_bytes = block->head_dim * bytes, row_bytes = qkv->n * bytes;
    long q_bytes = block->num_heads * head_bytes, kv_bytes = block->num_kv_heads * head_bytes, num_tokens = step->num_tokens;
    char *rows = scratch(QKV_ROWS, num_tokens * row_bytes), *attended = scratch(ATTENTION_ROWS, num_tokens * q_bytes);
    if (!rows || !attended) return NO_MEMORY;
    packed_linear(qkv, x, x_step, num_tokens, block->qkv_bias, rows, qkv->dtype, num_threads);
    KvWrite write = {cache, rows + q_bytes, rows + q_bytes + kv_bytes, step->slots, num_tokens, row_bytes, row_bytes,
                     block->num_kv_heads, block->head_dim, step->block_size, bytes};
    HeadsCall heads = {block, step, rows, write, row_bytes, max_long(1, ROW_TASK_ELEMENTS / qkv->n), qkv->dtype};
    parallel_for(ceil_div(num_tokens, heads.tokens_per_task), num_threads, heads_task, &heads);
    long status = attend(block, step, cache, rows, row_bytes, qkv->dtype, attended, num_threads);
    if (status) return status;
    if (block->is_gated)
        packed_times_sigmoid(attended, q_bytes, num_tokens, q_bytes / bytes, rows + q_bytes + 2 * kv_bytes, row_bytes,
                             q_bytes / bytes, attended, qkv->dtype, num_threads);
    packed_linear(out_weight, attended, q_bytes, num_tokens, block->out_bias, out, qkv->dtype, num_threads);
    return OK;
}

// ---- gated DeltaNet, from x [T, D] to out [T, D]

// Of a layer. Rows of projections: q, k, v, the gate of the output, b and a.
#define DELTA_NET_BLOCK_FIELDS(FIELD) \
    FIELD(const void *, projections) FIELD(const void *, out)       /* Linear */ \
    FIELD(const char *, conv_weight) FIELD(const float *, rate) FIELD(const float *, bias) FIELD(const char *, norm) \
    FIELD(long, num_key_heads) FIELD(long, num_heads) FIELD(long, key_dim) FIELD(long, value_dim) \
    FIELD(long, conv_kernel) FIELD(float, eps)
DEFINE_STRUCT(DeltaNetBlock, DELTA_NET_BLOCK_FIELDS);

EXPORT long packed_delta_net_block(const DeltaNetBlock *block, const Sequences *seqs, const char *x, long x_step,
                                   char *conv_slots, float *recurrent_slots, char *out, long num_threads) {
    const Linear *projections = block->projections, *out_weight = block->out;
    long dtype = projections->dtype, bytes = dtype_bytes(dtype), num_tokens = seqs->query_starts[seqs->num_seqs];
    long value_width = block->num_heads * block->value_dim;
    long conv_width = 2 * block->num_key_heads * block->key_dim + value_width;
    long row_bytes = projections->n * bytes, conv_bytes = conv_width * bytes, value_bytes = value_width * bytes;
    char *rows = scratch(QKV_ROWS, num_tokens * row_bytes), *qkv = scratch(CONV_ROWS, num_tokens * conv_bytes);
    char *values = scratch(ATTENTION_ROWS, num_tokens * value_bytes);
    if (!rows || !qkv || !values) return NO_MEMORY;
    packed_linear(projections, x, x_step, num_tokens, 0, rows, dtype, num_threads);
    Conv conv = {.x = rows, .weight = block->conv_weight, .slots = conv_slots, .out = qkv, .step = row_bytes,
                 .width = conv_width, .kernel = block->conv_kernel, .dtype = dtype, .seqs = seqs};
    packed_causal_conv(&conv, num_threads);
    DeltaRule rule = {
        .qkv = qkv, .ba = rows + conv_bytes + value_bytes, .rate = block->rate, .bias = block->bias,
        .slots = recurrent_slots, .out = values, .qkv_step = conv_bytes, .ba_step = row_bytes,
        .num_key_heads = block->num_key_heads, .num_heads = block->num_heads, .key_dim = block->key_dim,
        .value_dim = block->value_dim, .dtype = dtype, .seqs = seqs};
    packed_gated_delta_rule(&rule, num_threads);
    packed_rms_norm(values, value_bytes, num_tokens, block->num_heads, block->value_dim, block->norm, dtype,
                    rows + conv_bytes, row_bytes, block->eps, values, dtype, num_threads);
    packed_linear(out_weight, values, value_bytes, num_tokens, 0, out, dtype, num_threads);
    return OK;
}
