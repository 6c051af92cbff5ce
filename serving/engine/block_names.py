"""Names of the full blocks of requests: hashes of all tokens up to their ends, computed when they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from serving.engine.block_manager import block_hash
from serving.engine.request import Request


class BlockNames:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._last: Request | None = None       # that was named

    def of(self, request: Request) -> Iterator[bytes]:
        """Yield the names of the blocks that a cached prefix may replace: never all tokens, for the last one's logits
        are needed."""
        num_blocks = (request.num_tokens - 1) // self._block_size
        self._adopt(request)
        known = request.block_hashes[:num_blocks]
        return itertools.chain(known, (self.first(request, index + 1)[index]
                                       for index in range(len(known), num_blocks)))

    def first(self, request: Request, num_blocks: int) -> list[bytes]:
        """Return the known names, at least those of the first `num_blocks` blocks, which must be full."""
        known, size = request.block_hashes, self._block_size
        if len(known) < num_blocks:
            self._adopt(request)
            while len(known) < num_blocks:
                start = len(known) * size
                known.append(block_hash(known[-1] if known else b"", request.token_ids(start, start + size)))
            self._last = request
        return known

    def at(self, request: Request, position: int) -> bytes:
        """Return the name of the block that ends at a position, which is that of the state there, too."""
        index = position // self._block_size - 1
        return self.first(request, index + 1)[index]

    def _adopt(self, request: Request) -> None:
        """Take over those of the prompt's full blocks from the request named before if it has the very same prompt: it
        is another choice of one client's request, as a rule."""
        last, prompt = self._last, request.submission.prompt_token_ids
        if last is not None and last.submission.prompt_token_ids is prompt:
            known = request.block_hashes
            known += last.block_hashes[len(known):len(prompt) // self._block_size]
