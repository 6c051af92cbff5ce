"""The HTTP door through its ASGI interface, in front of a fake service."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.types import Message

from serving.config import RouterConfig
from serving.errors import OverloadedError, QuotaExceededError
from serving.ingress.http import request as http_request
from serving.ingress.http.app import HttpParts, build_http_app
from serving.tenants.key import Scope, Tenant
from serving.tenants.key_ring import KeyRing
from serving.text.tokenizer import Tokenizer
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import ANSWER, FakeService
from tests.serving.tenants.keys import new_key

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
TEXT = {"model": "tiny", "prompt": "hello world", "temperature": 0, "max_tokens": 100}


async def events(http: httpx.AsyncClient, path: str, body: dict[str, object]) -> list[dict[str, object]]:
    """All events of a stream; its [DONE] is checked."""
    response = await http.post(path, json=body | {"stream": True})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def refused(http: httpx.AsyncClient, path: str, body: object, status: int = 400) -> dict[str, str | None]:
    response = await http.post(path, json=body)
    assert response.status_code == status, response.text
    error: dict[str, str | None] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


async def test_chat_answers(http: httpx.AsyncClient, service: FakeService) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "abc-1"})
    answer = response.json()
    assert response.headers["x-request-id"] == "abc-1" and answer["id"] == "chatcmpl-abc-1"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": f"0{ANSWER}", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["object"] == "chat.completion"
    num_prompt = len(service.requests[0].prompt_token_ids)
    num_generated = answer["usage"]["completion_tokens"]
    assert answer["usage"] == {"prompt_tokens": num_prompt, "completion_tokens": num_generated,
                               "total_tokens": num_prompt + num_generated,
                               "prompt_tokens_details": {"cached_tokens": 3}}
    assert service.requests[0].request_id.startswith("abc-1-") and service.num_closed == 1


async def test_the_template_writes_the_prompt(http: httpx.AsyncClient, service: FakeService,
                                              tokenizer: Tokenizer) -> None:
    messages = [{"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    await http.post("/v1/chat/completions", json=CHAT | {"messages": messages})
    assert tokenizer.decode(service.requests[0].prompt_token_ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n")


async def test_chat_streams_role_text_finish_and_usage(http: httpx.AsyncClient) -> None:
    chunks = await events(http, "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}, "n": 2})
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == f"{index}{ANSWER}"
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
        assert all("\ufffd" not in choice["delta"].get("content", "") for choice in choices)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 20
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_no_usage_chunk_unless_asked(http: httpx.AsyncClient) -> None:
    assert all(chunk["choices"] for chunk in await events(http, "/v1/chat/completions", CHAT))


@pytest.mark.parametrize("stop", ["你", ["xyz", "你"]])
async def test_stop_strings_cut_the_text(http: httpx.AsyncClient, stop: object) -> None:
    choice = (await http.post("/v1/chat/completions", json=CHAT | {"stop": stop})).json()["choices"][0]
    assert choice["message"]["content"] == "0Hello " and choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "你"


async def test_chat_logprobs_name_bytes(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 2,
                                                                   "return_token_ids": True})).json()
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == f"0{ANSWER}"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert answer["prompt_token_ids"]


async def test_streamed_logprobs_cover_every_token(http: httpx.AsyncClient) -> None:
    chunks = await events(http, "/v1/chat/completions", CHAT | {"logprobs": True, "return_token_ids": True})
    entries = [entry for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]
               for entry in choice["logprobs"]["content"]]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == f"0{ANSWER}"
    assert len(entries) == sum(len(choice["token_ids"] or []) for chunk in chunks for choice in chunk["choices"])
    assert chunks[0]["prompt_token_ids"] and not chunks[1]["prompt_token_ids"]


async def test_chat_prompt_logprobs_have_vllms_shape(http: httpx.AsyncClient, service: FakeService) -> None:
    answer = (await http.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 1})).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"] and answer["prompt_logprobs"][0] is None
    token_id = str(service.requests[0].prompt_token_ids[1])
    assert answer["prompt_logprobs"][1][token_id] == {"logprob": -0.5, "rank": 1, "decoded_token": "u"}


async def test_completions_answer_and_default_to_sixteen_tokens(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "temperature": 0})).json()
    assert answer["object"] == "text_completion" and answer["usage"]["completion_tokens"] == 16


async def test_several_prompts_and_choices_are_ordered(http: httpx.AsyncClient, service: FakeService) -> None:
    answer = (await http.post("/v1/completions", json=TEXT | {"prompt": ["a", "bb"], "n": 2})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in answer["choices"]] == ["0", "1", "0", "1"]
    assert answer["usage"]["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in service.requests)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6 and service.num_closed == 2


async def test_several_prompts_stream(http: httpx.AsyncClient) -> None:
    chunks = await events(http, "/v1/completions", TEXT | {"prompt": ["a", "bb"], "echo": True})
    for index, prompt in enumerate(["a", "bb"]):
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)
        assert text == f"{prompt}0{ANSWER}"


@pytest.mark.parametrize("as_list", [False, True])
async def test_token_id_prompts(http: httpx.AsyncClient, service: FakeService, as_list: bool) -> None:
    body = TEXT | {"prompt": [[5, 6, 7]] if as_list else [5, 6, 7], "echo": True, "return_token_ids": True}
    choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert service.requests[0].prompt_token_ids == (5, 6, 7) and choice["prompt_token_ids"] == [5, 6, 7]
    assert choice["text"] == service.tokenizer.decode([5, 6, 7]) + f"0{ANSWER}"


@pytest.mark.parametrize("streams", [False, True])
async def test_echo_with_logprobs_scores_the_prompt(http: httpx.AsyncClient, streams: bool) -> None:
    body = TEXT | {"echo": True, "logprobs": 1, "prompt": "hello 你好 x"}
    if streams:
        choices = [choice for chunk in await events(http, "/v1/completions", body) for choice in chunk["choices"]]
    else:
        choices = (await http.post("/v1/completions", json=body)).json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    assert text == f"hello 你好 x0{ANSWER}"
    scores = {key: [value for choice in choices for value in choice["logprobs"][key]] for key in choices[0]["logprobs"]}
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert len({len(values) for values in scores.values()}) == 1
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)


async def test_echo_with_no_tokens_only_scores(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/completions", json=TEXT | {"echo": True, "logprobs": 0, "max_tokens": 0})).json()
    choice = answer["choices"][0]
    assert choice["text"] == "hello world" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_models(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list" and listed["data"][0]["max_model_len"] == 256
    assert (await http.get("/v1/models/tiny")).json() == listed["data"][0]
    assert (await http.get("/v1/models/other/one")).json()["error"]["code"] == "model_not_found"
    assert (await http.get("/v1/models/")).json() == listed


async def test_tokenize_and_detokenize(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    tokenized = (await http.post("/tokenize", json={"prompt": "hello 你好", "return_token_strs": True})).json()
    assert tokenized["tokens"] == tokenizer.encode("hello 你好") and tokenized["count"] == len(tokenized["tokens"])
    assert len(tokenized["token_strs"]) == tokenized["count"] and tokenized["max_model_len"] == 256
    assert (await http.post("/detokenize", json={"model": "tiny", "tokens": tokenized["tokens"]})).json() == {
        "prompt": "hello 你好"}
    chat = (await http.post("/tokenize", json={"messages": CHAT["messages"]})).json()
    assert tokenizer.decode(chat["tokens"], False).startswith("<|im_start|>user\nhi")
    await refused(http, "/tokenize", {"model": "tiny"})
    assert (await refused(http, "/tokenize", {"messages": CHAT["messages"], "add_special_tokens": True}))["param"] == (
        "add_special_tokens")
    assert (await http.post("/tokenize", json={"prompt": "a", "model": None, "messages": None, "tools": None,
                                               "chat_template": None, "return_token_strs": None})).status_code == 200
    assert (await refused(http, "/detokenize", {"tokens": [10**6]}))["param"] == "tokens"


async def test_health_follows_the_service(http: httpx.AsyncClient, service: FakeService) -> None:
    assert (await http.get("/health")).status_code == 200
    service.ready = False
    assert (await http.get("/health")).status_code == 503
    error = await refused(http, "/v1/chat/completions", CHAT, status=503)
    assert error["code"] == "not_ready"


async def test_metrics_and_version(http: httpx.AsyncClient) -> None:
    metrics = await http.get("/metrics")
    assert metrics.text == "moesaic:up 1\n" and metrics.headers["content-type"] == CONTENT_TYPE_LATEST
    assert (await http.get("/version")).json()["version"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"model": "tiny", "messages": }', b"null",
                                     b'{"model":"tiny","prompt":"\\ud800"}', b"[" * 100_000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_malformed_bodies_get_an_error_object(http: httpx.AsyncClient, path: str, content: bytes) -> None:
    response = await http.post(path, content=content)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("change", "param"), [
    ({"model": None}, "model"), ({"model": 1}, "model"), ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
    ({"temperature": "hot"}, "temperature"), ({"temperature": 3}, "temperature"),
    ({"temperature": True}, "temperature"), ({"top_p": -0.1}, "top_p"), ({"n": 0}, "n"), ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"stop": 1}, "stop"), ({"stop": ["a", 1]}, "stop"), ({"stop": [""]}, "stop[0]"), ({"seed": 2**70}, "seed"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"), ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"), ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": 2}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"), 
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"unheard_of": 1}, "unheard_of"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"min_tokens": 5, "max_tokens": 2}, None)])
async def test_wrong_fields_are_named(http: httpx.AsyncClient, service: FakeService, change: dict[str, object],
                                      param: str | None) -> None:
    assert (await refused(http, "/v1/chat/completions", CHAT | change))["param"] == param
    assert service.requests == []


@pytest.mark.parametrize(("change", "param"), [
    ({"response_format": {"type": "grammar"}}, "response_format"), ({"audio": {}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"), ({"prediction": {"type": "content"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"), ({"functions": [{}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"), ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),        # the template knows none
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type")])
async def test_unsupported_fields_are_refused_by_name(http: httpx.AsyncClient, change: dict[str, object],
                                                      param: str) -> None:
    error = await refused(http, "/v1/chat/completions", CHAT | change)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


async def test_harmless_fields_are_accepted(http: httpx.AsyncClient) -> None:
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
                "parallel_tool_calls": True, "safety_identifier": "s", "prompt_cache_key": "k",
                "tools": [{"type": "function"}], "tool_choice": "none", "response_format": {"type": "text"},
                "modalities": ["text"],
                "top_k": -1, "seed": None, "stop": None, "logprobs": False, "frequency_penalty": 0, "audio": None}
    response = await http.post("/v1/chat/completions", json=CHAT | harmless)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("change", "param"), [
    ({"best_of": 3}, "best_of"), ({"suffix": "x"}, "suffix"), ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"), ({"prompt": [1, "a"]}, "prompt[1]"), ({"prompt": {}}, "prompt"),
    ({"prompt": [100_000]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"logprobs": True}, "logprobs"),
    ({"messages": []}, "messages")])
async def test_wrong_completion_fields_are_named(http: httpx.AsyncClient, change: dict[str, object],
                                               param: str) -> None:
    error = await refused(http, "/v1/completions", TEXT | change)
    assert str(error["param"]).startswith(param.split("[")[0])


async def test_what_cannot_fit_is_refused(http: httpx.AsyncClient) -> None:
    for path, body, param in [
            ("/v1/completions", TEXT | {"prompt": [5] * 256}, "prompt"),
            ("/v1/completions", TEXT | {"max_tokens": 999}, "max_tokens"),
            ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "word " * 3000}]}, "messages")]:
        error = await refused(http, path, body)
        assert (error["code"], error["param"]) == ("context_length_exceeded", param) and "256" in str(error["message"])


async def test_unknown_model_path_and_method(http: httpx.AsyncClient) -> None:
    assert (await refused(http, "/v1/chat/completions", CHAT | {"model": "gpt-4"}, 404))["code"] == "model_not_found"
    assert (await refused(http, "/v1/nothing", {}, 404))["code"] == "not_found"
    response = await http.get("/v1/chat/completions")
    assert response.status_code == 405 and response.json()["error"]["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


async def test_a_trailing_slash_changes_nothing(http: httpx.AsyncClient) -> None:
    for path, body in (("/v1/chat/completions/", CHAT), ("/v1/completions//", TEXT), ("/tokenize/", {"prompt": "a"})):
        assert (await http.post(path, json=body)).status_code == 200
    assert (await http.get("/v1/models/tiny/")).json()["id"] == "tiny"
    assert (await http.get("/health/")).status_code == 200 and (await http.get("/")).status_code == 404


@pytest.mark.parametrize(("method", "path", "status", "says"), [
    ("OPTIONS", "/v1/chat/completions", 405, "Use POST"), ("PUT", "/v1/models", 405, "Use GET, HEAD"),
    ("DELETE", "/v1/models/tiny", 405, "Use GET, HEAD"), ("POST", "/v2/chat", 404, "/v1/chat/completions"),
    ("GET", "/", 404, "nothing at /")])
async def test_wrong_doors_answer_in_the_apis_shape(http: httpx.AsyncClient, method: str, path: str, status: int,
                                                    says: str) -> None:
    response = await http.request(method, path, headers={"x-request-id": "r7"})
    error = response.json()["error"]
    assert response.status_code == status and says in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert response.headers.get_list("x-request-id") == ["r7"]
    assert (await http.head("/v1/chat/completions")).status_code == 405
    assert (await http.head("/v1/models")).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
async def test_json_in_other_encodings_is_read(http: httpx.AsyncClient, service: FakeService, encoding: str) -> None:
    for prompt in ("你好", "你好" * 20_000):       # the long one is read beside the loop
        content = json.dumps({"model": "tiny", "prompt": prompt}, ensure_ascii=False).encode(encoding)
        response = await http.post("/v1/completions", content=content,
                                   headers={"content-type": "application/json; charset=" + encoding})
        assert response.status_code == 200 or "context length" in response.text
    assert service.tokenizer.decode(service.requests[0].prompt_token_ids) == "你好"


async def test_broken_and_compressed_bodies_say_so(http: httpx.AsyncClient) -> None:
    for content in (b"{\x00\x00", b"\xff\xfe\x00\xd8", b"\x00\x00\xfe\xff1"):
        response = await http.post("/v1/completions", content=content)
        assert response.status_code == 400 and response.json()["error"]["message"]
    response = await http.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert response.status_code == 415 and "uncompressed" in response.json()["error"]["message"]
    response = await http.post("/v1/completions", json=TEXT, headers={"content-encoding": ""})
    assert response.status_code == 200


async def test_an_answer_about_many_tokens_is_written_in_a_thread(
        http: httpx.AsyncClient, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, decode = [], tokenizer.decode

    def note(*args: object, **options: object) -> str:
        threads.append(threading.current_thread())
        return decode(*args, **options)     # type: ignore[arg-type]
    monkeypatch.setattr(tokenizer, "decode", note)
    for number in (10, 60_000):
        response = await http.post("/detokenize", json={"tokens": [300] * number})
        assert response.json()["prompt"] == tokenizer.token_text(300) * number
    assert (threads[0] is threading.main_thread(), threads[1] is threading.main_thread()) == (True, False)


async def test_a_length_of_thousands_of_digits_is_too_long(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", content=b"{}", headers={"content-length": "9" * 5000})
    assert response.status_code == 413


async def test_pages_of_named_origins_may_ask(service: FakeService, tokenizer: Tokenizer, http: httpx.AsyncClient
                                              ) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type"}
    assert (await http.options("/v1/chat/completions", headers=asks)).status_code == 405        # off
    for origins, others in ((("https://a.example",), None), (("*",), "*")):
        config = RouterConfig(cors_origins=origins)
        app = build_http_app(service, tokenizer, config, lambda: (b"", "text/plain"),
                             parts=HttpParts(keys=KeyRing(time.time)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as page:
            allowed = await page.options("/v1/chat/completions", headers=asks)      # browsers send no key with it
            assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == origins[0]
            assert "authorization" in allowed.headers["access-control-allow-headers"]
            refusal = await page.post("/v1/chat/completions/", json=CHAT, headers=asks)
            assert refusal.status_code == 401 and refusal.headers["access-control-allow-origin"] == origins[0]
            assert "x-request-id" in refusal.headers["access-control-expose-headers"]
            other = await page.get("/health", headers={"origin": "https://b.example"})
            assert other.headers.get("access-control-allow-origin") == others


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://a.example/page", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="cors_origins"):
        RouterConfig(cors_origins=(origin,))


async def test_a_body_too_large_is_not_read(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_request, "MAX_BODY_BYTES", 1000)
    error = await refused(http, "/v1/completions", TEXT | {"prompt": "x" * 1000}, 413)
    assert error["code"] == "request_too_large"


async def test_a_body_that_does_not_come_is_not_waited_for(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    monkeypatch.setattr(http_request, "BODY_TIMEOUT_S", 0.001)

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()
    response = await http.post("/v1/completions", content=endless())
    assert response.status_code == 408 and response.json()["error"]["code"] == "request_timeout"
    assert response.headers["connection"] == "close"


async def test_whole_numbers_may_be_written_with_a_point(http: httpx.AsyncClient, service: FakeService) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        given = {"max_tokens": 16.0, "n": 2.0, "seed": -3.0, "top_k": 1e1, "min_tokens": 0.0}
        assert (await http.post(path, json=body | given)).status_code == 200
        params = service.requests[-1].params
        assert (params.max_tokens, params.n, params.seed, params.top_k) == (16, 2, -3, 10)
    assert (await refused(http, "/v1/completions", TEXT | {"max_tokens": 16.5}))["param"] == "max_tokens"
    assert (await refused(http, "/v1/completions", TEXT | {"max_tokens": 1e300}))["param"] == "max_tokens"


async def test_a_prefix_may_be_there_or_not(service: FakeService, tokenizer: Tokenizer) -> None:
    app = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"), route_prefix="/moe/")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for path in ("/moe/v1/models", "/v1/models", "/moe/v1/models/", "/moe/health"):
            assert (await http.get(path)).status_code == 200, path
        for path in ("/moe", "/moev1/models", "/moe/moe/health"):
            assert (await http.get(path)).status_code == 404, path
    behind_proxy = httpx.ASGITransport(app, root_path="/moe")       # as Ray Serve says it
    async with httpx.AsyncClient(transport=behind_proxy, base_url="http://test") as http:
        assert (await http.get("/moe/v1/models")).status_code == 200


async def test_a_long_body_is_parsed_beside_the_loop(http: httpx.AsyncClient) -> None:
    error = await refused(http, "/v1/completions", TEXT | {"prompt": "x" * 200_000})
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("streams", [False, True])
async def test_overload_says_when_to_come_back(http: httpx.AsyncClient, service: FakeService, streams: bool) -> None:
    service.error = OverloadedError("the queue is full", retry_after_s=2.5)
    response = await http.post("/v1/chat/completions", json=CHAT | {"stream": streams}, headers={"x-request-id": "r1"})
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "rate_limit_exceeded" and response.headers["x-request-id"] == "r1"


async def test_an_error_in_the_middle_of_a_stream_is_an_event(http: httpx.AsyncClient, service: FakeService) -> None:
    service.error, service.num_before_error = RuntimeError("secret"), 3
    response = await http.post("/v1/completions", json=TEXT | {"stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.status_code == 200 and "secret" not in response.text and "[DONE]" not in response.text
    assert json.loads(lines[-1])["error"]["code"] == "internal_error" and len(lines) == 4


async def test_one_failed_prompt_cancels_the_others(http: httpx.AsyncClient, service: FakeService) -> None:
    service.error, service.num_before_error = OverloadedError("full", retry_after_s=1), 2
    assert (await http.post("/v1/completions", json=TEXT | {"prompt": ["a", "b", "c"]})).status_code == 429
    assert service.num_closed == len(service.requests)


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
async def test_api_keys(service: FakeService, tokenizer: Tokenizer, header: str) -> None:
    keys, (key, secret), (scraper, scrapers_secret) = KeyRing(time.time), new_key(), new_key(
        scopes=frozenset({Scope.STATUS}))
    keys.set_keys([key, scraper])
    prefix = "Bearer " if header == "authorization" else ""
    app = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"), parts=HttpParts(keys=keys))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert (await http.get("/health")).status_code == (await http.get("/version")).status_code == 200
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/metrics", headers={header: prefix + secret})).status_code == 403
        assert (await http.get("/metrics", headers={header: prefix + scrapers_secret})).status_code == 200
        forbidden = await http.post("/v1/chat/completions", json=CHAT, headers={header: prefix + scrapers_secret})
        assert forbidden.status_code == 403 and forbidden.json()["error"]["code"] == "insufficient_permissions"
        refusal = await http.get("/v1/models")
        assert refusal.status_code == 401 and refusal.json()["error"]["code"] == "invalid_api_key"
        assert (await http.post("/tokenize", json={"prompt": "x"})).status_code == 401
        headers = {header: prefix + secret}
        assert (await http.post("/v1/chat/completions", json=CHAT | {"user": "u"}, headers=headers)).status_code == 200
    assert service.requests[0].tenant == Tenant("team", key)


@pytest.mark.parametrize("stream", [False, True])
async def test_rates_are_told_with_answers_and_refusals(service: FakeService, tokenizer: Tokenizer, stream: bool
                                                        ) -> None:
    keys, (key, secret) = KeyRing(time.time), new_key()
    keys.set_keys([key])
    app = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"), parts=HttpParts(
        keys=keys, rates=lambda key: {"x-ratelimit-remaining-requests": str(9 - len(service.requests))}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        async def ask() -> httpx.Response:
            return await http.post("/v1/chat/completions", json=CHAT | {"stream": stream},
                                   headers={"authorization": f"Bearer {secret}"})
        answer = await ask()
        assert answer.status_code == 200 and answer.headers["x-ratelimit-remaining-requests"] == "8"
        service.error = QuotaExceededError("no tokens are left", retry_after_s=7200.5)
        refusal = await ask()
        assert refusal.status_code == 429 and refusal.json()["error"]["code"] == "insufficient_quota"
        assert refusal.headers["retry-after"] == "7201" and refusal.headers["x-ratelimit-remaining-requests"] == "7"
        assert "x-ratelimit-remaining-requests" not in (await http.post("/v1/chat/completions", json=CHAT)).headers


async def test_the_user_is_the_tenant_without_keys(http: httpx.AsyncClient, service: FakeService) -> None:
    await http.post("/v1/completions", json=TEXT | {"user": "ada"})
    assert service.requests[0].tenant == Tenant("ada")


async def test_a_priority_comes_with_a_body(http: httpx.AsyncClient, service: FakeService) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT),
                       ("/v1/responses", {"model": "tiny", "input": "hi"}),
                       ("/v1/messages", CHAT | {"max_tokens": 4})):
        for given in (-3, None):
            answer = await http.post(path, json=body | {"priority": given})
            assert answer.status_code == 200 and service.requests[-1].priority == given, answer.text


async def test_the_header_of_a_trace_goes_on_to_the_service(http: httpx.AsyncClient, service: FakeService) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT | {"request_id": "other"}),
                       ("/v1/responses", {"model": "tiny", "input": "hi"}),
                       ("/v1/messages", CHAT | {"max_tokens": 4})):
        for headers in ({"traceparent": "00-ab-cd-01"}, {}):
            answer = await http.post(path, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            assert service.requests[-1].traceparent == headers.get("traceparent", "")


async def test_defaults_come_from_the_checkpoint(http: httpx.AsyncClient, service: FakeService) -> None:
    await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "top_k": -1, "top_p": 1, "temperature": 1})
    first, second = (request.params for request in service.requests)
    assert (first.temperature, first.top_p, first.top_k) == (0.7, 0.8, 20)
    assert (second.temperature, second.top_p, second.top_k) == (1.0, 1.0, None)


async def test_everything_asked_reaches_the_service(http: httpx.AsyncClient, service: FakeService) -> None:
    asked = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
             "repetition_penalty": 1.1, "seed": -7, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [9],
             "include_stop_str_in_output": True, "skip_special_tokens": False, "max_tokens": 7}
    await http.post("/v1/completions", json=TEXT | asked | {"logit_bias": {"5": -100}, "stop": "x", "logprobs": 3})
    params = service.requests[0].params
    assert {name: getattr(params, name) for name in asked} == asked | {"stop_token_ids": (9,)}
    assert (params.logit_bias, params.stop, params.logprobs) == ({5: -100.0}, ("x",), 3)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_client_that_leaves_cancels(app: Starlette, service: FakeService, path: str, streams: bool) -> None:
    service.stalls = True
    asked = CHAT if path.endswith("chat/completions") else TEXT | {"prompt": ["a", "b"]}
    body = json.dumps(asked | {"stream": streams})
    sent: list[Message] = []
    body_read = False

    async def receive() -> Message:
        nonlocal body_read
        if not body_read:
            body_read = True
            return {"type": "http.request", "body": body.encode(), "more_body": False}
        await service.started.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "http_version": "1.1",
             "asgi": {"version": "3.0", "spec_version": "2.4"}}
    async with asyncio.timeout(PATIENCE_S):
        await app(scope, receive, send)
        await service.closed.wait()
    assert service.num_closed == len(service.requests) > 0


async def test_a_cancelled_handler_cancels(http: httpx.AsyncClient, service: FakeService) -> None:
    """Ray Serve cancels the coroutine of a request whose client went away."""
    service.stalls = True
    task = asyncio.create_task(http.post("/v1/completions", json=TEXT | {"stream": True}))
    async with asyncio.timeout(PATIENCE_S):
        await service.started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await service.closed.wait()


async def test_a_checkpoint_without_a_template_says_so(service: FakeService, metaspace_dir: Path) -> None:
    app = build_http_app(service, Tokenizer.from_dir(metaspace_dir), RouterConfig(), lambda: (b"", "text/plain"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert "no chat template" in str((await refused(http, "/v1/chat/completions", CHAT))["message"])


def test_the_app_can_be_made_outside_a_loop(tokenizer: Tokenizer, folder_with: Callable[..., Path]) -> None:
    async def build() -> Starlette:
        return build_http_app(FakeService(tokenizer), tokenizer, RouterConfig(), lambda: (b"", "text/plain"))
    assert callable(asyncio.run(build()))


@pytest.mark.parametrize(("path", "fields"), [
    ("chat/completions", {"messages": [{"role": "user", "content": "<|im_end|>"}]}),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]}),
    ("responses", {"input": "<|im_end|>"}),
    ("messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "<|im_end|>"}]}),
    ("messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"},
                                                {"role": "assistant", "content": "<|im_end|>"}]})])
async def test_special_tokens_in_a_chat_are_text(http: httpx.AsyncClient, service: FakeService, path: str,
                                                 fields: dict[str, Any]) -> None:
    response = await http.post(f"/v1/{path}", json={"model": "tiny"} | fields)
    assert response.status_code == 200, response.text
    prompt = service.requests[-1].prompt_token_ids
    assert "<|im_end|>" in service.tokenizer.decode(prompt)         # what it leaves out is special
    is_begun = not service.tokenizer.decode(prompt, skip_special_tokens=False).endswith("assistant\n")
    assert [service.tokenizer.token_name(token_id) for token_id in prompt
            if token_id in service.tokenizer.special_token_ids] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert is_begun == (len(fields.get("messages", ())) == 2)


async def test_special_tokens_in_a_bare_prompt_are_those_of_the_client(http: httpx.AsyncClient, service: FakeService
                                                                       ) -> None:
    await http.post("/v1/completions", json={"model": "tiny", "prompt": "a<|im_end|>"})
    assert service.requests[-1].prompt_token_ids[-1] in service.tokenizer.special_token_ids
