"""The door of a service with a database."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette

from serving.batches.stores import BatchStores
from serving.config import RouterConfig
from serving.ingress.http.app import HttpParts, build_http_app
from serving.text.tokenizer import Tokenizer
from tests.serving.ingress.conftest import FakeService


@pytest.fixture
def app(service: FakeService, tokenizer: Tokenizer, stores: BatchStores) -> Starlette:
    return build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"),
                          parts=HttpParts(stores=stores))
