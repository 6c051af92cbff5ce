// What a machine's units and memory give at most, for kernels.py to set beside its figures. Compiled by peaks.py.
#include "packed_dots.h"

// Multiplications and additions in registers only; the sum keeps the compiler from leaving them out
#define IN_REGISTERS(NAME, SUMS, OPERATION) float NAME(long num_steps) { \
    f32x16 acc[SUMS], x = splat(1.0f), w = splat(0.5f), all = splat(0.0f); \
    FloatMode before = enter_kernel_mode(); \
    for (int i = 0; i < SUMS; i++) acc[i] = splat((float)i); \
    for (long step = 0; step < num_steps; step++) \
        for (int i = 0; i < SUMS; i++) acc[i] = OPERATION; \
    for (int i = 0; i < SUMS; i++) all += acc[i]; \
    set_float_mode(before); \
    return sum_lanes(all); \
}

#ifdef __AVX512F__
enum { SUMS = 24 };
#else
enum { SUMS = 6 };          // AVX2: 12 registers; NEON: 24
#endif
IN_REGISTERS(fma_steps, SUMS, fma16(x, w, acc[i]))
IN_REGISTERS(dot_steps, SUMS, dot16(x, (u32x16)w, acc[i]))

long lanes_per_step(void) { return SUMS * LANES; }
long has_dots(void) { return DOTS && dots_are_chains(); }

// Four streams, as kernels read four panels
long read_bytes(const char *from, long num_bytes) {
    u32x16 sum = {0};
    long stream = num_bytes / 4 & ~63l;
    for (long i = 0; i < stream; i += 64)
        for (int s = 0; s < 4; s++) {
            u32x16 some;
            __builtin_prefetch(from + s * stream + i + 2048);
            __builtin_memcpy(&some, from + s * stream + i, 64);
            sum += some;
        }
    long total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return total;
}

#ifdef __AVX512F__
#pragma clang attribute pop     // began in packed_simd.h
#endif
