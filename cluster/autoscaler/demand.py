"""The demand on a fleet, and its memory: how fast requests come, whether more will, what the last peak was. Pure."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from cluster.autoscaler.fleet import Work

ENOUGH_ARRIVALS = 20        # with fewer a rate is chance, and a longer window is looked at
MOST_WINDOWS = 8            # that are looked back for them
TREND = 1.5                 # so many times the arrivals of the half window before are a rise, and no chance
_SAMPLES_PER_WINDOW = 8
_NUM_PEAKS = 16             # parts of the keep-alive time whose highest demands are kept apart


@dataclass(frozen=True, slots=True)
class Demand:
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    num_waiting_tokens: float = 0.0
    num_decoding: float = 0.0
    num_kv_tokens: float = 0.0

    def times(self, rates: float, amounts: float) -> Demand:
        """Return one with so many times what comes, and so many times what is there."""
        return Demand(self.prompt_tokens_per_s * rates, self.output_tokens_per_s * rates,
                      self.num_waiting_tokens * amounts, self.num_decoding * amounts, self.num_kv_tokens * amounts)

    def at_least(self, other: Demand) -> Demand:
        return Demand(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class Arrivals:
    """All that had come up to a moment."""

    at_s: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class DemandHistory:
    """What the policy remembers between two decisions. `idle_since_s`: None while there are requests."""

    since_s: float | None = None                    # when it began to look; None: it has yet to
    arrivals: tuple[Arrivals, ...] = ()             # oldest first
    peaks: tuple[tuple[float, Demand], ...] = ()    # when each part of the keep-alive time began, and its highest
    idle_since_s: float | None = None
    has_slept: bool = False                         # when it last looked, no pool was to have a replica

    def peak(self) -> Demand:
        """Return the highest of each within the keep-alive time."""
        highest = Demand()
        for _, demand in self.peaks:
            highest = highest.at_least(demand)
        return highest


def observe(history: DemandHistory, work: Work, now_s: float, window_s: float, ready_s: float, keep_alive_s: float,
            ) -> tuple[DemandHistory, Demand]:
    """Return the history with what is there now, and the demand that a replica must meet when it is ready."""
    now = Arrivals(now_s, work.num_arrived, work.num_prompt_tokens, work.num_output_tokens)
    past = _thinned(history.arrivals, now_s, window_s)
    prompt_rate, output_rate = _rates(past, now, window_s, ready_s)
    demand = Demand(prompt_rate, output_rate, work.num_waiting_tokens, work.num_decoding, work.num_kv_tokens)
    arrived = bool(past) and past[-1].num_requests != now.num_requests
    idle_since_s = None if work.num_held or arrived else (
        now_s if history.idle_since_s is None else history.idle_since_s)
    peaks = _with_peak(history.peaks, demand, now_s, keep_alive_s)
    since_s = now_s if history.since_s is None else history.since_s
    return DemandHistory(since_s, (*past, now), peaks, idle_since_s), demand


def _thinned(arrivals: tuple[Arrivals, ...], now_s: float, window_s: float) -> tuple[Arrivals, ...]:
    """Leave out what is older than any window, and the newest where it is nearly as new as the one before."""
    kept = tuple(one for one in arrivals if one.at_s >= now_s - MOST_WINDOWS * window_s)
    if len(kept) > 1 and kept[-1].at_s - kept[-2].at_s < window_s / _SAMPLES_PER_WINDOW:
        return kept[:-1]
    return kept


def _rates(past: tuple[Arrivals, ...], now: Arrivals, window_s: float, ready_s: float) -> tuple[float, float]:
    """Return tokens a second of prompts and of outputs: of the shortest window with enough arrivals, and if they grow
    within that, as many as there will be when a replica is ready."""
    num_windows = 1
    since = _at(past, now, now.at_s - window_s)
    while now.num_requests - since.num_requests < ENOUGH_ARRIVALS and num_windows < MOST_WINDOWS:
        num_windows *= 2
        since = _at(past, now, now.at_s - num_windows * window_s)
    elapsed_s = max(now.at_s - since.at_s, window_s)
    prompt_rate = (now.num_prompt_tokens - since.num_prompt_tokens) / elapsed_s
    output_rate = (now.num_output_tokens - since.num_output_tokens) / elapsed_s
    growth = _growth(past, since, now, ready_s)
    return prompt_rate * growth, output_rate * growth


def _growth(past: tuple[Arrivals, ...], since: Arrivals, now: Arrivals, ready_s: float) -> float:
    """Return by how much more comes after ready_s than came within the window; 1 where nothing rises."""
    half_s = (now.at_s - since.at_s) / 2
    middle = _at(past, now, now.at_s - half_s)
    before, after = middle.num_requests - since.num_requests, now.num_requests - middle.num_requests
    if half_s <= 0 or before + after < ENOUGH_ARRIVALS or after < TREND * before:
        return 1.0
    slope = (after - before) / half_s           # requests a half window, each second
    mean = (after + before) / 2
    return min(2.0, (after + slope * min(ready_s, half_s)) / mean)


def _at(past: tuple[Arrivals, ...], now: Arrivals, at_s: float) -> Arrivals:
    """Return the newest that is as old as that, else the oldest that there is."""
    for one in reversed(past):
        if one.at_s <= at_s:
            return one
    return past[0] if past else now


def _with_peak(peaks: tuple[tuple[float, Demand], ...], demand: Demand, now_s: float, keep_alive_s: float,
               ) -> tuple[tuple[float, Demand], ...]:
    kept = tuple((began_s, peak) for began_s, peak in peaks if now_s - began_s <= keep_alive_s)
    if kept and now_s - kept[-1][0] < keep_alive_s / _NUM_PEAKS:
        return (*kept[:-1], (kept[-1][0], kept[-1][1].at_least(demand)))
    return (*kept, (now_s, demand))
