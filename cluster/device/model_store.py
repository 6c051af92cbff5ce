"""Finds a checkpoint on this node: a local folder, or a hub's files in the local cache, fetched when missing."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Literal

import platformdirs

from cluster.device.checkpoint_fetch import CheckpointFetch, Report
from cluster.device.hub import Hub
from model.errors import CheckpointError
from serving.config import ModelConfig

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
Part = Literal["facts", "all"]      # "facts": all but the weights (config, tokenizer, chat template)


def locate_checkpoint(config: ModelConfig, part: Part, report: Report | None = None) -> Path:
    """Return the folder of the checkpoint on this node. Blocks while it is fetched, and reports how far that is.

    "facts" asks the hub which commit the revision is now; "all" stays at the one that this node has seen last.
    Raises CheckpointError.
    """
    scheme, separator, name = config.path.partition("://")
    if not separator:
        folder = Path(config.path).expanduser()
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"model.path={config.path}: no config.json is there on this node",
                                  fix="give a Hugging Face folder that every node can read, or hf://owner/name")
        return folder
    if scheme not in ("hf", "modelscope"):
        raise CheckpointError(f"model.path={config.path} has the unknown scheme {scheme!r}",
                              fix="write a folder, hf://owner/name or modelscope://owner/name")
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"model.path={config.path}: {name!r} is no name of a repository",
                              fix=f"write {scheme}://owner/name")
    folder = platformdirs.user_cache_path("moesaic") / "hubs"
    digest = hashlib.sha256(f"{config.path} {config.revision}".encode()).hexdigest()
    hub = _hub_of(scheme, name, config.revision, folder)
    fetch = CheckpointFetch(config.path, hub, folder / digest[:24], report or _log)
    return fetch.facts() if part == "facts" else fetch.all_files()


def _hub_of(scheme: str, name: str, revision: str | None, notes_folder: Path) -> Hub:
    """Return the hub's client. Its library is imported here: most nodes need one, or none."""
    if scheme == "hf":
        from cluster.device.hugging_face import HuggingFaceHub
        return HuggingFaceHub(name, revision)
    from cluster.device.model_scope import ModelScopeHub
    return ModelScopeHub(name, revision, notes_folder)


def _log(line: str) -> None:
    logger.info("checkpoint %s", line)
