// Row-wise kernels: norm, rotary embedding, combine. A task is a run of rows.
// T tokens, D size of a row, H heads, d head size, K experts per token. Steps are in bytes between tokens' rows.
#pragma once

#include "packed_parallel.h"
#include "packed_simd.h"

enum { ROW_TASK_ELEMENTS = 1 << 14 };       // shorter work is not worth another thread

typedef struct {
    const char *x, *weight;     // rms_norm: [T, H, D] with any step between tokens, weight [D]; combine: rows [R, D]
    const float *cos, *sin;     // rope: [T, rotary size]
    const int64_t *row_of;      // combine: [T, K]
    const float *weights;       // combine: [T, K]
    const char *gate;           // gated norm and sigmoid: as x, or one of each row
    long gate_step, gate_size, weight_dtype, rotary_size;
    char *out;                  // contiguous
    char *sum;                  // sums of rows, changed where they are; of add_rms_norm also x
    const char *delta;          // what is added to them
    long num_tokens, step, num_heads, size, num_choices, tokens_per_task, dtype;
    float eps;
} RowsCall;

// weight_dtype F32 beside another dtype: the product is rounded once.
// gate: 0, or the result is multiplied by silu of it.
INLINE void norm_row(const Dtype dtype, const char *x, const char *weight, long weight_dtype, const char *gate, char *out,
                     long size, float eps) {
    long bytes = dtype_bytes(dtype);
    f32x16 squares = splat(0.0f);
    for (long i = 0; i < size; i += LANES) {
        f32x16 v = load_n(dtype, x + i * bytes, size - i);
        squares = fma16(v, v, squares);
    }
    f32x16 variance = splat(sum_lanes(squares) / (float)size + eps);
    f32x16 factor = splat(1.0f) / __builtin_elementwise_sqrt(variance);
    for (long i = 0; i < size; i += LANES) {
        f32x16 v = load_n(dtype, x + i * bytes, size - i) * factor;
        if (weight_dtype == dtype) v = round_to(dtype, v) * load_n(dtype, weight + i * bytes, size - i);
        else v = v * load_n(F32, weight + i * 4, size - i);
        if (gate) v = round_to(dtype, v) * silu16(load_n(dtype, gate + i * bytes, size - i));
        store_n(dtype, out + i * bytes, v, size - i);
    }
}

// x * sigmoid(gate), the gate one for each element or one for the row
INLINE void sigmoid_row(const Dtype dtype, const char *x, const char *gate, long gate_size, char *out, long size) {
    long bytes = dtype_bytes(dtype);
    for (long i = 0; i < size; i += LANES) {
        f32x16 g = gate_size == 1 ? splat(load_n(dtype, gate, 1)[0]) : load_n(dtype, gate + i * bytes, size - i);
        f32x16 minus_g = select16(-g > splat(88.0f), splat(88.0f), -g);
        store_n(dtype, out + i * bytes, load_n(dtype, x + i * bytes, size - i) / (splat(1.0f) + exp16(minus_g)), size - i);
    }
}

INLINE void add_row(const Dtype dtype, char *sum, const char *delta, long size) {
    long bytes = dtype_bytes(dtype);
    for (long i = 0; i < size; i += LANES)
        store_n(dtype, sum + i * bytes, load_n(dtype, sum + i * bytes, size - i) + load_n(dtype, delta + i * bytes, size - i),
                size - i);
}

// The first `rotary` elements; the others stay as they are. out may be x.
INLINE void rotate_row(const Dtype dtype, const char *x, const float *cos, const float *sin, char *out, long size,
                       long rotary) {
    long bytes = dtype_bytes(dtype), half = rotary / 2;
    if (rotary < size && out != x) memcpy(out + rotary * bytes, x + rotary * bytes, (size - rotary) * bytes);
    for (long i = 0; i < half; i += LANES) {
        long n = half - i;
        f32x16 a = load_n(dtype, x + i * bytes, n), b = load_n(dtype, x + (half + i) * bytes, n);
        f32x16 first = fma16(a, load_n(F32, cos + i, n), -b * load_n(F32, sin + i, n));
        f32x16 second = fma16(b, load_n(F32, cos + half + i, n), a * load_n(F32, sin + half + i, n));
        store_n(dtype, out + i * bytes, first, n);
        store_n(dtype, out + (half + i) * bytes, second, n);
    }
}

INLINE void combine_row(const Dtype dtype, const RowsCall *call, long token) {
    long bytes = dtype_bytes(dtype);
    const int64_t *row_of = call->row_of + token * call->num_choices;
    const float *weights = call->weights + token * call->num_choices;
    for (long i = 0; i < call->size; i += LANES) {
        f32x16 sum = splat(0.0f);
        for (long k = 0; k < call->num_choices; k++)
            sum = fma16(splat(weights[k]), load_n(dtype, call->x + row_of[k] * call->step + i * bytes, call->size - i), sum);
        store_n(dtype, call->out + (token * call->size + i) * bytes, sum, call->size - i);
    }
}

typedef enum { NORM, ADD, ADD_NORM, ROTATE, COMBINE, SIGMOID } RowKernel;

INLINE void rows_task(const RowKernel kernel, const Dtype dtype, const RowsCall *call, long task) {
    long end = min_long(call->num_tokens, (task + 1) * call->tokens_per_task), row_bytes = call->size * dtype_bytes(dtype);
    for (long t = task * call->tokens_per_task; t < end; t++) {
        if (kernel == COMBINE) { combine_row(dtype, call, t); continue; }
        if (kernel == ADD || kernel == ADD_NORM)
            add_row(dtype, call->sum + t * call->step, call->delta + t * row_bytes, call->size);
        if (kernel == ADD) continue;
        for (long h = 0; h < call->num_heads; h++) {
            const char *x = call->x + t * call->step + h * row_bytes;
            char *out = call->out + (t * call->num_heads + h) * row_bytes;
            const char *gate = call->gate ? call->gate + t * call->gate_step + h * row_bytes : 0;
            if (kernel == NORM || kernel == ADD_NORM) norm_row(dtype, x, call->weight, call->weight_dtype, gate, out, call->size, call->eps);
            else if (kernel == SIGMOID) sigmoid_row(dtype, x, gate, call->gate_size, out, call->size);
            else rotate_row(dtype, x, call->cos + t * call->rotary_size, call->sin + t * call->rotary_size, out, call->size,
                            call->rotary_size);
        }
    }
}

#define ROWS_TASK(NAME, KERNEL) static void NAME(const void *context, long task) { \
    const RowsCall *call = context; \
    if (call->dtype == BF16) rows_task(KERNEL, BF16, call, task); \
    else if (call->dtype == F16) rows_task(KERNEL, F16, call, task); \
    else rows_task(KERNEL, F32, call, task); }
ROWS_TASK(norm_task, NORM)
ROWS_TASK(add_task, ADD)
ROWS_TASK(add_norm_task, ADD_NORM)
ROWS_TASK(rotate_task, ROTATE)
ROWS_TASK(combine_task, COMBINE)
ROWS_TASK(sigmoid_task, SIGMOID)
#undef ROWS_TASK

static void run_rows(RowsCall *call, TaskFunction task, long elements_per_token, long num_threads) {
    if (call->num_tokens == 0) return;
    call->tokens_per_task = max_long(1, ROW_TASK_ELEMENTS / max_long(1, elements_per_token));
    parallel_for(ceil_div(call->num_tokens, call->tokens_per_task), num_threads, task, call);
}
