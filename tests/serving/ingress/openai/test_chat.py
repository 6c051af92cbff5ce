"""The official client, unchanged, against a real HTTP server in front of a fake service."""

from __future__ import annotations

import asyncio

import openai
import pytest

from serving.errors import OverloadedError
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import ANSWER, FakeService

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, logprobs=True,
                                                  top_logprobs=2, n=2, seed=3)
    assert [choice.message.content for choice in answer.choices] == [f"0{ANSWER}", f"1{ANSWER}"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and answer.usage is not None
    assert b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode() == f"0{ANSWER}"
    assert len(logprobs.content[0].top_logprobs) == 2 and answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_streamed_chat(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, stream=True,
                                                  stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == f"0{ANSWER}"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage is not None


async def test_an_answer_goes_back_as_the_client_gave_it(client: openai.AsyncOpenAI, service: FakeService) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=3)
    said = answer.choices[0].message
    for again in (said.model_dump(), said.to_dict(), said.model_dump(exclude_unset=True), said):
        await client.chat.completions.create(  # type: ignore[call-overload]
            model="tiny", messages=[*MESSAGES, again, {"role": "assistant", "content": None, "name": "a",
                                                       "reasoning_content": "hm", "cache_control": {"type": "x"}},
                                    {"role": "user", "content": [{"type": "text", "text": "b", "cache_control": {}}]}])
    written = service.tokenizer.decode(service.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert written == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + (said.content or "") + "<|im_end|>\n"
                       "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("with_last", [True, False])
async def test_usage_in_every_chunk(client: openai.AsyncOpenAI, with_last: bool) -> None:
    options = {"stream_options": {"include_usage": with_last, "continuous_usage_stats": True}}
    chat = await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, stream=True,
                                                extra_body=options)
    text = await client.completions.create(model="tiny", prompt="hello", temperature=0, stream=True, max_tokens=9,
                                           extra_body=options)
    for stream in (chat, text):
        usages = [(chunk.usage, chunk.choices) async for chunk in stream]
        counts = [usage.completion_tokens for usage, _ in usages if usage is not None]
        assert len(counts) == len(usages) and counts == sorted(counts) and counts[-1] > counts[0]
        assert all(usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
                   for usage, _ in usages)
        assert (usages[-1][1] == []) is with_last


async def test_top_p_of_zero_and_an_id_in_the_body(client: openai.AsyncOpenAI, service: FakeService) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, top_p=0,
                                                  extra_body={"request_id": "my-1"})
    assert service.requests[0].params.top_p == 0.0 and answer.id == "chatcmpl-my-1"
    odd = await client.completions.create(model="tiny", prompt="a", extra_body={"request_id": "no spaces, please"})
    assert " " not in odd.id


async def test_the_clients_own_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="tiny", messages=MESSAGES, temperature=0, logprobs=True) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == f"0{ANSWER}" and final.choices[0].finish_reason == "stop"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt="hello", temperature=0, logprobs=1, echo=True,
                                             max_tokens=100)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == f"hello0{ANSWER}" and logprobs is not None
    assert logprobs.tokens and logprobs.text_offset and len(logprobs.tokens) == len(logprobs.text_offset)
    stream = await client.completions.create(model="tiny", prompt=[5, 6], temperature=0, stream=True, max_tokens=100)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == f"0{ANSWER}"


async def test_the_sync_client(base_url: str) -> None:
    def ask() -> tuple[str | None, list[str], str]:
        with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
            answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
            stream = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return answer.choices[0].message.content, [model.id for model in client.models.list()], text
    assert await asyncio.to_thread(ask) == (f"0{ANSWER}", ["tiny"], f"0{ANSWER}")


async def test_the_client_raises_its_own_errors(client: openai.AsyncOpenAI, service: FakeService) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, n=0)
    assert wrong.value.param == "n"
    with pytest.raises(openai.BadRequestError) as unsupported:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, modalities=["text", "audio"])
    assert unsupported.value.code == "unsupported_parameter"
    service.error = OverloadedError("full", retry_after_s=7)
    with pytest.raises(openai.RateLimitError) as overload:
        await client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert overload.value.response.headers["retry-after"] == "7"
    service.num_before_error = 2
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass


async def test_a_stream_left_open_ends_when_the_client_leaves(client: openai.AsyncOpenAI, service: FakeService) -> None:
    service.stalls = True
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    async with asyncio.timeout(PATIENCE_S):
        await anext(aiter(stream))
        await stream.close()
        await service.closed.wait()


async def test_vllms_extras(client: openai.AsyncOpenAI, service: FakeService) -> None:
    await client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": [1]})
    params = service.requests[0].params
    assert (params.top_k, params.min_p, params.ignore_eos, params.stop_token_ids) == (5, 0.1, True, (1,))
