"""What was used within the last minute, counted in slots of three seconds. Pure.

A slot counts until a minute after its end, so that no minute, wherever it begins, has more than its limit; what is let
in may be 5 % less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SLOT_S = 3.0
NUM_SLOTS = 21      # those that began within the last 60 s, and the running one


@dataclass(frozen=True, slots=True)
class MinuteWindow:
    slot: int = 0                                   # number of the running one
    counts: tuple[int, ...] = (0,) * NUM_SLOTS      # of the slots, the running one first

    @property
    def total(self) -> int:
        return sum(self.counts)

    def at(self, now_s: float) -> MinuteWindow:
        """Return the window as it is then; a clock that goes back changes nothing."""
        num_new = min(slot_of(now_s) - self.slot, NUM_SLOTS)
        if num_new <= 0:
            return self
        return MinuteWindow(slot_of(now_s), (0,) * num_new + self.counts[:NUM_SLOTS - num_new])

    def add(self, count: int, slot: int | None = None) -> MinuteWindow:
        """Count in that slot, or the running one; nothing where that slot is over. `count` may be below 0."""
        index = 0 if slot is None else self.slot - slot
        if not 0 <= index < NUM_SLOTS:
            return self
        return replace(self, counts=(*self.counts[:index], self.counts[index] + count, *self.counts[index + 1:]))

    def wait_s(self, count: int, limit: int, now_s: float) -> float:
        """Return in how many seconds there will be room for so many, if nobody else comes. 0: now."""
        left = self.total
        if left + count <= limit:
            return 0.0
        for index in reversed(range(NUM_SLOTS)):        # the oldest goes first
            left -= self.counts[index]
            if left + count <= limit:
                return self._end_s(index) - now_s
        return self._end_s(0) - now_s

    def reset_s(self, now_s: float) -> float:
        """Return in how many seconds nothing of what was used will count any more."""
        newest = next((index for index, count in enumerate(self.counts) if count), None)
        return 0.0 if newest is None else self._end_s(newest) - now_s

    def _end_s(self, index: int) -> float:
        """Return when the slot at this index leaves the window."""
        return (self.slot - index + NUM_SLOTS) * SLOT_S


def slot_of(now_s: float) -> int:
    return int(now_s // SLOT_S)
