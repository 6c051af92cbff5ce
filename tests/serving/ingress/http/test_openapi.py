"""The description names every path, and nothing that is sent by it ends in a fault of ours."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from starlette.applications import Starlette
from starlette.routing import Route

from serving.batches.stores import BatchStores
from serving.config import RouterConfig
from serving.ingress.http.app import HttpParts, build_http_app
from serving.ingress.http.openapi import OPERATIONS, describe
from serving.text.tokenizer import Tokenizer
from tests.serving.ingress.conftest import FakeService

FITS, BREAKS = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


def test_every_path_of_the_app_is_described(app: Starlette) -> None:
    served = {(method.lower(), route.path.replace(":path", "")) for route in app.routes if isinstance(route, Route)
              for method in route.methods or () if method != "HEAD"}
    assert served == {(operation.method, operation.path) for operation in OPERATIONS}


async def test_it_is_a_page_and_a_file(http: httpx.AsyncClient) -> None:
    assert (await http.get("/openapi.json")).json() == describe(version("moesaic"))
    page = await http.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "/v1/messages/count_tokens" in page.text


def test_nothing_that_is_sent_by_it_is_a_fault(plain_tokenizer: Tokenizer, stores: BatchStores) -> None:
    """Bodies of the types to the model that is served, and where making such takes no seconds, others too."""
    app = build_http_app(FakeService(plain_tokenizer), plain_tokenizer, RouterConfig(), lambda: (b"", "text/plain"),
                         parts=HttpParts(stores=stores))
    found = [result.ok() for result in schemathesis.openapi.from_dict(describe("1")).get_all_operations()]
    assert len(found) == len(OPERATIONS)
    for operation in found:
        check(app, operation.as_strategy(generation_mode=FITS))
        if operation.path in ("/v1/completions", "/v1/responses", "/detokenize"):
            check(app, operation.as_strategy(generation_mode=BREAKS))


def check(app: Starlette, cases: Any) -> None:
    @settings(max_examples=4, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(cases)
    def run(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"
        response = case.call(app=app)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"] and error["type"] and error["code"]
    run()
