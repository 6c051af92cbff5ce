"""The worker processes of the link tests do these jobs."""

from __future__ import annotations

import torch

from cluster.shard.link_probe import measure_link
from serving.link.epoch import Link
from tests.process_pool import Worker


def measure(worker: Worker) -> Link | None:
    return measure_link(worker.kept["group"], torch.device("cpu"))
