"""Drawn under a grammar: whatever the logits and the seed, the text is of the form, and its state is its tokens'."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from model.errors import GrammarError
from model.grammar import GrammarMasks, GrammarTokenizer
from model.sampler import Draw, sample
from model.step import SamplingSpec, ScheduledRequest
from tests.serving.conftest import byte_level_tokenizer

VOCAB, EOS = 512, 2
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0},
                                          "b": {"type": "boolean"}},
          "required": ["n", "b"], "additionalProperties": False}
GRAMMAR = str(LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False}))


@pytest.fixture(scope="module")
def masks() -> GrammarMasks:
    return new_masks()


def new_masks() -> GrammarMasks:
    return GrammarMasks(GrammarTokenizer(byte_level_tokenizer().to_str(), (EOS,)), VOCAB)


def scheduled(spec: SamplingSpec, output: tuple[int, ...], name: str = "a") -> ScheduledRequest:
    return ScheduledRequest(name, output[-1:] or (5,), len(output), (0,), spec, (5,), output)


def logits_at(seed: int, position: int) -> np.ndarray:
    return np.random.default_rng([seed, position]).normal(size=VOCAB).astype(np.float32) * 4


def draw(masks: GrammarMasks, logits: np.ndarray, requests: list[ScheduledRequest]) -> list[Draw]:
    masks.begin(requests)
    return sample(torch.from_numpy(logits.copy()), requests, masks)


def generate(masks: GrammarMasks, spec: SamplingSpec, name: str = "a", output: tuple[int, ...] = ()) -> tuple[int, ...]:
    while len(output) < 200 and (not output or output[-1] != EOS):
        output += (draw(masks, logits_at(spec.seed, len(output))[None], [scheduled(spec, output, name)])[0].token_id,)
    return output


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_is_of_the_form(masks: GrammarMasks, temperature: float, seed: int) -> None:
    output = generate(masks, SamplingSpec(temperature=temperature, seed=seed, grammar=GRAMMAR, top_k=40), f"{seed}")
    assert output[-1] == EOS
    answer = json.loads(byte_level_tokenizer().decode(list(output[:-1])))
    assert set(answer) == {"n", "b"} and 0 <= answer["n"] <= 99 and isinstance(answer["b"], bool)


def test_a_sequence_goes_on_anywhere_from_its_tokens() -> None:
    spec = SamplingSpec(temperature=1.0, seed=7, grammar=GRAMMAR)
    masks = new_masks()
    whole = generate(masks, spec)
    for kept in range(len(whole)):
        assert generate(new_masks(), spec, output=whole[:kept]) == whole        # on another shard
        assert generate(masks, spec, output=whole[:kept]) == whole              # on this one, from an older journal


def test_rows_with_and_without_a_grammar_do_not_touch_each_other(masks: GrammarMasks) -> None:
    logits = np.stack([logits_at(1, row) for row in range(4)])
    specs = [SamplingSpec(temperature=0.0), SamplingSpec(temperature=0.0, grammar=GRAMMAR),
             SamplingSpec(temperature=0.7, seed=3), SamplingSpec(temperature=0.0, grammar=GRAMMAR, num_logprobs=2)]
    requests = [scheduled(spec, (), f"row {row}") for row, spec in enumerate(specs)]
    together = draw(masks, logits, requests)
    alone = [draw(new_masks(), logits[row:row + 1], [request])[0] for row, request in enumerate(requests)]
    assert together == alone and together[0].token_id == int(logits[0].argmax())
    assert together[3].logprob is not None and together[3].logprob.top[0][0] == int(logits[3].argmax())  # of all tokens


def test_what_fails_is_an_error_of_its_row_and_no_end(masks: GrammarMasks) -> None:
    spec = SamplingSpec(grammar=GRAMMAR)
    (first,) = byte_level_tokenizer().encode("{").ids
    requests = [scheduled(spec, (9, 9, 9), "wrong"), scheduled(SamplingSpec(temperature=0.0), (), "free"),
                scheduled(replace(spec, banned_token_ids=tuple(range(VOCAB))), (), "banned"),
                scheduled(replace(spec, grammar="start: missing"), (), "no grammar"),
                scheduled(replace(spec, temperature=0.0), (), "good")]
    logits = np.stack([logits_at(1, row) for row in range(5)])
    drawn = draw(masks, logits, requests)
    assert [bool(one.error) for one in drawn] == [one.token_id is None for one in drawn] == [True, False, True, True,
                                                                                             False]
    assert "output format" in drawn[0].error and "bans" in drawn[2].error and drawn[4].token_id == first


def test_a_prepared_sequence_goes_on_from_its_journal(masks: GrammarMasks) -> None:
    spec = SamplingSpec(temperature=1.0, seed=3, grammar=GRAMMAR)
    whole = generate(masks, spec, "whole")
    for kept in range(len(whole)):
        masks.prepare(f"kept {kept}", GRAMMAR, whole[:kept]).result()
        assert generate(masks, spec, f"kept {kept}", whole[:kept]) == whole


def test_a_grammar_that_cannot_be_compiled_says_so(masks: GrammarMasks) -> None:
    with pytest.raises(GrammarError, match="cannot be compiled"):
        masks.prepare("a", "start: missing", ()).result()


def test_a_tokenizer_that_makes_llguidance_panic_is_an_ordinary_error() -> None:
    described = json.loads(byte_level_tokenizer().to_str())
    ids, described["model"]["merges"] = described["model"]["vocab"], []
    ids["a" * 2000] = ids.pop(next(name for name, token_id in ids.items() if token_id == VOCAB - 212))
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        GrammarMasks(GrammarTokenizer(json.dumps(described), (EOS,)), VOCAB)
