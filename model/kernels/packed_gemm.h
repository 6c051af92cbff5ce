// rows [M, K] x panels -> floats. A weight [N, K] is stored as panels of 16 outputs, k ascending:
//   fp32, fp16: [N/16][K][16];  bf16: [N/16][K/2][16][2], so that one shift and one mask widen two k of 16 outputs.
// N is padded with zeros to 16 and K of bf16 to 2.
//
// Every output is ONE chain acc = fma(x[k], w[k], acc), k ascending from acc = 0. Tiles, blocks and partial sums kept in
// memory change where the chain is computed, never its order: results do not depend on M, threads or the CPU level.
#pragma once

#include "packed_simd.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 12, TILE_VECS = 2 };     // 24 of 32 registers hold sums
#else
enum { TILE_ROWS = 6, TILE_VECS = 1 };      // AVX2: 12 of 16; NEON: 24 of 32
#endif
enum {
    BLOCK_ROWS = 120, BLOCK_K = 256, BLOCK_PANELS = 16,     // a block's rows and sums stay in L2, one widened panel in L1
    DIRECT_ROWS = 8,                        // up to here a panel is widened in registers, above into L1 first
    ROWS_LD_PAD = 16,                       // keeps rows out of each other's cache sets
    SUMS_LD = BLOCK_PANELS * LANES + 16,
    ROWS_FLOATS = BLOCK_ROWS * (BLOCK_K + ROWS_LD_PAD),
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

// Any number of rows and vectors of floats: the kernel of large products and of attention
static void multiply_f32(long num_rows, long num_vecs, const float *rows, long ld_rows, const float *b, long vec_step,
                         long ldb, long k, float *sums, long ld_sums, int resume) {
    const char *bytes = (const char *)b;
    long num_tiles = ceil_div(num_rows, TILE_ROWS), done = 0;
    for (long t = 0; t < num_tiles; t++) {
        long here = (num_rows - done) / (num_tiles - t);            // even tiles: 7 rows are 4 + 3, not 6 + 1
        const float *tile_rows = rows + done * ld_rows;
        float *tile_sums = sums + done * ld_sums;
#define TILE(R, V) case R: for (; v + V <= num_vecs; v += V) \
            tile(F32, R, V, tile_rows, ld_rows, bytes + v * vec_step, vec_step, ldb, k, tile_sums + v * LANES, ld_sums, resume); \
            for (; v < num_vecs; v++) \
            tile(F32, R, 1, tile_rows, ld_rows, bytes + v * vec_step, vec_step, ldb, k, tile_sums + v * LANES, ld_sums, resume); \
            break;
        long v = 0;
        switch (here) {
            TILE(1, 4) TILE(2, 2) TILE(3, 2) TILE(4, TILE_VECS) TILE(5, TILE_VECS) TILE(6, TILE_VECS)
#ifdef __AVX512F__
            TILE(7, 2) TILE(8, 2) TILE(9, 2) TILE(10, 2) TILE(11, 2) TILE(12, 2)
#endif
        }
#undef TILE
        done += here;
    }
}

// At most DIRECT_ROWS rows: memory-bound, so weights are widened in registers and never written
INLINE void multiply_direct(const Dtype dtype, long num_rows, long num_panels, const float *rows, long ld_rows,
                            const char *panels, long panel_step, long k, float *sums, int resume) {
#define TILE(R, V, FIRST) tile(dtype, R, V, rows + (FIRST) * ld_rows, ld_rows, panels + p * panel_step, panel_step, 64, k, \
                               sums + (FIRST) * SUMS_LD + p * LANES, SUMS_LD, resume)
    long p = 0;
    if (num_rows == 1) for (; p + 4 <= num_panels; p += 4) TILE(1, 4, 0);
    if (num_rows == 2) for (; p + 2 <= num_panels; p += 2) TILE(2, 2, 0);
    for (; p < num_panels; p++) switch (num_rows) {
        case 1: TILE(1, 1, 0); break;
        case 2: TILE(2, 1, 0); break;
        case 3: TILE(3, 1, 0); break;
        case 4: TILE(4, 1, 0); break;
        case 5: TILE(3, 1, 0); TILE(2, 1, 3); break;
        case 6: TILE(3, 1, 0); TILE(3, 1, 3); break;
        case 7: TILE(4, 1, 0); TILE(3, 1, 4); break;
        default: TILE(4, 1, 0); TILE(4, 1, 4); break;
    }
#undef TILE
}

INLINE void widen_panel(const Dtype dtype, float *out, const char *panel, long k) {
    if (dtype == F16) { widen(F16, out, panel, k * LANES); return; }
    for (long i = 0; i < k; i += 2) {               // odd k: one row of padding more, `out` has room
        u32x16 pair;
        __builtin_memcpy(&pair, panel + i * 32, sizeof pair);
        store_f32(out + i * LANES, (f32x16)(pair << 16));
        store_f32(out + (i + 1) * LANES, (f32x16)(pair & 0xffff0000u));
    }
}

INLINE void multiply_block_of(const Dtype dtype, long num_rows, long num_panels, const char *x, long x_step,
                              const char *panels, long k, float *sums) {
    float rows[ROWS_FLOATS] __attribute__((aligned(64)));
    float widened[TILE_VECS * BLOCK_K * LANES] __attribute__((aligned(64)));
    int direct = num_rows <= DIRECT_ROWS;
    long panel_step = panel_bytes(dtype, k);
    long block_k = direct ? ((ROWS_FLOATS / num_rows - ROWS_LD_PAD) & ~15L) : BLOCK_K;
    for (long k0 = 0; k0 < k; k0 += block_k) {
        long kc = min_long(block_k, k - k0), ld_rows = ((kc + 15) & ~15L) + ROWS_LD_PAD;
        for (long m = 0; m < num_rows; m++)
            widen(dtype, rows + m * ld_rows, x + m * x_step + k0 * dtype_bytes(dtype), kc);
        const char *here = panels + panel_offset(dtype, k0);
        if (direct) {
            multiply_direct(dtype, num_rows, num_panels, rows, ld_rows, here, panel_step, kc, sums, k0 > 0);
            continue;
        }
        for (long p = 0; p < num_panels; p += TILE_VECS) {
            long vecs = min_long(TILE_VECS, num_panels - p);
            const char *panel = here + p * panel_step;
            if (dtype == F32) {
                multiply_f32(num_rows, vecs, rows, ld_rows, (const float *)panel, panel_step, 64, kc,
                             sums + p * LANES, SUMS_LD, k0 > 0);
                continue;
            }
            for (long v = 0; v < vecs; v++) widen_panel(dtype, widened + v * BLOCK_K * LANES, panel + v * panel_step, kc);
            multiply_f32(num_rows, vecs, rows, ld_rows, widened, BLOCK_K * LANES * 4, 64, kc, sums + p * LANES, SUMS_LD,
                         k0 > 0);
        }
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
