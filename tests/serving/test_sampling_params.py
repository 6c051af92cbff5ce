"""Every number of both APIs, found by reflection: at its limits it reaches a shard's engine whole; past them it is the
client's error with the field's name. None ever fails on the way."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from pydantic import BaseModel

from serving.config import RouterConfig
from serving.engine.request import Submission
from serving.errors import InvalidRequestError
from serving.ingress.body_bounds import body_bounds
from serving.ingress.build_request import Asked, RequestBuilder, SamplingFields
from serving.ingress.caller import Caller, Stamp
from serving.ingress.grpc.messages import num_logprobs, to_fields, to_prompt
from serving.ingress.http.app import build_http_app
from serving.ingress.openai.bodies import ChatCompletionBody, CompletionBody, parse_body
from serving.ingress.openai.chat import ChatEndpoint
from serving.ingress.openai.completions import CompletionEndpoint
from serving.ingress.prompts import TokenIds
from serving.link.messages import decode_submission, encode_submission
from serving.proto import inference_pb2 as pb
from serving.proto import shard_pb2
from serving.router.admission import Ticket
from serving.router.generation import GenerationRequest
from serving.router.open_request import OpenPart, OpenRequest, new_choices, new_submissions
from serving.router.request_checks import check_request, check_requests
from serving.sampling_params import SamplingParams
from serving.tenants.key import Tenant
from serving.text.tokenizer import Tokenizer
from tests.serving.ingress.conftest import FakeService

INTS = [0, 1, -1, 2, 128, 129, 2**31 - 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
        -(2**31), -(2**63), -(2**63) - 1, 10**30, -(10**30), 10**400]
FLOATS = [*map(float, INTS[:-1]), 1e-320, 5e-324, -0.0, 0.5, 1e308, -1e308]
NOT_NUMBERS = [math.nan, math.inf, -math.inf]
STAMP = Stamp("id", 0, "test")


@pytest.fixture
def tokenizer(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(byte_level_dir)


@pytest.fixture
async def service(tokenizer: Tokenizer) -> FakeService:
    return FakeService(tokenizer)


def numbers_of(kind: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(field, shape) of every field of a body that may hold a number: alone, in a list or in a dict."""
    for name, field in kind.model_fields.items():
        for part in parts_of(field.annotation):
            origin, args = typing.get_origin(part), typing.get_args(part)
            if part in (int, float):
                yield name, "alone"
            elif origin is list and args[0] is int:
                yield name, "list"
            elif origin is dict and args[1] in (int, float):
                yield name, "dict"


def parts_of(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for part in typing.get_args(annotation):
            yield from parts_of(part)
    elif typing.get_origin(annotation) is typing.Annotated:
        yield from parts_of(typing.get_args(annotation)[0])
    else:
        yield annotation


def json_number(value: float) -> str:
    return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN" if value != value else repr(value))


def body_with(kind: type[BaseModel], name: str, shape: str, value: float) -> Iterator[bytes]:
    number = json_number(value)
    written = {"alone": [number], "list": [f"[{number}]", f"[1, {number}]"],
               "dict": [f'{{"1": {number}}}', f'{{"{number}": 1}}']}[shape]
    for text in written:
        prompt = '"messages": [{"role": "user", "content": "a"}]' if kind is ChatCompletionBody else '"prompt": "a"'
        if name == "prompt":
            prompt = f'"prompt": {text}'
        yield (f'{{"model": "tiny", {prompt}' + ("" if name == "prompt" else f', "{name}": {text}') +
               ("" if name != "top_logprobs" else ', "logprobs": true') + "}").encode()


def submissions_of(request: GenerationRequest, tokenizer: Tokenizer, deadline_s: float = 600.0) -> list[Submission]:
    part = OpenPart(OpenRequest(0.0, deadline_s), 0, request, Ticket("t", 1, 1, 1.0))
    part.choices = new_choices(part, [str(index) for index in range(request.params.n)], tokenizer)
    return new_submissions(part, request.params.seed or 0, 256, tokenizer.eos_token_ids)


def reaches_the_engine(request: GenerationRequest, tokenizer: Tokenizer) -> None:
    """Through the link's own encoding, as bytes, with nothing changed."""
    for submission in submissions_of(request, tokenizer):
        wire = encode_submission(submission, 0.0).SerializeToString()
        assert decode_submission(shard_pb2.Submission.FromString(wire), 0.0) == submission


CASES = [(kind, name, shape) for kind in (ChatCompletionBody, CompletionBody) for name, shape in numbers_of(kind)]


def test_the_walk_finds_the_fields() -> None:
    found = {name for _, name, _ in CASES}
    assert found >= {"n", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p",
                     "seed", "logit_bias", "stop_token_ids", "prompt", "logprobs", "top_logprobs", "prompt_logprobs",
                     "presence_penalty", "frequency_penalty", "repetition_penalty", "best_of"}


@pytest.mark.parametrize(("kind", "name", "shape"), CASES, ids=lambda value: getattr(value, "__name__", value))
async def test_a_number_of_a_body_is_sent_whole_or_refused(kind: Any, name: str, shape: str, service: FakeService,
                                                           tokenizer: Tokenizer) -> None:
    chat, completions = ChatEndpoint(service, tokenizer), CompletionEndpoint(service, tokenizer)
    num_sent = 0
    for value in [*INTS, *FLOATS, *NOT_NUMBERS]:
        for content in body_with(kind, name, shape, value):
            try:
                body = parse_body(kind, content, body_bounds(256))
                if isinstance(body, ChatCompletionBody):
                    requests = [(await chat.build(body, Caller("id", None), STAMP)).chat.request]
                else:
                    requests = (await completions.build(body, Caller("id", None), STAMP)).requests
                check_requests(requests, service.cards[0], tokenizer.num_embeddings, None)
            except InvalidRequestError as error:
                assert len(str(error)) < 500
                continue
            num_sent += 1
            for request in requests:
                reaches_the_engine(request, tokenizer)
    assert num_sent > 0, "no value of the field was accepted: the test walks nothing"


def sampling_fields() -> Iterator[FieldDescriptor]:
    for field in pb.Sampling.DESCRIPTOR.fields:
        if field.message_type is not None or field.cpp_type not in (FieldDescriptor.CPPTYPE_STRING,
                                                                   FieldDescriptor.CPPTYPE_BOOL):
            yield field


@pytest.mark.parametrize("field", list(sampling_fields()), ids=lambda field: field.name)
async def test_a_number_of_a_message_is_sent_whole_or_refused(field: FieldDescriptor, service: FakeService,
                                                              tokenizer: Tokenizer) -> None:
    num_sent = 0
    for value in [*INTS, *FLOATS, *NOT_NUMBERS]:
        sampling = pb.Sampling()
        try:
            set_number(sampling, field, value)
        except (ValueError, TypeError, OverflowError):      # the wire of this door cannot say it
            continue
        message = pb.GenerateRequest(model="tiny", text="a", sampling=sampling)
        try:
            asked = Asked("tiny", to_fields(message.sampling), "id", Tenant("t"), num_logprobs(message.sampling))
            (request,) = await RequestBuilder(service, tokenizer).build(asked, [to_prompt(message)])
            check_request(request, service.cards[0], tokenizer.num_embeddings, None)
        except InvalidRequestError as error:
            assert error.param is not None
            continue
        num_sent += 1
        reaches_the_engine(request, tokenizer)
    assert num_sent > 0


def set_number(sampling: pb.Sampling, field: FieldDescriptor, value: float) -> None:
    if isinstance(field.message_type, Descriptor):          # logit_bias
        sampling.logit_bias[1] = value
    elif field.is_repeated:
        getattr(sampling, field.name).append(value)
    else:
        setattr(sampling, field.name, value)


def test_every_number_of_the_link_can_hold_what_the_limits_allow(tokenizer: Tokenizer) -> None:
    """The widest values that SamplingParams lets pass, all at once."""
    widest = SamplingParams(
        n=128, max_tokens=2**31 - 1, min_tokens=2**31 - 1, top_k=2**31 - 1, logit_bias={2**31 - 1: -100.0},
        seed=-(2**63), stop_token_ids=(2**31 - 1,), logprobs=20, prompt_logprobs=20, repetition_penalty=0.01)
    request = GenerationRequest("id", "tiny", (2**31 - 1,), widest, deadline_s=1e300, priority=-100)
    submission = submissions_of(request, tokenizer, deadline_s=1e300)[-1]
    sent = shard_pb2.Submission.FromString(encode_submission(submission, 0.0).SerializeToString())
    assert decode_submission(sent, 0.0) == submission
    used = {field.name for field, _ in sent.ListFields()} | {field.name for field, _ in sent.sampling.ListFields()}
    numbers = {field.name for descriptor in (shard_pb2.Submission.DESCRIPTOR, shard_pb2.Sampling.DESCRIPTOR)
               for field in descriptor.fields if field.cpp_type != FieldDescriptor.CPPTYPE_STRING}
    neutral = {"min_p", "presence_penalty", "frequency_penalty", "banned_token_ids", "journal_token_ids"}     # 0, empty
    assert numbers - used <= neutral


async def test_token_ids_of_any_width_are_refused_by_name(service: FakeService, tokenizer: Tokenizer) -> None:
    builder = RequestBuilder(service, tokenizer)
    for token_id in (-1, tokenizer.num_embeddings, 2**32, 10**30):
        asked = Asked("tiny", SamplingFields(), "id", Tenant("t"))
        requests = await builder.build(asked, [TokenIds((token_id,))])
        with pytest.raises(InvalidRequestError, match=f"prompt holds the token id {token_id}"):
            check_requests(requests, service.cards[0], tokenizer.num_embeddings, None)


@pytest.mark.parametrize("text", ["9" * 100_000, "-" + "9" * 100_000, "1e" + "9" * 1000, "0." + "1" * 100_000])
async def test_a_number_of_100_000_digits_is_the_clients_error(text: str, service: FakeService,
                                                               tokenizer: Tokenizer) -> None:
    app = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", ""))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for name in ("max_tokens", "temperature", "seed"):
            content = f'{{"model": "tiny", "prompt": "a", "{name}": {text}}}'
            answer = await client.post("/v1/completions", content=content)
            assert answer.status_code == 400 and len(answer.text) < 600
