// The end of a split of rows over copies: the slowest member is relieved as long as that works. See row_split.h.
#pragma once

#include "row_split.h"

typedef struct { long expert, giver; } Handover;

static void hand_over(Balance *p, const Handover *handover, long rank, long first) {
    long M = p->copies->num_members;
    while (rank != first) {
        long c = handover[rank].expert, giver = handover[rank].giver;
        p->finish[giver] -= p->whole[c * M + giver];
        p->finish[rank] += p->whole[c * M + rank];
        keep(p, c, &(Part){rank, p->num_rows[c], p->whole[c * M + rank]}, 1);
        rank = giver;
    }
}

// The slowest gives a whole expert to another holder, which may pass on one of its own to have time for it, and so on
static int find_handover(Balance *p, long slowest) {
    const Copies *w = p->copies;
    long M = w->num_members, waiting[M], num_waiting = 1, nobody_has_time = 1;
    double busy[M], last = p->finish[slowest];
    char is_busy[M];
    Handover handover[M];
    for (long m = 0; m < M; m++) {
        is_busy[m] = m == slowest;
        nobody_has_time = nobody_has_time && p->finish[m] + w->read[m] >= last;
    }
    if (nobody_has_time) return 0;
    waiting[0] = slowest;
    busy[slowest] = last;
    for (long next = 0; next < num_waiting; next++)
        for (long i = p->num_ordered - 1; i >= 0; i--) {
            long c = p->order[i], giver = waiting[next];
            const Part *part = p->parts + c * M;
            if (p->num_parts[c] != 1 || part->rank != giver || !(busy[giver] - part->seconds < last)) continue;
            for (long h = w->first_holder[c]; h < w->first_holder[c + 1]; h++) {
                long rank = w->holders[h];
                if (is_busy[rank]) continue;
                is_busy[rank] = 1;
                busy[rank] = p->finish[rank] + p->whole[c * M + rank];
                handover[rank] = (Handover){c, giver};
                waiting[num_waiting++] = rank;
                if (busy[rank] < last) {
                    hand_over(p, handover, rank, slowest);
                    return 1;
                }
            }
        }
    return 0;
}

// Split an expert of the slowest member, also over holders that then read more than they compute
static int relieve(Balance *p, long slowest, long c) {
    long M = p->copies->num_members, num_before = p->num_parts[c], computes = 0;
    Part before[M], after[M];
    double limit = p->finish[slowest] * (1.0 - CLOSE), spent;
    memcpy(before, p->parts + c * M, num_before * sizeof(Part));
    for (long i = 0; i < num_before; i++)
        computes = computes || (before[i].rank == slowest && before[i].seconds > p->copies->read[slowest]);
    if (!computes || earliest_holder(p, c) >= limit) return 0;
    remove_work(p, before, num_before);
    long num_after = split_expert(p, c, limit, 1, after);
    int better = num_after > 0 && outcome(p, after, num_after, before, num_before, &spent) < limit;
    if (better) keep(p, c, after, num_after);
    add_work(p, p->parts + c * M, p->num_parts[c]);
    return better;
}

static void relieve_slowest(Balance *p) {
    for (long i = 0; i < MAX_PASSES * p->copies->num_members; i++) {
        long slowest = 0, done = 0;
        for (long m = 1; m < p->copies->num_members; m++)
            if (p->finish[m] > p->finish[slowest]) slowest = m;
        done = find_handover(p, slowest);
        for (long k = 0; !done && k < p->num_long; k++) done = relieve(p, slowest, p->long_ones[k]);
        if (!done) break;
    }
}

static void balance(Balance *p) {
    long M = p->copies->num_members;
    for (long i = 0; i < p->num_ordered; i++) {
        long c = p->order[i];
        p->num_parts[c] = place_expert(p, c, p->parts + c * M);
        add_work(p, p->parts + c * M, p->num_parts[c]);
    }
    for (long pass = 1; p->num_long && pass < MAX_PASSES; pass++) {
        double before = latest(p);
        if (is_balanced(p) || !place_again(p) || latest(p) > (1.0 - CLOSE) * before) break;
    }
    if (!is_balanced(p)) relieve_slowest(p);
}
