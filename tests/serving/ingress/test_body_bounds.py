"""Hostile bodies at the HTTP door: each is the client's error, which names field and bound, and reaches no service."""

from __future__ import annotations

import json

import httpx
import pytest

from serving.ingress.body_bounds import MAX_BODY_BYTES, body_bounds
from serving.ingress.json_reader import read_json
from tests.serving.ingress.conftest import FakeService

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def body(before: str, piece: str, after: str, number: int) -> bytes:
    return (before + piece * number + after).encode()


@pytest.mark.parametrize(("path", "content", "param", "bound"), [
    (COMPLETIONS, body('{"model":"tiny","prompt":[', "{},", "{}]}", 100_000), "prompt", "32768 values"),
    (COMPLETIONS, body('{"model":"tiny","prompt":[', "1,", "1]}", 3_000_000), "prompt", "262144"),
    (COMPLETIONS, body('{"model":"tiny","prompt":[', '"a",', '"a"]}', 2048), "prompt", "2048"),
    (COMPLETIONS, body('{"model":"tiny","n":128,"prompt":[', '"a",', '"a"]}', 40), "n", "4096"),
    (COMPLETIONS, body('{"model":"tiny","prompt":', "[", "", 33), "prompt", "32 levels"),
    (COMPLETIONS, body('{"model":"tiny","prompt":"a","n":128,"stop":"', "ab", '"}', 500_000), "stop", "256 characters"),
    (COMPLETIONS, body('{"model":"tiny","prompt":"a","stop":[', '"a",', '"a"]}', 16), "stop", "16 values"),
    (COMPLETIONS, body('{"model":"tiny","prompt":"a","stop_token_ids":[', "1,", "1]}", 256), "stop_token_ids", "256"),
    (COMPLETIONS, json.dumps({"model": "tiny", "prompt": "a", "logit_bias": {str(i): 0 for i in range(1025)}}).encode(),
     "logit_bias", "1024 fields"),
    (COMPLETIONS, body('{"model":"tiny","prompt":"a","seed":', "9", "}", 100_000), "seed", "40 digits"),
    (COMPLETIONS, b'{"model":"tiny","prompt":"a","prompt":"b"}', "prompt", "twice"),
    (COMPLETIONS, body('{"prompt":"a","model":"', "m", '"}', 257), "model", "256 characters"),
    (COMPLETIONS, body('{"model":"tiny","echo":true,"n":128,"max_tokens":1,"prompt":[', "5,", "5]}", 200), None, ""),
    (CHATS, body('{"model":"tiny","messages":[', '{"role":"user","content":"a"},', '{}]}', 4097), "messages", "4096"),
    (CHATS, body('{"model":"tiny","messages":[{"role":"user","content":[', '{"type":"text"},', "{}]}]}", 1024),
     "messages.content", "1024 values"),
    (CHATS, body('{"model":"tiny","messages":[{"content":"a","role":"', "user", '"}]}', 100), "messages.role", "256"),
    (CHATS, body('{"model":"tiny","messages":[],"chat_template_kwargs":', '{"a":', "1", 40), None, "32 levels"),
    ("/detokenize", body('{"model":"tiny","tokens":[', "1,", "1]}", 70_000), "tokens", "65536 values"),
])
async def test_what_is_too_much_is_refused_by_name(http: httpx.AsyncClient, service: FakeService, path: str,
                                                   content: bytes, param: str | None, bound: str) -> None:
    response = await http.post(path, content=content)
    if not bound:       # within the bound of what an answer may repeat
        assert response.status_code == 200
        return
    error = response.json()["error"]
    assert response.status_code == 400 and bound in error["message"] and len(error["message"]) < 500
    assert param is None or error["param"] == param
    assert service.requests == []


async def test_an_answer_repeats_prompts_within_a_bound(http: httpx.AsyncClient,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.ingress.openai.completions.MAX_REPEATED_TOKENS", 100)
    for field in ("echo", "return_token_ids"):
        asked = {"model": "tiny", "prompt": [5] * 10, "max_tokens": 1, field: True}
        assert (await http.post(COMPLETIONS, json=asked | {"n": 10})).status_code == 200
        response = await http.post(COMPLETIONS, json=asked | {"n": 11})
        assert response.status_code == 400 and response.json()["error"]["param"] == field


def test_a_longer_context_takes_longer_prompts_of_ids() -> None:
    content = body('{"prompt":[', "7,", "7]}", 299_999)
    assert len(read_json(content, body_bounds(300_000))["prompt"]) == 300_000     # type: ignore[arg-type]


async def test_a_text_of_the_largest_body_is_refused_before_it_is_tokenized(http: httpx.AsyncClient) -> None:
    content = body('{"model":"tiny","prompt":"', "~", '"}', MAX_BODY_BYTES - 100)
    error = (await http.post(COMPLETIONS, content=content)).json()["error"]
    assert error["code"] == "context_length_exceeded" and "more than 256 tokens" in error["message"]
