// Kernels compute with denormal inputs and results taken as zeros: VDPBF16PS does so whatever the CPU is told, so all
// other arithmetic is told to. packed_parallel.h sets the mode around every task.
#pragma once

#include <stdint.h>

typedef uint64_t FloatMode;

static inline FloatMode float_mode(void) {
#if defined(__x86_64__)
    return __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
    FloatMode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
#else
    return 0;
#endif
}

static inline void set_float_mode(FloatMode mode) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr((unsigned)mode);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
#else
    (void)mode;
#endif
}

// Rounds to nearest even, flushes denormals, stops at no exception. Returns the mode before.
static inline FloatMode enter_kernel_mode(void) {
    FloatMode before = float_mode();
#if defined(__x86_64__)
    set_float_mode(0x1f80 | 0x8000 | 0x0040);       // exceptions masked, flush to zero, denormals are zeros
#elif defined(__aarch64__)
    set_float_mode(1 << 24);                        // FZ; of halves denormals stay, as with F16C
#endif
    return before;
}
