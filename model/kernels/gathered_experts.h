// A MoE layer of a step in which every member gets all rows, in one call: rows to everybody, the plan, the experts that
// are here, outputs back, weighted sums. What travels, in which order, and every bit of it is as in
// model/dispatch/gather.py, so members may differ in how they run a layer.
// packed_cpu.c includes this after packed_blocks.h.
// S rows of all members, T of this one, K experts per token, M members, R (row, expert) pairs computed here
#pragma once

#include "packed_scratch.h"
#include "row_plan.h"

// transport_exchange of model/transport/transport.c
typedef int (*ExchangeFunction)(void *endpoint, uint64_t group, const void *sent, const long *sent_rows, void *received,
                                const long *received_rows, long row_bytes, int same_to_all, long timeout_ns,
                                int *failed_rank);

// Of a step, for all its layers; below the line is what a layer answers. Times are of CLOCK_MONOTONIC.
#define GATHER_STEP_FIELDS(FIELD) \
    FIELD(const void *, exchange) FIELD(const void *, endpoint) FIELD(long, group) FIELD(long, timeout_ns) \
    FIELD(const int64_t *, num_tokens) FIELD(const int64_t *, owner)        /* [M], [S] */ \
    FIELD(long, num_rows) FIELD(long, own_first) FIELD(long, own_count) \
    FIELD(long, failure) FIELD(long, failed_rank)                           /* of an exchange */ \
    FIELD(long, bytes_sent)                                                 /* to others */ \
    FIELD(long, sent_ns) FIELD(long, arrived_ns) FIELD(long, planned_ns) FIELD(long, left_ns) FIELD(long, returned_ns)
DEFINE_STRUCT(GatherStep, GATHER_STEP_FIELDS);

typedef struct {
    const char *x;              // [T, D], x_step from row to row
    const float *weights;       // [T, K]
    const int64_t *ids;         // [T, K]
    char *out;                  // [T, D]
    long x_step, num_choices;
} GatherRows;

static long exchange_rows(GatherStep *step, const Routing *routing, const char *sent, const long *sent_rows, char *received,
                          const long *received_rows, long row_bytes, int same_to_all) {
    int failed_rank = -1;
    long own_count[routing->num_members];
    for (long m = 0; m < routing->num_members; m++) own_count[m] = step->own_count;
    ExchangeFunction exchange = (ExchangeFunction)(uintptr_t)step->exchange;
    step->failure = exchange((void *)(uintptr_t)step->endpoint, (uint64_t)step->group, sent,
                             sent_rows ? sent_rows : own_count, received, received_rows, row_bytes, same_to_all,
                             step->timeout_ns, &failed_rank);
    step->failed_rank = failed_rank;
    return step->failure ? EXCHANGE_FAILED : OK;
}

// A row on the wire: its numbers, then its experts' ids in 16 bits, padded to whole elements
static long wire_bytes(long row_bytes, long num_choices, long bytes) {
    return row_bytes + ceil_div(2 * num_choices, bytes) * bytes;
}

static void write_wire_rows(const GatherRows *own, long num_tokens, long row_bytes, long step_bytes, char *wire) {
    for (long t = 0; t < num_tokens; t++, wire += step_bytes) {
        int16_t *ids = (int16_t *)(wire + row_bytes);
        memcpy(wire, own->x + t * own->x_step, row_bytes);
        for (long k = 0; k < own->num_choices; k++) ids[k] = (int16_t)own->ids[t * own->num_choices + k];
        memset(ids + own->num_choices, 0, step_bytes - row_bytes - 2 * own->num_choices);
    }
}

// Copies rows by their numbers
static void pick_rows(const char *rows, long step, const int64_t *number, long num_picked, long row_bytes, char *picked) {
    for (long i = 0; i < num_picked; i++) memcpy(picked + i * row_bytes, rows + number[i] * step, row_bytes);
}

// Rows that arrived, `step_bytes` apart -> outputs of the pairs computed here, in the order in which they leave
static long compute_arrived(const Experts *experts, const RowPlanOut *plan, const char *arrived, long step_bytes,
                            char **leaving, long num_threads) {
    long row_bytes = experts->hidden * dtype_bytes(experts->dtype), num_pairs = 0;
    for (long e = 0; e < experts->num_experts; e++) num_pairs += plan->num_slot_rows[e];
    char *rows = scratch(EXPERT_ROWS, num_pairs * row_bytes), *outputs = scratch(EXPERT_OUTPUTS, num_pairs * row_bytes);
    *leaving = scratch(WIRE_SENT, num_pairs * row_bytes);
    if (!rows || !outputs || !*leaving) return NO_MEMORY;
    pick_rows(arrived, step_bytes, plan->source_row, num_pairs, row_bytes, rows);
    long status = packed_experts(experts, rows, row_bytes, num_pairs, (const long *)plan->num_slot_rows, outputs,
                                 num_threads);
    if (!status) pick_rows(outputs, row_bytes, plan->departure, num_pairs, row_bytes, *leaving);
    return status;
}

static long plan_gathered(const GatherStep *step, const Routing *routing, const char *arrived, long row_bytes,
                          long step_bytes, long num_choices, RowPlanOut *plan) {
    RowPlanOffsets at = offsets_of_plan(routing, step->num_rows, num_choices, step->own_count);
    int64_t *numbers = (int64_t *)scratch(ROW_PLAN, at.end * sizeof *numbers);
    if (!numbers) return NO_MEMORY;
    StepRows rows = {(const int16_t *)(arrived + row_bytes), step->owner, step_bytes / 2, step->num_rows, num_choices,
                     step->own_first, step->own_count};
    *plan = plan_out(routing, &rows, numbers);
    return row_plan(routing, rows.ids, rows.ids_step, rows.num_rows, num_choices, step->owner, step->own_first,
                    step->own_count, numbers);
}

// x [T, D], weights and ids [T, K] -> out [T, D], and the number of rows of each expert here
EXPORT long packed_gathered_experts(GatherStep *step, const Routing *routing, const Experts *experts, const char *x,
                                    long x_step, long num_choices, const float *weights, const int64_t *ids, char *out,
                                    long *num_rows_E, long num_threads) {
    GatherRows own = {x, weights, ids, out, x_step, num_choices};
    long bytes = dtype_bytes(experts->dtype), row_bytes = experts->hidden * bytes, num_tokens = step->own_count;
    long step_bytes = wire_bytes(row_bytes, num_choices, bytes);
    char *sent = scratch(WIRE_SENT, num_tokens * step_bytes), *leaving;
    char *received = scratch(WIRE_RECEIVED, max_long(step->num_rows * step_bytes, num_tokens * num_choices * row_bytes));
    RowPlanOut plan;
    if (!sent || !received) return NO_MEMORY;
    write_wire_rows(&own, num_tokens, row_bytes, step_bytes, sent);
    step->sent_ns = now_ns();
    long status = exchange_rows(step, routing, sent, 0, received, step->num_tokens, step_bytes, 1);
    step->arrived_ns = now_ns();
    if (!status) status = plan_gathered(step, routing, received, row_bytes, step_bytes, num_choices, &plan);
    step->planned_ns = now_ns();
    if (!status) status = compute_arrived(experts, &plan, received, step_bytes, &leaving, num_threads);
    if (status) return status;
    memcpy(num_rows_E, plan.num_slot_rows, experts->num_experts * sizeof *num_rows_E);
    step->bytes_sent = (routing->num_members - 1) * num_tokens * step_bytes;
    for (long m = 0; m < routing->num_members; m++)
        if (m != routing->rank) step->bytes_sent += plan.num_departures[m] * row_bytes;
    step->left_ns = now_ns();
    status = exchange_rows(step, routing, leaving, (const long *)plan.num_departures, received,
                           (const long *)plan.num_returns, row_bytes, 0);
    step->returned_ns = now_ns();
    if (status || num_tokens == 0) return status;
    packed_combine(received, row_bytes, plan.row_of, weights, num_tokens, num_choices, experts->hidden, out,
                   experts->dtype, num_threads);
    return OK;
}
