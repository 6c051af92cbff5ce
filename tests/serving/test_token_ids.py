"""Token ids are those that the model has an embedding of."""

from __future__ import annotations

import pytest

from serving.errors import InvalidRequestError
from serving.token_ids import check_token_ids


def test_ids_are_those_of_the_model() -> None:
    check_token_ids("prompt", (), 10)
    check_token_ids("prompt", (0, 9), 10)
    for wrong in (-1, 10):
        with pytest.raises(InvalidRequestError, match=f"prompt holds the token id {wrong}.*0 to 9") as refused:
            check_token_ids("prompt", (3, wrong), 10)
        assert refused.value.param == "prompt"
