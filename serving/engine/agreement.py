"""What a group does after its members have told each other their headers. Pure: all members judge the same headers, so
all come to the same."""

from __future__ import annotations

from dataclasses import dataclass

from model.step import StepHeader


@dataclass(frozen=True, slots=True)
class Agreement:
    headers: tuple[StepHeader, ...]     # by rank

    @property
    def is_step(self) -> bool:
        """Return whether the members now run their plans; if not, the group sleeps."""
        return any(header.num_tokens for header in self.headers)

    @property
    def num_tokens_of_member(self) -> tuple[int, ...]:
        return tuple(header.num_tokens for header in self.headers)

    def revision_after(self, running: int) -> int:
        """Return the placement to use from now on: another one when all can switch to it."""
        first, *others = (header.prepared_revision for header in self.headers)
        return first if first > running and all(revision == first for revision in others) else running

    def is_step_at_once(self, running: int) -> bool:
        """Return whether there is nothing to do before the step."""
        return self.is_step and self.revision_after(running) == running
