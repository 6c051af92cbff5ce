// What a process has of the transport: its connections, its groups, and how threads wait for both.
//
// One lock guards all. A thread that must wait does so in poll() for every exchange of the process, without the lock; a
// second one waits for it to come back. Whoever changes what there is to wait for wakes it by the bell.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include "frames.h"

struct Endpoint {
    pthread_mutex_t lock;
    pthread_cond_t changed;         // an exchange ended, or nobody polls any more
    int is_over;                    // closed, or this is the child of a fork
    int is_polling;
    int bell;
    long yield_ns;                  // so long a waiting thread yields before it blocks
    uint64_t fence;                 // groups up to this number that are not here are over
    Group *groups;
    Connection *connections;
    struct pollfd *polled;
    Connection **polled_connections;
    int max_polled;
};

static Group *find_group(const Endpoint *endpoint, uint64_t id) {
    Group *group = endpoint->groups;
    while (group && group->id != id) group = group->next;
    return group;
}

static uint64_t fence_of(const Endpoint *endpoint) { return endpoint->fence; }

// Returns whether another group waits for something on this connection
static int others_wait(const Endpoint *endpoint, const Connection *c, const Group *group) {
    for (Group *other = endpoint->groups; other; other = other->next) {
        if (other == group || !other->is_busy || other->failure) continue;
        int rank = rank_of(other, c);
        if (rank >= 0 && !other->incoming[rank].is_done) return 1;
    }
    return 0;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void wake(Endpoint *endpoint) {
    uint64_t one = 1;
    if (write(endpoint->bell, &one, sizeof one) < 0) { /* full: it is awake */ }
}

// Fails an exchange that waits for somebody who will not answer
static void look_for_lost(Group *group) {
    for (int rank = 0; rank < group->num_members && group->num_open; rank++) {
        Connection *c = group->connections[rank];
        if (!c) continue;
        int waits = !group->incoming[rank].is_done;
        if (group->has_left[rank] == BROKEN || (waits && group->has_left[rank])) fail(group, LEFT, rank);
        else if (c->is_closed && (waits || !group->outgoing[rank].is_done)) fail(group, CLOSED, rank);
    }
}

static int runs(const Group *group) { return group->is_busy && !group->failure && group->num_open; }

// Moves what can be moved of all exchanges, and hears from everybody, also from who has sent all, if it looks everywhere -> whether anything was
static int progress(Endpoint *endpoint, int looks_everywhere) {
    int moved = 0;
    for (Group *group = endpoint->groups; group; group = group->next) {
        if (!runs(group)) continue;
        for (int rank = 0; rank < group->num_members && !group->failure; rank++) {
            Connection *c = group->connections[rank];
            if (!c) continue;
            if (!c->writer) flush_pending(c);
            if (!group->outgoing[rank].is_done) moved |= send_some(group, rank);
            if (!group->incoming[rank].is_done || looks_everywhere) moved |= receive_some(endpoint, c);
            if (c->is_closed || group->has_left[rank]) look_for_lost(group);
        }
    }
    for (Group *group = endpoint->groups; group; group = group->next) {
        if (!group->is_busy || group->is_told || runs(group)) continue;
        group->is_told = moved = 1;                     // its thread may wait for another one, or poll
        pthread_cond_broadcast(&endpoint->changed);
        if (endpoint->is_polling) wake(endpoint);
    }
    return moved;
}

// Lists what ends a wait -> the number of entries. Sets the flags by which other processes know that they must wake us.
static int list_polled(Endpoint *endpoint) {
    int n = 0;
    endpoint->polled[n++] = (struct pollfd){endpoint->bell, POLLIN, 0};
    for (Connection *c = endpoint->connections; c; c = c->next) {
        int reads = 0, writes = c->pending_at < c->num_pending;
        for (Group *group = endpoint->groups; group; group = group->next) {
            int rank = runs(group) ? rank_of(group, c) : -1;
            if (rank < 0) continue;
            reads |= !group->incoming[rank].is_done || !c->is_blocked;
            writes |= !group->outgoing[rank].is_done;
        }
        if ((!reads && !writes) || c->is_closed || c->is_hung_up || n >= endpoint->max_polled) continue;
        short events = POLLIN | POLLRDHUP;
        if (is_shared(c)) {
            if (reads) STORE(c->in->reader_waits, 1);
            if (writes) STORE(c->out->writer_waits, 1);
        } else {
            events = (short)((reads && !c->is_blocked ? POLLIN : 0) | (writes ? POLLOUT : 0));
        }
        endpoint->polled_connections[n] = c;
        endpoint->polled[n++] = (struct pollfd){c->socket, events, 0};
    }
    FENCE();
    return n;
}

static int has_room_to_poll(Endpoint *endpoint) {
    int needed = 1;
    for (Connection *c = endpoint->connections; c; c = c->next) needed++;
    if (needed <= endpoint->max_polled) return 1;
    void *polled = realloc(endpoint->polled, (size_t)needed * 2 * sizeof *endpoint->polled);
    if (polled) endpoint->polled = polled;
    void *connections = realloc(endpoint->polled_connections, (size_t)needed * 2 * sizeof(Connection *));
    if (connections) endpoint->polled_connections = connections;
    if (!polled || !connections) return 0;
    endpoint->max_polled = needed * 2;
    return 1;
}

// Waits for news, with the lock given back meanwhile. Nobody else polls.
static void wait_for_news(Endpoint *endpoint, int64_t deadline_ns) {
    if (!has_room_to_poll(endpoint)) { sched_yield(); return; }
    int num_polled = list_polled(endpoint);
    if (!progress(endpoint, 1)) {
        int64_t left_ns = deadline_ns - now_ns();
        struct timespec left = {left_ns > 0 ? left_ns / 1000000000 : 0, left_ns > 0 ? left_ns % 1000000000 : 0};
        endpoint->is_polling = 1;
        pthread_mutex_unlock(&endpoint->lock);
        int num_ready = ppoll(endpoint->polled, (nfds_t)num_polled, &left, NULL);
        pthread_mutex_lock(&endpoint->lock);
        endpoint->is_polling = 0;
        uint64_t rung;
        if (num_ready > 0 && endpoint->polled[0].revents && read(endpoint->bell, &rung, sizeof rung) < 0) { /* by another */ }
        for (int i = 1; num_ready > 0 && i < num_polled; i++) {
            Connection *c = endpoint->polled_connections[i];
            if (is_shared(c)) c->is_closed |= endpoint->polled[i].revents != 0;
            else c->is_hung_up |= (endpoint->polled[i].revents & (POLLHUP | POLLERR | POLLNVAL)) != 0;
        }
    }
    for (int i = 1; i < num_polled; i++) {
        Connection *c = endpoint->polled_connections[i];
        if (!is_shared(c)) continue;
        STORE(c->in->reader_waits, 0);
        STORE(c->out->writer_waits, 0);
    }
    pthread_cond_broadcast(&endpoint->changed);
}

static void wait_for_other_thread(Endpoint *endpoint, int64_t deadline_ns) {
    struct timespec until = {deadline_ns / 1000000000, deadline_ns % 1000000000};
    pthread_cond_timedwait(&endpoint->changed, &endpoint->lock, &until);
}

static void drop_stashes(Endpoint *endpoint, Connection *c) {
    for (Stash **place = &c->stashes; *place;) {
        Stash *stash = *place;
        Group *group = find_group(endpoint, stash->group);
        if (group ? !group->failure : stash->group > endpoint->fence) { place = &stash->next; continue; }
        if (c->reader == &stash->incoming) c->reader = NULL;
        *place = stash->next;
        free(stash->incoming.bytes);
        free(stash);
    }
}

static void look_if_alive(Connection *c) {
    struct pollfd look = {c->socket, (short)(is_shared(c) ? POLLIN | POLLRDHUP : POLLRDHUP), 0};
    if (!c->is_closed && poll(&look, 1, 0) > 0 && look.revents) c->is_closed = 1;
}

// Drops what is of no use any more: messages of groups that are over, connections of processes that are gone
static void sweep(Endpoint *endpoint) {
    if (endpoint->is_polling) return;       // whoever polls looks at connections; there is another sweep
    for (Connection **place = &endpoint->connections; *place;) {
        Connection *c = *place;
        drop_stashes(endpoint, c);
        if (!c->num_groups) look_if_alive(c);
        if (c->num_groups || !c->is_closed) { place = &c->next; continue; }
        *place = c->next;
        free_connection(c);
    }
}
