// How the rows of an expert are shared out over its copies. The reference, with the reasons for every step, is
// model/dispatch/row_split.py: the same IEEE operations in the same order, so that a member that runs this and one
// that runs that agree on every row.
// E experts of the layer, M members, F experts with one holder, C experts with several
#pragma once

#include <math.h>

#include "packed_simd.h"
#include "shared_structs.h"

enum { MAX_PASSES = 8 };
#define CLOSE 2e-3

// `LayerCopies` of model/dispatch/row_split.py
#define COPIES_FIELDS(FIELD) \
    FIELD(const int64_t *, fixed) FIELD(const int64_t *, holder)            /* [F] expert, its holder */ \
    FIELD(const double *, read_F) FIELD(const double *, row_F) FIELD(const double *, start_F) \
    FIELD(const int64_t *, copied) FIELD(const int64_t *, first_holder)     /* [C] expert; [C + 1] its holders' begin */ \
    FIELD(const int64_t *, holders)                                         /* ascending within an expert */ \
    FIELD(const double *, short_up_to) FIELD(const double *, splits_from)   /* [C] */ \
    FIELD(const double *, read) FIELD(const double *, row) FIELD(const double *, start)         /* [M] */ \
    FIELD(long, num_members) FIELD(long, num_experts) FIELD(long, num_fixed) FIELD(long, num_copied)
DEFINE_STRUCT(Copies, COPIES_FIELDS);

typedef struct { long rank, num_rows; double seconds; } Part;

typedef struct {
    const Copies *copies;
    long *num_rows;             // [C]
    double *finish, *speed;     // [M] what each has to do so far; rows a second
    double *whole;              // [C, M] seconds of an expert if the member computes all its rows
    long *order, *long_ones, num_ordered, num_long;     // experts with rows, most first; those worth splitting
    Part *parts;                // [C, M]
    long *num_parts;            // [C]
} Balance;

INLINE double max_double(double a, double b) { return a >= b ? a : b; }
INLINE double min_double(double a, double b) { return a <= b ? a : b; }

static double latest(const Balance *p) {
    double most = p->finish[0];
    for (long m = 1; m < p->copies->num_members; m++) most = max_double(most, p->finish[m]);
    return most;
}

static int is_balanced(const Balance *p) {
    double most = latest(p), least = p->finish[0];
    for (long m = 1; m < p->copies->num_members; m++) least = min_double(least, p->finish[m]);
    return most - least <= CLOSE * most;
}

static double earliest_holder(const Balance *p, long c) {
    const Copies *w = p->copies;
    double least = p->finish[w->holders[w->first_holder[c]]];
    for (long i = w->first_holder[c] + 1; i < w->first_holder[c + 1]; i++) least = min_double(least, p->finish[w->holders[i]]);
    return least;
}

static void add_work(Balance *p, const Part *parts, long count) {
    for (long i = 0; i < count; i++) p->finish[parts[i].rank] += parts[i].seconds;
}

static void remove_work(Balance *p, const Part *parts, long count) {
    for (long i = 0; i < count; i++) p->finish[parts[i].rank] -= parts[i].seconds;
}

static void keep(Balance *p, long c, const Part *parts, long count) {
    memcpy(p->parts + c * p->copies->num_members, parts, count * sizeof(Part));
    p->num_parts[c] = count;
}

// Whole rows for each of the ranks, so that all are done at about `level`; the last may have less to do
static long share_out(const Balance *p, const long *ranks, long count, long num_rows, double level, Part *parts) {
    const Copies *w = p->copies;
    long shares[count], left = num_rows, used = 0;
    for (long i = 0; i < count; i++) {
        double rows = (level - (p->finish[ranks[i]] + w->start[ranks[i]])) * p->speed[ranks[i]];
        shares[i] = rows >= (double)left ? left : rows > 0 ? (long)rows : 0;
        left -= shares[i];
    }
    for (; left > 0; left--) {
        long best = 0;
        double best_done = INFINITY;
        for (long i = 0; i < count; i++) {
            double done = (p->finish[ranks[i]] + w->start[ranks[i]]) + w->row[ranks[i]] * (double)(shares[i] + 1);
            if (done < best_done) { best = i; best_done = done; }
        }
        shares[best]++;
    }
    for (long i = 0; i < count; i++)
        if (shares[i]) {
            double busy = w->start[ranks[i]] + w->row[ranks[i]] * (double)shares[i];
            parts[used++] = (Part){ranks[i], shares[i], max_double(w->read[ranks[i]], busy)};
        }
    return used;
}

// Parts for holders that are all done at once and before `limit`; 0 where that is not possible
static long split_expert(const Balance *p, long c, double limit, int may_read_more, Part *parts) {
    const Copies *w = p->copies;
    long count = w->first_holder[c + 1] - w->first_holder[c], ranks[count], chosen[count], num_chosen = 0;
    double opens[count], speed = 0.0, behind = (double)p->num_rows[c], level = INFINITY;
    for (long i = 0; i < count; i++) {              // sorted by when they could begin to compute, then rank
        long rank = w->holders[w->first_holder[c] + i], place = i;
        double open = p->finish[rank] + w->read[rank];
        for (; place > 0 && opens[place - 1] > open; place--) {
            opens[place] = opens[place - 1];
            ranks[place] = ranks[place - 1];
        }
        opens[place] = open;
        ranks[place] = rank;
    }
    for (long i = 0; i < count; i++) {
        long rank = ranks[i];
        double new_speed = speed + p->speed[rank];
        double new_behind = behind + (p->finish[rank] + w->start[rank]) * p->speed[rank];
        double new_level = new_behind / new_speed;
        if (may_read_more && new_level < opens[i]) new_level = opens[i];
        if (opens[i] <= new_level && new_level < level) {
            speed = new_speed;
            behind = new_behind;
            level = new_level;
            chosen[num_chosen++] = rank;
        }
    }
    if (num_chosen < 2 || level >= limit) return 0;
    return share_out(p, chosen, num_chosen, p->num_rows[c], level, parts);
}

// The best parts for an expert that nobody has yet
static long place_expert(const Balance *p, long c, Part *parts) {
    const Copies *w = p->copies;
    const double *whole = p->whole + c * w->num_members;
    long best = w->holders[w->first_holder[c]], count = 0;
    double best_done = p->finish[best] + whole[best];
    for (long i = w->first_holder[c] + 1; i < w->first_holder[c + 1]; i++) {
        double done = p->finish[w->holders[i]] + whole[w->holders[i]];
        if (done < best_done) { best = w->holders[i]; best_done = done; }
    }
    if ((double)p->num_rows[c] >= w->splits_from[c]) count = split_expert(p, c, best_done, 0, parts);
    if (count == 0) parts[count++] = (Part){best, p->num_rows[c], whole[best]};
    return count;
}

static double outcome(const Balance *p, const Part *parts, long count, const Part *others, long num_others, double *spent) {
    double most = p->finish[parts[0].rank] + parts[0].seconds;
    *spent = 0.0;
    for (long i = 0; i < count; i++) {
        most = max_double(most, p->finish[parts[i].rank] + parts[i].seconds);
        *spent += parts[i].seconds;
    }
    for (long i = 0; i < num_others; i++) most = max_double(most, p->finish[others[i].rank]);
    return most;
}

static int same_parts(const Part *a, long num_a, const Part *b, long num_b) {
    if (num_a != num_b) return 0;
    for (long i = 0; i < num_a; i++)
        if (a[i].rank != b[i].rank || a[i].num_rows != b[i].num_rows || a[i].seconds != b[i].seconds) return 0;
    return 1;
}

// Take every expert out and place it anew, where that is better. Returns whether any was.
static int place_again(Balance *p) {
    const Copies *w = p->copies;
    int changed = 0;
    for (long i = 0; i < p->num_ordered; i++) {
        long c = p->order[i], num_before = p->num_parts[c];
        Part before[w->num_members], after[w->num_members];
        memcpy(before, p->parts + c * w->num_members, num_before * sizeof(Part));
        double last = p->finish[before[0].rank];
        for (long k = 1; k < num_before; k++) last = max_double(last, p->finish[before[k].rank]);
        if (last - earliest_holder(p, c) <= CLOSE * last) continue;
        remove_work(p, before, num_before);
        long num_after = place_expert(p, c, after);
        if (!same_parts(after, num_after, before, num_before)) {
            double spent_after, spent_before;
            double done_after = outcome(p, after, num_after, before, num_before, &spent_after);
            double done_before = outcome(p, before, num_before, after, num_after, &spent_before);
            if (done_after < done_before || (done_after == done_before && spent_after < spent_before)) {
                keep(p, c, after, num_after);
                changed = 1;
            }
        }
        add_work(p, p->parts + c * w->num_members, p->num_parts[c]);
    }
    return changed;
}
