"""A sequence that moves takes its KV blocks and states along, bit by bit; whatever goes wrong, it is computed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.kernels.protocol import Kernels
from model.kernels.select import select_kernels
from model.kernels.torch_kernels import TorchKernels
from model.transport.address import Secret
from serving.engine import transfer_choice
from serving.engine.block_manager import block_hash
from serving.link import block_receiver, block_sender
from tests.cluster.shard.lone_members import BLOCK, LoneMember, lone_members, meet
from tests.model.conftest import CONFIG, tiny_tensors
from tests.model.tiny_hybrids import save_hybrid

KINDS: dict[str, tuple[Callable[[], Kernels], torch.dtype]] = {
    "torch-fp32": (TorchKernels, torch.float32), "packed-fp32": (lambda: select_kernels("cpu", 1), torch.float32),
    "packed-bf16": (lambda: select_kernels("cpu", 1), torch.bfloat16)}
PROMPT = tuple(range(3, 60)) + tuple(range(3, 23))
NUM_OUTPUT, NUM_MOVED = 36, 22      # tokens, and how many of them the first member has drawn before


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is."""
    for module in (block_receiver, block_sender):
        monkeypatch.setattr(module, "ANSWER_S", 60.0)
        monkeypatch.setattr(module, "TRANSFER_S", 120.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    moe = tmp_path_factory.mktemp("moe")
    save_file(tiny_tensors(), moe / "model.safetensors")
    (moe / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 256}))
    return {"moe": moe, "hybrid": save_hybrid(tmp_path_factory.mktemp("hybrid"), "qwen3_next")}


async def truth(member: LoneMember) -> tuple[int, ...]:
    """The answer of one whom nobody disturbs."""
    return (await member.answer("whole", PROMPT, NUM_OUTPUT))[0]


def names_of(tokens: tuple[int, ...]) -> list[bytes]:
    """The names of all full blocks of these tokens."""
    names: list[bytes] = []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        names.append(block_hash(names[-1] if names else b"", tokens[start:start + BLOCK]))
    return names


def states(member: LoneMember, name: bytes) -> list[bytes]:
    slot = member.engine.scheduler.states._slots.find(name)
    assert slot is not None
    return [member.runner.caches.read_state(slot, index) for index in range(len(member.runner.caches.states))]


@pytest.mark.parametrize("model", ["moe", "hybrid"])
@pytest.mark.parametrize("kind", list(KINDS))
async def test_what_is_sent_are_the_bits_that_computing_gives(folders: dict[str, Path], model: str, kind: str) -> None:
    kernels, dtype = KINDS[kind]
    async with lone_members(folders[model], dtype, [kernels() for _ in range(3)]) as (first, second, third):
        part, _ = await first.answer("part", PROMPT, NUM_MOVED)
        warm, num_received = await second.answer("warm", PROMPT, NUM_MOVED + 1, part, source="s0")
        assert num_received == (len(PROMPT) + NUM_MOVED - 1) // BLOCK * BLOCK
        assert second.engine.num_tokens_computed == len(PROMPT) + NUM_MOVED - num_received
        rest, _ = await second.answer("moved", PROMPT, NUM_OUTPUT, part + warm)

        known = (PROMPT + part)[:num_received]      # a prefill that ends there leaves the state there
        await third.answer("again", PROMPT, num_received - len(PROMPT) + 1, known[len(PROMPT):])
        names = names_of(known)
        found = [[one.engine.scheduler.blocks.find(name) for name in names] for one in (second, third)]
        sent, computed = ([number for number in numbers if number is not None] for numbers in found)
        assert len(sent) == len(computed) == num_received // BLOCK
        assert second.runner.caches.read_blocks(sent) == third.runner.caches.read_blocks(computed)
        if model == "hybrid":
            assert states(second, names[-1]) == states(third, names[-1])
        assert part + warm + rest == await truth(third)
        assert first.is_empty() and second.is_empty()


async def stranger(first: LoneMember, second: LoneMember) -> None:
    """The second is not in the epoch of the first."""
    meet(first)


async def liar(first: LoneMember, second: LoneMember) -> None:
    """Who does not know the token says that it is the second."""
    known = second.exchange._receiver._members["s0"]
    assert known.endpoint is not None
    second.exchange._receiver._members["s0"] = replace(known, endpoint=replace(known.endpoint, token=Secret("x")))


async def another_model(first: LoneMember, second: LoneMember) -> None:
    lender = first.exchange.sender.lender
    assert lender is not None
    first.exchange.sender.lender = replace(lender, receivers=frozenset())


async def another_format(first: LoneMember, second: LoneMember) -> None:
    content = second.exchange._receiver._content
    assert content is not None
    content.format += " of another kind"


async def engine_given_up(first: LoneMember, second: LoneMember) -> None:
    first.exchange.leave()


async def no_room(first: LoneMember, second: LoneMember) -> None:
    """Somebody else holds most blocks of the second, until the transfer has found that out."""
    blocks, transfers = second.engine.scheduler.blocks, second.engine.transfers
    held, receive = blocks.allocate(blocks.num_blocks - 2), transfers.receive
    assert held is not None

    def receive_once(*arguments: object, **named: object) -> object:
        found = receive(*arguments, **named)    # type: ignore[arg-type]
        blocks.free(held)
        return found
    transfers.receive = receive_once            # type: ignore


async def closed(first: LoneMember, second: LoneMember) -> None:
    """The first one's blocks are about to get other numbers."""
    await first.engine.transfers.close()


async def source_breaks(first: LoneMember, second: LoneMember) -> None:
    """After the first chunk there is no second."""
    lender = first.exchange.sender.lender
    assert lender is not None
    read, calls = lender.content.read_blocks, 0

    def read_once(numbers: tuple[int, ...]) -> asyncio.Future[bytes]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError("the member is gone")
        return read(numbers)
    lender.content.read_blocks = read_once      # type: ignore[method-assign]


TROUBLES = [stranger, liar, another_model, another_format, engine_given_up, no_room, closed, source_breaks]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
async def test_whatever_goes_wrong_the_sequence_is_computed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
                                                            trouble: Callable[..., object]) -> None:
    monkeypatch.setattr(block_sender, "CHUNK_BYTES", 1)
    async with lone_members(folders["moe"], torch.float32, [TorchKernels(), TorchKernels()]) as (first, second):
        whole = await truth(first)
        await trouble(first, second)        # type: ignore[misc]
        drawn, num_received = await second.answer("warm", PROMPT, NUM_OUTPUT, whole[:NUM_MOVED], source="s0")
        assert drawn == whole[NUM_MOVED:]
        assert num_received == (BLOCK if trouble is source_breaks else 0)
        assert first.is_empty() and second.is_empty()


async def test_what_is_computed_sooner_is_not_sent(folders: dict[str, Path]) -> None:
    async with lone_members(folders["moe"], torch.float32, [TorchKernels(), TorchKernels()]) as (first, second):
        whole = await truth(first)
        second.engine.prefill_rate.add(1000, 1e-3)
        second.exchange._receiver.bytes_per_s["s0"] = 1.0
        assert await second.answer("warm", PROMPT, NUM_OUTPUT, whole[:NUM_MOVED], source="s0") == (whole[NUM_MOVED:], 0)


async def test_a_transfer_that_turns_out_slow_ends(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each chunk the choice is made again: what has come is kept, the rest is computed."""
    monkeypatch.setattr(block_sender, "CHUNK_BYTES", 1)
    seen: list[transfer_choice.Transfer] = []

    def until_two_have_come(transfer: transfer_choice.Transfer) -> bool:
        seen.append(transfer)
        return len(seen) <= 4       # before the turn, at the offer, before two chunks
    monkeypatch.setattr(block_receiver, "is_sent", until_two_have_come)
    async with lone_members(folders["moe"], torch.float32, [TorchKernels(), TorchKernels()]) as (first, second):
        whole = await truth(first)
        drawn, num_received = await second.answer("warm", PROMPT, NUM_OUTPUT, whole[:NUM_MOVED], source="s0")
        assert (drawn, num_received) == (whole[NUM_MOVED:], 2 * BLOCK)
        assert [transfer.num_tokens for transfer in seen] == [96, 96, 96, 80, 64]
        assert seen[0].bytes_per_s is None and seen[-1].bytes_per_s is not None
        assert first.is_empty() and second.is_empty()


async def test_a_request_that_is_cancelled_in_the_middle_leaves_nothing(folders: dict[str, Path]) -> None:
    async with lone_members(folders["hybrid"], torch.float32, [TorchKernels(), TorchKernels()]) as (first, second):
        whole = await truth(first)
        content = second.exchange._receiver._content
        assert content is not None
        begun, may_go_on = asyncio.Event(), asyncio.Event()
        write = content.write_blocks

        async def held_write(*arguments: object) -> None:
            begun.set()
            await may_go_on.wait()
            await write(*arguments)     # type: ignore[arg-type]
        content.write_blocks = lambda *arguments: asyncio.ensure_future(held_write(*arguments))  # type: ignore
        second.submit("warm", PROMPT, NUM_OUTPUT, whole[:NUM_MOVED], "s0")
        await begun.wait()
        second.engine.cancel("r", "warm")
        for _ in range(10):
            await asyncio.sleep(0)
        assert second.engine.transfers._held, "a block that is written belongs to nobody else"
        may_go_on.set()
        while not (first.is_empty() and second.is_empty()):     # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_choices_that_share_a_prompt_take_it_once(folders: dict[str, Path]) -> None:
    async with lone_members(folders["moe"], torch.float32, [TorchKernels(), TorchKernels()]) as (first, second):
        whole = await truth(first)
        for index in range(3):
            second.submit(f"warm{index}", PROMPT, NUM_OUTPUT, whole[:NUM_MOVED + index], "s0")
        ends = [await second.outcome(f"warm{index}") for index in range(3)]
        assert [drawn for drawn, _ in ends] == [whole[NUM_MOVED + index:] for index in range(3)]
        assert sorted(num_received for _, num_received in ends) == [0, 0, 96]
