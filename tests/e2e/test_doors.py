"""Tests what lies between a client and our app: the router's own HTTP door, and the server of Ray Serve's proxy."""

from __future__ import annotations

import httpx
import pytest

from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service

pytestmark = pytest.mark.multinode
BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 1}
OFFERS = (
    {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAARAAAAAAAIAAAAA"},
    {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "dGhlIHNhbXBsZQ=="})


@pytest.fixture(params=["own", "proxy"])
def url(service: Service, request: pytest.FixtureRequest) -> str:
    return service.url if request.param == "own" else service.proxy_url


def test_answers_have_one_request_id(url: str) -> None:
    for method, path, body in (("POST", "/v1/completions", BODY), ("GET", "/v1/models/", None), ("GET", "/no", None),
                               ("OPTIONS", "/v1/completions", None), ("POST", "/v1/completions", {**BODY, "n": 0}),
                               ("POST", "/v1/completions", {**BODY, "stream": True})):
        for given in ("mine-1", None):
            response = httpx.request(method, url + path, json=body, timeout=PATIENCE_S,
                                     headers={} if given is None else {"x-request-id": given})
            found = response.headers.get_list("x-request-id")
            assert len(found) == 1 and given in (found[0], None), (path, found)
            if response.status_code >= 400:
                assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_offer_of_another_protocol_loses_no_body(url: str) -> None:
    for offer in OFFERS:
        answer = httpx.post(f"{url}/v1/completions", json=BODY, headers=offer, timeout=PATIENCE_S)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1, answer.text


def test_a_byte_order_mark_and_a_trailing_slash(url: str) -> None:
    content = b'\xef\xbb\xbf{"model": "tiny", "prompt": "hello", "max_tokens": 1}'
    answer = httpx.post(f"{url}/v1/completions/", content=content, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
