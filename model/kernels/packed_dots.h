// VDPBF16PS on pairs of bf16: two steps of an FMA chain at once, fma of the upper halves and then of the lower ones, with
// denormals flushed. Manuals say so in pseudo-code; whether this CPU does is found out before it is used.
#pragma once

#include "packed_float_mode.h"
#include "packed_simd.h"

#ifdef __AVX512BF16__
enum { DOTS = 1 };
#else
enum { DOTS = 0 };
#endif

INLINE f32x16 dot16(f32x16 x_pairs, u32x16 w_pairs, f32x16 acc) {
#ifdef __AVX512BF16__
    typedef __bf16 bf16x32 __attribute__((vector_size(64)));
    return __builtin_ia32_dpbf16ps_512(acc, (bf16x32)x_pairs, (bf16x32)w_pairs);
#else
    (void)x_pairs, (void)w_pairs;
    return acc;
#endif
}

INLINE f32x16 chain16(u32x16 x, u32x16 w, f32x16 acc) {
    acc = fma16((f32x16)(x & 0xffff0000u), (f32x16)(w & 0xffff0000u), acc);
    return fma16((f32x16)(x << 16), (f32x16)(w << 16), acc);
}

// ---- the check

enum { DOT_CHECKS = 4096 };

static uint32_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

// A bf16 of a random sign and mantissa, its exponent within `spread` from `exponent`
static uint32_t random_bf16(uint64_t *state, uint32_t exponent, uint32_t spread) {
    uint32_t bits = next_random(state);
    return (bits & 0x807f) | (exponent + (bits >> 8 & 0xffff) % spread) << 7;
}

// Numbers of one of four kinds: any bits; sums that cancel; sums near the least normal number; special ones
static void draw_numbers(uint64_t *state, int kind, uint32_t *x, uint32_t *w, uint32_t *acc) {
    static const uint32_t special[] = {0x0000, 0x8000, 0x7f80, 0xff80, 0x7fc0, 0x0001, 0x807f, 0x0080, 0x3f80, 0xff7f};
    uint32_t high = next_random(state) % 10, low = next_random(state) % 10, of_acc = next_random(state);
    *x = next_random(state), *w = next_random(state), *acc = of_acc;
    if (kind == 1) {
        *x = random_bf16(state, 124, 6) << 16 | random_bf16(state, 124, 6);
        *w = random_bf16(state, 124, 6) << 16 | random_bf16(state, 124, 6);
        *acc = (of_acc & 0x807fffff) | (122 + of_acc % 7) << 23;
    } else if (kind == 2) {
        *x = random_bf16(state, 58, 14) << 16 | random_bf16(state, 58, 14);
        *w = random_bf16(state, 50, 30) << 16 | random_bf16(state, 50, 30);
        *acc = (of_acc & 0x800003ff) | (of_acc % 4) << 23;              // the least normal number and close to it
    } else if (kind == 3) {
        *x = special[high] << 16 | special[low];
        *w = special[*w % 10] << 16 | special[*w / 16 % 10];
        *acc = special[of_acc % 10] << 16;
    }
}

// Whether the CPU's dots have the bits of the chain. NaN is NaN: stores give it the same bits.
static long dots_are_chains(void) {
    FloatMode before = enter_kernel_mode();
    uint64_t state = 1;
    int all_equal = 1;
    for (int check = 0; DOTS && check < DOT_CHECKS; check++) {
        uint32_t x[LANES], w[LANES], acc[LANES];
        for (int lane = 0; lane < LANES; lane++) draw_numbers(&state, check % 4, x + lane, w + lane, acc + lane);
        u32x16 x16, w16;
        f32x16 acc16;
        __builtin_memcpy(&x16, x, sizeof x16);
        __builtin_memcpy(&w16, w, sizeof w16);
        __builtin_memcpy(&acc16, acc, sizeof acc16);
        f32x16 dot = dot16((f32x16)x16, w16, acc16), chain = chain16(x16, w16, acc16);
        i32x16 equal = ((i32x16)dot == (i32x16)chain) | ((dot != dot) & (chain != chain));
        for (int lane = 0; lane < LANES; lane++) all_equal &= equal[lane] != 0;
    }
    set_float_mode(before);
    return all_equal;
}
