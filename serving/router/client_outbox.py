"""What waits to be sent to one client. Pieces of one choice that wait together go together: a message costs the door
more than what is in it, so a router that has more to send than it can sends larger pieces."""

from __future__ import annotations

import asyncio

from serving.errors import ServingError
from serving.router.generation import GenerationDelta

MAX_MERGED = 64     # pieces in one: a client that reads late gets messages of a bounded size


class ClientOutbox:
    """Has one reader. Unbounded, but a sequence has at most max_tokens: a client that does not read must not hold back
    the others."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], list[GenerationDelta]] = {}        # by part and choice
        self._error: ServingError | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, part_index: int, delta: GenerationDelta) -> None:
        key = (part_index, delta.choice)
        if key in self._waiting:
            self._waiting[key].append(delta)
        else:
            self._waiting[key] = [delta]
        self._wake()

    def fail(self, error: ServingError) -> None:
        """Have take() raise this once what waits has been taken. The first error counts."""
        self._error = self._error or error
        self._wake()

    async def take(self) -> list[tuple[int, GenerationDelta]]:
        """Wait for something, and return all that waits, each piece with its part. Raises the error of fail()."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        waiting, self._waiting = self._waiting, {}
        return [(part_index, delta) for (part_index, _), deltas in waiting.items() for delta in _merged(deltas)]

    def _wake(self) -> None:
        if self._reader is not None:
            if not self._reader.done():
                self._reader.set_result(None)
            self._reader = None


def _merged(deltas: list[GenerationDelta]) -> list[GenerationDelta]:
    if len(deltas) == 1:
        return deltas
    return [_merge(deltas[start:start + MAX_MERGED]) for start in range(0, len(deltas), MAX_MERGED)]


def _merge(deltas: list[GenerationDelta]) -> GenerationDelta:
    """Return pieces that follow each other as one."""
    last = deltas[-1]
    return GenerationDelta(
        last.choice, text="".join([delta.text for delta in deltas]),
        token_ids=tuple([token_id for delta in deltas for token_id in delta.token_ids]),
        logprobs=tuple([entry for delta in deltas for entry in delta.logprobs]),
        prompt_logprobs=deltas[0].prompt_logprobs, num_cached_tokens=deltas[0].num_cached_tokens,
        finish_reason=last.finish_reason, stop_reason=last.stop_reason)
