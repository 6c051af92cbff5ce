// Tasks 0..n-1 over the OpenMP pool that torch already runs, so that one pool serves both. Which thread takes which task
// never shows in a result.
#pragma once

typedef void (*GompParallel)(void (*body)(void *), void *context, unsigned num_threads, unsigned flags);
typedef void (*TaskFunction)(const void *context, long task);

static GompParallel gomp_parallel = 0;      // 0: no OpenMP runtime in this process, everything runs on the caller

typedef struct {
    TaskFunction function;
    const void *context;
    long num_tasks;
    long next;
} Job;

static void work_on(void *job_pointer) {
    Job *job = job_pointer;
    for (;;) {
        long task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (task >= job->num_tasks) return;
        job->function(job->context, task);
    }
}

static void parallel_for(long num_tasks, long num_threads, TaskFunction function, const void *context) {
    Job job = {function, context, num_tasks, 0};
    if (num_threads > num_tasks) num_threads = num_tasks;
    if (num_threads <= 1 || !gomp_parallel) work_on(&job);
    else gomp_parallel(work_on, &job, (unsigned)num_threads, 0);
}
