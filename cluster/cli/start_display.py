"""Shows where `moesaic up` is."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.coordinator.view import ShardState
from cluster.launch.bring_up import Progress as StartProgress
from serving.config import ServeConfig

_MIB = 2**20
_BEFORE_WEIGHTS = (ShardState.STARTING, ShardState.WAITING)


class StartDisplay:
    """Call it with each Progress. On a terminal: bars; in a file: the lines that matter, once each."""

    def __init__(self, console: Console, config: ServeConfig) -> None:
        self._console = console
        self._said = ""
        self._bars = Progress(TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(),
                              TextColumn("{task.fields[unit]}"), TimeElapsedColumn(), console=console)
        num_shards = config.num_members
        self._nodes = self._bar("Ray nodes", len(config.local_nodes), "") if config.local_nodes else None
        self._shards = self._bar("shards", num_shards, "")
        self._weights = self._bar("weights", None, "MiB")
        self._ready = self._bar("group ready", num_shards, "")

    def _bar(self, name: str, total: int | None, unit: str) -> TaskID:
        return self._bars.add_task(name, total=total, unit=unit)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """The bars stay as they are. May be called twice."""
        self._bars.stop()

    def __call__(self, progress: StartProgress) -> None:
        if self._nodes is not None:
            self._bars.update(self._nodes, completed=len(progress.nodes))
        if progress.status is None:
            return
        shards = [status for _, status in progress.status.shards]
        self._bars.update(self._shards, completed=len(shards))
        loading = [shard for shard in shards if shard.state not in _BEFORE_WEIGHTS]
        if loading:
            self._bars.update(self._weights, completed=sum(shard.bytes_read for shard in loading) // _MIB,
                              total=sum(shard.bytes_to_read for shard in loading) // _MIB)
        self._bars.update(self._ready, completed=sum(shard.state == ShardState.READY for shard in shards))
        view = progress.status.view
        if view.is_too_small and view.why != self._said:
            self._said = view.why
            self._console.print(f"waiting: {view.why}", markup=False)
