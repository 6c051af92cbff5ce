// Messages of groups on a connection: pieces with a header each. A message of a group that is over here is thrown away;
// one that nobody has asked for yet waits where it is, or beside if another group waits for what comes after it.
#pragma once

#include "stream.h"

#define FRAME_MARK 0x4d4f45534149431aull
enum { ROWS = 1, FAREWELL, BROKEN };        // the last two: it left the group, after an exchange of it had failed

enum Failure { NO_FAILURE, CLOSED, LEFT, DEADLINE, ABORTED, OUT_OF_STEP, NO_GROUP, ENDPOINT_OVER };

typedef struct Group {
    uint64_t id, sequence;          // sequence: of the exchange that runs or comes next
    int num_members, rank;
    int is_busy, is_told;           // an exchange runs; its end was made known to waiting threads
    int failure, failed_rank;
    int num_open;                   // messages of the exchange, in and out, that are not done
    int is_large;                   // some of them take longer than to wake up
    Connection **connections;       // by rank; null: this process
    unsigned char *has_left;        // by rank: 0, FAREWELL or BROKEN
    Incoming *incoming;
    Outgoing *outgoing;
    struct Group *next;
} Group;

typedef struct Endpoint Endpoint;
static Group *find_group(const Endpoint *endpoint, uint64_t id);
static uint64_t fence_of(const Endpoint *endpoint);
static int others_wait(const Endpoint *endpoint, const Connection *c, const Group *group);

static int rank_of(const Group *group, const Connection *c) {
    for (int rank = 0; rank < group->num_members; rank++) if (group->connections[rank] == c) return rank;
    return -1;
}

// Ends the group. What it was writing is completed later, from a copy; what it was reading is thrown away.
static void fail(Group *group, int failure, int rank) {
    if (group->failure) return;
    group->failure = failure;
    group->failed_rank = rank;
    for (int r = 0; r < group->num_members; r++) {
        Connection *c = group->connections[r];
        if (!c) continue;
        if (c->reader == &group->incoming[r]) c->reader = NULL;
        if (c->writer != &group->outgoing[r]) continue;
        Outgoing *out = c->writer;
        c->writer = NULL;
        uint32_t head = out->in_frame < HEADER_BYTES ? HEADER_BYTES - out->in_frame : 0;
        uint32_t in_body = out->in_frame > HEADER_BYTES ? out->in_frame - HEADER_BYTES : 0;
        size_t body = out->header.length - in_body;
        size_t later = c->num_pending - c->pending_at;
        unsigned char *rest = malloc(head + body + later);
        if (!rest) { c->is_closed = 1; shutdown(c->socket, SHUT_RDWR); continue; }
        memcpy(rest, (const char *)&out->header + HEADER_BYTES - head, head);
        if (body) memcpy(rest + head, out->bytes + out->sent + in_body, body);
        if (later) memcpy(rest + head + body, c->pending + c->pending_at, later);
        free(c->pending);
        c->pending = rest;
        c->num_pending = head + body + later;
        c->pending_at = 0;
    }
}

static int flush_pending(Connection *c) {
    while (c->pending_at < c->num_pending) {
        struct iovec parts[2] = {{c->pending + c->pending_at, c->num_pending - c->pending_at}, {NULL, 0}};
        long n = stream_write(c, parts);
        if (n <= 0) return 0;
        c->pending_at += (size_t)n;
    }
    return 1;
}

// Returns whether anything moved
static int send_some(Group *group, int rank) {
    Connection *c = group->connections[rank];
    Outgoing *out = &group->outgoing[rank];
    int moved = 0;
    while (!out->is_done && (!c->writer || c->writer == out)) {
        if (!c->writer) {
            if (!flush_pending(c)) break;
            uint64_t left = out->total - out->sent;
            out->header = (FrameHeader){group->id, out->total, group->sequence,
                                        (uint32_t)(left < CHUNK_BYTES ? left : CHUNK_BYTES), ROWS, FRAME_MARK};
            out->in_frame = 0;
            c->writer = out;
        }
        uint32_t head = out->in_frame < HEADER_BYTES ? HEADER_BYTES - out->in_frame : 0;
        uint32_t in_body = out->in_frame > HEADER_BYTES ? out->in_frame - HEADER_BYTES : 0;
        struct iovec parts[2] = {{(char *)&out->header + HEADER_BYTES - head, head},
                                 {(void *)(out->bytes + out->sent + in_body), out->header.length - in_body}};
        long n = stream_write(c, parts);
        if (n <= 0) break;
        moved = 1;
        out->in_frame += (uint32_t)n;
        if (out->in_frame < HEADER_BYTES + out->header.length) continue;
        out->sent += out->header.length;
        c->writer = NULL;
        if (out->sent == out->total) {
            out->is_done = 1;
            group->num_open--;
        }
    }
    return moved;
}

static void note_farewell(const Endpoint *endpoint, Connection *c) {
    Group *group = find_group(endpoint, c->header.group);
    int rank = group ? rank_of(group, c) : -1;
    if (rank >= 0) group->has_left[rank] = (unsigned char)c->header.kind;
    else if (c->header.group > fence_of(endpoint)) c->left_groups[c->num_left_groups++ % MAX_LEFT] = c->header.group;
}

static Incoming *stash_of(Connection *c) {
    Stash **place = &c->stashes;
    for (; *place; place = &(*place)->next)
        if ((*place)->group == c->header.group && (*place)->sequence == c->header.sequence) return &(*place)->incoming;
    Stash *stash = calloc(1, sizeof *stash);
    if (stash) stash->incoming.bytes = malloc(c->header.total ? c->header.total : 1);
    if (!stash || !stash->incoming.bytes) { free(stash); c->is_closed = 1; return NULL; }
    stash->group = c->header.group;
    stash->sequence = c->header.sequence;
    stash->incoming.total = c->header.total;
    return &(*place = stash)->incoming;
}

// Finds where the frame's bytes go -> 0 if it must wait where it is
static int choose_reader(const Endpoint *endpoint, Connection *c) {
    Group *group = find_group(endpoint, c->header.group);
    int rank = group ? rank_of(group, c) : -1;
    c->reader = NULL;
    if ((!group && c->header.group <= fence_of(endpoint)) || (group && (group->failure || rank < 0))) return 1;
    if (group && group->is_busy && c->header.sequence == group->sequence) {
        Incoming *in = &group->incoming[rank];
        if (!in->is_done && c->header.total == in->total) { c->reader = in; return 1; }
        fail(group, OUT_OF_STEP, rank);
        return 1;
    }
    if (group && c->header.sequence != group->sequence + (group->is_busy ? 1 : 0)) {
        fail(group, OUT_OF_STEP, rank);
        return 1;
    }
    if (!others_wait(endpoint, c, group)) return 0;
    c->reader = stash_of(c);
    return 1;
}

static void end_frame(const Endpoint *endpoint, Connection *c) {
    Group *group = find_group(endpoint, c->header.group);
    int rank = group ? rank_of(group, c) : -1;
    c->is_body = 0;
    c->num_header = 0;
    c->more_follows = c->header.length == CHUNK_BYTES;
    if (!c->reader) return;
    c->reader->is_done = c->reader->got == c->reader->total;
    if (rank >= 0 && c->reader == &group->incoming[rank]) group->num_open -= c->reader->is_done;
    c->reader = NULL;
}

static int is_sound(const FrameHeader *header) {
    return header->mark == FRAME_MARK && header->length <= CHUNK_BYTES && header->length <= header->total
           && header->total <= 1ull << 40 && (header->kind == ROWS || ((header->kind == FAREWELL || header->kind == BROKEN) && !header->length));
}

// Reads what has come -> whether anything moved
static int receive_some(const Endpoint *endpoint, Connection *c) {
    int moved = 0;
    for (;;) {
        if (c->num_header < HEADER_BYTES) {
            long n = stream_read(c, (unsigned char *)&c->header + c->num_header, HEADER_BYTES - c->num_header);
            if (n <= 0) return moved;
            moved = 1;
            c->num_header += (uint32_t)n;
            if (c->num_header < HEADER_BYTES) continue;
            if (!is_sound(&c->header)) {
                c->is_closed = 1;
                c->num_header = 0;
                shutdown(c->socket, SHUT_RDWR);
                return 1;
            }
        }
        if (c->header.kind != ROWS) {
            note_farewell(endpoint, c);
            c->num_header = 0;
            continue;
        }
        if (!c->is_body) {
            c->is_blocked = !choose_reader(endpoint, c);
            if (c->is_blocked) return moved;
            c->is_body = 1;
            c->num_left = c->header.length;
            if (c->reader && c->reader->total - c->reader->got < c->num_left) {     // more than was announced
                c->reader = NULL;
                c->is_closed = 1;
                shutdown(c->socket, SHUT_RDWR);
            }
        }
        while (c->num_left) {
            Incoming *in = c->reader;
            long n = stream_read(c, in ? in->bytes + in->got : NULL, c->num_left);
            if (n <= 0) return moved;
            moved = 1;
            c->num_left -= (uint32_t)n;
            if (in) in->got += (uint64_t)n;
        }
        moved = 1;
        end_frame(endpoint, c);
    }
}

// Gives an exchange what had come before it began
static void take_stashed(Group *group, int rank) {
    Connection *c = group->connections[rank];
    Incoming *in = &group->incoming[rank];
    for (Stash **place = &c->stashes; *place; place = &(*place)->next) {
        Stash *stash = *place;
        if (stash->group != group->id || stash->sequence != group->sequence) continue;
        if (stash->incoming.total == in->total) {
            memcpy(in->bytes, stash->incoming.bytes, stash->incoming.got);
            in->got = stash->incoming.got;
            if (c->reader == &stash->incoming) c->reader = in;
            else if ((in->is_done = stash->incoming.is_done)) group->num_open--;
        } else {
            if (c->reader == &stash->incoming) c->reader = NULL;
            fail(group, OUT_OF_STEP, rank);
        }
        *place = stash->next;
        free(stash->incoming.bytes);
        free(stash);
        return;
    }
}
