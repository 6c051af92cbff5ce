// Gated DeltaNet: causal convolution, and the recurrence token by token. No result depends on how work is shared out or on
// how many tokens a call has: a row's is made of the same operations in the same order whichever task computes it.
// T tokens, S sequences, C channels, H value heads, k key head size, v value head size. Steps are in bytes between rows.
#pragma once

#include "packed_parallel.h"
#include "packed_rows.h"
#include "packed_simd.h"
#include "shared_structs.h"

enum { MAX_KEY_DIM = 256, MAX_CONV_KERNEL = 16, CONV_CHANNELS = 512, CONV_TASK_ELEMENTS = 1 << 13 };

// query_starts [S + 1]; reads, writes [S]: state slots, a read of -1 begins; kept_starts [S + 1], kept_rows and kept_slots [W]:
// slots that are written too, after so many rows of the sequence; or 0
#define SEQUENCES_FIELDS(FIELD) FIELD(const int32_t *, query_starts) FIELD(const int32_t *, reads) \
    FIELD(const int32_t *, writes) FIELD(const int32_t *, kept_starts) FIELD(const int32_t *, kept_rows) \
    FIELD(const int32_t *, kept_slots) FIELD(long, num_seqs)
DEFINE_STRUCT(Sequences, SEQUENCES_FIELDS);

// Of one sequence, the slots that keep a state on the way: `next` counts those that are passed.
typedef struct { const int32_t *rows, *slots; long next, end; } Kept;

// Those after more than `num_done` rows
INLINE Kept kept_of(const Sequences *seqs, long seq, long num_done) {
    if (!seqs->kept_starts) return (Kept){0, 0, 0, 0};
    Kept kept = {seqs->kept_rows, seqs->kept_slots, seqs->kept_starts[seq], seqs->kept_starts[seq + 1]};
    while (kept.next < kept.end && kept.rows[kept.next] <= num_done) kept.next++;
    return kept;
}

// The slot for the state after `num_rows` rows of the sequence, or -1
INLINE long kept_after(Kept *kept, long num_rows) {
    return kept->next < kept->end && kept->rows[kept->next] == num_rows ? kept->slots[kept->next++] : -1;
}

static const float zeros[MAX_KEY_DIM * 64];         // the state and the rows before the first

// ---- convolution: weight [K, C] of the model's dtype, slots [N, K - 1, C], oldest row first. A task takes some rows of the
// call, whoever's they are, and a part of the channels.

#define CONV_FIELDS(FIELD) FIELD(const char *, x) FIELD(const char *, weight) FIELD(char *, slots) FIELD(char *, out) \
    FIELD(long, step) FIELD(long, width) FIELD(long, kernel) FIELD(long, dtype) FIELD(const Sequences *, seqs)
DEFINE_STRUCT(Conv, CONV_FIELDS);

typedef struct { const Conv *conv; long num_parts, rows_per_task; } ConvJob;

// The last K rows up to row t of a sequence whose first row is `first`, oldest first: of the call, of the slot that is read,
// or zeros. At the channel's place.
INLINE void conv_window(const Conv *call, const int kernel, const char **window, long seq, long first, long t,
                        long channel_bytes) {
    long row_bytes = call->width * dtype_bytes(call->dtype), read = call->seqs->reads[seq];
    for (long back = kernel - 1; back >= 0; back--) {
        const char *row = (const char *)zeros;
        if (t - back >= first) row = call->x + (t - back) * call->step + channel_bytes;
        else if (read >= 0) row = call->slots + (read * (kernel - 1) + kernel - 1 + t - back - first) * row_bytes + channel_bytes;
        window[kernel - 1 - back] = row;
    }
}

INLINE void conv_part(const Dtype dtype, const int kernel, const Conv *call, long row, long end_row, long channel,
                      long num_channels) {
    float weight[MAX_CONV_KERNEL * CONV_CHANNELS] __attribute__((aligned(64)));
    const char *window[MAX_CONV_KERNEL];
    long bytes = dtype_bytes(dtype), row_bytes = call->width * bytes, at = channel * bytes, seq = 0;
    for (int i = 0; i < kernel; i++)
        widen(dtype, weight + i * CONV_CHANNELS, call->weight + i * row_bytes + at, num_channels);
    while (call->seqs->query_starts[seq + 1] <= row) seq++;
    Kept kept = kept_of(call->seqs, seq, row - call->seqs->query_starts[seq]);
    for (long t = row; t < end_row; t++) {
        if (call->seqs->query_starts[seq + 1] <= t) {
            while (call->seqs->query_starts[seq + 1] <= t) seq++;
            kept = kept_of(call->seqs, seq, 0);
        }
        long first = call->seqs->query_starts[seq], c = 0;
        conv_window(call, kernel, window, seq, first, t, at);
        for (; c + LANES <= num_channels; c += LANES) {
            f32x16 sum = splat(0.0f);
            for (int i = 0; i < kernel; i++)
                sum = fma16(load(dtype, window[i] + c * bytes), load_f32(weight + i * CONV_CHANNELS + c), sum);
            store(dtype, call->out + t * row_bytes + at + c * bytes, silu16(sum));
        }
        if (c < num_channels) {
            long n = num_channels - c;
            f32x16 sum = splat(0.0f);
            for (int i = 0; i < kernel; i++)
                sum = fma16(load_n(dtype, window[i] + c * bytes, n), load_n(F32, weight + i * CONV_CHANNELS + c, n), sum);
            store_n(dtype, call->out + t * row_bytes + at + c * bytes, silu16(sum), n);
        }
        long slot = kept_after(&kept, t + 1 - first);
        if (t + 1 == call->seqs->query_starts[seq + 1]) slot = call->seqs->writes[seq];
        for (int i = 1; slot >= 0 && i < kernel; i++)
            memcpy(call->slots + (slot * (kernel - 1) + i - 1) * row_bytes + at, window[i], num_channels * bytes);
    }
}

static void conv_task(const void *context, long task) {
    const ConvJob *job = context;
    const Conv *call = job->conv;
    long row = task / job->num_parts * job->rows_per_task, channel = task % job->num_parts * CONV_CHANNELS;
    long end_row = min_long(call->seqs->query_starts[call->seqs->num_seqs], row + job->rows_per_task);
    long num_channels = min_long(CONV_CHANNELS, call->width - channel);
#define PART(DTYPE) \
    if (call->kernel == 4) conv_part(DTYPE, 4, call, row, end_row, channel, num_channels); \
    else conv_part(DTYPE, call->kernel, call, row, end_row, channel, num_channels)
    if (call->dtype == BF16) PART(BF16);
    else if (call->dtype == F16) PART(F16);
    else PART(F32);
#undef PART
}

// ---- recurrence. A slot holds, head after head, panels of columns: of 64 as long as there are 64, then of 16, then the
// rest; each panel lies in memory as [k][columns]. A task takes panels of the value heads of one key head of one sequence.

#ifdef __AVX512F__
enum { STATE_VECTORS = 4 };     // of a panel of 64 columns at once: 16 of 32 registers hold sums
#else
enum { STATE_VECTORS = 1 };
#endif
enum { PANEL_COLUMNS = 64, DELTA_ROWS = LANES };        // rows whose queries, keys and gates are made ready together

// qkv [T, 2 * key heads * k + H * v], ba [T, 2 * H], rate and bias [H], slots [N, H, panels], out [T, H, v]
#define DELTA_RULE_FIELDS(FIELD) FIELD(const char *, qkv) FIELD(const char *, ba) FIELD(const float *, rate) \
    FIELD(const float *, bias) FIELD(float *, slots) FIELD(char *, out) FIELD(long, qkv_step) FIELD(long, ba_step) \
    FIELD(long, num_key_heads) FIELD(long, num_heads) FIELD(long, key_dim) FIELD(long, value_dim) FIELD(long, dtype) \
    FIELD(const Sequences *, seqs)
DEFINE_STRUCT(DeltaRule, DELTA_RULE_FIELDS);

typedef struct { const DeltaRule *rule; long panels_per_task; } DeltaJob;

typedef struct { long column, width; } Panel;

INLINE long num_panels_of(long value_dim) {
    return value_dim / PANEL_COLUMNS + value_dim % PANEL_COLUMNS / LANES + (value_dim % LANES > 0);
}

INLINE Panel panel_at(long value_dim, long index) {
    long wide = value_dim / PANEL_COLUMNS;
    if (index < wide) return (Panel){index * PANEL_COLUMNS, PANEL_COLUMNS};
    long column = wide * PANEL_COLUMNS + (index - wide) * LANES;
    return (Panel){column, min_long(LANES, value_dim - column)};
}

// Queries and keys as floats, normalized, `ld` floats between rows; k q; and of one value head the gates of each row
typedef struct {
    float q[DELTA_ROWS * MAX_KEY_DIM], k[DELTA_ROWS * MAX_KEY_DIM];
    float kq[DELTA_ROWS], decay[DELTA_ROWS], beta[DELTA_ROWS];
    long num_rows, ld;
} DeltaRows;

// log(1 + e^x), without overflow: max(x, 0) + log1p(e^-|x|), the latter by the series of 2 atanh(u / (2 + u))
INLINE f32x16 softplus16(f32x16 x) {
    i32x16 is_positive = x > splat(0.0f);
    f32x16 u = exp16(select16(is_positive, -x, x));
    f32x16 s = u / (splat(2.0f) + u), s2 = s * s, p = splat(1.0f / 15.0f);
    for (int odd = 13; odd >= 1; odd -= 2) p = fma16(p, s2, splat(1.0f / (float)odd));
    return select16(is_positive, x, splat(0.0f)) + splat(2.0f) * s * p;
}

INLINE f32x16 sigmoid16(f32x16 x) {
    return splat(1.0f) / (splat(1.0f) + exp16(select16(-x > splat(88.0f), splat(88.0f), -x)));
}

// x / |x| * scale, as floats; zeros up to a multiple of 16
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

INLINE void prepare_keys(const Dtype dtype, const DeltaRule *call, long row, long key_head, DeltaRows *rows) {
    long bytes = dtype_bytes(dtype), size = call->key_dim, key_width = call->num_key_heads * size;
    float scale = 1.0f / __builtin_sqrtf((float)size);
    for (long r = 0; r < rows->num_rows; r++) {
        const char *x = call->qkv + (row + r) * call->qkv_step + key_head * size * bytes;
        float *q = rows->q + r * rows->ld, *k = rows->k + r * rows->ld;
        normalize(dtype, x, q, size, scale);
        normalize(dtype, x + key_width * bytes, k, size, 1.0f);
        f32x16 products = splat(0.0f);
        for (long i = 0; i < rows->ld; i += LANES) products = fma16(load_f32(q + i), load_f32(k + i), products);
        rows->kq[r] = sum_lanes(products);
    }
}

// A lane is a row
INLINE void prepare_gates(const Dtype dtype, const DeltaRule *call, long row, long head, DeltaRows *rows) {
    long bytes = dtype_bytes(dtype);
    float a[DELTA_ROWS] = {0}, b[DELTA_ROWS] = {0};
    for (long r = 0; r < rows->num_rows; r++) {
        const char *ba = call->ba + (row + r) * call->ba_step;
        b[r] = load_n(dtype, ba + head * bytes, 1)[0];
        a[r] = load_n(dtype, ba + (call->num_heads + head) * bytes, 1)[0];
    }
    f32x16 forget = splat(call->rate[head]) * softplus16(load_f32(a) + splat(call->bias[head]));
    store_f32(rows->decay, exp16(forget));
    store_f32(rows->beta, sigmoid16(load_f32(b)));
}

// Sums over k of the state times key and query: those of even and of odd k apart, then added
typedef struct { f32x16 k[2][STATE_VECTORS], q[2][STATE_VECTORS]; } StateSums;

INLINE void add_state_row(const int vecs, StateSums *sums, const int odd, const f32x16 *s, float k, float q) {
    for (int j = 0; j < vecs; j++) {
        sums->k[odd][j] = fma16(s[j], splat(k), sums->k[odd][j]);
        sums->q[odd][j] = fma16(s[j], splat(q), sums->q[odd][j]);
    }
}

INLINE void clear_sums(const int vecs, StateSums *sums) {
    for (int j = 0; j < vecs; j++) sums->k[0][j] = sums->k[1][j] = sums->q[0][j] = sums->q[1][j] = splat(0.0f);
}

// `lanes` of each vector; rows of the state are `ld` floats apart
INLINE void read_state(const int vecs, const long lanes, const float *state, long ld, const float *k, const float *q,
                       long key_dim, StateSums *sums) {
    clear_sums(vecs, sums);
    for (long i = 0; i < key_dim; i++) {
        f32x16 s[STATE_VECTORS];
        for (int j = 0; j < vecs; j++) s[j] = load_n(F32, state + i * ld + j * LANES, lanes);
        if (i % 2) add_state_row(vecs, sums, 1, s, k[i], q[i]);
        else add_state_row(vecs, sums, 0, s, k[i], q[i]);
    }
}

// One row i of to = decay from + k delta, and its part of the next token's sums
INLINE void update_state_row(const int vecs, const long lanes, const int streams, const float *from, float *to, float k,
                             f32x16 decay, const f32x16 *delta, f32x16 *s) {
    for (int j = 0; j < vecs; j++) {
        s[j] = fma16(splat(k), delta[j], decay * load_n(F32, from + j * LANES, lanes));
        if (streams) __builtin_nontemporal_store(s[j], (f32x16 *)(to + j * LANES));
        else store_f32_n(to + j * LANES, s[j], lanes);
    }
}

// With next_k: also sums the new state with the next token's key and query, while it is in registers.
INLINE void update_state(const int vecs, const long lanes, const int streams, const float *from, float *to, long ld,
                         const float *k, f32x16 decay, const f32x16 *delta, long key_dim, const float *next_k,
                         const float *next_q, StateSums *sums) {
    f32x16 s[STATE_VECTORS];
    if (next_k) clear_sums(vecs, sums);
    long i = 0;
    for (; i + 2 <= key_dim; i += 2) {
        update_state_row(vecs, lanes, streams, from + i * ld, to + i * ld, k[i], decay, delta, s);
        if (next_k) add_state_row(vecs, sums, 0, s, next_k[i], next_q[i]);
        update_state_row(vecs, lanes, streams, from + (i + 1) * ld, to + (i + 1) * ld, k[i + 1], decay, delta, s);
        if (next_k) add_state_row(vecs, sums, 1, s, next_k[i + 1], next_q[i + 1]);
    }
    if (i < key_dim) {
        update_state_row(vecs, lanes, streams, from + i * ld, to + i * ld, k[i], decay, delta, s);
        if (next_k) add_state_row(vecs, sums, 0, s, next_k[i], next_q[i]);
    }
}

// Some rows of one sequence, on a part of a panel. The state is at `from` first, at `to` afterwards.
typedef struct {
    const float *from;
    float *to;
    long row, num_done, head, column, ld;       // num_done: rows of the sequence before `row`; column: of the head's value
} PanelRows;

// S' q is made of the old state, S' q = decay (S q) + (k q) delta, so that a token passes over the state once.
INLINE void delta_rows(const Dtype dtype, const int vecs, const long lanes, const int streams, const DeltaRule *call,
                       const DeltaRows *rows, const PanelRows *at, Kept kept, long write) {
    StateSums sums;
    f32x16 delta[STATE_VECTORS];
    long bytes = dtype_bytes(dtype), key_dim = call->key_dim, column = at->head * call->value_dim + at->column;
    long slot_size = call->num_heads * key_dim * call->value_dim;
    const char *value = call->qkv + at->row * call->qkv_step + (2 * call->num_key_heads * key_dim + column) * bytes;
    char *out = call->out + (at->row * call->num_heads * call->value_dim + column) * bytes;
    read_state(vecs, lanes, at->from, at->ld, rows->k, rows->q, key_dim, &sums);
    for (long r = 0; r < rows->num_rows; r++) {
        f32x16 decay = splat(rows->decay[r]), beta = splat(rows->beta[r]), kq = splat(rows->kq[r]);
        for (int j = 0; j < vecs; j++) {
            f32x16 v = load_n(dtype, value + j * LANES * bytes, lanes);
            delta[j] = (v - decay * (sums.k[0][j] + sums.k[1][j])) * beta;
            store_n(dtype, out + j * LANES * bytes, fma16(kq, delta[j], decay * (sums.q[0][j] + sums.q[1][j])), lanes);
        }
        value += call->qkv_step;
        out += call->num_heads * call->value_dim * bytes;
        const float *from = r ? at->to : at->from, *k = rows->k + r * rows->ld, *q = rows->q + r * rows->ld;
        if (r + 1 < rows->num_rows)
            update_state(vecs, lanes, 0, from, at->to, at->ld, k, decay, delta, key_dim, k + rows->ld, q + rows->ld, &sums);
        else update_state(vecs, lanes, streams, from, at->to, at->ld, k, decay, delta, key_dim, 0, 0, &sums);
        long slot = kept_after(&kept, at->num_done + r + 1);
        for (long i = 0; slot >= 0 && i < key_dim; i++)
            memcpy(at->to + (slot - write) * slot_size + i * at->ld, at->to + i * at->ld, ((vecs - 1) * LANES + lanes) * 4);
    }
}

// A single row's new state is not needed soon: it goes past the caches.
INLINE void delta_panel(const Dtype dtype, const DeltaRule *call, const DeltaRows *rows, const Panel *panel, PanelRows *at,
                        Kept kept, long write, int is_single) {
    int streams = is_single && (uintptr_t)at->to % 64 == 0;
#define ROWS(VECS, LANES_, STREAMS) delta_rows(dtype, VECS, LANES_, STREAMS, call, rows, at, kept, write)
    at->column = panel->column;
    at->ld = panel->width;
    if (panel->width < LANES) ROWS(1, panel->width, 0);
    else if (STATE_VECTORS == PANEL_COLUMNS / LANES && panel->width == PANEL_COLUMNS) {
        if (streams) ROWS(STATE_VECTORS, LANES, 1);
        else ROWS(STATE_VECTORS, LANES, 0);
    } else {
        for (long column = 0; column < panel->width; column += LANES, at->from += LANES, at->to += LANES, at->column += LANES) {
            if (streams) ROWS(1, LANES, 1);
            else ROWS(1, LANES, 0);
        }
    }
#undef ROWS
}

INLINE void delta_part(const Dtype dtype, const DeltaRule *call, long seq, long key_head, long panel, long end_panel) {
    DeltaRows rows __attribute__((aligned(64)));
    long first = call->seqs->query_starts[seq], end = call->seqs->query_starts[seq + 1];
    long read = call->seqs->reads[seq], write = call->seqs->writes[seq], key_dim = call->key_dim, value_dim = call->value_dim;
    long slot_size = call->num_heads * key_dim * value_dim, num_panels = num_panels_of(value_dim);
    rows.ld = ceil_div(key_dim, LANES) * LANES;
    for (long row = first; row < end; row += DELTA_ROWS) {
        Kept kept = kept_of(call->seqs, seq, row - first);
        rows.num_rows = min_long(DELTA_ROWS, end - row);
        prepare_keys(dtype, call, row, key_head, &rows);
        for (long p = panel; p < end_panel; p++) {
            Panel columns = panel_at(value_dim, p % num_panels);
            long head = key_head * (call->num_heads / call->num_key_heads) + p / num_panels;
            long place = (head * value_dim + columns.column) * key_dim;
            float *to = call->slots + write * slot_size + place;
            const float *from = row > first ? to : read < 0 ? zeros : call->slots + read * slot_size + place;
            PanelRows at = {from, to, row, row - first, head, 0, 0};
            if (p == panel || p % num_panels == 0) prepare_gates(dtype, call, row, head, &rows);
            delta_panel(dtype, call, &rows, &columns, &at, kept, write, end - first == 1);
        }
    }
}

static void delta_task(const void *context, long task) {
    const DeltaJob *job = context;
    const DeltaRule *call = job->rule;
    long num_panels = call->num_heads / call->num_key_heads * num_panels_of(call->value_dim);
    long parts = ceil_div(num_panels, job->panels_per_task), panel = task % parts * job->panels_per_task;
    long seq = task / parts / call->num_key_heads, key_head = task / parts % call->num_key_heads;
    long end_panel = min_long(num_panels, panel + job->panels_per_task);
    if (call->dtype == BF16) delta_part(BF16, call, seq, key_head, panel, end_panel);
    else if (call->dtype == F16) delta_part(F16, call, seq, key_head, panel, end_panel);
    else delta_part(F32, call, seq, key_head, panel, end_panel);
#ifdef __x86_64__
    __builtin_ia32_sfence();        // whoever waits for this task sees what went past the caches
#endif
}
