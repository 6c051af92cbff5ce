"""The one check of token ids, at doors and shards. Pure."""

from __future__ import annotations

from collections.abc import Collection

from serving.errors import InvalidRequestError


def check_token_ids(param: str, token_ids: Collection[int], num_embeddings: int) -> None:
    """Raise InvalidRequestError for an id that the model has no embedding of."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= num_embeddings):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < num_embeddings)
        raise InvalidRequestError(f"{param} holds the token id {wrong}, which is not of this model",
                                  fix=f"token ids are 0 to {num_embeddings - 1}", param=param)
