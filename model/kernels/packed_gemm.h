// rows [M, K] x panels -> floats. A weight [N, K] is stored as panels of 16 outputs, k ascending:
//   fp32, fp16: [N/16][K][16];  bf16: [N/16][K/2][16][2], so that one shift and one mask widen two k of 16 outputs.
// N is padded with zeros to 16 and K of bf16 to 2.
//
// Every output is ONE chain acc = fma(x[k], w[k], acc), k ascending from acc = 0. Tiles, blocks and partial sums kept
// in memory change where the chain is computed, never its order: results do not depend on M, threads or the CPU level.
#pragma once

#include "packed_simd.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 8, TILE_VECS = 2 };      // 16 of 32 registers hold sums; with 24 the compiler spills
#else
enum { TILE_ROWS = 6, TILE_VECS = 1 };      // AVX2: 12 of 16; NEON: 24 of 32
#endif
enum {
    BLOCK_ROWS = 120, BLOCK_PANELS = 16,    // one task's share: its rows and its sums stay in L2
    ROWS_LD_PAD = 16,                       // keeps rows out of each other's cache sets
    ROWS_FLOATS = BLOCK_ROWS * (256 + ROWS_LD_PAD),     // 120 rows are taken 256 k at a time, fewer rows more
    SUMS_LD = BLOCK_PANELS * LANES + 16,
    PREFETCH = 3072,                        // bytes of weights ahead of the one being read, all streams together
};

INLINE long panel_bytes(Dtype dtype, long k) { return LANES * (dtype == F32 ? 4 * k : 2 * (k + (k & 1))); }
INLINE long panel_offset(Dtype dtype, long k) { return LANES * dtype_bytes(dtype) * k; }       // k even

// sums[m][v*16..] (+)= rows[m][0..k] x panel v[0..k]. `ldb` is the byte step of k in `b`, used by F32 only.
INLINE void tile(const Dtype dtype, const int num_rows, const int num_vecs, const float *rows, long ld_rows,
                 const char *b, long vec_step, long ldb, long k, float *sums, long ld_sums, int resume) {
    f32x16 acc[num_rows][num_vecs];
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vecs; v++) acc[m][v] = resume ? load_f32(sums + m * ld_sums + v * LANES) : splat(0.0f);
    if (dtype == BF16) {
        long i = 0;
        for (; i + 2 <= k; i += 2) {
            for (int v = 0; v < num_vecs; v++) {
                u32x16 pair;
                __builtin_memcpy(&pair, b + v * vec_step + i * 32, sizeof pair);
                __builtin_prefetch(b + v * vec_step + i * 32 + PREFETCH / num_vecs);
                f32x16 even = (f32x16)(pair << 16), odd = (f32x16)(pair & 0xffff0000u);
                for (int m = 0; m < num_rows; m++) acc[m][v] = fma16(splat(rows[m * ld_rows + i]), even, acc[m][v]);
                for (int m = 0; m < num_rows; m++) acc[m][v] = fma16(splat(rows[m * ld_rows + i + 1]), odd, acc[m][v]);
            }
        }
        if (i < k)
            for (int v = 0; v < num_vecs; v++) {
                u32x16 pair;
                __builtin_memcpy(&pair, b + v * vec_step + i * 32, sizeof pair);
                f32x16 even = (f32x16)(pair << 16);
                for (int m = 0; m < num_rows; m++) acc[m][v] = fma16(splat(rows[m * ld_rows + i]), even, acc[m][v]);
            }
    } else {
        for (long i = 0; i < k; i++)
            for (int v = 0; v < num_vecs; v++) {
                f32x16 w = load(dtype, b + v * vec_step + i * (dtype == F32 ? ldb : 32));
                for (int m = 0; m < num_rows; m++) acc[m][v] = fma16(splat(rows[m * ld_rows + i]), w, acc[m][v]);
            }
    }
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vecs; v++) store_f32(sums + m * ld_sums + v * LANES, acc[m][v]);
}

// Any number of rows and vectors. Weights are widened in registers and never written: for few rows memory is the limit,
// for many the multiplications are.
INLINE void multiply(const Dtype dtype, long num_rows, long num_vecs, const float *rows, long ld_rows, const char *b,
                     long vec_step, long ldb, long k, float *sums, long ld_sums, int resume) {
#define TILE(R, V) tile(dtype, R, V, rows + done * ld_rows, ld_rows, b + v * vec_step, vec_step, ldb, k, \
                        sums + done * ld_sums + v * LANES, ld_sums, resume)
#define CASE(R) case R: if (vecs == TILE_VECS) TILE(R, TILE_VECS); else TILE(R, 1); break;
    long v = 0, done = 0, vecs;
    if (num_rows == 1) for (; v + 4 <= num_vecs; v += 4) TILE(1, 4);       // more chains at once hide their latency
    if (num_rows == 2) for (; v + 2 <= num_vecs; v += 2) TILE(2, 2);
    for (; v < num_vecs; v += vecs, done = 0) {
        vecs = v + TILE_VECS <= num_vecs ? TILE_VECS : 1;
        for (long tiles = ceil_div(num_rows, TILE_ROWS), here; tiles > 0; tiles--, done += here)
            switch (here = (num_rows - done) / tiles) {                     // even tiles: 7 rows are 3 + 4, not 6 + 1
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#ifdef __AVX512F__
                CASE(7) CASE(8)
#endif
            }
    }
#undef CASE
#undef TILE
}

// The same on plain floats b[k][...], for attention
static void multiply_f32(long num_rows, long num_vecs, const float *rows, long ld_rows, const float *b, long ldb, long k,
                         float *sums, long ld_sums, int resume) {
    multiply(F32, num_rows, num_vecs, rows, ld_rows, (const char *)b, LANES * 4, ldb * 4, k, sums, ld_sums, resume);
}

INLINE void multiply_block_of(const Dtype dtype, long num_rows, long num_panels, const char *x, long x_step,
                              const char *panels, long k, float *sums) {
    float rows[ROWS_FLOATS] __attribute__((aligned(64)));
    long most_k = ROWS_FLOATS / num_rows - ROWS_LD_PAD, num_parts = ceil_div(k, most_k & ~15L);
    long part_k = (ceil_div(k, num_parts) + 15) & ~15L, ld_rows = part_k + ROWS_LD_PAD;
    for (long k0 = 0; k0 < k; k0 += part_k) {
        long kc = min_long(part_k, k - k0);
        for (long m = 0; m < num_rows; m++)
            widen(dtype, rows + m * ld_rows, x + m * x_step + k0 * dtype_bytes(dtype), kc);
        multiply(dtype, num_rows, num_panels, rows, ld_rows, panels + panel_offset(dtype, k0), panel_bytes(dtype, k),
                 LANES * 4, kc, sums, SUMS_LD, k0 > 0);
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
    split.rows_per_task = num_rows > BLOCK_ROWS ? min_long(BLOCK_ROWS, ceil_div(rows, TILE_ROWS) * TILE_ROWS) : rows;
    split.num_row_tasks = ceil_div(num_rows, split.rows_per_task);
    long wanted = max_long(1, num_tasks_wanted / split.num_row_tasks);
    long panels = ceil_div(ceil_div(num_panels, wanted), panels_granule) * panels_granule;
    split.panels_per_task = max_long(panels_granule, min_long(panels, BLOCK_PANELS));
    split.num_panel_tasks = ceil_div(num_panels, split.panels_per_task);
    return split;
}
