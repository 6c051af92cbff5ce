// One direction of a pair of processes in shared memory: a ring of bytes with one writer and one reader. Both sides keep
// only what they counted themselves; what the other one counted is checked before it is used.
#pragma once

#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { LINE_BYTES = 64, RING_BYTES = 1 << 20, RING_PIECE = 64 << 10 };

typedef struct {
    _Alignas(LINE_BYTES) uint64_t num_read;         // by the reader
    uint32_t writer_waits;                          // for room
    _Alignas(LINE_BYTES) uint64_t num_written;      // by the writer
    uint32_t reader_waits;                          // for bytes
    _Alignas(LINE_BYTES) unsigned char bytes[RING_BYTES];
} Ring;

#define LOAD(X) __atomic_load_n(&(X), __ATOMIC_ACQUIRE)
#define STORE(X, VALUE) __atomic_store_n(&(X), VALUE, __ATOMIC_RELEASE)
#define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)

// Wakes the other side if it has said that it waits; it looks again after having said so, so no wake-up is lost.
static void ring_bell(uint32_t *waits, int bell) {
    uint64_t one = 1;
    FENCE();
    if (__builtin_expect(LOAD(*waits), 0)) {
        STORE(*waits, 0);
        if (write(bell, &one, sizeof one) < 0) { /* full: it is awake */ }
    }
}

// Returns the bytes that can be read; -1 when the other side's count is impossible
static long ring_readable(const Ring *ring) {
    uint64_t used = LOAD(ring->num_written) - ring->num_read;
    return used > RING_BYTES ? -1 : (long)used;
}

static long ring_writable(const Ring *ring) {
    uint64_t used = ring->num_written - LOAD(ring->num_read);
    return used > RING_BYTES ? -1 : (long)(RING_BYTES - used);
}

static void ring_put(Ring *ring, uint64_t at, const void *from, long length) {
    long place = (long)(at % RING_BYTES), first = RING_BYTES - place < length ? RING_BYTES - place : length;
    memcpy(ring->bytes + place, from, (size_t)first);
    memcpy(ring->bytes, (const char *)from + first, (size_t)(length - first));
}

static void ring_get(const Ring *ring, uint64_t at, void *to, long length) {
    long place = (long)(at % RING_BYTES), first = RING_BYTES - place < length ? RING_BYTES - place : length;
    memcpy(to, ring->bytes + place, (size_t)first);
    memcpy((char *)to + first, ring->bytes, (size_t)(length - first));
}
