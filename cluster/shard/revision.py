"""Changing the placement of a group that serves: a member prepares the next revision beside the one that runs.

The coordinator names it (View.next); it is prepared on a thread of its own and offered to the engine, which switches
together with the other members. What cannot be prepared is reported, and the group goes on as it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from cluster.coordinator.client import ViewFollower
from cluster.coordinator.view import View
from cluster.device.facts import trim_memory, used_memory_bytes
from cluster.shard.executor import GroupExecutor, PreparedRevision
from cluster.shard.loaded_model import LoadedModel
from model.dispatch.dispatcher import Dispatcher
from model.errors import ModelError, OutOfMemoryError
from model.expert_swap import ExpertChange, change_bytes, prepare_experts
from model.kernels.protocol import ExpertWeights
from model.placement import Placement
from serving.errors import ServingError
from serving.link.epoch import Epoch

logger = logging.getLogger(__name__)

# Where cores are short, steps get ten times the share of the preparation. Measured with 2 members on 2 busy cores: a
# step beside a preparation took 1.1 to 1.2 times as long as others, 1.4 to 2.2 times without this.
PREPARING_NICENESS = 10
STEPS_GROWTH_BYTES = 16 << 20   # what a process may come to take besides, while it prepares: the steps go on


class RevisionError(ServingError):
    """Says that a revision needs a new epoch instead."""


class SupersededError(ServingError):
    """Says that the coordinator no longer wants the revision that is being prepared."""


class RevisionMaker:
    """Prepares on the calling thread, which is not the model thread. `new_dispatcher` makes no collectives."""

    def __init__(self, new_dispatcher: Callable[[Placement], Dispatcher], budget_bytes: int) -> None:
        self._new_dispatcher = new_dispatcher
        self._budget_bytes = budget_bytes

    def make(self, running: Epoch, model: LoadedModel, wanted: Epoch, check: Callable[[], None]) -> PreparedRevision:
        """Prepare a revision. `check` is called now and then and raises when the work is in vain.

        Raises RevisionError, OutOfMemoryError, TensorError.
        """
        began_s = time.perf_counter()
        refuse_what_needs_an_epoch(running, wanted, model.rank)
        change = ExpertChange(running.placement, wanted.placement, model.rank)
        trim_memory()
        self._check_memory(change, model)
        weights_of_layer = prepare_experts(change, model.decoder, model.loader, check)
        dispatcher = self._new_dispatcher(wanted.placement)
        logger.info("revision_prepared revision=%d layers=%d copies=%d took_s=%.2f", wanted.revision,
                    len(weights_of_layer), change.num_slots, time.perf_counter() - began_s)
        return PreparedRevision(wanted, model.placed(wanted.placement, model.rank), dispatcher, weights_of_layer)

    def _check_memory(self, change: ExpertChange, model: LoadedModel) -> None:
        needed = change_bytes(change, model.loader)
        if not needed:
            return
        used = used_memory_bytes(str(model.decoder.kernels.device))
        left = self._budget_bytes - used - STEPS_GROWTH_BYTES
        if needed > left:
            raise OutOfMemoryError(
                f"the experts of {len(change.layers)} changed layers take {needed} bytes beside those that run; budget "
                f"{self._budget_bytes} - used {used} - {STEPS_GROWTH_BYTES} for the steps leaves {left}: "
                f"{needed - left} bytes are missing",
                fix="change fewer layers at a time, or raise the pool's memory_budget")


def refuse_what_needs_an_epoch(running: Epoch, wanted: Epoch, rank: int) -> None:
    """Raise RevisionError for what cannot change while the members stay."""
    old, new = running.placement, wanted.placement
    ids, old_ids = ([member.shard_id for member in epoch.members] for epoch in (wanted, running))
    if ids != old_ids or new.num_members != old.num_members:
        raise RevisionError(f"revision {wanted.revision} has other members than epoch {running.number}",
                            fix="make a new epoch")
    if [len(layer) for layer in new.holders] != [len(layer) for layer in old.holders]:
        raise RevisionError(f"revision {wanted.revision} places {new.num_layers} layers of another model",
                            fix=f"place the {old.num_layers} layers of this one")
    if wanted.takes_requests(rank) != running.takes_requests(rank):
        ways = {True: "takes requests", False: "holds experts only"}
        raise RevisionError(
            f"rank {rank} {ways[running.takes_requests(rank)]} and revision {wanted.revision} says that it "
            f"{ways[wanted.takes_requests(rank)]}", fix="make a new epoch: it takes other weights and another KV cache")


class RevisionFollower:
    """Does what the coordinator's views say, one revision after the other. `run` is a task of the owner.

    `changed` is called whenever there is news for the coordinator: something is prepared, has failed, or runs.
    """

    def __init__(self, epoch: Epoch, model: LoadedModel, maker: RevisionMaker, views: ViewFollower,
                 changed: Callable[[], None]) -> None:
        self.epoch = epoch              # with the revision that runs
        self.model = model
        self.failed_revision = 0
        self.detail = ""                # why it failed, until another one runs
        self._maker = maker
        self._views = views
        self._changed = changed
        self._thread = ThreadPoolExecutor(1, "prepare", _give_way_to_steps)
        self._is_closed = False

    async def run(self, executor: GroupExecutor, tell_prepared: Callable[[], None]) -> None:
        """Follow until cancelled. `tell_prepared`: of the engine."""
        while True:
            await self._views.until(lambda view: self._wanted_revision(view) != executor.prepared_revision)
            await executor.withdraw()
            wanted = self._wanted(self._views.view)
            if wanted is not None and await self._offer(wanted, executor):
                tell_prepared()
                self._changed()

    def has_switched(self, prepared: PreparedRevision, replaced: dict[int, ExpertWeights]) -> None:
        """Note that the engine uses it from now on, and free `replaced` where that holds up nobody."""
        self.epoch, self.model, self.detail = prepared.epoch, prepared.model, ""
        self._thread.submit(_free, replaced)
        self._changed()

    async def _offer(self, wanted: Epoch, executor: GroupExecutor) -> bool:
        """Prepare and offer, in a function of its own: nothing here may keep weights that were withdrawn."""
        prepared = await self._prepare(wanted)
        if prepared is None:
            return False
        executor.offer(prepared)
        return True

    async def close(self) -> None:
        """Return when nothing is being prepared any more."""
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _prepare(self, wanted: Epoch) -> PreparedRevision | None:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._maker.make, self.epoch, self.model, wanted,
                                              lambda: self._check_wanted(wanted))
        except SupersededError as error:
            logger.info("revision_superseded revision=%d why=%s", wanted.revision, error)
        except Exception as error:      # whatever it is, the group goes on with the placement that it has
            is_told = isinstance(error, (ModelError, ServingError))
            logger.warning("revision_failed revision=%d error=%s", wanted.revision, error, exc_info=not is_told)
            self.failed_revision, self.detail = wanted.revision, f"revision {wanted.revision} failed: {error}"
            self._changed()
        return None

    def _wanted(self, view: View) -> Epoch | None:
        """Return what to prepare now. What has failed once is not tried again."""
        is_new = (view.next is not None and view.next.number == self.epoch.number
                  and view.next.revision > max(self.epoch.revision, self.failed_revision))
        return view.next if is_new else None

    def _wanted_revision(self, view: View) -> int:
        wanted = self._wanted(view)
        return self.epoch.revision if wanted is None else wanted.revision

    def _check_wanted(self, wanted: Epoch) -> None:
        """Raise SupersededError on the preparing thread, when that is so."""
        if self._is_closed or self._wanted(self._views.view) != wanted:
            raise SupersededError(f"revision {wanted.revision} is not wanted any more")


def _give_way_to_steps() -> None:
    """Lower the priority of the thread that calls it."""
    torch.set_num_threads(1)
    if sys.platform == "linux":     # there each thread has its own priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PREPARING_NICENESS)


def _free(replaced: dict[int, ExpertWeights]) -> None:
    replaced.clear()
    trim_memory()
    if torch.cuda.is_available():       # what is kept for later counts as used
        torch.cuda.empty_cache()
