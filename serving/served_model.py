"""A checkpoint and the options that serve it, judged together before anything starts.

The router, `moesaic doctor` and `moesaic up` read a model here, so that what would change answers or refuse requests
is said once and at the start. May import: text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.args import ModelArgs, read_model_args
from serving.config import ModelConfig
from serving.text.tokenizer import Note, Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    args: ModelArgs
    tokenizer: Tokenizer
    max_model_len: int              # tokens of prompt and output of one sequence
    notes: tuple[Note, ...]         # what is not as the files would have it


def read_served_model(folder: Path, config: ModelConfig) -> ServedModel:
    """Read and judge everything but the weights: takes a moment.

    Raises CheckpointError, TokenizerError, ChatTemplateError and ConfigError for what cannot be served as it is.
    """
    args = read_model_args(folder)
    max_model_len = config.context_length(args.context_limit)
    tokenizer = Tokenizer.from_dir(folder)
    return ServedModel(args, tokenizer, max_model_len, tokenizer.notes)
