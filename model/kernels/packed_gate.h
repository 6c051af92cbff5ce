// A row's choice of experts: softmax over its logits, the K likeliest, their weights, ascending in expert id.
// Of equally likely experts the one with the lower id is chosen. A row without a number in it takes experts 0 to K - 1,
// as torch's stable sort has it.
// N experts of the layer, K experts per token
#pragma once

#include "packed_parallel.h"
#include "packed_simd.h"

typedef struct {
    const char *logits;         // [T, N]
    float *weights;             // [T, K]
    int64_t *ids;               // [T, K]
    long num_tokens, num_experts, num_choices, normalizes, rounds, dtype, tokens_per_task;
} GateCall;

// Turns logits into probabilities, padded with -1 to whole vectors
INLINE void softmax_of_logits(const Dtype dtype, const char *logits, long num, float *probs) {
    long bytes = dtype_bytes(dtype);
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 best = splat(-__builtin_inff()), total = splat(0.0f);
    for (long i = 0; i < num; i += LANES) {
        f32x16 v = load_n(dtype, logits + i * bytes, num - i);
        v = select16(lanes < (int)min_long(LANES, num - i), v, splat(-__builtin_inff()));
        store_f32(probs + i, v);
        best = max16(v, best);
    }
    f32x16 highest = splat(max_lanes(best));
    for (long i = 0; i < num; i += LANES) {
        i32x16 is_padding = lanes >= (int)min_long(LANES, num - i);
        f32x16 weight = select16(is_padding, splat(0.0f), exp16(load_f32(probs + i) - highest));
        store_f32(probs + i, weight);
        total += weight;
    }
    f32x16 sum = splat(sum_lanes(total));
    for (long i = 0; i < num; i += LANES) {
        i32x16 is_padding = lanes >= (int)min_long(LANES, num - i);
        store_f32(probs + i, select16(is_padding, splat(-1.0f), load_f32(probs + i) / sum));
    }
}

// The id of the largest, the lowest of equal ones
INLINE long likeliest(const float *probs, long num) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 best = load_f32(probs);
    i32x16 at = lanes;
    for (long i = LANES; i < num; i += LANES) {
        f32x16 v = load_f32(probs + i);
        i32x16 better = v > best;
        best = select16(better, v, best);
        at = (better & (lanes + (int)i)) | (~better & at);
    }
    int lane = 0;
    for (int i = 1; i < LANES; i++)
        if (best[i] > best[lane] || (best[i] == best[lane] && at[i] < at[lane])) lane = i;
    return at[lane];
}

INLINE void sort_by_id(float *weights, int64_t *ids, long num) {
    for (long i = 1; i < num; i++) {
        int64_t id = ids[i];
        float weight = weights[i];
        long j = i;
        for (; j > 0 && ids[j - 1] > id; j--) { ids[j] = ids[j - 1]; weights[j] = weights[j - 1]; }
        ids[j] = id;
        weights[j] = weight;
    }
}

INLINE void choose_row(const Dtype dtype, const GateCall *call, long token) {
    long num = call->num_experts;
    float probs[ceil_div(num, LANES) * LANES] __attribute__((aligned(64)));
    float *weights = call->weights + token * call->num_choices, total = 0.0f;
    int64_t *ids = call->ids + token * call->num_choices;
    softmax_of_logits(dtype, call->logits + token * num * dtype_bytes(dtype), num, probs);
    for (long k = 0; k < call->num_choices; k++) {
        ids[k] = probs[0] == probs[0] ? likeliest(probs, num) : k;      // one NaN makes all of them NaN
        weights[k] = probs[ids[k]];
        total += weights[k];
        if (probs[0] == probs[0]) probs[ids[k]] = -1.0f;
    }
    for (long k = 0; k < call->num_choices; k++) {
        f32x16 weight = splat(call->normalizes ? weights[k] / total : weights[k]);
        weights[k] = round_to(call->rounds ? dtype : F32, weight)[0];
    }
    sort_by_id(weights, ids, call->num_choices);
}

static void gate_task(const void *context, long task) {
    const GateCall *call = context;
    long end = min_long(call->num_tokens, (task + 1) * call->tokens_per_task);
    for (long token = task * call->tokens_per_task; token < end; token++) {
        if (call->dtype == BF16) choose_row(BF16, call, token);
        else if (call->dtype == F16) choose_row(F16, call, token);
        else choose_row(F32, call, token);
    }
}
