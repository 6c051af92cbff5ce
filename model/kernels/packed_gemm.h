// rows [M, K] x panels -> floats. A weight [N, K] is stored as panels of 16 outputs, k ascending:
//   fp32, fp16: [N/16][K][16];  bf16: [N/16][K/2][16][2], a pair is (odd k, even k).
// N is padded with zeros to 16 and K of bf16 to 2.
//
// Every output is ONE chain acc = fma(x[k], w[k], acc), k ascending from acc = 0. Tiles, blocks and partial sums kept
// in memory change where the chain is computed, never its order: results do not depend on M, threads or the CPU level.
// Dots of bf16 pairs (packed_dots.h) take two steps of the chain at once.
#pragma once

#include "packed_dots.h"
#include "packed_simd.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 8, TILE_VECS = 2 };      // 16 of 32 registers hold sums; with 24 the compiler spills
#else
enum { TILE_ROWS = 6, TILE_VECS = 1 };      // AVX2: 12 of 16; NEON: 24 of 32
#endif
#ifdef __AVX512BF16__
enum { DOT_ROWS = 6, DOT_VECS = 4 };      // 24 of 32 registers hold sums
#else
enum { DOT_ROWS = TILE_ROWS, DOT_VECS = TILE_VECS };
#endif
enum {
    MAX_ROWS = 8, MAX_VECS = 4,             // of any tile
    BLOCK_ROWS = 120, BLOCK_PANELS = 16,    // one task's share: its rows and its sums stay in L2
    ROWS_GRANULE = 24,                      // a multiple of every tile's rows
    ROWS_LD_PAD = 16,                       // keeps rows out of each other's cache sets
    ROWS_WORDS = BLOCK_ROWS * (256 + ROWS_LD_PAD),      // 120 rows are taken 256 words at a time, fewer rows more
    SUMS_LD = BLOCK_PANELS * LANES + 16,
    FETCH_LEAD = 96,                        // steps of the chain that weights are fetched ahead, of all vectors together
};

INLINE int has_pairs(Dtype dtype) { return DOTS && dtype == BF16; }
INLINE int rows_of_tile(Dtype dtype) { return has_pairs(dtype) ? DOT_ROWS : TILE_ROWS; }
// More chains at once hide their latency where rows are few
INLINE int vecs_of_tile(Dtype dtype, long num_rows) {
    return has_pairs(dtype) ? DOT_VECS : num_rows == 1 ? 4 : num_rows == 2 ? 2 : TILE_VECS;
}

INLINE long panel_bytes(Dtype dtype, long k) { return LANES * (dtype == F32 ? 4 * k : 2 * (k + (k & 1))); }
INLINE long panel_offset(Dtype dtype, long k) { return LANES * dtype_bytes(dtype) * k; }       // k even

// A row as tiles read it is made of words of 4 bytes: floats, or bf16 pairs (odd k, even k) where the CPU has dots.
// A step of the chain takes a word, or two floats that meet a bf16 pair.
INLINE int words_per_step(Dtype dtype) { return dtype == BF16 && !DOTS ? 2 : 1; }
INLINE int k_per_step(Dtype dtype) { return dtype == BF16 ? 2 : 1; }

// n words from k of a row, zeros up to a step
INLINE void to_words(Dtype dtype, float *words, const char *x, long k) {
    if (!has_pairs(dtype)) {
        widen(dtype, words, x, k);
        if (dtype == BF16 && k % 2) words[k] = 0.0f;
        return;
    }
    for (long i = 0; i < k; i += 2 * LANES) {
        long bytes = min_long(64, 2 * (k - i));
        u32x16 pairs = {0};
        if (bytes == 64) __builtin_memcpy(&pairs, x + 2 * i, 64);
        else memcpy(&pairs, x + 2 * i, bytes);
        pairs = pairs << 16 | pairs >> 16;
        if (bytes == 64) __builtin_memcpy(words + i / 2, &pairs, 64);
        else memcpy(words + i / 2, &pairs, (bytes + 3) & ~3l);
    }
}

INLINE void tile_step(const Dtype dtype, const int num_rows, const int num_vecs, const float *x, long ld_rows,
                      const char *b, long vec_step, f32x16 (*acc)[MAX_VECS]) {
    if (dtype != BF16)
        for (int v = 0; v < num_vecs; v++) {
            f32x16 w = load(dtype, b + v * vec_step);
            for (int m = 0; m < num_rows; m++) acc[m][v] = fma16(splat(x[m * ld_rows]), w, acc[m][v]);
        }
    else if (has_pairs(dtype)) {
        u32x16 pair[MAX_VECS];
        for (int v = 0; v < num_vecs; v++) __builtin_memcpy(&pair[v], b + v * vec_step, sizeof pair[v]);
        for (int m = 0; m < num_rows; m++)
            for (int v = 0; v < num_vecs; v++) acc[m][v] = dot16(splat(x[m * ld_rows]), pair[v], acc[m][v]);
    } else
        for (int v = 0; v < num_vecs; v++) {
            u32x16 pair;
            __builtin_memcpy(&pair, b + v * vec_step, sizeof pair);
            f32x16 even = (f32x16)(pair & 0xffff0000u), odd = (f32x16)(pair << 16);
            for (int m = 0; m < num_rows; m++) acc[m][v] = fma16(splat(x[m * ld_rows]), even, acc[m][v]);
            for (int m = 0; m < num_rows; m++) acc[m][v] = fma16(splat(x[m * ld_rows + 1]), odd, acc[m][v]);
        }
}

// Vectors beside each other, vec_step bytes apart, and what is read after them
typedef struct { const char *b, *next; long vec_step, step_bytes, num_steps; } Group;

// Where a tile fetches from while it computes: NEAR is what it will read itself, FETCH_LEAD ahead, and then the
// beginning of the next group; FAR is a part of the next group, so that all tiles of a group share the waiting.
typedef enum { NOTHING, NEAR, FAR } Fetch;

INLINE void tile_steps(const Dtype dtype, const int num_rows, const int num_vecs, const int num_fetched, const float *rows,
                       long ld_rows, const Group *g, long begin, long end, const char *const *fetched,
                       f32x16 (*acc)[MAX_VECS]) {
    for (long i = begin; i < end; i++) {
        for (int f = 0; f < num_fetched; f++) __builtin_prefetch(fetched[f] + i * g->step_bytes);
        tile_step(dtype, num_rows, num_vecs, rows + i * words_per_step(dtype), ld_rows, g->b + i * g->step_bytes,
                  g->vec_step, acc);
    }
}

// sums[m][v*16..] (+)= rows[m] x vector v of the group
INLINE void tile(const Dtype dtype, const int num_rows, const int num_vecs, const Fetch fetch, const float *rows,
                 long ld_rows, const Group *g, const char *const *far, float *sums, long ld_sums, int resume) {
    f32x16 acc[MAX_ROWS][MAX_VECS];
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vecs; v++) acc[m][v] = resume ? load_f32(sums + m * ld_sums + v * LANES) : splat(0.0f);
#define STEPS(BEGIN, END, NUM_FETCHED, FETCHED) \
    tile_steps(dtype, num_rows, num_vecs, NUM_FETCHED, rows, ld_rows, g, BEGIN, END, FETCHED, acc)
    if (fetch == NEAR) {
        const char *near[MAX_VECS], *next[MAX_VECS];
        long lead = FETCH_LEAD / num_vecs, middle = max_long(0, g->num_steps - lead);
        for (int v = 0; v < num_vecs; v++) {
            near[v] = g->b + v * g->vec_step + lead * g->step_bytes;
            next[v] = g->next + v * g->vec_step - middle * g->step_bytes;
        }
        STEPS(0, middle, num_vecs, near);
        STEPS(middle, g->num_steps, num_vecs, next);
    } else if (fetch == FAR) STEPS(0, g->num_steps, 2, far);
    else STEPS(0, g->num_steps, 0, far);
#undef STEPS
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vecs; v++) store_f32(sums + m * ld_sums + v * LANES, acc[m][v]);
}

// Any number of rows and vectors. Weights are widened in registers and never written: for few rows memory is the limit,
// for many the multiplications are. `next` is read after `b`; are_cold: neither is in a cache.
INLINE void multiply(const Dtype dtype, const int are_cold, long num_rows, long num_vecs, const float *rows, long ld_rows,
                     const char *b, const char *next, long vec_step, long step_bytes, long num_steps, float *sums,
                     long ld_sums, int resume) {
#define TILE(R, V, FETCH) tile(dtype, R, V, are_cold ? FETCH : NOTHING, rows + done * ld_rows, ld_rows, &group, far, \
                               sums + done * ld_sums + v * LANES, ld_sums, resume)
#define CASE(R) case R: \
        if (vecs == 1) TILE(R, 1, NEAR); \
        else if (t == 0 && (num_tiles == 1 || v == 0)) TILE(R, vecs_of_tile(dtype, R), NEAR); \
        else if (R > 2) TILE(R, vecs_of_tile(dtype, R), FAR); \
        break;
    long wide = vecs_of_tile(dtype, num_rows), num_tiles = ceil_div(num_rows, rows_of_tile(dtype)), vecs;
    long vecs_fetched = min_long(2, ceil_div(wide, num_tiles));
    for (long v = 0; v < num_vecs; v += vecs) {
        vecs = v + wide <= num_vecs ? wide : 1;
        const char *after = v + vecs < num_vecs ? b + (v + vecs) * vec_step : next;
        Group group = {b + v * vec_step, after, vec_step, step_bytes, num_steps};
        for (long t = 0, done = 0, here; t < num_tiles; t++, done += here) {
            const char *far[2] = {after + t * vecs_fetched % wide * vec_step,
                                  after + (t * vecs_fetched + vecs_fetched - 1) % wide * vec_step};
            switch (here = (num_rows - done) / (num_tiles - t)) {           // even tiles: 7 rows are 3 + 4, not 6 + 1
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#ifdef __AVX512F__
                CASE(7) CASE(8)
#endif
            }
        }
    }
#undef CASE
#undef TILE
}

// The same on plain floats b[k][...], for attention
static void multiply_f32(long num_rows, long num_vecs, const float *rows, long ld_rows, const float *b, long ldb, long k,
                         float *sums, long ld_sums, int resume) {
    multiply(F32, 0, num_rows, num_vecs, rows, ld_rows, (const char *)b, 0, LANES * 4, ldb * 4, k, sums, ld_sums, resume);
}

INLINE void multiply_block_of(const Dtype dtype, long num_rows, long num_panels, const char *x, long x_step,
                              const char *panels, long k, float *sums) {
    float rows[ROWS_WORDS] __attribute__((aligned(64)));
    long words = words_per_step(dtype), step_k = k_per_step(dtype), num_steps = ceil_div(k, step_k);
    long most_words = (ROWS_WORDS / num_rows - ROWS_LD_PAD) & ~15L, num_parts = ceil_div(num_steps * words, most_words);
    long part_steps = ((ceil_div(num_steps * words, num_parts) + 15) & ~15L) / words;
    long ld_rows = part_steps * words + ROWS_LD_PAD, step_bytes = LANES * dtype_bytes(dtype) * step_k;
    for (long step = 0; step < num_steps; step += part_steps) {
        long steps = min_long(part_steps, num_steps - step), k0 = step * step_k;
        const char *b = panels + step * step_bytes, *next = step + steps < num_steps ? b + steps * step_bytes : b;
        for (long m = 0; m < num_rows; m++)
            to_words(dtype, rows + m * ld_rows, x + m * x_step + k0 * dtype_bytes(dtype), min_long(steps * step_k, k - k0));
        multiply(dtype, 1, num_rows, num_panels, rows, ld_rows, b, next, panel_bytes(dtype, k), step_bytes, steps, sums,
                 SUMS_LD, step > 0);
    }
}

// sums [num_rows][SUMS_LD] = x [num_rows, k] x panels; num_rows <= BLOCK_ROWS, num_panels <= BLOCK_PANELS
static void multiply_block(Dtype dtype, long num_rows, long num_panels, const char *x, long x_step, const char *panels,
                           long k, float *sums) {
    if (dtype == BF16) multiply_block_of(BF16, num_rows, num_panels, x, x_step, panels, k, sums);
    else if (dtype == F16) multiply_block_of(F16, num_rows, num_panels, x, x_step, panels, k, sums);
    else multiply_block_of(F32, num_rows, num_panels, x, x_step, panels, k, sums);
}

// Rows and panels of a product are cut into tasks: enough of them for all threads, each within a block
typedef struct { long rows_per_task, panels_per_task, num_row_tasks, num_panel_tasks; } Split;

static Split split_product(long num_rows, long num_panels, long panels_granule, long num_tasks_wanted) {
    Split split;
    split.num_row_tasks = ceil_div(num_rows, BLOCK_ROWS);
    long rows = ceil_div(num_rows, split.num_row_tasks);
    split.rows_per_task = num_rows > BLOCK_ROWS ? min_long(BLOCK_ROWS, ceil_div(rows, ROWS_GRANULE) * ROWS_GRANULE) : rows;
    split.num_row_tasks = ceil_div(num_rows, split.rows_per_task);
    long wanted = max_long(1, num_tasks_wanted / split.num_row_tasks);
    long panels = ceil_div(ceil_div(num_panels, wanted), panels_granule) * panels_granule;
    split.panels_per_task = max_long(panels_granule, min_long(panels, BLOCK_PANELS));
    split.num_panel_tasks = ceil_div(num_panels, split.panels_per_task);
    return split;
}
