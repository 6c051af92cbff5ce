"""Every field of OpenAI's and vLLM's API: null says nothing, a neutral value passes, another is refused by name."""

from __future__ import annotations

import typing
from collections.abc import Mapping

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartRefusalParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from pydantic import JsonValue

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.unused_fields import (
    CONTENT_PART_FIELDS,
    MESSAGE_FIELDS,
    REQUEST_FIELDS,
    Unused,
    refuse_unused,
)

CHAT: dict[str, JsonValue] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TEXT: dict[str, JsonValue] = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
# Of vLLM 0.12 and later, protocol.py: what OpenAI's client has no type for. The last lines are of older versions.
VLLM = """
    use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
    ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    prompt_logprobs logprob_token_ids allowed_token_ids bad_words thinking_token_budget include_reasoning echo
    add_generation_prompt continue_final_message add_special_tokens documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_prompt_text return_mm_kwargs cache_salt
    kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval prompt_embeds
    best_of early_stopping guided_choice guided_grammar guided_json guided_regex guided_decoding_backend
    guided_whitespace_pattern structural_tag logits_processors""".split()  # noqa: SIM905


def fields_of(kind: type) -> set[str]:
    return {name for name, hint in typing.get_type_hints(kind, include_extras=True).items()
            if typing.get_origin(hint) is not typing.Required}


def request_fields(path: str) -> list[str]:
    kind = chat_create_params if "chat" in path else completion_create_params
    return sorted({*fields_of(kind.CompletionCreateParamsBase), *fields_of(kind.CompletionCreateParamsNonStreaming),
                   *VLLM} - {"model", "messages", "prompt"})


@pytest.mark.parametrize("path", BODIES)
async def test_null_is_not_said(http: httpx.AsyncClient, path: str) -> None:
    expected = (await http.post(path, json=BODIES[path] | {"temperature": 0})).json()["choices"]
    for name in request_fields(path):
        response = await http.post(path, json=BODIES[path] | {"temperature": 0} | (
            {} if name == "temperature" else {name: None}))
        assert response.status_code == 200, f"{name}: {response.text}"
        if name != "max_tokens":
            assert response.json()["choices"] == expected, name


async def test_a_required_field_that_is_null_is_missing(http: httpx.AsyncClient) -> None:
    for path, name in zip([*BODIES, *BODIES], ["messages", "prompt", "model", "model"], strict=True):
        response = await http.post(path, json=BODIES[path] | {name: None})
        assert response.status_code == 400 and response.json()["error"]["param"] == name
        assert "missing" in response.json()["error"]["message"]


async def test_a_null_inside_of_a_field_is_a_wrong_value(http: httpx.AsyncClient) -> None:
    for change in ({"logit_bias": {"5": None}}, {"stop": [None]}, {"stop_token_ids": [None]}):
        error = (await http.post("/v1/completions", json=TEXT | change)).json()["error"]
        assert str(error["param"]).startswith(next(iter(change))) and "missing" not in error["message"]


@pytest.mark.parametrize("path", BODIES)
async def test_fields_of_the_other_path_say_nothing_as_null(http: httpx.AsyncClient, path: str) -> None:
    other = next(body for where, body in BODIES.items() if where != path)
    for name in set(other) - set(BODIES[path]):
        assert (await http.post(path, json=BODIES[path] | {name: None})).status_code == 200
        assert (await http.post(path, json=BODIES[path] | {name: other[name]})).status_code == 400


@pytest.mark.parametrize("kind", [ChatCompletionSystemMessageParam, ChatCompletionDeveloperMessageParam,
                                  ChatCompletionUserMessageParam, ChatCompletionAssistantMessageParam])
async def test_null_in_a_message_is_not_said(http: httpx.AsyncClient, kind: type) -> None:
    role = typing.get_args(typing.get_type_hints(kind)["role"])[0]
    names = {*fields_of(kind), *MESSAGE_FIELDS, "reasoning", "reasoning_content"} - {"content"}
    message = {"role": role, "content": "hi"} | dict.fromkeys(names)
    response = await http.post("/v1/chat/completions", json=CHAT | {"messages": [message]})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("kind", [ChatCompletionContentPartTextParam, ChatCompletionContentPartRefusalParam])
async def test_null_in_a_content_part_is_not_said(http: httpx.AsyncClient, kind: type) -> None:
    name = typing.get_args(typing.get_type_hints(kind)["type"])[0]
    part = dict.fromkeys({*fields_of(kind), *CONTENT_PART_FIELDS}) | {"type": name, name: "hi"}
    message = {"role": "assistant", "content": [part, {"type": "text", "text": "you"}]}
    response = await http.post("/v1/chat/completions", json=CHAT | {"messages": [message]})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", BODIES)
async def test_null_in_stream_options_is_not_said(http: httpx.AsyncClient, path: str) -> None:
    options = dict.fromkeys({*fields_of(ChatCompletionStreamOptionsParam), "continuous_usage_stats"})
    response = await http.post(path, json=BODIES[path] | {"stream": True, "stream_options": options})
    assert response.status_code == 200 and '"usage":null' in response.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("options", [{}, {"include_usage": False}, {"include_usage": None}])
async def test_stream_options_that_ask_for_nothing_need_no_stream(http: httpx.AsyncClient, path: str,
                                                                  options: dict[str, object]) -> None:
    response = await http.post(path, json=BODIES[path] | {"stream_options": options})
    assert response.status_code == 200, response.text


async def test_functions_that_must_not_be_called_need_not_be_known(http: httpx.AsyncClient) -> None:
    fields = {"functions": [{"name": "f"}], "function_call": "none"}
    assert (await http.post("/v1/chat/completions", json=CHAT | fields)).status_code == 200


@pytest.mark.parametrize("path", BODIES)
async def test_neutral_values_pass_and_others_are_refused_by_name(http: httpx.AsyncClient, path: str) -> None:
    implemented = {"echo", "add_special_tokens"} if path == "/v1/completions" else set()
    for name, field in REQUEST_FIELDS.items():
        for value in (["anything"] if field.never_matters else field.neutral):
            response = await http.post(path, json=BODIES[path] | {name: value})
            assert response.status_code == 200, f"{name}={value}: {response.text}"
        if field.never_matters or name in implemented:
            continue
        error = (await http.post(path, json=BODIES[path] | {name: {"other": 7}})).json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter") and field.fix in error["message"]


@pytest.mark.parametrize("table", [REQUEST_FIELDS, MESSAGE_FIELDS, CONTENT_PART_FIELDS])
def test_the_tables_are_one_rule(table: Mapping[str, Unused]) -> None:
    for name, field in table.items():
        refuse_unused({name: None}, table)
        for value in field.neutral:
            refuse_unused({name: value}, table)
        if not field.never_matters:
            with pytest.raises(UnsupportedFieldError, match=rf"^{name}=.* is not supported\. {field.fix[:20]}"):
                refuse_unused({name: {"other": 7}}, table)
    with pytest.raises(InvalidRequestError, match="unknown field 'colour'"):
        refuse_unused({"colour": None}, table)


def test_true_is_not_one() -> None:
    assert Unused((1.0,)).accepts(1) and not Unused((1.0,)).accepts(True)
    assert not Unused((False,)).accepts(0)


@pytest.mark.parametrize(("change", "n"), [({"best_of": 1}, 1), ({"n": 2, "best_of": 2}, 2)])
@pytest.mark.parametrize("path", BODIES)
async def test_best_of_as_many_as_are_given(http: httpx.AsyncClient, path: str, change: dict[str, int], n: int) -> None:
    assert len((await http.post(path, json=BODIES[path] | change)).json()["choices"]) == n
    error = (await http.post(path, json=BODIES[path] | {"best_of": 3})).json()["error"]
    assert error["param"] == "best_of"


async def test_defaults_of_fields_that_are_implemented_pass(http: httpx.AsyncClient) -> None:
    common = {"n": 1, "temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "min_tokens": 0,
              "presence_penalty": 0, "frequency_penalty": 0, "stop": [], "stop_token_ids": [], "logit_bias": {},
              "ignore_eos": False, "skip_special_tokens": True, "include_stop_str_in_output": False, "stream": False,
              "logprobs": False}
    chat = {"add_generation_prompt": True, "chat_template_kwargs": {}, "top_logprobs": 0}
    for path, extra in zip(BODIES, (chat, {"echo": False, "add_special_tokens": True}), strict=True):
        response = await http.post(path, json=BODIES[path] | common | extra)
        assert response.status_code == 200, response.text
