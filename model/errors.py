"""Names the errors of the tensor layer. Every one says what was wrong, with the value, and how to fix it.

ModelError
├── CheckpointError        a folder, index or config that cannot be read
│   ├── UnknownArchitectureError
│   ├── UnsupportedFieldError   a config field that would change the result and is not implemented
│   └── TensorError             missing, extra, wrong-shaped, truncated or non-finite tensors
├── OutOfMemoryError       a budget that cannot hold what it must
├── GrammarError           a grammar that this model's tokenizer cannot be held to
└── GroupError             a collective that failed or timed out: the epoch is over
"""

from __future__ import annotations


class ModelError(Exception):
    """Is the base of all errors of `model/`. `fix` says what to do about it."""

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(f"{message}. {fix}" if fix else message)
        self.message = message
        self.fix = fix


class CheckpointError(ModelError):
    pass


class UnknownArchitectureError(CheckpointError):
    pass


class UnsupportedFieldError(CheckpointError):
    pass


class TensorError(CheckpointError):
    pass


class OutOfMemoryError(ModelError):
    pass


class GrammarError(ModelError):
    pass


class GroupError(ModelError):
    pass
