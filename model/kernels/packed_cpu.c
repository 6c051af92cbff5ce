// The CPU kernels behind model/kernels/packed_cpu.py, and the planning of rows. This file: packing, linear, experts.
// M rows, N outputs, K inputs, D hidden size, I expert intermediate size, E experts
#define _GNU_SOURCE
#include <stdlib.h>

#include "packed_simd.h"

#include "packed_attention.h"
#include "packed_delta_net.h"
#include "packed_gemm.h"
#include "packed_parallel.h"
#include "packed_rows.h"
#include "packed_scratch.h"
#include "row_plan.h"
#include "shared_structs.h"

#define EXPORT __attribute__((visibility("default")))
enum { OK = 0, NO_MEMORY = 1, BAD_ID = 2, EXCHANGE_FAILED = 3 };

// ---- packing: rows [n, K] of a weight into panels; panel p lands at place p * panel_stride + panel_first

typedef struct {
    char *panels;
    const char *rows;
    long first_row, num_rows, k, dtype, panel_stride, panel_first;
} Packing;

static void pack_panel(const void *context, long task) {
    const Packing *p = context;
    long panel = p->first_row / LANES + task, bytes = dtype_bytes(p->dtype);
    long begin = max_long(panel * LANES, p->first_row), end = min_long((panel + 1) * LANES, p->first_row + p->num_rows);
    char *out = p->panels + (panel * p->panel_stride + p->panel_first) * panel_bytes(p->dtype, p->k);
    long step = k_per_step(p->dtype);
    for (long k = 0; k < p->k; k += step)
        for (long row = begin; row < end; row++) {
            const char *from = p->rows + ((row - p->first_row) * p->k + k) * bytes;
            char *to = out + (k / step * LANES + row - panel * LANES) * step * bytes;
            if (p->dtype == F32) memcpy(to, from, 4);
            else if (p->dtype == F16) memcpy(to, from, 2);
            else {
                memcpy(to + 2, from, 2);                                        // even k is the upper half
                if (k + 1 < p->k) memcpy(to, from + 2, 2);
            }
        }
}

EXPORT void packed_pack(char *panels, const char *rows, long first_row, long num_rows, long k, long dtype,
                        long panel_stride, long panel_first, long num_threads) {
    Packing packing = {panels, rows, first_row, num_rows, k, dtype, panel_stride, panel_first};
    if (num_rows == 0) return;
    long num_panels = (first_row + num_rows - 1) / LANES - first_row / LANES + 1;
    parallel_for(num_panels, num_threads, pack_panel, &packing);
}

EXPORT long packed_dots_are_chains(void) { return dots_are_chains(); }

// Of a weight [n, k] in panels
EXPORT long packed_weight_bytes(long dtype, long n, long k) { return ceil_div(n, LANES) * panel_bytes(dtype, k); }

// ---- linear

#define LINEAR_FIELDS(FIELD) FIELD(const char *, panels) FIELD(long, n) FIELD(long, k) FIELD(long, dtype)
DEFINE_STRUCT(Linear, LINEAR_FIELDS);

typedef struct {
    const Linear *weight;
    const char *x;
    long x_step;            // bytes between rows
    long num_rows;
    const char *bias;       // dtype of the weight, or 0
    char *out;
    long out_dtype;
    Split split;
} LinearCall;

INLINE void finish_linear(const LinearCall *call, long row, long num_rows, long column, long num_columns,
                          const float *sums, const Dtype dtype, const Dtype out_dtype) {
    for (long m = 0; m < num_rows; m++)
        for (long n = 0; n < num_columns; n += LANES) {
            long lanes = min_long(LANES, num_columns - n);
            f32x16 v = load_f32(sums + m * SUMS_LD + n);
            if (call->bias) v += load_n(dtype, call->bias + (column + n) * dtype_bytes(dtype), lanes);
            store_n(out_dtype, call->out + ((row + m) * call->weight->n + column + n) * dtype_bytes(out_dtype), v, lanes);
        }
}

static void linear_task(const void *context, long task) {
    const LinearCall *call = context;
    const Linear *w = call->weight;
    float sums[BLOCK_ROWS * SUMS_LD] __attribute__((aligned(64)));
    long row = task % call->split.num_row_tasks * call->split.rows_per_task;
    long panel = task / call->split.num_row_tasks * call->split.panels_per_task;
    long num_rows = min_long(call->split.rows_per_task, call->num_rows - row);
    long num_panels = min_long(call->split.panels_per_task, ceil_div(w->n, LANES) - panel);
    multiply_block(w->dtype, num_rows, num_panels, call->x + row * call->x_step, call->x_step,
                   w->panels + panel * panel_bytes(w->dtype, w->k), w->k, sums);
    long column = panel * LANES, num_columns = min_long(num_panels * LANES, w->n - column);
#define FINISH(DTYPE, OUT) finish_linear(call, row, num_rows, column, num_columns, sums, DTYPE, OUT)
    if (w->dtype == BF16) { if (call->out_dtype == F32) FINISH(BF16, F32); else FINISH(BF16, BF16); }
    else if (w->dtype == F16) { if (call->out_dtype == F32) FINISH(F16, F32); else FINISH(F16, F16); }
    else FINISH(F32, F32);
#undef FINISH
}

EXPORT void packed_linear(const Linear *weight, const char *x, long x_step, long num_rows, const char *bias, char *out,
                          long out_dtype, long num_threads) {
    LinearCall call = {weight, x, x_step, num_rows, bias, out, out_dtype, {0, 0, 0, 0}};
    if (num_rows == 0 || weight->n == 0) return;
    if (num_rows * weight->n * weight->k < 1 << 16) num_threads = 1;        // shorter than waking a thread
    call.split = split_product(num_rows, ceil_div(weight->n, LANES), 4, num_threads > 1 ? 4 * num_threads : 1);
    parallel_for(call.split.num_row_tasks * call.split.num_panel_tasks, num_threads, linear_task, &call);
}

// ---- experts

// gate_up: per expert, panels gate 0, up 0, gate 1, up 1, ... [2 * ceil(I/16)] over k = D;
// down: [ceil(D/16)] over k = I
#define EXPERTS_FIELDS(FIELD) \
    FIELD(const char *, gate_up) FIELD(const char *, down) \
    FIELD(long, num_experts) FIELD(long, intermediate) FIELD(long, hidden) FIELD(long, dtype)
DEFINE_STRUCT(Experts, EXPERTS_FIELDS);

typedef struct { long row, num_rows, panel, num_panels, expert; } ExpertTask;

typedef struct {
    const Experts *weights;
    const ExpertTask *tasks;
    const char *x;
    long x_step;
    char *out;              // gate_up: silu(gate) * up [R, I]; down: [R, D]
} ExpertsCall;

INLINE void finish_gate_up(const Dtype dtype, const ExpertTask *t, const float *sums, long intermediate, char *out) {
    for (long m = 0; m < t->num_rows; m++)
        for (long p = 0; p < t->num_panels; p += 2) {
            long column = (t->panel + p) / 2 * LANES;
            const float *gate = sums + m * SUMS_LD + p * LANES;
            f32x16 v = silu16(load_f32(gate)) * load_f32(gate + LANES);
            store_n(dtype, out + ((t->row + m) * intermediate + column) * dtype_bytes(dtype), v,
                    min_long(LANES, intermediate - column));
        }
}

static void gate_up_task(const void *context, long task) {
    const ExpertsCall *call = context;
    const Experts *w = call->weights;
    const ExpertTask *t = call->tasks + task;
    float sums[BLOCK_ROWS * SUMS_LD] __attribute__((aligned(64)));
    long panel = t->expert * 2 * ceil_div(w->intermediate, LANES) + t->panel;
    multiply_block(w->dtype, t->num_rows, t->num_panels, call->x + t->row * call->x_step, call->x_step,
                   w->gate_up + panel * panel_bytes(w->dtype, w->hidden), w->hidden, sums);
    if (w->dtype == BF16) finish_gate_up(BF16, t, sums, w->intermediate, call->out);
    else if (w->dtype == F16) finish_gate_up(F16, t, sums, w->intermediate, call->out);
    else finish_gate_up(F32, t, sums, w->intermediate, call->out);
}

INLINE void finish_down(const Dtype dtype, const ExpertTask *t, const float *sums, long hidden, char *out) {
    for (long m = 0; m < t->num_rows; m++)
        for (long p = 0; p < t->num_panels; p++) {
            long column = (t->panel + p) * LANES;
            store_n(dtype, out + ((t->row + m) * hidden + column) * dtype_bytes(dtype),
                    load_f32(sums + m * SUMS_LD + p * LANES), min_long(LANES, hidden - column));
        }
}

static void down_task(const void *context, long task) {
    const ExpertsCall *call = context;
    const Experts *w = call->weights;
    const ExpertTask *t = call->tasks + task;
    float sums[BLOCK_ROWS * SUMS_LD] __attribute__((aligned(64)));
    long panel = t->expert * ceil_div(w->hidden, LANES) + t->panel;
    multiply_block(w->dtype, t->num_rows, t->num_panels, call->x + t->row * call->x_step, call->x_step,
                   w->down + panel * panel_bytes(w->dtype, w->intermediate), w->intermediate, sums);
    if (w->dtype == BF16) finish_down(BF16, t, sums, w->hidden, call->out);
    else if (w->dtype == F16) finish_down(F16, t, sums, w->hidden, call->out);
    else finish_down(F32, t, sums, w->hidden, call->out);
}

// Tasks of one of the two products; returns how many. With tasks == 0 it only counts.
static long list_tasks(ExpertTask *tasks, const long *num_rows_E, const Experts *w, long num_panels, long num_threads) {
    long count = 0, row = 0, num_active = 0;
    for (long e = 0; e < w->num_experts; e++) num_active += num_rows_E[e] > 0;
    for (long e = 0; e < w->num_experts; row += num_rows_E[e], e++) {
        if (num_rows_E[e] == 0) continue;
        Split s = split_product(num_rows_E[e], num_panels, 4, num_threads > 1 ? ceil_div(8 * num_threads, num_active) : 1);
        for (long p = 0; p < num_panels; p += s.panels_per_task)
            for (long m = 0; m < num_rows_E[e]; m += s.rows_per_task, count++)
                if (tasks) tasks[count] = (ExpertTask){row + m, min_long(s.rows_per_task, num_rows_E[e] - m), p,
                                                       min_long(s.panels_per_task, num_panels - p), e};
    }
    return count;
}

EXPORT long packed_experts(const Experts *weights, const char *x, long x_step, long num_rows, const long *num_rows_E,
                           char *out, long num_threads) {
    long panels_up = 2 * ceil_div(weights->intermediate, LANES), panels_down = ceil_div(weights->hidden, LANES);
    if (num_rows == 0) return OK;
    if (num_rows * weights->hidden * weights->intermediate < 1 << 15) num_threads = 1;
    long num_up = list_tasks(0, num_rows_E, weights, panels_up, num_threads);
    long num_down = list_tasks(0, num_rows_E, weights, panels_down, num_threads);
    long middle_step = weights->intermediate * dtype_bytes(weights->dtype);
    ExpertTask *tasks = malloc((num_up + num_down) * sizeof(ExpertTask));
    char *middle = scratch(EXPERT_MIDDLES, num_rows * middle_step);
    if (tasks && middle) {
        ExpertsCall up = {weights, tasks, x, x_step, middle}, down = {weights, tasks + num_up, middle, middle_step, out};
        list_tasks(tasks, num_rows_E, weights, panels_up, num_threads);
        list_tasks(tasks + num_up, num_rows_E, weights, panels_down, num_threads);
        parallel_for(num_up, num_threads, gate_up_task, &up);
        parallel_for(num_down, num_threads, down_task, &down);
    }
    long status = tasks && middle ? OK : NO_MEMORY;
    free(tasks);
    return status;
}

// ---- rows: their calls are described in packed_rows.h

EXPORT void packed_rms_norm(const char *x, long step, long num_tokens, long num_heads, long size, const char *weight,
                            long weight_dtype, const char *gate, long gate_step, float eps, char *out, long dtype,
                            long num_threads) {
    RowsCall call = {.x = x, .step = step, .num_tokens = num_tokens, .num_heads = num_heads, .size = size,
                     .weight = weight, .weight_dtype = weight_dtype, .gate = gate, .gate_step = gate_step, .eps = eps,
                     .out = out, .dtype = dtype};
    run_rows(&call, norm_task, num_heads * size, num_threads);
}

// x + delta, rounded, to where x is; its norm to out
EXPORT void packed_add_rms_norm(char *x, const char *delta, long num_tokens, long size, const char *weight,
                                long weight_dtype, float eps, char *out, long dtype, long num_threads) {
    RowsCall call = {.sum = x, .x = x, .delta = delta, .step = size * dtype_bytes(dtype), .num_tokens = num_tokens,
                     .num_heads = 1, .size = size, .weight = weight, .weight_dtype = weight_dtype, .eps = eps, .out = out,
                     .dtype = dtype};
    run_rows(&call, add_norm_task, size, num_threads);
}

EXPORT void packed_times_sigmoid(const char *x, long step, long num_tokens, long size, const char *gate, long gate_step,
                                 long gate_size, char *out, long dtype, long num_threads) {
    RowsCall call = {.x = x, .step = step, .num_tokens = num_tokens, .num_heads = 1, .size = size, .gate = gate,
                     .gate_step = gate_step, .gate_size = gate_size, .out = out, .dtype = dtype};
    run_rows(&call, sigmoid_task, size, num_threads);
}

EXPORT void packed_rope(const char *x, long step, long num_tokens, long num_heads, long size, long rotary_size,
                        const float *cos, const float *sin, char *out, long dtype, long num_threads) {
    RowsCall call = {.x = x, .step = step, .num_tokens = num_tokens, .num_heads = num_heads, .size = size,
                     .rotary_size = rotary_size, .cos = cos, .sin = sin, .out = out, .dtype = dtype};
    run_rows(&call, rotate_task, num_heads * size, num_threads);
}

EXPORT void packed_combine(const char *rows, long step, const int64_t *row_of, const float *weights, long num_tokens,
                           long num_choices, long size, char *out, long dtype, long num_threads) {
    RowsCall call = {.x = rows, .step = step, .num_tokens = num_tokens, .num_choices = num_choices, .size = size,
                     .row_of = row_of, .weights = weights, .out = out, .dtype = dtype};
    run_rows(&call, combine_task, num_choices * size, num_threads);
}

// ---- attention

EXPORT void packed_write_kv(char *cache, const char *k, long k_step, const char *v, long v_step, const int64_t *slots,
                            long num_tokens, long num_kv_heads, long head_dim, long block_size, long bytes) {
    KvWrite write = {cache, k, v, slots, num_tokens, k_step, v_step, num_kv_heads, head_dim, block_size, bytes};
    for (long token = 0; token < num_tokens; token++) write_kv_token(&write, token);
}

EXPORT long packed_attention(const Attention *call, long num_threads) {
    long num_tasks = list_attention_tasks(0, call);
    if (num_tasks == 0) return OK;
    AttentionTask *tasks = malloc(num_tasks * sizeof(AttentionTask));
    if (!tasks) return NO_MEMORY;
    list_attention_tasks(tasks, call);
    AttentionJob job = {call, tasks};
    parallel_for(num_tasks, num_threads, attention_task, &job);
    free(tasks);
    return OK;
}

// ---- gated DeltaNet: the structs are described in packed_delta_net.h

EXPORT void packed_causal_conv(const Conv *conv, long num_threads) {
    long num_rows = conv->seqs->query_starts[conv->seqs->num_seqs];
    if (num_rows == 0) return;
    if (num_rows * conv->width * conv->kernel < CONV_TASK_ELEMENTS) num_threads = 1;
    ConvJob job = {conv, ceil_div(conv->width, CONV_CHANNELS), 0};
    job.rows_per_task = ceil_div(num_rows, ceil_div(4 * num_threads, job.num_parts));
    parallel_for(ceil_div(num_rows, job.rows_per_task) * job.num_parts, num_threads, conv_task, &job);
}

EXPORT void packed_gated_delta_rule(const DeltaRule *rule, long num_threads) {
    long num_panels = rule->num_heads / rule->num_key_heads * num_panels_of(rule->value_dim);
    long num_pairs = rule->seqs->num_seqs * rule->num_key_heads;
    if (num_pairs == 0) return;
    DeltaJob job = {rule, ceil_div(num_panels, min_long(num_panels, ceil_div(4 * num_threads, num_pairs)))};
    parallel_for(num_pairs * ceil_div(num_panels, job.panels_per_task), num_threads, delta_task, &job);
}

#include "packed_blocks.h"

// ---- rows of a MoE layer between members: model/dispatch/compiled_row_planner.py

EXPORT void row_plan_offsets(const Routing *routing, long num_rows, long num_per_row, long own_count, RowPlanOffsets *at) {
    *at = offsets_of_plan(routing, num_rows, num_per_row, own_count);
}

EXPORT long row_plan(const Routing *routing, const int16_t *ids, long ids_step, long num_rows, long num_per_row,
                     const int64_t *owner, long own_first, long own_count, int64_t *numbers) {
    StepRows rows = {ids, owner, ids_step, num_rows, num_per_row, own_first, own_count};
    RowPlanOut out = plan_out(routing, &rows, numbers);
    PlanSpace space;
    if (!ids_are_valid(routing, &rows)) return BAD_ID;
    char *memory = malloc(lay_out(&space, routing, &rows, 0) + 64);
    if (!memory) return NO_MEMORY;
    lay_out(&space, routing, &rows, memory + (-(uintptr_t)memory & 63));
    choose_holders(routing, &rows, &space);
    plan_arrivals(routing, &rows, &space, &out);
    plan_departures(routing, &rows, &space, &out);
    free(memory);
    return OK;
}

#include "gathered_experts.h"

// ---- what Python must know of the structs above: packed_cpu_library.py

EXPORT const char *shared_structs(void) {
    return DESCRIBE_STRUCT(Linear, LINEAR_FIELDS) DESCRIBE_STRUCT(Experts, EXPERTS_FIELDS)
        DESCRIBE_STRUCT(Attention, ATTENTION_FIELDS) DESCRIBE_STRUCT(Copies, COPIES_FIELDS)
        DESCRIBE_STRUCT(Routing, ROUTING_FIELDS) DESCRIBE_STRUCT(RowPlanOffsets, ROW_PLAN_FIELDS)
        DESCRIBE_STRUCT(GatherStep, GATHER_STEP_FIELDS) DESCRIBE_STRUCT(Sequences, SEQUENCES_FIELDS) DESCRIBE_STRUCT(Conv, CONV_FIELDS)
        DESCRIBE_STRUCT(DeltaRule, DELTA_RULE_FIELDS) DESCRIBE_STRUCT(AttentionBlock, ATTENTION_BLOCK_FIELDS)
        DESCRIBE_STRUCT(AttentionStep, ATTENTION_STEP_FIELDS) DESCRIBE_STRUCT(DeltaNetBlock, DELTA_NET_BLOCK_FIELDS);
}

#ifdef __AVX512F__
#pragma clang attribute pop     // began in packed_simd.h
#endif
