"""Slots for the states of sequences, and snapshots of states for others with the same prefix. Pure.

A layer with a state (gated DeltaNet) has it after all computed tokens only, so a prefix is reused only where somebody
has kept the state: at the end of a prompt and a little before, between its messages, where it parts from others, every
so many tokens, and where an answer ended. A step reads one slot and writes another, so a running sequence holds two,
and keeping its state is not to write a slot again. A snapshot has the name of the last full KV block before it, and
goes with that block.

All snapshots are equally large, and not equally useful: one that stands shortly behind another saves little. So what is
evicted is that which saves the fewest tokens, ageing as others are used (GreedyDual: Young 1994, Cao and Irani 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from serving.engine.block_manager import BlockManager

SLOTS_OF_A_SEQUENCE = 2     # that runs: one read, one written
SLOTS_WITH_SNAPSHOT = SLOTS_OF_A_SEQUENCE + 1   # with fewer it could not start from a snapshot
TAIL_TOKENS = 512           # a multiple of every block size
NUM_LAST_MESSAGES = 3       # of a conversation, after which a snapshot is kept


@dataclass(frozen=True, slots=True)
class PlannedSlots:
    """The slots of one sequence in one step; all None where no layer has a state."""

    read: int | None = None
    write: int | None = None
    on_the_way: tuple[tuple[int, int], ...] = ()    # (position, slot)


@dataclass(slots=True)
class HeldSlots:
    """Holds the slots of one running sequence."""

    write: int                          # the slot that the next step writes
    spare: int | None                   # the one after it, while `current` must not be written
    current: int | None = None          # the state after all computed tokens; None: nothing is computed
    is_kept: bool = False               # `current` is a snapshot
    on_the_way: dict[int, int] = field(default_factory=dict)    # for a step in flight: position -> slot to keep it in
    newest: bytes | None = None         # the snapshot that its own output has left last
    superseded: bytes | None = None     # the one before it
    kept_at: int = 0                    # position of the last snapshot on its way, its own output's left out


@dataclass(slots=True)
class Snapshot:
    """Holds what a kept state is good for."""

    position: int
    num_saved: int      # tokens since the snapshot before it: they would have to be computed again
    worth: int          # num_saved, above what the last one evicted was worth when this one was last used


class StateSlots:
    """Counts references to slots, finds snapshots, evicts those worth least. With no slots it does nothing."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots = BlockManager(num_slots, block_size=1, on_evict=self._evicted,
                                   worth_of=lambda name: self._snapshots[name].worth)
        self._snapshots: dict[bytes, Snapshot] = {}
        self._evicted_worth = 0         # only grows, so that what nobody uses is evicted in the end
        self._held: dict[str, HeldSlots] = {}

    @property
    def num_free(self) -> int:
        """Slots that can be taken, snapshots that nobody reads included."""
        return self._slots.num_free

    @property
    def num_snapshots(self) -> int:
        return self._slots.num_named

    def num_reusable(self, names: Sequence[bytes]) -> int:
        """Return how many of the blocks that `names` name a sequence can skip: the most that end with a snapshot."""
        if not self.num_slots:
            return len(names)
        return next((count for count in range(len(names), 0, -1) if self._slots.find(names[count - 1]) is not None), 0)

    def start(self, request_id: str, name: bytes | None) -> bool:
        """Give a sequence its slots; with `name` it goes on from that snapshot. False: none are left."""
        if not self.num_slots:
            return True
        found = None if name is None else self._slots.find(name)
        assert (found is None) == (name is None), "num_reusable() has found the snapshot"
        slots = self._slots.allocate(SLOTS_OF_A_SEQUENCE, [] if found is None else [found])
        if slots is None:
            return False
        *_, spare, write = slots
        held = self._held[request_id] = HeldSlots(write, spare, found, found is not None)
        if name is not None:
            snapshot = self._snapshots[name]
            snapshot.worth = self._evicted_worth + snapshot.num_saved
            held.kept_at = snapshot.position
        return True

    def plan(self, request_id: str, positions: Iterable[int], name_of: Callable[[int], bytes]) -> PlannedSlots:
        """Say what the next step reads and writes, and where it keeps the state at those `positions` for which there is
        room, ascending. A step that was planned before and did not succeed is forgotten."""
        held = self._held.get(request_id)
        if held is None:
            return PlannedSlots()
        wanted = [position for position in positions
                  if position in held.on_the_way or self._slots.find(name_of(position)) is None]
        self._slots.free([held.on_the_way.pop(position) for position in set(held.on_the_way) - set(wanted)])
        for position in wanted:
            if position not in held.on_the_way:
                slots = self._slots.allocate(1)
                if slots is None:
                    break
                held.on_the_way[position] = slots[0]
        return PlannedSlots(held.current, held.write, tuple(sorted(held.on_the_way.items())))

    def commit(self, request_id: str, name_of: Callable[[int], bytes], position: int, keeps: bool,
               is_output: bool) -> None:
        """The step has succeeded and the state is at `position`. What was kept on the way may be reused by others now;
        with `keeps` the new state too. Of what its own output leaves (`is_output`) only the newest stays in the end."""
        held = self._held.get(request_id)
        if held is None:
            return
        for at, slot in sorted(held.on_the_way.items()):
            self._publish(slot, name_of(at), at, at - held.kept_at)
            self._slots.free([slot])
            held.kept_at = at
        held.on_the_way.clear()
        self._move(held)
        if keeps:
            self._keep(held, name_of(position), position, is_output)
            held.kept_at = held.kept_at if is_output else position

    def _move(self, held: HeldSlots) -> None:
        before, was_kept = held.current, held.is_kept
        held.current, held.is_kept = held.write, False
        if before is not None and not was_kept:
            held.write = before
            return
        assert held.spare is not None, "a state that must not be written has a spare slot beside it"
        held.write, held.spare = held.spare, None
        if before is not None:
            self._slots.free([before])

    def _publish(self, slot: int, name: bytes, position: int, num_saved: int) -> None:
        if self._slots.find(name) is None:
            self._slots.publish(slot, name)
            self._snapshots[name] = Snapshot(position, num_saved, self._evicted_worth + num_saved)

    def _keep(self, held: HeldSlots, name: bytes, position: int, is_output: bool) -> None:
        if self._slots.find(name) is not None:
            return
        slots = self._slots.allocate(1)
        if slots is None:
            return
        assert held.current is not None
        self._publish(held.current, name, position, position - held.kept_at)
        held.is_kept, held.spare = True, slots[0]
        if is_output:
            self._supersede(held)
            held.newest = name

    def _supersede(self, held: HeldSlots) -> None:
        """Keep the newest snapshot of a sequence's output until the next one, where nobody needs the slot: another
        member may be about to take the sequence over as it was a moment ago."""
        if held.superseded is not None:
            self.forget(held.superseded)
        held.superseded = held.newest
        if held.newest is not None and (snapshot := self._snapshots.get(held.newest)):
            snapshot.worth = 0

    # Snapshots of other members, and for them.

    def lend(self, name: bytes) -> int | None:
        """Hold a snapshot that num_reusable() has found until give_back(). None where no layer keeps a state."""
        slot = self._slots.find(name)
        if slot is not None:
            self._slots.allocate(0, [slot])
        return slot

    def take(self) -> int | None:
        """Hold a slot for what is received, until give_back(). None: there is none."""
        slots = self._slots.allocate(1)
        return slots[0] if slots else None

    def publish_received(self, slot: int, name: bytes, position: int, num_saved: int) -> None:
        """Let others go on from a state that was received. `num_saved`: tokens since the snapshot before it."""
        self._publish(slot, name, position, num_saved)

    def give_back(self, slot: int) -> None:
        self._slots.free([slot])

    def forget(self, name: bytes) -> None:
        """Nobody can go on from this snapshot any more."""
        self._slots.forget(name)
        self._snapshots.pop(name, None)

    def _evicted(self, name: bytes) -> None:
        self._evicted_worth = max(self._evicted_worth, self._snapshots.pop(name).worth)

    def release(self, request_id: str) -> None:
        """A sequence ended or was preempted: its slots are free, its snapshots stay as long as there is room."""
        held = self._held.pop(request_id, None)
        if held is not None:
            slots = [held.write, held.spare, held.current, *held.on_the_way.values()]
            self._slots.free([slot for slot in slots if slot is not None])
            if held.superseded is not None:
                self.forget(held.superseded)


def snapshot_positions(prompt_token_ids: Sequence[int], end_of_message_ids: Collection[int], block_size: int,
                       interval_tokens: int, shared: int = 0) -> tuple[int, ...]:
    """Return where a prompt's state is worth keeping, ascending, each at the end of a full block.

    Its end, for the same prompt again and for what goes on from it, and a little before, for what differs in the last
    words only; after the first and the last messages (a message ends with a token that also ends an answer), for
    others with the same system prompt or history; where it parts from what another has computed (`shared` tokens),
    for there more will part; and every so many tokens. The last token's logits are always computed, so the end is
    before it.
    """
    last = (len(prompt_token_ids) - 1) // block_size * block_size
    ends = [index + 1 for index, token_id in enumerate(prompt_token_ids) if token_id in end_of_message_ids]
    messages = {end // block_size * block_size for end in (*ends[:1], *ends[-NUM_LAST_MESSAGES:])}
    step = max(1, interval_tokens // block_size) * block_size
    tail = last // TAIL_TOKENS * TAIL_TOKENS
    wanted = {last, tail, shared // block_size * block_size, *messages, *range(step, last, step)}
    return tuple(sorted(position for position in wanted if 0 < position <= last))
