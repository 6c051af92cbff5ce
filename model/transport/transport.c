// The functions that Python calls: see model/transport/library.py. One endpoint a process. Those of heartbeats stand
// with them.
#define _GNU_SOURCE
#include "endpoint.h"
#include "heartbeats.h"

Endpoint *transport_new(long yield_ns) {
    Endpoint *endpoint = calloc(1, sizeof *endpoint);
    if (!endpoint) return NULL;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&endpoint->lock, NULL);
    pthread_cond_init(&endpoint->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    endpoint->yield_ns = yield_ns;
    endpoint->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (endpoint->bell >= 0) return endpoint;
    free(endpoint);
    return NULL;
}

// The file descriptor that other processes of this machine are to have
int transport_bell(const Endpoint *endpoint) { return endpoint->bell; }

long transport_segment_bytes(void) { return 2 * sizeof(Ring); }

static Connection *find_connection(const Endpoint *endpoint, const unsigned char *peer_id) {
    for (Connection *c = endpoint->connections; c; c = c->next)
        if (!c->is_closed && !memcmp(c->peer_id, peer_id, PEER_ID_BYTES)) return c;
    return NULL;
}

static int map_rings(Connection *c, int segment, int is_first) {
    Ring *rings = mmap(NULL, 2 * sizeof(Ring), PROT_READ | PROT_WRITE, MAP_SHARED, segment, 0);
    if (rings == MAP_FAILED) return 0;
    madvise(rings, 2 * sizeof(Ring), MADV_DONTFORK);
    c->out = &rings[!is_first];
    c->in = &rings[is_first];
    return 1;
}

// Takes over a connected socket and, if segment >= 0, the other side's bell; the segment is mapped and stays the caller's.
// is_first: of the two sides. An older connection with the same process is over. -> 0, or -1 if nothing was taken
int transport_add(Endpoint *endpoint, const unsigned char *peer_id, int socket, int segment, int bell, int is_first) {
    Connection *c = calloc(1, sizeof *c);
    if (!c) return -1;
    memcpy(c->peer_id, peer_id, PEER_ID_BYTES);
    c->socket = socket;
    c->bell = bell;
    if (segment >= 0 ? !map_rings(c, segment, is_first) : !(c->ahead = malloc(READ_AHEAD))) {
        free(c);
        return -1;
    }
    pthread_mutex_lock(&endpoint->lock);
    if (endpoint->is_over) {
        pthread_mutex_unlock(&endpoint->lock);
        if (c->out) munmap(is_first ? c->out : c->in, 2 * sizeof(Ring));
        free(c->ahead);
        free(c);
        return -1;
    }
    Connection *older = find_connection(endpoint, peer_id);
    if (older) {
        older->is_closed = 1;
        shutdown(older->socket, SHUT_RDWR);
    }
    c->next = endpoint->connections;
    endpoint->connections = c;
    sweep(endpoint);
    wake(endpoint);
    pthread_mutex_unlock(&endpoint->lock);
    return 0;
}

// Returns whether there is a connection with that process that has not ended
int transport_is_connected(Endpoint *endpoint, const unsigned char *peer_id) {
    pthread_mutex_lock(&endpoint->lock);
    Connection *c = endpoint->is_over ? NULL : find_connection(endpoint, peer_id);
    if (c) look_if_alive(c);
    int is_connected = c && !c->is_closed;
    pthread_mutex_unlock(&endpoint->lock);
    return is_connected;
}

static void free_group(Group *group) {
    free(group->connections);
    free(group->has_left);
    free(group->incoming);
    free(group->outgoing);
    free(group);
}

static void join_connections(Group *group) {
    for (int rank = 0; rank < group->num_members; rank++) {
        Connection *c = group->connections[rank];
        if (!c) continue;
        c->num_groups++;
        for (int i = 0; i < MAX_LEFT; i++) if (c->left_groups[i] == group->id) group->has_left[rank] = FAREWELL;
    }
}

// Opens a group over connections that are there; its number must be above all before it. Returns a Failure and its rank.
int transport_open(Endpoint *endpoint, uint64_t id, int num_members, int rank, const unsigned char *peer_ids, int *failed_rank) {
    int failure = NO_FAILURE;
    size_t n = (size_t)num_members;
    Group *group = calloc(1, sizeof *group);
    if (!group) return ENDPOINT_OVER;
    *group = (Group){.id = id, .num_members = num_members, .rank = rank, .connections = calloc(n, sizeof(Connection *)),
                     .has_left = calloc(n, 1), .incoming = calloc(n, sizeof(Incoming)),
                     .outgoing = calloc(n, sizeof(Outgoing))};
    *failed_rank = rank;
    pthread_mutex_lock(&endpoint->lock);
    if (endpoint->is_over || !group->connections || !group->has_left || !group->incoming || !group->outgoing) {
        failure = ENDPOINT_OVER;
    } else if (id <= endpoint->fence) {
        failure = OUT_OF_STEP;
    }
    for (int r = 0; r < num_members && !failure; r++) {
        if (r == rank) continue;
        group->connections[r] = find_connection(endpoint, peer_ids + r * PEER_ID_BYTES);
        if (group->connections[r]) continue;
        failure = CLOSED;
        *failed_rank = r;
    }
    if (!failure) {
        endpoint->fence = id;
        group->next = endpoint->groups;
        endpoint->groups = group;
        join_connections(group);
        sweep(endpoint);
    }
    pthread_mutex_unlock(&endpoint->lock);
    if (failure) free_group(group);
    return failure;
}

// Returns the rank of a member whose connection with this process has ended, -1 if there is none
int transport_lost(Endpoint *endpoint, uint64_t id) {
    int lost = -1;
    pthread_mutex_lock(&endpoint->lock);
    const Group *group = find_group(endpoint, id);
    for (int rank = 0; group && rank < group->num_members && lost < 0; rank++) {
        Connection *c = group->connections[rank];
        if (c) look_if_alive(c);
        if (c && c->is_closed) lost = rank;
    }
    pthread_mutex_unlock(&endpoint->lock);
    return lost;
}

enum { LARGE_BYTES = 256 << 10 };

static void begin_exchange(Group *group, const unsigned char *sent, const long *sent_rows, unsigned char *received,
                           const long *received_rows, long row_bytes, int same_to_all) {
    group->is_busy = 1;
    group->is_told = 0;
    group->num_open = 2 * (group->num_members - 1);
    group->is_large = 0;
    for (int rank = 0; rank < group->num_members; rank++) {
        uint64_t out_bytes = (uint64_t)(sent_rows[rank] * row_bytes);
        uint64_t in_bytes = (uint64_t)(received_rows[rank] * row_bytes);
        group->outgoing[rank] = (Outgoing){.bytes = sent, .total = out_bytes};
        group->incoming[rank] = (Incoming){.bytes = received, .total = in_bytes};
        if (rank != group->rank && (out_bytes > LARGE_BYTES || in_bytes > LARGE_BYTES)) group->is_large = 1;
        if (rank == group->rank && out_bytes) memmove(received, sent, out_bytes);
        if (!same_to_all) sent += out_bytes;
        received += in_bytes;
    }
    for (int rank = 0; rank < group->num_members; rank++)
        if (rank != group->rank && group->connections[rank]->stashes) take_stashed(group, rank);
}

static int first_awaited(const Group *group) {
    for (int rank = 0; rank < group->num_members; rank++)
        if (rank != group->rank && !group->incoming[rank].is_done) return rank;
    for (int rank = 0; rank < group->num_members; rank++)
        if (rank != group->rank && !group->outgoing[rank].is_done) return rank;
    return group->rank;
}

// A process that does not answer in time is met by a new connection, if ever: this one may lead nowhere
static void give_up(Group *group, int rank) {
    fail(group, DEADLINE, rank);
    if (rank == group->rank) return;
    group->connections[rank]->is_closed = 1;
    shutdown(group->connections[rank]->socket, SHUT_RDWR);
}

static void finish_exchange(Endpoint *endpoint, Group *group, int64_t deadline_ns) {
    int64_t yield_until_ns = 0;
    while (group->num_open && !group->failure) {
        if (progress(endpoint, 0)) { yield_until_ns = 0; continue; }
        if (!group->num_open || group->failure) break;
        int64_t now = now_ns();
        if (!yield_until_ns) yield_until_ns = now + (group->is_large ? 0 : endpoint->yield_ns);
        if (endpoint->is_over) fail(group, ENDPOINT_OVER, group->rank);
        else if (now >= deadline_ns) give_up(group, first_awaited(group));
        else if (now < yield_until_ns) {
            pthread_mutex_unlock(&endpoint->lock);
            sched_yield();
            pthread_mutex_lock(&endpoint->lock);
        }
        else if (endpoint->is_polling) {
            wake(endpoint);                     // there is more to wait for now
            wait_for_other_thread(endpoint, deadline_ns);
        }
        else wait_for_news(endpoint, deadline_ns);
    }
}

// One collective. sent: the rows for each member, in the order of ranks, or the same for all; received: likewise. Rows for
// this member itself are copied. Returns a Failure and its rank.
int transport_exchange(Endpoint *endpoint, uint64_t id, const void *sent, const long *sent_rows, void *received,
                       const long *received_rows, long row_bytes, int same_to_all, long timeout_ns, int *failed_rank) {
    int64_t deadline_ns = now_ns() + timeout_ns;
    pthread_mutex_lock(&endpoint->lock);
    Group *group = find_group(endpoint, id);
    if (!group || group->is_busy) {
        pthread_mutex_unlock(&endpoint->lock);
        *failed_rank = -1;
        return NO_GROUP;
    }
    if (!group->failure) {
        begin_exchange(group, sent, sent_rows, received, received_rows, row_bytes, same_to_all);
        finish_exchange(endpoint, group, deadline_ns);
        group->is_busy = 0;
        group->sequence++;
        pthread_cond_broadcast(&endpoint->changed);
    }
    int failure = group->failure;
    *failed_rank = group->failed_rank;
    pthread_mutex_unlock(&endpoint->lock);
    return failure;
}

static void end_group(Endpoint *endpoint, Group *group) {
    fail(group, ABORTED, group->rank);
    wake(endpoint);
    pthread_cond_broadcast(&endpoint->changed);
}

// Ends an exchange that runs, from any thread, and every later one of the group
void transport_abort(Endpoint *endpoint, uint64_t id) {
    pthread_mutex_lock(&endpoint->lock);
    Group *group = find_group(endpoint, id);
    if (group && !endpoint->is_over) end_group(endpoint, group);
    pthread_mutex_unlock(&endpoint->lock);
}

static void bid_farewell(Connection *c, uint64_t id, uint32_t kind) {
    FrameHeader farewell = {.group = id, .kind = kind, .mark = FRAME_MARK};
    if (!c->writer && flush_pending(c)) c->num_pending = c->pending_at = 0;
    unsigned char *pending = realloc(c->pending, c->num_pending + sizeof farewell);
    if (!pending) return;           // the others wait for their deadline
    memcpy(pending + c->num_pending, &farewell, sizeof farewell);
    c->pending = pending;
    c->num_pending += sizeof farewell;
    if (!c->writer) flush_pending(c);
}

// Leaves a group and tells the others. Returns whether everything could be written; if not, call transport_flush.
int transport_leave(Endpoint *endpoint, uint64_t id) {
    int is_flushed = 1;
    pthread_mutex_lock(&endpoint->lock);
    Group **place = &endpoint->groups, *group = find_group(endpoint, id);
    uint32_t kind = group && (group->failure || group->is_busy) ? BROKEN : FAREWELL;
    if (group && !endpoint->is_over) end_group(endpoint, group);
    while ((group = find_group(endpoint, id)) && group->is_busy) pthread_cond_wait(&endpoint->changed, &endpoint->lock);
    while (*place && *place != group) place = &(*place)->next;
    if (group) {
        *place = group->next;
        for (int rank = 0; rank < group->num_members; rank++) {
            Connection *c = group->connections[rank];
            if (!c) continue;
            c->num_groups--;
            if (c->is_closed || endpoint->is_over) continue;
            bid_farewell(c, id, kind);
            is_flushed &= c->pending_at == c->num_pending || c->is_closed;
        }
        free_group(group);
        sweep(endpoint);
    }
    pthread_mutex_unlock(&endpoint->lock);
    return is_flushed;
}

// Writes what was left over, for at most `timeout_ms` -> whether nothing is left
int transport_flush(Endpoint *endpoint, int timeout_ms) {
    int64_t deadline_ns = now_ns() + timeout_ms * 1000000ll;
    for (;;) {
        int is_flushed = 1;
        pthread_mutex_lock(&endpoint->lock);
        for (Connection *c = endpoint->connections; c; c = c->next)
            is_flushed &= c->is_closed || c->writer || flush_pending(c);
        is_flushed |= endpoint->is_over;
        pthread_mutex_unlock(&endpoint->lock);
        if (is_flushed || now_ns() >= deadline_ns) return is_flushed;
        poll(NULL, 0, 1);
    }
}

// Ends everything: exchanges that run fail, other processes read the end of file. The memory of the endpoint stays.
void transport_close(Endpoint *endpoint) {
    pthread_mutex_lock(&endpoint->lock);
    endpoint->is_over = 1;
    for (Group *group = endpoint->groups; group; group = group->next) fail(group, ENDPOINT_OVER, group->rank);
    wake(endpoint);
    pthread_cond_broadcast(&endpoint->changed);
    for (Group *group = endpoint->groups; group;) {
        if (group->is_busy || endpoint->is_polling) {
            pthread_cond_wait(&endpoint->changed, &endpoint->lock);
            group = endpoint->groups;
            continue;
        }
        group = group->next;
    }
    while (endpoint->groups) {
        Group *group = endpoint->groups;
        endpoint->groups = group->next;
        free_group(group);
    }
    while (endpoint->connections) {
        Connection *c = endpoint->connections;
        endpoint->connections = c->next;
        free_connection(c);
    }
    close(endpoint->bell);
    endpoint->bell = -1;
    free(endpoint->polled);
    free(endpoint->polled_connections);
    endpoint->polled = NULL;
    endpoint->polled_connections = NULL;
    endpoint->max_polled = 0;
    pthread_mutex_unlock(&endpoint->lock);
}

// In the child of a fork: lets go of everything without a word to other processes, whose connections are the parent's
void transport_forget(Endpoint *endpoint) {
    pthread_mutex_init(&endpoint->lock, NULL);      // a thread that is not here may have held it
    if (endpoint->is_over) return;
    endpoint->is_over = 1;
    for (Connection *c = endpoint->connections; c; c = c->next) {
        close(c->socket);
        if (is_shared(c)) close(c->bell);
    }
    close(endpoint->bell);
    endpoint->connections = NULL;
    endpoint->groups = NULL;
    endpoint->bell = -1;
}
