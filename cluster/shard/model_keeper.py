"""The weights of one member, from one epoch to the next: what both need stays, only the rest is read.

Its methods run on the model thread; the event loop may look at `model` and `progress`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from cluster.device.facts import resident_memory_bytes, return_free_memory, trim_memory, used_memory_bytes
from cluster.device.model_store import locate_checkpoint
from cluster.planner.memory_demand import PROCESS_GROWTH_BYTES
from cluster.shard.loaded_model import LoadedModel, load_model
from model.args import ModelArgs
from model.expert_swap import ExpertChange, exchange_experts
from model.kernels.protocol import Kernels
from model.weights import WeightLoader
from serving.config import ServeConfig
from serving.link.epoch import DeviceFacts, Epoch

logger = logging.getLogger(__name__)


class ModelKeeper:
    """Keeps the model. `tell` takes a line on how far the checkpoint is while it is fetched, "" when it is here."""

    def __init__(self, config: ServeConfig, args: ModelArgs, kernels: Kernels, tell: Callable[[str], None]) -> None:
        self.model: LoadedModel | None = None
        self.progress = (0, 0)          # bytes read, bytes to read
        self._config = config
        self._args = args
        self._kernels = kernels
        self._tell = tell

    def take(self, epoch: Epoch, rank: int) -> LoadedModel:
        """Return the weights that the epoch asks of this member. Raises CheckpointError, TensorError.

        Call it when the engine of the epoch before is gone. While it loads, the process takes no more memory than the
        larger of what was held and what is wanted, plus the experts of one layer where the budget has room for that.
        """
        model, self.model = self.model, None
        if model is not None and model.takes_requests == epoch.takes_requests(rank):
            self._exchange(model, epoch, rank)
            self.model = model.placed(epoch.placement, rank)
        else:
            del model               # two would not fit
            return_free_memory()
            self.model = load_model(self._new_loader(), epoch, rank, self._note)
        return self.model

    def release_engine(self, facts: DeviceFacts) -> DeviceFacts:
        """Free what an engine that has ended has left, and return the facts with what the process takes by now.

        It grows while it serves; the next placement is to be planned for what it is.
        """
        return_free_memory()        # an engine's parts refer to each other
        if facts.device != "cpu":
            return facts
        weights_bytes = self.model.decoder.weights_bytes if self.model else 0
        # Plans count the growth of a process among its buffers.
        grown_bytes = resident_memory_bytes() - weights_bytes - PROCESS_GROWTH_BYTES
        return replace(facts, resident_bytes=max(facts.resident_bytes, grown_bytes))

    def _exchange(self, model: LoadedModel, epoch: Epoch, rank: int) -> None:
        device, budget_bytes = str(self._kernels.device), epoch.members[rank].facts.memory_budget_bytes

        def has_room(num_bytes: int) -> bool:
            trim_memory()
            return used_memory_bytes(device) + num_bytes <= budget_bytes
        change = ExpertChange(model.placement, epoch.placement, rank, model.rank)
        bytes_read = exchange_experts(change, model.decoder, model.loader, has_room, self._note)
        trim_memory()
        logger.info("weights_kept epoch=%d rank=%d layers_changed=%d bytes_read=%d", epoch.number, rank,
                    len(change.layers), bytes_read)

    def _new_loader(self) -> WeightLoader:
        folder = locate_checkpoint(self._config.model, "all", self._tell)
        self._tell("")
        return WeightLoader(folder, self._args, getattr(torch, self._config.model.dtype), self._kernels)

    def _note(self, num_done: int, num_total: int) -> None:
        self.progress = (num_done, num_total)
