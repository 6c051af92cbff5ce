"""How many threads the calls of one device's kernels run on: their own, or for a while those of others too."""

from __future__ import annotations


class CallThreads:
    """Is shared by kernels and all that is made from them. Results do not depend on it."""

    def __init__(self, own: int) -> None:
        self.own = own      # the caller's thread included
        self.now = own
