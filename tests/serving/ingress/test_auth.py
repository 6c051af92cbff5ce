"""A key opens the door by either header, and names the tenant."""

from __future__ import annotations

import itertools
import logging
import time

import grpc
import httpx
import pytest

from serving.config import RouterConfig
from serving.errors import UnauthorizedError
from serving.ingress.auth import choose_tenant, key_of_headers
from serving.ingress.grpc.server import build_grpc_server
from serving.ingress.http.app import HttpParts, build_http_app
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc
from serving.tenants.key import Scope, Tenant
from serving.tenants.key_ring import KeyRing
from serving.text.tokenizer import Tokenizer
from tests.serving.ingress.conftest import FakeService
from tests.serving.tenants.keys import new_key


def test_a_key_may_come_in_either_header() -> None:
    ring, (key, secret) = KeyRing(lambda: 1500.0), new_key()
    ring.set_keys([key])
    assert key_of_headers(f"Bearer {secret}", None, ring, Scope.INFER) is key
    assert key_of_headers(None, secret, ring, Scope.INFER) is key
    for headers in ((None, None), (None, ""), ("", secret), ("Bearer wrong", secret)):
        with pytest.raises(UnauthorizedError):
            key_of_headers(*headers, ring, Scope.INFER)


def test_a_key_counts_over_what_a_client_says() -> None:
    key, _ = new_key(tenant="team")
    assert key_of_headers("Bearer x", None, None, Scope.INFER) is None
    assert choose_tenant(None, "ada") == Tenant("ada") and choose_tenant(None, None) == Tenant("default")
    assert choose_tenant(key, "ada") == Tenant("team", key)


async def test_no_key_is_ever_told_or_logged(service: FakeService, tokenizer: Tokenizer,
                                             caplog: pytest.LogCaptureFixture) -> None:
    """Right and wrong ones, by both doors, in answers, refusals and faults."""
    caplog.set_level(logging.DEBUG)
    made = [new_key("right"), new_key("status", scopes=frozenset({Scope.STATUS})), new_key("old", expires_s=1.0)]
    ring, told = KeyRing(time.time), ""
    ring.set_keys([key for key, _ in made])
    texts = [*(text for _, text in made), new_key()[1], f"{made[0][1][:-1]}.", "sk-proj-of-another-service"]
    app = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"), parts=HttpParts(keys=ring))
    server = build_grpc_server(service, tokenizer, ring)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    service.error, service.num_before_error = RuntimeError("boom"), 2
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http, \
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for text in texts:
            for path, header in itertools.product(
                    ("/v1/completions", "/v1/messages", "/metrics", "/nothing"),
                    ({"authorization": f"Bearer {text}"}, {"authorization": text}, {"x-api-key": text})):
                answer = await http.post(path, json={"model": "tiny", "prompt": "hi"}, headers=header)
                told += f"{answer.headers}{answer.text}"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for part in stub.Generate(pb.GenerateRequest(text="hi"), timeout=60,
                                                metadata=(("authorization", f"Bearer {text}"),)):
                    told += str(part)
            told += f"{caught.value}"
    await server.stop(grace=None)
    assert "request_failed" in caplog.text and "invalid_api_key" in told
    for text in texts:
        assert text not in told and text not in caplog.text and text.rpartition("-")[2] not in told + caplog.text
