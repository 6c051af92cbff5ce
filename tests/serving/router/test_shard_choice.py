from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from serving.router.shard_choice import PrefixIndex, RoutedRequest, ShardSnapshot, block_hashes, choose_shard

BLOCK = 16
IDLE = ShardSnapshot("a", num_open_tokens=0, num_foreign_sequences=0, kv_blocks_free=1000, kv_blocks_total=1000,
                     share=1.0)


def shard(shard_id: str, **fields: float) -> ShardSnapshot:
    return replace(IDLE, shard_id=shard_id, **fields)      # type: ignore[arg-type]


def request(token_ids: range, num_output: int = 10) -> RoutedRequest:
    return RoutedRequest(block_hashes(token_ids, BLOCK), len(token_ids), num_output, len(token_ids) + num_output)


def choose(asked: RoutedRequest, shards: list[ShardSnapshot], index: PrefixIndex | None = None) -> str | None:
    chosen = choose_shard(asked, shards, index or PrefixIndex(), BLOCK)
    return chosen.shard_id if chosen else None


def test_equals_go_to_the_earlier_one() -> None:
    assert choose(request(range(100)), [shard("b"), shard("a")]) == "b"


def test_the_least_loaded_is_chosen() -> None:
    shards = [shard("a", num_open_tokens=500), shard("b", num_open_tokens=499), shard("c", num_open_tokens=501)]
    assert choose(request(range(100)), shards) == "b"


def test_other_routers_sequences_are_load() -> None:
    assert choose(request(range(100)), [shard("a", num_foreign_sequences=1), shard("b", num_open_tokens=200)]) == "b"


def test_open_work_stands_as_the_shares_do() -> None:
    shards = [shard("slow", num_open_tokens=100, share=0.1), shard("fast", num_open_tokens=500, share=0.9)]
    assert choose(request(range(100)), shards) == "fast"
    assert choose(request(range(100)), [shards[0], shard("fast", num_open_tokens=1800, share=0.9)]) == "slow"


def test_many_requests_are_shared_out_as_the_plan_says() -> None:
    counts = {"a": 0, "b": 0, "c": 0}
    shares = {"a": 0.5, "b": 0.375, "c": 0.125}
    for _ in range(80):
        chosen = choose(request(range(10)), [shard(name, share=shares[name], num_open_tokens=20 * counts[name])
                                             for name in counts])
        assert chosen is not None
        counts[chosen] += 1
    assert counts == {"a": 40, "b": 30, "c": 10}


def test_a_slow_member_is_not_given_the_request_that_all_would_wait_for() -> None:
    """256 requests, the shares of six nodes at 8:4:2:1:1:1: no way to hand them out has an earlier last member."""
    shares = {"a": 0.5133, "b": 0.2417, "c": 0.1112, "d": 0.0462, "e": 0.0442, "f": 0.0433}
    counts = dict.fromkeys(shares, 0)
    for _ in range(256):
        chosen = choose(request(range(2), num_output=8), [
            shard(name, share=share, num_open_tokens=10 * counts[name]) for name, share in shares.items()])
        assert chosen is not None
        counts[chosen] += 1
    assert counts == {"a": 133, "b": 62, "c": 28, "d": 11, "e": 11, "f": 11}
    last = max(counts[name] / shares[name] for name in shares)
    assert all((counts[name] + 1) / shares[name] >= last for name in shares)


def test_members_without_a_share_get_nothing() -> None:
    assert choose(request(range(100)), [shard("experts", share=0.0), shard("b", num_open_tokens=10_000)]) == "b"
    assert choose(request(range(100)), [shard("experts", share=0.0)]) is None


def test_a_cached_prefix_outweighs_a_smaller_load_and_not_a_larger() -> None:
    index = PrefixIndex()
    index.record("a", block_hashes(range(1024), BLOCK), capacity=1000)
    asked = request(range(1100))
    assert choose(asked, [shard("a", num_open_tokens=1000), shard("b")], index) == "a"
    assert choose(asked, [shard("a", num_open_tokens=1050), shard("b")], index) == "b"


def test_members_without_kv_capacity_are_skipped() -> None:
    assert choose(request(range(10)), [shard("a", kv_blocks_total=0, kv_blocks_free=0), shard("b")]) == "b"
    assert choose(request(range(10)), [shard("a", kv_blocks_total=0, kv_blocks_free=0)]) is None


def test_a_shard_that_can_never_hold_the_request_is_skipped() -> None:
    shards = [shard("small", kv_blocks_total=6), shard("large", num_open_tokens=10_000)]
    assert choose(request(range(87), num_output=10), shards) == "small"     # 97 tokens: the last needs no place
    assert choose(request(range(88), num_output=10), shards) == "large"


def test_a_shard_whose_blocks_are_taken_comes_last() -> None:
    assert choose(request(range(100)), [shard("full", kv_blocks_free=6), shard("b", num_open_tokens=900)]) == "b"


def test_a_shard_whose_state_slots_are_taken_comes_last() -> None:
    full, free = (shard(name, state_slots_total=9, state_slots_free=left) for name, left in (("full", 1), ("free", 2)))
    assert choose(request(range(100)), [full, replace(free, num_open_tokens=900)]) == "free"
    assert choose(request(range(100)), [full]) == "full"


def test_the_index_forgets_the_least_recently_used_tail_first() -> None:
    index, first, second = PrefixIndex(), block_hashes(range(64), BLOCK), block_hashes(range(1000, 1032), BLOCK)
    index.record("a", first, capacity=4)
    index.record("a", second, capacity=4)
    assert index.num_cached_blocks("a", second) == 2
    assert index.num_cached_blocks("a", first) == 2
    index.keep_only(["b"])
    assert index.num_cached_blocks("a", second) == 0


def test_of_a_model_with_states_a_prefix_counts_as_far_as_one_was_kept() -> None:
    index, prompt = PrefixIndex(), block_hashes(range(1024), BLOCK)
    index.record("a", prompt, 1000, num_states=9, kept_blocks=lambda: [32, 63])
    longer, parts_early = block_hashes(range(2000), BLOCK), (*prompt[:40], *block_hashes(range(5000, 6000), BLOCK))
    assert index.num_cached_blocks("a", longer) == 64 and index.num_reusable_blocks("a", longer) == 63
    assert index.num_cached_blocks("a", parts_early) == 40 and index.num_reusable_blocks("a", parts_early) == 32
    assert index.num_reusable_blocks("a", prompt[:20]) == 0 == index.num_reusable_blocks("b", prompt)


def test_states_are_known_where_prompts_part_and_where_an_answer_ended() -> None:
    index, prompt = PrefixIndex(), block_hashes(range(1024), BLOCK)
    other = (*prompt[:40], *block_hashes(range(5000, 6000), BLOCK))
    for hashes in (prompt, other):
        index.record("a", hashes, 1000, num_states=9)
    assert index.num_reusable_blocks("a", prompt) == 40
    answer = block_hashes(range(1024, 1120), BLOCK, prompt[-1])
    index.extend("a", prompt, answer, 1000, num_states=9)
    assert index.num_reusable_blocks("a", (*prompt, *answer, 7)) == len(prompt) + len(answer)


def test_states_are_forgotten_with_their_blocks_and_where_there_are_too_many() -> None:
    index, first = PrefixIndex(), block_hashes(range(64), BLOCK)
    second, third = (block_hashes(range(start, start + 64), BLOCK) for start in (1000, 2000))
    for hashes in (first, second):
        index.record("a", hashes, 1000, num_states=2, kept_blocks=lambda: [2, 4])
    assert index.num_reusable_blocks("a", first) == 0 and index.num_reusable_blocks("a", second) == 4
    index.record("a", third, 4, num_states=9, kept_blocks=lambda: [3])
    index.record("a", first, 1000)
    index.record("a", second, 1000)
    assert [index.num_reusable_blocks("a", hashes) for hashes in (second, third)] == [0, 3]
    index.keep_only(["b"])
    index.record("a", third, 1000)
    assert index.num_reusable_blocks("a", third) == 0


def test_the_choice_follows_what_a_shard_with_states_can_go_on_from() -> None:
    index, prompt = PrefixIndex(), block_hashes(range(1024), BLOCK)
    index.record("cached", prompt, 1000, num_states=9)          # all its blocks, and a state nowhere
    index.record("kept", prompt[:32], 1000, num_states=9, kept_blocks=lambda: [32])
    shards = [shard(name, state_slots_total=90, state_slots_free=80) for name in ("cached", "kept")]
    assert choose(request(range(1100)), shards, index) == "kept"
    assert choose(request(range(1100)), [replace(one, state_slots_total=0) for one in shards], index) == "cached"


@given(tokens=st.lists(st.integers(0, 3), max_size=80), cut=st.integers(0, 80), num_known=st.integers(0, 5))
def test_hashes_agree_exactly_on_the_common_prefix(tokens: list[int], cut: int, num_known: int) -> None:
    hashes = block_hashes(tokens, BLOCK)
    assert len(hashes) == len(tokens) // BLOCK
    known = hashes[:num_known]
    rest = block_hashes(tokens[len(known) * BLOCK:], BLOCK, known[-1] if known else 0)
    assert (*known, *rest) == hashes
    assert block_hashes(tokens[:cut], BLOCK) == hashes[:min(cut, len(tokens)) // BLOCK]
    if cut < len(tokens):
        changed = block_hashes([*tokens[:cut], 9, *tokens[cut + 1:]], BLOCK)
        assert all(left != right for left, right in zip(changed[cut // BLOCK:], hashes[cut // BLOCK:], strict=True))


class CountedHashes(tuple[int, ...]):
    """Counts how often somebody looks through it."""

    num_reads = 0

    def __iter__(self) -> Iterator[int]:
        self.num_reads += 1
        return super().__iter__()

    def __reversed__(self) -> Iterator[int]:
        self.num_reads += 1
        return iter(self[::-1])


def test_choices_of_one_request_do_not_look_through_its_prompt_again() -> None:
    """Found by n=128 of a long prompt: the router stood still for as long as 128 times its blocks take."""
    index, hashes = PrefixIndex(), CountedHashes(block_hashes(range(1024), BLOCK))
    for _ in range(128):
        index.num_cached_blocks("a", hashes)
        index.record("a", hashes, capacity=1000)
    for choice in range(128):
        index.extend("a", hashes, (choice,), capacity=1000)
    assert hashes.num_reads <= 3 and index.num_cached_blocks("a", (*hashes, 127)) == len(hashes) + 1


def test_what_is_forgotten_is_counted_anew() -> None:
    index, first, second = PrefixIndex(), block_hashes(range(64), BLOCK), block_hashes(range(1000, 1032), BLOCK)
    index.extend("a", first[:2], first[2:], capacity=4)
    before = index.num_cached_blocks("a", first)
    index.record("a", second, capacity=4)
    assert before == len(first) and index.num_cached_blocks("a", first) == 4 - len(second)
