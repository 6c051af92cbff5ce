"""A router's service before whole shards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from serving.config import AdmissionConfig, RouterConfig
from serving.metrics import RouterMetrics
from serving.router.generation import ModelCard
from serving.router.service import InferenceService
from serving.text.tokenizer import Tokenizer
from tests.serving.link.fake_link import clock
from tests.serving.router.served_shards import MAX_MODEL_LEN, SCHEDULER, Shard, Start, epoch_with, until


@pytest.fixture(scope="session")
def tokenizer(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(byte_level_dir)


@pytest.fixture
async def start(tokenizer: Tokenizer) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:
        async def make(num_shards: int = 1, num_blocks: int = 200,
                       **admission: Any) -> tuple[InferenceService, list[Shard]]:
            shards = [Shard(num_blocks, f"s{index}") for index in range(num_shards)]
            for shard in shards:
                await shard.start()
                stack.push_async_callback(shard.stop)
            config = RouterConfig(admission=AdmissionConfig(**admission), stream_window=8)
            card = ModelCard("m", MAX_MODEL_LEN, 0)
            service = InferenceService(card, tokenizer, config, SCHEDULER, RouterMetrics(), clock)
            stack.push_async_callback(service.close)
            service.set_epoch(epoch_with(1, *shards))
            await until(lambda: service._links.is_complete)
            return service, shards
        yield make
