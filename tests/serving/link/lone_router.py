"""A router process that submits long sequences, and then waits until somebody ends it.

Its arguments: the port of the shard, the number of sequences, and their deadline in seconds from now, if they have one.
"""

from __future__ import annotations

import asyncio
import sys

from model.step import SamplingSpec
from serving.engine.request import Submission
from serving.link.client import ShardLinkClient, SubmissionQueue
from tests.serving.link.fake_link import RecordingOwner, clock, member

WINDOW = 4


async def run(port: int, num_sequences: int, deadline_in_s: float | None) -> None:
    owner = RecordingOwner()
    link = ShardLinkClient(member(port), lambda: SubmissionQueue("s0", "lone", WINDOW, clock), owner)
    link.start()
    await owner.changed.until(lambda: link.is_connected)
    for index in range(num_sequences):
        link.submit(Submission(f"{index}", tuple(range(40)), SamplingSpec(seed=index), 1900,
                               deadline_s=None if deadline_in_s is None else clock() + deadline_in_s))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else None))
