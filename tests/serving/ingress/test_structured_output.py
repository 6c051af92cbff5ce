"""Output formats: which fields become which grammar, and what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

from serving.sampling_params import MAX_GRAMMAR_CHARACTERS
from tests.serving.ingress.conftest import FakeService

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                          "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
DEEP: Any = {"type": "object"}
for _ in range(25):
    DEEP = {"items": DEEP}


def accepts(service: FakeService, text: str) -> bool:
    """Return whether the grammar of the last request takes the whole text."""
    tokenizer = LLTokenizer(service.tokenizer.to_json(), eos_token=list(service.tokenizer.eos_token_ids))
    matcher = LLMatcher(tokenizer, service.requests[-1].params.grammar)
    ids = service.tokenizer.encode(text, add_special_tokens=False)
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


@pytest.mark.parametrize(("change", "good", "bad"), [
    ({"response_format": FORMAT}, '{"a": 3}', '{"a": "x"}'),
    ({"response_format": {"type": "json_object"}}, '{"x": [1, null]}', "[1]"),
    ({"structured_outputs": {"json": SCHEMA}}, '{"a": 3}', "{}"), ({"guided_json": SCHEMA}, '{"a": 3}', "{}"),
    ({"guided_json": '{"type": "integer"}'}, "17", '"17"'), ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"structured_outputs": {"regex": "[ab]{2}"}}, "ab", "abc"), ({"guided_regex": "h(e|a)llo"}, "hallo", "hillo"),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'n"o', "ye"), ({"guided_choice": ["你好"]}, "你好", "你"),
    ({"guided_grammar": 'start: "x" start | "y"'}, "xxy", "xx"),
    ({"structured_outputs": {"grammar": 'start: /[0-9]+/', "regex": None, "backend": "any"}}, "12", "a")])
async def test_a_format_becomes_a_grammar(http: httpx.AsyncClient, service: FakeService, change: dict[str, Any],
                                          good: str, bad: str) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT | change)
    assert response.status_code == 200, response.text
    assert accepts(service, good) and not accepts(service, bad)


async def test_completions_have_formats_too(http: httpx.AsyncClient, service: FakeService) -> None:
    for change in ({"guided_regex": "[ab]{2}"}, {"response_format": {"type": "json_object"}}):
        response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "hi"} | change)
        assert response.status_code == 200 and accepts(service, "ab" if "guided_regex" in change else "{}")
    refused = await http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "guided_regex": "("})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "guided_regex"


async def test_the_clients_parse(client: openai.AsyncOpenAI, service: FakeService) -> None:
    class Answer(BaseModel):
        a: int

    service.says = '{"a": 3}'
    parsed = await client.chat.completions.parse(**CHAT, response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(a=3) and accepts(service, '{"a":3}')
    async with client.chat.completions.stream(**CHAT, response_format=Answer) as stream:
        assert (await stream.get_final_completion()).choices[0].message.parsed == Answer(a=3)


async def test_text_has_no_grammar(http: httpx.AsyncClient, service: FakeService) -> None:
    for change in ({"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"guided_json": None},
                   {"structured_outputs": {"json_object": False}}):
        assert (await http.post("/v1/chat/completions", json=CHAT | change)).status_code == 200
        assert service.requests[-1].params.grammar == ""


@pytest.mark.parametrize(("change", "param"), [
    ({"response_format": {"type": "xml"}}, "response_format"), ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}}, "response_format"),
    ({"guided_json": "{"}, "guided_json"), ({"guided_json": DEEP}, "guided_json"),
    ({"guided_json": {"enum": [["a"] * 1000] * 5}}, "guided_json"), ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "a" * (MAX_GRAMMAR_CHARACTERS + 1)}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"), ({"guided_grammar": "start: nothing"}, "guided_grammar"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": "b"}}, "structured_outputs"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"), ({"guided_regex": "a", "min_tokens": 3}, "min_tokens")])
async def test_refusals_name_the_field(http: httpx.AsyncClient, service: FakeService, change: dict[str, Any],
                                       param: str) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT | change)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600 and service.requests == []
