// Memory for what a call makes on its way, kept for the thread's next calls: fresh pages cost more than the work on them.
// It grows to what the largest step needs, and is freed when the thread ends.
#pragma once

#include <pthread.h>
#include <stdlib.h>

typedef enum {
    GATE_LOGITS, EXPERT_PLACES, EXPERT_ROWS, EXPERT_MIDDLES, EXPERT_OUTPUTS, QKV_ROWS, CONV_ROWS, ATTENTION_ROWS,
    ROW_PLAN, WIRE_SENT, WIRE_RECEIVED,
    NUM_PURPOSES
} Purpose;

typedef struct { char *memory[NUM_PURPOSES]; long size[NUM_PURPOSES]; } KeptScratch;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_scratch(void *kept) {
    for (int i = 0; i < NUM_PURPOSES; i++) free(((KeptScratch *)kept)->memory[i]);
    free(kept);
}

static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

// At least so many bytes, aligned to 64, until the thread's next call for the same purpose; 0 when there is no memory
static char *scratch(Purpose purpose, long bytes) {
    pthread_once(&scratch_once, make_scratch_key);
    KeptScratch *kept = pthread_getspecific(scratch_key);
    if (!kept) {
        kept = calloc(1, sizeof *kept);
        if (!kept || pthread_setspecific(scratch_key, kept)) { free(kept); return 0; }
    }
    if (kept->size[purpose] < bytes || !kept->memory[purpose]) {
        free(kept->memory[purpose]);
        kept->size[purpose] = (bytes + 64) & ~63L;
        kept->memory[purpose] = aligned_alloc(64, (size_t)kept->size[purpose]);
        if (!kept->memory[purpose]) kept->size[purpose] = 0;
    }
    return kept->memory[purpose];
}
