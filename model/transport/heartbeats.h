// Who answers: a thread asks each watched process every interval, and answers whoever asks this one. It never needs
// Python's lock, so only what stops the whole process silences it. See cluster/shard/heartbeats.py.
//
// Question and answer are signed with the key of the process that is asked. The answer repeats the time of the question,
// on the clock of who asked: one that is older than the last answer or than the limit, or comes again, says nothing.
//
// Silence is counted in time in which this thread has run: who was stopped itself, or starved, accuses nobody for it.
#pragma once

#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "siphash.h"

enum { BEAT_ID_BYTES = 16, BEAT_BATCH = 64, MAX_BATCHES = 16, HOST_BYTES = 64, QUESTION = 1, ANSWER };

typedef struct {
    unsigned char sender[BEAT_ID_BYTES], receiver[BEAT_ID_BYTES];
    uint64_t asked_ns, kind, signature;
} Beat;

// A process to be watched, as Python describes it
typedef struct {
    char host[HOST_BYTES];          // its IP address
    int32_t port;
    unsigned char id[BEAT_ID_BYTES], key[SIPHASH_KEY_BYTES];
} Watched;

typedef struct {
    Watched who;
    struct sockaddr_storage address;
    socklen_t address_bytes;        // 0: there is no such address
    uint64_t answered_ns;           // when the last question was asked that it has answered
    int64_t silent_ns;
} HeartbeatPeer;

typedef struct {
    pthread_mutex_t lock;
    pthread_t thread;
    int socket, end, news;          // end, news: eventfds; news is the caller's
    unsigned char id[BEAT_ID_BYTES], key[SIPHASH_KEY_BYTES];
    int64_t interval_ns, limit_ns, ran_ns;
    HeartbeatPeer *peers;
    int num_peers;
    Beat received[BEAT_BATCH], sent[BEAT_BATCH];
    struct sockaddr_storage senders[BEAT_BATCH];
    struct iovec received_parts[BEAT_BATCH], sent_parts[BEAT_BATCH];
    struct mmsghdr received_heads[BEAT_BATCH], sent_heads[BEAT_BATCH];
    unsigned num_sent;              // that wait to be sent together
} Heartbeats;

static int64_t beat_clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static uint64_t beat_signature(const unsigned char *key, const Beat *beat) {
    return siphash(key, (const unsigned char *)beat, offsetof(Beat, signature));
}

// What cannot be sent is not said: the other side's silence tells
static void send_beats(Heartbeats *h) {
    unsigned done = 0;
    while (done < h->num_sent) {
        int n = sendmmsg(h->socket, h->sent_heads + done, h->num_sent - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        done += n > 0 ? (unsigned)n : 1;        // past the one that failed
    }
    h->num_sent = 0;
}

static void put_beat(Heartbeats *h, const unsigned char *receiver, const unsigned char *key, uint64_t asked_ns, uint64_t kind,
                     struct sockaddr_storage *address, socklen_t address_bytes) {
    Beat *beat = &h->sent[h->num_sent];
    *beat = (Beat){.asked_ns = asked_ns, .kind = kind};
    memcpy(beat->sender, h->id, BEAT_ID_BYTES);
    memcpy(beat->receiver, receiver, BEAT_ID_BYTES);
    beat->signature = beat_signature(key, beat);
    h->sent_parts[h->num_sent] = (struct iovec){beat, sizeof *beat};
    h->sent_heads[h->num_sent] = (struct mmsghdr){.msg_hdr = {
        .msg_name = address, .msg_namelen = address_bytes, .msg_iov = &h->sent_parts[h->num_sent], .msg_iovlen = 1}};
    if (++h->num_sent == BEAT_BATCH) send_beats(h);
}

static HeartbeatPeer *find_peer(const Heartbeats *h, const unsigned char *id) {
    for (int i = 0; i < h->num_peers; i++) if (!memcmp(h->peers[i].who.id, id, BEAT_ID_BYTES)) return &h->peers[i];
    return NULL;
}

static void take_beat(Heartbeats *h, const Beat *beat, struct sockaddr_storage *sender, socklen_t sender_bytes) {
    if (memcmp(beat->receiver, h->id, BEAT_ID_BYTES)) return;
    if (beat->kind == QUESTION && beat->signature == beat_signature(h->key, beat))
        put_beat(h, beat->sender, h->key, beat->asked_ns, ANSWER, sender, sender_bytes);
    HeartbeatPeer *peer = beat->kind == ANSWER ? find_peer(h, beat->sender) : NULL;
    if (!peer || beat->asked_ns <= peer->answered_ns || (uint64_t)h->ran_ns - beat->asked_ns > (uint64_t)h->limit_ns
        || beat->signature != beat_signature(peer->who.key, beat)) return;
    peer->answered_ns = beat->asked_ns;
    peer->silent_ns = 0;
}

static void take_beats(Heartbeats *h) {
    for (int batch = 0, n = BEAT_BATCH; batch < MAX_BATCHES && n == BEAT_BATCH; batch++) {
        for (int i = 0; i < BEAT_BATCH; i++) {
            h->received_parts[i] = (struct iovec){&h->received[i], sizeof(Beat)};
            h->received_heads[i] = (struct mmsghdr){.msg_hdr = {
                .msg_name = &h->senders[i], .msg_namelen = sizeof h->senders[i], .msg_iov = &h->received_parts[i],
                .msg_iovlen = 1}};
        }
        n = recvmmsg(h->socket, h->received_heads, BEAT_BATCH, MSG_DONTWAIT, NULL);
        for (int i = 0; i < n; i++) {
            const struct msghdr *head = &h->received_heads[i].msg_hdr;
            if (h->received_heads[i].msg_len == sizeof(Beat) && !(head->msg_flags & MSG_TRUNC))
                take_beat(h, &h->received[i], &h->senders[i], head->msg_namelen);
        }
        send_beats(h);              // answers refer to the senders of this batch
    }
}

static void beat_once(Heartbeats *h) {
    int64_t now = beat_clock_ns(), ran_ns = now - h->ran_ns;
    int is_news = 0;
    h->ran_ns = now;
    if (ran_ns > 2 * h->interval_ns) ran_ns = 2 * h->interval_ns;
    for (int i = 0; i < h->num_peers; i++) h->peers[i].silent_ns += ran_ns;
    take_beats(h);
    for (int i = 0; i < h->num_peers; i++) {
        HeartbeatPeer *peer = &h->peers[i];
        is_news |= peer->silent_ns > h->limit_ns && peer->silent_ns - ran_ns <= h->limit_ns;
        if (peer->address_bytes)
            put_beat(h, peer->who.id, peer->who.key, (uint64_t)now, QUESTION, &peer->address, peer->address_bytes);
    }
    send_beats(h);
    uint64_t one = 1;
    if (is_news && write(h->news, &one, sizeof one) < 0) { /* full: it has news */ }
}

static void *run_heartbeats(void *given) {
    Heartbeats *h = given;
    struct pollfd end = {h->end, POLLIN, 0};
    int64_t next_ns = beat_clock_ns();
    for (;;) {
        pthread_mutex_lock(&h->lock);
        beat_once(h);
        pthread_mutex_unlock(&h->lock);
        int64_t now = beat_clock_ns();
        next_ns += h->interval_ns;
        if (next_ns < now) next_ns = now;       // it was stopped: what was missed is not made up for
        struct timespec left = {(next_ns - now) / 1000000000, (next_ns - now) % 1000000000};
        if (ppoll(&end, 1, &left, NULL) > 0) return NULL;
    }
}

// Begins on a bound UDP socket, which it takes over. `news` is written to when a process has been silent for the limit.
// -> null without memory, file descriptors or threads; then the socket stays the caller's
Heartbeats *heartbeats_new(int socket, int news, const unsigned char *id, const unsigned char *key, long interval_ns, long limit_ns) {
    Heartbeats *h = calloc(1, sizeof *h);
    if (!h) return NULL;
    pthread_mutex_init(&h->lock, NULL);
    h->socket = socket;
    h->news = news;
    h->interval_ns = interval_ns;
    h->limit_ns = limit_ns;
    h->ran_ns = beat_clock_ns();
    memcpy(h->id, id, BEAT_ID_BYTES);
    memcpy(h->key, key, SIPHASH_KEY_BYTES);
    h->end = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);        // signals are for Python's threads
    int failed = h->end < 0 || pthread_create(&h->thread, NULL, run_heartbeats, h);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed) {
        pthread_setname_np(h->thread, "heartbeats");
        return h;
    }
    if (h->end >= 0) close(h->end);
    free(h);
    return NULL;
}

static void find_address(HeartbeatPeer *peer) {
    char port[16];
    struct addrinfo *found = NULL, numeric = {.ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_DGRAM};
    snprintf(port, sizeof port, "%d", peer->who.port);
    if (getaddrinfo(peer->who.host, port, &numeric, &found)) return;
    memcpy(&peer->address, found->ai_addr, found->ai_addrlen);
    peer->address_bytes = found->ai_addrlen;
    freeaddrinfo(found);
}

// Watches these from now on, and nobody else: nobody is silent yet. -> 0, or -1 without memory
int heartbeats_watch(Heartbeats *h, int num_peers, const Watched *watched) {
    HeartbeatPeer *peers = calloc((size_t)num_peers + 1, sizeof *peers);
    if (!peers) return -1;
    for (int i = 0; i < num_peers; i++) {
        peers[i].who = watched[i];
        find_address(&peers[i]);
    }
    pthread_mutex_lock(&h->lock);
    for (int i = 0; i < num_peers; i++) {
        const HeartbeatPeer *known = find_peer(h, peers[i].who.id);
        if (known) peers[i].answered_ns = known->answered_ns;
    }
    HeartbeatPeer *before = h->peers;
    h->peers = peers;
    h->num_peers = num_peers;
    pthread_mutex_unlock(&h->lock);
    free(before);
    return 0;
}

// Returns the time since that process was last heard; that of one that is not watched is 0
int64_t heartbeats_silence_ns(Heartbeats *h, const unsigned char *id) {
    pthread_mutex_lock(&h->lock);
    const HeartbeatPeer *peer = find_peer(h, id);
    int64_t silent_ns = peer ? peer->silent_ns : 0;
    pthread_mutex_unlock(&h->lock);
    return silent_ns;
}

void heartbeats_close(Heartbeats *h) {
    uint64_t one = 1;
    if (write(h->end, &one, sizeof one) < 0) { /* full: it ends */ }
    pthread_join(h->thread, NULL);
    close(h->end);
    close(h->socket);
    pthread_mutex_destroy(&h->lock);
    free(h->peers);
    free(h);
}
