"""A multimodal qwen3_5_moe checkpoint, its text part served by three nodes: chats with thinking on and off through both
doors, and the prefix cache of its states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import torch
import yaml

from model.kernels.select import select_kernels
from model.step import SamplingSpec
from serving.proto import inference_pb2 as pb
from serving.proto.inference_pb2_grpc import InferenceStub
from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service, config_of, eventually
from tests.oracle.conftest import Engine
from tests.ports import held_port
from tests.serving.conftest import byte_level_tokenizer

pytestmark = pytest.mark.multinode
NAME = "hybrid"
# As Qwen's: the answer begins with a thought, an empty one when thinking is off.
TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
            "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
            "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
            "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}")
CHAT = [{"role": "system", "content": "answer in one word, and never in two words"},
        {"role": "user", "content": "hello world, how are you?"}]


def write_multimodal(folder: Path) -> None:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
    torch.manual_seed(3)
    config = Qwen3_5MoeConfig(
        text_config={
            "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8,
            "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "max_position_embeddings": 512, "initializer_range": 0.1, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5,
                                "mrope_interleaved": True, "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64,
                       "patch_size": 4, "num_position_embeddings": 16})
    Qwen3_5MoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False}), encoding="utf-8")


@dataclass(frozen=True)
class Hybrid:
    url: str
    grpc_address: str
    folder: Path


@pytest.fixture(scope="module")
def hybrid(service: Service) -> Iterator[Hybrid]:
    folder = service.work_dir / NAME
    write_multimodal(folder)
    grpc_port = held_port()
    config = config_of(folder) | {"application": NAME, "route_prefix": f"/{NAME}",
                                  "router": {"num_cpus": 0.1, "grpc_port": grpc_port}}
    path = service.work_dir / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(config))
    service.ray("deploy", NAME, str(path))
    url = f"{service.proxy_url}/{NAME}"
    try:
        assert eventually(lambda: httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200)
        yield Hybrid(url, f"{service.running.grpc_address.rpartition(':')[0]}:{grpc_port}", folder)
    finally:
        service.ray("delete", NAME)


@pytest.fixture
def client(hybrid: Hybrid) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{hybrid.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **kwargs: bool) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=24, temperature=0.0,     # type: ignore[arg-type]
                                          extra_body={"chat_template_kwargs": kwargs})


@pytest.mark.parametrize("thinks", [True, False])
def test_both_doors_chat_as_one_process_would(hybrid: Hybrid, client: openai.OpenAI, thinks: bool) -> None:
    answer = chat(client, enable_thinking=thinks)
    with grpc.insecure_channel(hybrid.grpc_address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = InferenceStub(channel)
        asked = pb.Chat(messages=[pb.ChatMessage(**message) for message in CHAT],
                        chat_template_kwargs={"enable_thinking": thinks})
        token_ids = tuple(stub.Tokenize(pb.TokenizeRequest(model="tiny", chat=asked)).token_ids)
        responses = list(stub.Generate(pb.GenerateRequest(
            model="tiny", chat=asked, sampling=pb.Sampling(max_tokens=24, temperature=0.0)), timeout=PATIENCE_S))
    message = answer.choices[0].message
    thought = (message.model_extra or {}).get("reasoning_content") or ""
    assert "".join(response.text for response in responses) == (message.content or "")
    assert "".join(response.reasoning for response in responses) == thought
    assert bool(thought) == thinks
    engine = Engine(hybrid.folder, torch.bfloat16, select_kernels("cpu", 2))
    expected = engine.generate(token_ids, 24, SamplingSpec(temperature=0.0))
    assert tuple(token_id for response in responses for token_id in response.token_ids) == expected


def test_a_conversation_goes_on_from_the_state_that_its_last_turn_left(client: openai.OpenAI) -> None:
    first = chat(client, enable_thinking=False)
    again = chat(client, enable_thinking=False)
    assert again.choices[0].message.content == first.choices[0].message.content
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached and cached % 16 == 0 and cached >= again.usage.prompt_tokens - 16


def test_images_are_refused_by_name(hybrid: Hybrid) -> None:
    content = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    reply = httpx.post(f"{hybrid.url}/v1/chat/completions", json={
        "model": "tiny", "messages": [{"role": "user", "content": content}]}, timeout=PATIENCE_S)
    assert reply.status_code == 400 and "image_url" in reply.text
