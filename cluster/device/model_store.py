"""Where a checkpoint is on this node: a local folder, or a hub's files in the local cache, fetched when missing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from model.errors import CheckpointError
from serving.config import ModelConfig

logger = logging.getLogger(__name__)

Part = Literal["facts", "all"]      # "facts": all but the weights (config, tokenizer, chat template)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
_NEVER = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*")


def locate_checkpoint(config: ModelConfig, part: Part) -> Path:
    """The folder of the checkpoint on this node. Blocks while it is fetched. Raises CheckpointError."""
    scheme, separator, name = config.path.partition("://")
    if not separator:
        folder = Path(config.path).expanduser()
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"model.path={config.path}: no config.json is there on this node",
                                  fix="give a Hugging Face folder that every node can read, or hf://owner/name")
        return folder
    if scheme == "hf":
        return _fetch_from_hugging_face(name, config.revision, part)
    if scheme == "modelscope":
        return _fetch_from_modelscope(name, config.revision, part)
    raise CheckpointError(f"model.path={config.path} has the unknown scheme {scheme!r}",
                          fix="write a folder, hf://owner/name or modelscope://owner/name")


def _fetch_from_hugging_face(name: str, revision: str | None, part: Part) -> Path:
    from huggingface_hub import snapshot_download

    ignored = list(_WEIGHTS if part == "facts" else _NEVER)
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except Exception as error:      # the library raises errors of many packages: network, disk, authentication
        raise CheckpointError(f"{name} could not be fetched from the Hugging Face hub: {error}",
                              fix="check its name, the network, and HF_ENDPOINT or HF_TOKEN") from error


def _fetch_from_modelscope(name: str, revision: str | None, part: Part) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise CheckpointError(f"modelscope://{name} needs the package modelscope",
                              fix="install it on every node: pip install modelscope") from error
    ignored = list(_WEIGHTS if part == "facts" else _NEVER)
    try:
        return Path(snapshot_download(name, revision=revision, ignore_file_pattern=ignored))
    except Exception as error:      # as above
        raise CheckpointError(f"{name} could not be fetched from ModelScope: {error}",
                              fix="check its name and the network") from error
