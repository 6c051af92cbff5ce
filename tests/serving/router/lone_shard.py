"""A shard process, by its id: it tells its port, makes five steps, and goes on when it gets a line on stdin."""

from __future__ import annotations

import asyncio
import sys

from tests.serving.router.served_shards import Shard


async def run(shard_id: str) -> None:
    shard = Shard(shard_id=shard_id)
    shard.executor.allow(5)
    await shard.start()
    sys.stdout.write(f"{shard.port}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    shard.executor.allow(None)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1]))
