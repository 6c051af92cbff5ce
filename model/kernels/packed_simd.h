// Vectors of 16 floats, whatever the CPU: the compiler splits them into its own registers (AVX2: two, NEON: four), so
// every CPU level performs the same operations in the same order. All rounding is to nearest even.
#pragma once

#include <stdint.h>
#include <string.h>

#pragma clang diagnostic ignored "-Wpsabi"      // vectors cross only inlined functions
#ifdef __AVX512F__                              // else clang prefers two 256-bit registers
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#endif

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 };
typedef enum { F32 = 0, BF16 = 1, F16 = 2 } Dtype;      // as model/kernels/packed_cpu.py numbers them

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef _Float16 f16x16 __attribute__((vector_size(32)));

INLINE long min_long(long a, long b) { return a < b ? a : b; }
INLINE long max_long(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
INLINE long dtype_bytes(Dtype dtype) { return dtype == F32 ? 4 : 2; }

INLINE f32x16 splat(float x) { return (f32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) { return __builtin_elementwise_fma(a, b, c); }
INLINE f32x16 select16(i32x16 mask, f32x16 a, f32x16 b) { return (f32x16)((mask & (i32x16)a) | (~mask & (i32x16)b)); }
INLINE f32x16 max16(f32x16 a, f32x16 b) { return select16(a > b, a, b); }

INLINE f32x16 load_f32(const float *p) { f32x16 v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE void store_f32(float *p, f32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

// A NaN becomes the same NaN whatever it was made of: which operand's bits it has differs between CPUs. The compiler must
// not know the constant: it would load it under a mask that is hardly ever set, which takes 150 ns as long as nothing
// else has touched the constant's page.
INLINE f32x16 with_one_nan(f32x16 v) {
    uint32_t bits = 0x7fc00000;
    float nan;
    __asm__("" : "+r"(bits));
    __builtin_memcpy(&nan, &bits, sizeof nan);
    return select16(v == v, v, splat(nan));
}

INLINE u16x16 to_bf16(f32x16 v) {
    u32x16 bits = (u32x16)v;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x16);
}

INLINE f32x16 load(Dtype dtype, const void *p) {
    if (dtype == F32) return load_f32(p);
    if (dtype == F16) { f16x16 h; __builtin_memcpy(&h, p, sizeof h); return __builtin_convertvector(h, f32x16); }
    u16x16 h;
    __builtin_memcpy(&h, p, sizeof h);
    return (f32x16)(__builtin_convertvector(h, u32x16) << 16);
}

INLINE void store(Dtype dtype, void *p, f32x16 v) {
    v = with_one_nan(v);
    if (dtype == F32) { store_f32(p, v); return; }
    if (dtype == F16) { f16x16 h = __builtin_convertvector(v, f16x16); __builtin_memcpy(p, &h, sizeof h); return; }
    u16x16 h = to_bf16(v);
    __builtin_memcpy(p, &h, sizeof h);
}

// The first n lanes only; lanes n.. are loaded as zero. n <= 16
INLINE f32x16 load_n(Dtype dtype, const void *p, long n) {
    if (n >= LANES) return load(dtype, p);
    char part[64] = {0};
    memcpy(part, p, n * dtype_bytes(dtype));
    return load(dtype, part);
}

INLINE void store_n(Dtype dtype, void *p, f32x16 v, long n) {
    if (n >= LANES) { store(dtype, p, v); return; }
    char part[64];
    store(dtype, part, v);
    memcpy(p, part, n * dtype_bytes(dtype));
}

// Of floats that stay between kernels, as they are
INLINE void store_f32_n(float *p, f32x16 v, long n) {
    if (n >= LANES) store_f32(p, v);
    else memcpy(p, &v, n * 4);
}

// x rounded to dtype and back
INLINE f32x16 round_to(Dtype dtype, f32x16 v) {
    char part[64];
    store(dtype, part, v);
    return load(dtype, part);
}

INLINE f32x8 low_half(f32x16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE f32x8 high_half(f32x16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }

// Always the same tree: lanes 8 apart, then 4, 2, 1
INLINE float sum_lanes(f32x16 v) {
    f32x8 a = low_half(v) + high_half(v);
    f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

INLINE float max_lanes(f32x16 v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}

// e^x for x <= 88 within 2 ulp, exactly 1 at 0, 0 below -87.3. Range reduction and polynomial of Cephes' expf.
INLINE f32x16 exp16(f32x16 x) {
    i32x16 is_low = x < splat(-87.3f);
    x = select16(is_low, splat(-87.3f), x);
    f32x16 shifted = fma16(x, splat(1.44269504f), splat(12582912.0f));    // 1.5 * 2^23: rounds to an integer in the low bits
    f32x16 n = shifted - splat(12582912.0f);
    f32x16 r = fma16(n, splat(-0.693359375f), x);
    r = fma16(n, splat(2.12194440e-4f), r);
    f32x16 p = splat(1.9875691500e-4f);
    p = fma16(p, r, splat(1.3981999507e-3f));
    p = fma16(p, r, splat(8.3334519073e-3f));
    p = fma16(p, r, splat(4.1665795894e-2f));
    p = fma16(p, r, splat(1.6666665459e-1f));
    p = fma16(p, r, splat(5.0000001201e-1f));
    p = fma16(p, r * r, r) + splat(1.0f);
    f32x16 power = (f32x16)(((u32x16)shifted + 127u - 0x4b400000u) << 23);
    return select16(is_low, splat(0.0f), p * power);
}

INLINE f32x16 silu16(f32x16 x) {
    f32x16 minus_x = select16(-x > splat(88.0f), splat(88.0f), -x);
    return x / (splat(1.0f) + exp16(minus_x));
}

// n elements of any dtype to floats
INLINE void widen(Dtype dtype, float *out, const void *in, long n) {
    const char *src = in;
    long i = 0;
    for (; i + LANES <= n; i += LANES) store_f32(out + i, load(dtype, src + i * dtype_bytes(dtype)));
    if (i < n) store_f32_n(out + i, load_n(dtype, src + i * dtype_bytes(dtype), n - i), n - i);
}
