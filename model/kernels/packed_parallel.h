// Tasks 0..n-1 over a small pool of our own. The caller works too and waits only for tasks that a helper has begun: a
// helper that the system does not run costs nothing. (On torch's OpenMP pool every call waits for every thread; on a
// busy machine that took milliseconds.) Which thread takes which task never shows in a result.
#pragma once

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "packed_float_mode.h"

// A thread that waits yields for so long and then sleeps. Measured with 1, 2 and 3 processes of two threads on two cores:
// 50 to 500 us make no difference where cores are short, for a yield gives them away; below 100 us helpers fall asleep
// between the kernels of a step, and each waking takes 20.
enum { MAX_HELPERS = 255, YIELD_NS = 100000, STACK_BYTES = 2 << 20 };

typedef void (*TaskFunction)(const void *context, long task);

// One job at a time. Who lowers `num_left` by one owns a task, and the job stays as it is until all owners are done.
static struct {
    pthread_mutex_t one_caller;
    uint32_t num_helpers;               // threads that exist
    uint32_t num_helpers_wanted, num_sleeping;
    uint32_t job;                       // counts jobs; sleepers wait for it to change
    TaskFunction function;
    const void *context;
    uint32_t num_tasks, num_left, num_done;
    uint32_t caller_sleeps;             // until num_done is num_tasks
} pool = {.one_caller = PTHREAD_MUTEX_INITIALIZER};

#define LOAD(X) __atomic_load_n(&(X), __ATOMIC_SEQ_CST)
#define STORE(X, VALUE) __atomic_store_n(&(X), VALUE, __ATOMIC_SEQ_CST)

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

// Takes and runs tasks of the current job until none is left
static int work_on_job(void) {
    int worked = 0;
    uint32_t left = LOAD(pool.num_left);
    while (left > 0) {
        if (!__atomic_compare_exchange_n(&pool.num_left, &left, left - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        uint32_t num_tasks = pool.num_tasks;            // once all are done, the next job's may be there
        pool.function(pool.context, num_tasks - left);
        int is_last = __atomic_add_fetch(&pool.num_done, 1, __ATOMIC_SEQ_CST) == num_tasks;
        if (is_last && LOAD(pool.caller_sleeps)) syscall(SYS_futex, &pool.num_done, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
        worked = 1;
        left = LOAD(pool.num_left);
    }
    return worked;
}

static void *help(void *index_pointer) {
    uint32_t index = (uint32_t)(uintptr_t)index_pointer;
    int64_t idle_since_ns = now_ns();
    enter_kernel_mode();
    for (;;) {
        uint32_t job = LOAD(pool.job);
        if (index < LOAD(pool.num_helpers_wanted) && work_on_job()) idle_since_ns = now_ns();
        for (int i = 0; i < 64 && LOAD(pool.job) == job; i++) relax();
        if (LOAD(pool.job) != job) continue;
        sched_yield();                                  // whoever shares this core, perhaps the caller, goes first
        if (now_ns() - idle_since_ns < YIELD_NS) continue;
        __atomic_fetch_add(&pool.num_sleeping, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &pool.job, FUTEX_WAIT_PRIVATE, job, 0, 0, 0);       // returns at once if job has changed
        __atomic_fetch_sub(&pool.num_sleeping, 1, __ATOMIC_SEQ_CST);
        idle_since_ns = now_ns();
    }
    return 0;
}

static void forget_helpers(void) {      // in the child of a fork there are none
    pool.num_helpers = pool.num_sleeping = pool.num_left = 0;
    pthread_mutex_init(&pool.one_caller, 0);
}

static void start_helpers(uint32_t wanted) {
    static int at_fork_is_set = 0;
    sigset_t all, before;
    pthread_attr_t attributes;
    if (!at_fork_is_set) at_fork_is_set = !pthread_atfork(0, 0, forget_helpers);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);        // signals belong to Python's threads
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.num_helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, help, (void *)(uintptr_t)pool.num_helpers)) break;     // fewer will do
        pool.num_helpers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

static void run_alone(long num_tasks, TaskFunction function, const void *context) {
    for (long task = 0; task < num_tasks; task++) function(context, task);
}

// Returns when the last task is done. A helper can be put off in the middle of one for as long as the system likes
static void wait_for_helpers(uint32_t num_tasks) {
    for (int i = 0; i < 64; i++) {
        if (LOAD(pool.num_done) == num_tasks) return;
        relax();
    }
    int64_t since_ns = now_ns();
    while (LOAD(pool.num_done) != num_tasks && now_ns() - since_ns < YIELD_NS) sched_yield();
    STORE(pool.caller_sleeps, 1);
    for (uint32_t done; (done = LOAD(pool.num_done)) != num_tasks;) {
        syscall(SYS_futex, &pool.num_done, FUTEX_WAIT_PRIVATE, done, 0, 0, 0);     // returns at once if it has changed
    }
    STORE(pool.caller_sleeps, 0);
}

static void run_job(long num_tasks, long num_threads, TaskFunction function, const void *context) {
    long helpers = (num_threads < num_tasks ? num_threads : num_tasks) - 1;
    if (helpers > MAX_HELPERS) helpers = MAX_HELPERS;
    if (helpers <= 0 || num_tasks > INT_MAX || pthread_mutex_trylock(&pool.one_caller)) {
        run_alone(num_tasks, function, context);
        return;
    }
    if (pool.num_helpers < helpers) start_helpers((uint32_t)helpers);
    pool.function = function;
    pool.context = context;
    pool.num_tasks = (uint32_t)num_tasks;
    pool.num_done = 0;
    STORE(pool.num_helpers_wanted, (uint32_t)helpers);
    STORE(pool.num_left, (uint32_t)num_tasks);
    __atomic_fetch_add(&pool.job, 1, __ATOMIC_SEQ_CST);
    if (LOAD(pool.num_sleeping)) syscall(SYS_futex, &pool.job, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
    work_on_job();
    wait_for_helpers((uint32_t)num_tasks);
    pthread_mutex_unlock(&pool.one_caller);
}

static void parallel_for(long num_tasks, long num_threads, TaskFunction function, const void *context) {
    FloatMode before = enter_kernel_mode();
    run_job(num_tasks, num_threads, function, context);
    set_float_mode(before);
}
