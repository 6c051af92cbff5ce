// Which rows go to which member in one layer, and in what order outputs come back. The reference is
// model/dispatch/row_plan.py: every number here is its.
// S rows of all members, sorted by owner; K experts per row; E experts, M members, R (row, expert) pairs computed here
#pragma once

#include <stdlib.h>

#include "row_relief.h"

// `LayerRouting` of model/dispatch/row_plan.py
#define ROUTING_FIELDS(FIELD) \
    FIELD(const Copies *, copies)           /* 0: every expert has one holder */ \
    FIELD(const int16_t *, holder_of) FIELD(const int16_t *, slot_of)       /* [E + 1], the last for padding */ \
    FIELD(long, rank) FIELD(long, num_members) FIELD(long, num_experts) FIELD(long, num_slots)
DEFINE_STRUCT(Routing, ROUTING_FIELDS);

typedef struct {
    const int16_t *ids;                     // [S, K], ids_step from row to row
    const int64_t *owner;                   // [S]
    long ids_step, num_rows, num_per_row, own_first, own_count;
} StepRows;

// `RowPlan` of model/dispatch/row_plan.py is written into one array of int64: where each part of it begins
#define ROW_PLAN_FIELDS(FIELD) \
    FIELD(long, num_slot_rows)              /* [slots] */ \
    FIELD(long, num_departures) FIELD(long, num_returns) FIELD(long, num_sent) FIELD(long, num_received)    /* [M] */ \
    FIELD(long, end_of_counts)              /* all that is above */ \
    FIELD(long, source_row) FIELD(long, place) FIELD(long, departure)       /* room for S * K, R are filled */ \
    FIELD(long, row_of)                     /* [own rows, K] */ \
    FIELD(long, sent_row)                   /* room for own rows * M */ \
    FIELD(long, end)
DEFINE_STRUCT(RowPlanOffsets, ROW_PLAN_FIELDS);

typedef struct {
    int64_t *num_slot_rows, *num_departures, *num_returns, *num_sent, *num_received;
    int64_t *source_row, *place, *departure, *row_of, *sent_row;
} RowPlanOut;

typedef struct {
    int64_t *num_owned, *quota;             // [E, M] rows of an expert: of each owner, for each holder
    Balance balance;
    int64_t *next;                          // [max(slots, M)]
    int16_t *holder;                        // [S, K]
    char *needed;                           // [M, own rows]
} PlanSpace;

static char *cut(char **from, long bytes) {
    char *piece = *from;
    *from += (bytes + 63) & ~63L;
    return piece;
}

// Everything that a plan needs, from one allocation; returns its bytes. With from == 0 it only counts.
static long lay_out(PlanSpace *s, const Routing *r, const StepRows *rows, char *from) {
    char *begin = from;
    long M = r->num_members, C = r->copies ? r->copies->num_copied : 0;
    s->num_owned = (int64_t *)cut(&from, r->num_experts * M * 8);
    s->quota = (int64_t *)cut(&from, r->num_experts * M * 8);
    s->next = (int64_t *)cut(&from, max_long(r->num_slots, M) * 8);
    s->holder = (int16_t *)cut(&from, rows->num_rows * rows->num_per_row * 2);
    s->needed = cut(&from, M * rows->own_count);
    s->balance = (Balance){
        .copies = r->copies, .num_rows = (long *)cut(&from, C * sizeof(long)),
        .finish = (double *)cut(&from, M * 8), .speed = (double *)cut(&from, M * 8),
        .whole = (double *)cut(&from, C * M * 8),
        .order = (long *)cut(&from, C * sizeof(long)), .long_ones = (long *)cut(&from, C * sizeof(long)),
        .parts = (Part *)cut(&from, C * M * sizeof(Part)), .num_parts = (long *)cut(&from, C * sizeof(long))};
    return from - begin;
}

static RowPlanOffsets offsets_of_plan(const Routing *r, long num_rows, long num_per_row, long own_count) {
    long M = r->num_members, num_pairs = num_rows * num_per_row;
    RowPlanOffsets at = {.num_slot_rows = 0, .num_departures = r->num_slots};
    at.num_returns = at.num_departures + M;
    at.num_sent = at.num_returns + M;
    at.num_received = at.num_sent + M;
    at.source_row = at.end_of_counts = at.num_received + M;
    at.place = at.source_row + num_pairs;
    at.departure = at.place + num_pairs;
    at.row_of = at.departure + num_pairs;
    at.sent_row = at.row_of + own_count * num_per_row;
    at.end = at.sent_row + own_count * M;
    return at;
}

static RowPlanOut plan_out(const Routing *r, const StepRows *rows, int64_t *numbers) {
    RowPlanOffsets at = offsets_of_plan(r, rows->num_rows, rows->num_per_row, rows->own_count);
    return (RowPlanOut){
        .num_slot_rows = numbers + at.num_slot_rows, .num_departures = numbers + at.num_departures,
        .num_returns = numbers + at.num_returns, .num_sent = numbers + at.num_sent,
        .num_received = numbers + at.num_received, .source_row = numbers + at.source_row, .place = numbers + at.place,
        .departure = numbers + at.departure, .row_of = numbers + at.row_of, .sent_row = numbers + at.sent_row};
}

// Ids come from other members, and index memory here
static int ids_are_valid(const Routing *r, const StepRows *rows) {
    long num_bad = 0;
    for (long row = 0; row < rows->num_rows; row++)
        for (long k = 0; k < rows->num_per_row; k++) {
            long id = rows->ids[row * rows->ids_step + k];
            num_bad += id < 0 || id > r->num_experts;
        }
    return num_bad == 0;
}

static void begin_balance(Balance *p, const int64_t *num_rows_E) {
    const Copies *w = p->copies;
    long M = w->num_members;
    for (long m = 0; m < M; m++) {
        p->finish[m] = 0.0;
        p->speed[m] = 1.0 / w->row[m];
    }
    for (long f = 0; f < w->num_fixed; f++) {
        double rows = (double)num_rows_E[w->fixed[f]];
        if (rows > 0) p->finish[w->holder[f]] += max_double(w->read_F[f], w->start_F[f] + w->row_F[f] * rows);
    }
    p->num_ordered = p->num_long = 0;
    for (long c = 0; c < w->num_copied; c++) {
        long place = p->num_ordered;
        p->num_rows[c] = num_rows_E[w->copied[c]];
        p->num_parts[c] = 0;
        for (long m = 0; m < M; m++)
            p->whole[c * M + m] = max_double(w->read[m], w->start[m] + w->row[m] * (double)p->num_rows[c]);
        if (p->num_rows[c] == 0) continue;
        for (; place > 0 && p->num_rows[p->order[place - 1]] < p->num_rows[c]; place--) p->order[place] = p->order[place - 1];
        p->order[place] = c;
        p->num_ordered++;
    }
    for (long i = 0; i < p->num_ordered; i++)
        if ((double)p->num_rows[p->order[i]] > w->short_up_to[p->order[i]]) p->long_ones[p->num_long++] = p->order[i];
}

// quota [E, M] from the rows of every expert
static void split_rows(Balance *p, const int64_t *num_rows_E, int64_t *quota) {
    const Copies *w = p->copies;
    long M = w->num_members;
    memset(quota, 0, w->num_experts * M * sizeof *quota);
    for (long f = 0; f < w->num_fixed; f++) quota[w->fixed[f] * M + w->holder[f]] = num_rows_E[w->fixed[f]];
    if (w->num_copied == 0) return;
    begin_balance(p, num_rows_E);
    balance(p);
    for (long c = 0; c < w->num_copied; c++)
        for (long i = 0; i < p->num_parts[c]; i++)
            quota[w->copied[c] * M + p->parts[c * M + i].rank] = p->parts[c * M + i].num_rows;
}

static void count_rows(const Routing *r, const StepRows *rows, int64_t *num_owned, int64_t *num_rows_E) {
    long M = r->num_members;
    memset(num_owned, 0, r->num_experts * M * sizeof *num_owned);
    for (long row = 0; row < rows->num_rows; row++)
        for (long k = 0; k < rows->num_per_row; k++) {
            long id = rows->ids[row * rows->ids_step + k];
            if (id < r->num_experts) num_owned[id * M + rows->owner[row]]++;
        }
    for (long e = 0; e < r->num_experts; e++) {
        num_rows_E[e] = 0;
        for (long m = 0; m < M; m++) num_rows_E[e] += num_owned[e * M + m];
    }
}

// An owner keeps its first rows of an expert, as many as it may compute; the rest fills what the others may, by rank
static void choose_holders(const Routing *r, const StepRows *rows, PlanSpace *s) {
    long M = r->num_members;
    int64_t num_rows_E[r->num_experts], *kept = s->num_owned, *left = s->quota;
    int16_t *holder = s->holder;
    if (r->copies) {
        count_rows(r, rows, s->num_owned, num_rows_E);
        split_rows(&s->balance, num_rows_E, s->quota);
        for (long cell = 0; cell < r->num_experts * M; cell++) {
            kept[cell] = kept[cell] < left[cell] ? kept[cell] : left[cell];
            left[cell] -= kept[cell];
        }
    }
    for (long row = 0; row < rows->num_rows; row++)
        for (long k = 0; k < rows->num_per_row; k++, holder++) {
            long id = rows->ids[row * rows->ids_step + k], owner = rows->owner[row];
            *holder = r->holder_of[id];
            if (!r->copies || id == r->num_experts) continue;
            if (kept[id * M + owner] > 0) {
                kept[id * M + owner]--;
                *holder = (int16_t)owner;
                continue;
            }
            long rank = 0;
            while (left[id * M + rank] == 0) rank++;
            left[id * M + rank]--;
            *holder = (int16_t)rank;
        }
}

// This member's pairs, sorted by slot; and the places of their outputs in the order they leave
static void plan_arrivals(const Routing *r, const StepRows *rows, PlanSpace *s, const RowPlanOut *out) {
    long pair = 0, num_arrived = 0, num_before = 0;
    memset(out->num_slot_rows, 0, r->num_slots * 8);
    memset(out->num_departures, 0, r->num_members * 8);
    memset(out->num_received, 0, r->num_members * 8);
    for (long row = 0; row < rows->num_rows; row++)
        for (long k = 0; k < rows->num_per_row; k++)
            if (s->holder[row * rows->num_per_row + k] == r->rank)
                out->num_slot_rows[r->slot_of[rows->ids[row * rows->ids_step + k]]]++;
    for (long slot = 0; slot < r->num_slots; num_before += out->num_slot_rows[slot++]) s->next[slot] = num_before;
    for (long row = 0; row < rows->num_rows; row++) {
        long first = pair;
        for (long k = 0; k < rows->num_per_row; k++) {
            if (s->holder[row * rows->num_per_row + k] != r->rank) continue;
            long where = s->next[r->slot_of[rows->ids[row * rows->ids_step + k]]]++;
            out->source_row[where] = row;
            out->place[where] = num_arrived;
            out->departure[pair++] = where;
        }
        out->num_departures[rows->owner[row]] += pair - first;
        out->num_received[rows->owner[row]] += pair > first;
        num_arrived += pair > first;
    }
}

// What comes back for this member's own rows, by holder; and its rows to send, by member, each at most once to each
static void plan_departures(const Routing *r, const StepRows *rows, PlanSpace *s, const RowPlanOut *out) {
    long K = rows->num_per_row, num_before = 0;
    const int16_t *holder = s->holder + rows->own_first * K;
    int64_t *sent = out->sent_row;
    memset(out->num_returns, 0, r->num_members * 8);
    memset(s->needed, 0, r->num_members * rows->own_count);
    for (long row = 0; row < rows->own_count; row++)
        for (long k = 0; k < K; k++) {
            out->num_returns[holder[row * K + k]]++;
            s->needed[holder[row * K + k] * rows->own_count + row] = 1;
        }
    for (long m = 0; m < r->num_members; num_before += out->num_returns[m++]) s->next[m] = num_before;
    for (long i = 0; i < rows->own_count * K; i++) out->row_of[i] = s->next[holder[i]]++;
    for (long m = 0; m < r->num_members; m++) {
        int64_t *begin = sent;
        for (long row = 0; row < rows->own_count; row++)
            if (s->needed[m * rows->own_count + row]) *sent++ = row;
        out->num_sent[m] = sent - begin;
    }
}
