// A connection of two processes as two streams of bytes that never block: rings in shared memory, or a TCP socket.
#pragma once

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "ring.h"

enum { PEER_ID_BYTES = 16, READ_AHEAD = 64 << 10, HEADER_BYTES = 40, MAX_LEFT = 8, CHUNK_BYTES = 1 << 20 };

// What stands before every piece of a message
typedef struct {
    uint64_t group;         // number of the epoch
    uint64_t total;         // bytes of the whole message
    uint64_t sequence;      // of the exchange within its group
    uint32_t length;        // bytes that follow
    uint32_t kind;
    uint64_t mark;
} FrameHeader;

_Static_assert(sizeof(FrameHeader) == HEADER_BYTES, "the frame header is written as it lies in memory");

typedef struct Outgoing {
    const unsigned char *bytes;
    uint64_t total, sent;   // whole frames only
    FrameHeader header;     // of the frame that is under way
    uint32_t in_frame;      // bytes of it, with its header, that are written
    int is_done;
} Outgoing;

typedef struct Incoming {
    unsigned char *bytes;
    uint64_t total, got;
    int is_done;
} Incoming;

// A message that arrived before anybody asked for it
typedef struct Stash {
    Incoming incoming;
    uint64_t group, sequence;
    struct Stash *next;
} Stash;

typedef struct Connection {
    unsigned char peer_id[PEER_ID_BYTES];
    struct Connection *next;
    int num_groups;                 // that use it
    int socket;                     // TCP; with shared memory the Unix socket, whose end of file tells of a death
    int is_closed;                  // nothing will come any more, and nothing can be written
    int is_hung_up;                 // TCP only: it will be closed once what came before is read
    Ring *out, *in;                 // null: TCP
    int bell;                       // wakes the other process
    // Written before anything else: the rest of a frame whose exchange has failed, and farewells
    unsigned char *pending;
    size_t num_pending, pending_at;
    Outgoing *writer;               // whose frame is under way
    // The frame that is read
    FrameHeader header;
    uint32_t num_header, num_left;  // bytes of the header that are here; of the frame that are not
    int is_body, is_blocked;        // blocked: on a message that nobody has asked for yet
    Incoming *reader;               // null: the frame is thrown away
    Stash *stashes;
    uint64_t left_groups[MAX_LEFT]; // that the other process left before this one was in them
    unsigned num_left_groups;
    unsigned char *ahead;           // TCP only: bytes that were read and not used
    uint32_t ahead_at, num_ahead;
    int more_follows;               // the last frame was a full one of a message that goes on: nothing is read ahead
} Connection;

static int is_shared(const Connection *c) { return c->out != NULL; }

// Writes what fits of two parts -> the number of bytes
static long stream_write(Connection *c, struct iovec parts[2]) {
    if (c->is_closed) return 0;
    if (is_shared(c)) {
        long room = ring_writable(c->out), done = 0;
        uint64_t at = c->out->num_written;
        if (room < 0) { c->is_closed = 1; return 0; }
        for (int i = 0; i < 2 && room > 0; i++) {
            long length = (long)parts[i].iov_len, n;
            for (long put = 0; put < length && room > 0; put += n, done += n, room -= n) {
                n = length - put < room ? length - put : room;
                if (n > RING_PIECE) n = RING_PIECE;         // so that the reader can begin
                ring_put(c->out, at + (uint64_t)done, (const char *)parts[i].iov_base + put, n);
                if (n < RING_PIECE) continue;
                STORE(c->out->num_written, at + (uint64_t)(done + n));
                ring_bell(&c->out->reader_waits, c->bell);
            }
        }
        if (done) {
            STORE(c->out->num_written, at + (uint64_t)done);
            ring_bell(&c->out->reader_waits, c->bell);
        }
        return done;
    }
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t done = sendmsg(c->socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (done >= 0) return done;
    if (errno != EAGAIN && errno != EINTR && errno != ENOBUFS) c->is_hung_up = 1;
    return 0;
}

static long socket_read(Connection *c, void *to, size_t length) {
    ssize_t n = recv(c->socket, to, length, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) c->is_closed = 1;
    return n < 0 ? 0 : n;
}

// Reads up to `length` bytes, to nowhere if `to` is null -> the number of bytes
static long stream_read(Connection *c, unsigned char *to, uint64_t length) {
    if (is_shared(c)) {
        long n = ring_readable(c->in);
        if (n < 0) { c->is_closed = 1; return 0; }
        if ((uint64_t)n > length) n = (long)length;
        if (n > RING_PIECE) n = RING_PIECE;
        if (n && to) ring_get(c->in, c->in->num_read, to, n);
        if (n) {
            STORE(c->in->num_read, c->in->num_read + (uint64_t)n);
            ring_bell(&c->in->writer_waits, c->bell);
        }
        return n;
    }
    if (!c->num_ahead) {
        if (c->is_closed) return 0;
        if (to && (length >= READ_AHEAD || c->more_follows)) return socket_read(c, to, length);
        c->ahead_at = 0;
        c->num_ahead = (uint32_t)socket_read(c, c->ahead, READ_AHEAD);
    }
    uint32_t n = c->num_ahead < length ? c->num_ahead : (uint32_t)length;
    if (to) memcpy(to, c->ahead + c->ahead_at, n);
    c->ahead_at += n;
    c->num_ahead -= n;
    return n;
}

static void free_connection(Connection *c) {
    while (c->stashes) {
        Stash *stash = c->stashes;
        c->stashes = stash->next;
        free(stash->incoming.bytes);
        free(stash);
    }
    if (is_shared(c)) {
        munmap(c->out < c->in ? c->out : c->in, 2 * sizeof(Ring));
        close(c->bell);
    }
    close(c->socket);
    free(c->pending);
    free(c->ahead);
    free(c);
}
