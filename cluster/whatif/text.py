"""`moesaic plan` for people: within 80 columns, and readable without colour."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.planner.costs.cost_model import StepPrediction
from cluster.planner.placement_plan import PlacementPlan
from cluster.whatif.answer import MAX_MORE_NODES, Outlook, PlanAnswer
from cluster.whatif.cluster_file import cluster_name
from cluster.whatif.member_groups import MemberGroup, experts_a_layer, mean, member_groups
from cluster.whatif.notes import notes
from cluster.whatif.start_sizes import StartSizes
from serving.engine.state_slots import SLOTS_WITH_SNAPSHOT

STEP_PARTS = (("attention", "attention_s"), ("experts", "experts_s"), ("exchange", "exchange_s"), ("head", "head_s"),
              ("overhead", "overhead_s"))
MEMORY_PARTS = (("process", "process_bytes"), ("shared", "shared_bytes"), ("experts", "expert_bytes"),
                ("KV cache", "kv_cache_bytes"), ("states", "state_bytes"), ("buffers", "buffer_bytes"),
                ("free", "free_bytes"))



def memory_parts(plan: PlacementPlan) -> tuple[tuple[str, str], ...]:
    """Return the names and fields that the plan's memory has: states only where layers keep some."""
    has_states = any(member.memory.state_bytes for member in plan.members)
    return tuple(part for part in MEMORY_PARTS if has_states or part[0] != "states")


def plan_view(answer: PlanAnswer) -> Group:
    parts: list[RenderableType] = [*_head(answer)]
    if answer.plan is None:
        parts += _what_is_missing(answer)
    else:
        groups = member_groups(answer, answer.plan)
        parts += [_figures_table(answer, answer.plan), _title("memory of each device, GB"),
                  _memory_table(groups, memory_parts(answer.plan)), _title("experts and requests"),
                  _roles_table(answer.plan, groups), *_one_more(answer, answer.plan)]
    parts += [_title("notes"), _list(notes(answer.question))]
    return Group(*parts)


def _head(answer: PlanAnswer) -> Iterator[RenderableType]:
    question = answer.question
    yield Text(f"{question.model_name} in {question.dtype} on {cluster_name(question.cluster)}", style="bold")
    fits = Text("fits", style="green") if answer.plan else Text("does not fit", style="red")
    yield Text.assemble("it ", fits, f"; figures: {question.figures}; nothing was started")


def _list(lines: tuple[str, ...]) -> Padding:
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row("*", line)
    return Padding(table, (0, 0, 0, 1))


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _figures_table(answer: PlanAnswer, plan: PlacementPlan) -> Padding:
    question, prediction = answer.question, plan.prediction
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(ratio=1)
    workload = question.workload
    load = "counted expert loads" if workload.expert_load else "uniform expert load"
    tokens_per_s = Text(f"{prediction.tokens_per_s:,.0f} tokens/s", style="bold")
    table.add_row("asked", f"{workload.num_rows} sequences decoding, {workload.context_tokens:,} tokens each; {load}")
    but = "" if answer.kv_tokens >= answer.wanted_kv_tokens else ", if their KV cache had room"
    table.add_row("predicted", Text.assemble(tokens_per_s, f", {prediction.step_s * 1e3:.2f} ms per token{but}"))
    table.add_row("step, ms", _step_parts(prediction))
    table.add_row("limit", f"{prediction.limit} takes the largest part of a step")
    table.add_row("bound", f"no placement is under {plan.bound_s * 1e3:.2f} ms; ratio {plan.ratio:.3f} ({plan.solver})")
    if answer.even is not None:
        table.add_row("even", _even_text(answer.even, prediction.tokens_per_s))
    table.add_row("weights", _weights_text(answer))
    table.add_row("KV cache", _kv_text(answer))
    if answer.num_state_slots:
        table.add_row("states", _states_text(answer))
    if answer.start_sizes is not None and len(answer.members) > 1:
        table.add_row("starts", _starts_text(answer.start_sizes, len(answer.members)))
    return Padding(table, (1, 0, 0, 1))


def _starts_text(sizes: StartSizes, num_devices: int) -> str:
    """Say from how few devices the service can start and grow."""
    if sizes.of_any == num_devices:
        few = f" (the {sizes.of_largest} largest hold it)" if sizes.of_largest < num_devices else ""
        return f"with all {num_devices} devices: fewer do not hold the model{few}"
    return (f"with any {sizes.of_any} of the {num_devices} devices, or the {sizes.of_largest} largest, and grows as "
            "others join: min_replicas")


def _weights_text(answer: PlanAnswer) -> str:
    """Say what the checkpoint's weights take in files and, one copy of each, in memory."""
    question, block_size = answer.question, answer.question.args.weight_block_size
    stored_as = question.args.dtype if block_size is None else f"fp8 in blocks of {block_size[0]} x {block_size[1]}"
    return (f"{_gb(question.stored_bytes)} GB in files ({stored_as}), {_gb(question.loaded_bytes)} GB in memory "
            f"({question.dtype})")


def _states_text(answer: PlanAnswer) -> str:
    slots, each = answer.num_state_slots, answer.question.state_slot_bytes
    return (f"{slots:,} slots of {each / 1e6:,.1f} MB; a sequence has {SLOTS_WITH_SNAPSHOT}, its snapshot "
            "included")


def _even_text(even: Outlook, tokens_per_s: float) -> str:
    if even.tokens_per_s is None:
        return "placing the same on every device does not fit"
    part = even.tokens_per_s / tokens_per_s
    return f"placing the same on every device: {even.tokens_per_s:,.0f} tokens/s ({part:.2f} x)"


def _kv_text(answer: PlanAnswer) -> Text:
    if answer.kv_tokens >= answer.wanted_kv_tokens:
        return Text(f"room for {answer.kv_tokens:,} tokens; the {answer.wanted_kv_tokens:,} asked for fit")
    text = f"room for {answer.kv_tokens:,} tokens of the {answer.wanted_kv_tokens:,} asked for: "
    if answer.held is None or answer.held.tokens_per_s is None:
        return Text(text + "too few for one sequence of this context", style="yellow")
    return Text(f"{text}only {answer.num_held_rows} of the sequences run at once, which gives "
                f"{answer.held.tokens_per_s:,.0f} tokens/s", style="yellow")


def _step_parts(prediction: StepPrediction) -> str:
    """Write what the slowest member takes in each part: the others wait for it."""
    slowest = {name: max(getattr(times, field) for times in prediction.members) for name, field in STEP_PARTS}
    return ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in slowest.items())


def _memory_table(groups: tuple[MemberGroup, ...], parts: tuple[tuple[str, str], ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold",
                  collapse_padding=len(parts) == len(MEMORY_PARTS))
    table.add_column("devices", no_wrap=True)
    for name, _ in parts:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("budget", justify="right", no_wrap=True)
    for group in groups:
        uses = [member.memory for member in group.members]
        table.add_row(group.label, *(_gb(mean([getattr(use, field) for use in uses])) for _, field in parts),
                      _gb(mean([use.budget_bytes for use in uses])))
    return table


def _roles_table(plan: PlacementPlan, groups: tuple[MemberGroup, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("devices", no_wrap=True)
    for name in ("copies each", "of all", "requests each", "tokens/step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("which experts", overflow="fold")
    total = sum(member.num_expert_copies for member in plan.members)
    for group in groups:
        few, most = group.num_copies
        here = sum(member.num_expert_copies for member in group.members)
        share = mean([member.share.fraction for member in group.members])
        table.add_row(group.label, f"{few:,}" if few == most else f"{few:,}-{most:,}", f"{here / total:.1%}",
                      f"{share:.1%}" if share else "none", f"{group.members[0].share.token_budget:,}" if share else "-",
                      experts_a_layer(plan.placement, group.ranks) if share or most else "left out")
    return table


def _one_more(answer: PlanAnswer, plan: PlacementPlan) -> Iterator[RenderableType]:
    yield _title("one more node")
    table = Table.grid(padding=(0, 2))
    devices = {nodes.name: nodes.devices for nodes in answer.question.cluster.nodes}
    for outlook in answer.one_more:
        name = f"+1 {outlook.what} ({devices[outlook.what]} device{'s' if devices[outlook.what] > 1 else ''})"
        if outlook.tokens_per_s is None:
            table.add_row(name, "does not fit: buffers grow with the number of devices")
            continue
        gain = outlook.tokens_per_s / plan.prediction.tokens_per_s - 1
        table.add_row(name, f"{outlook.tokens_per_s:,.0f} tokens/s", f"{gain:+.1%}")
    yield Padding(table, (0, 0, 0, 1))


def _what_is_missing(answer: PlanAnswer) -> Iterator[RenderableType]:
    demand, num_members = answer.demand, len(answer.members)
    options, copies = answer.question.options, answer.question.options.min_copies
    yield Text(f"{answer.missing_bytes:,} bytes ({_gb(answer.missing_bytes)} GB) are missing", style="red")
    yield _title("what the model takes, GB")
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("experts", _gb(copies * demand.num_slots * demand.expert_bytes),
                  f"{copies} x {demand.num_slots:,} of {demand.expert_bytes / 1e6:.1f} MB, spread over the devices")
    takers = "on each device" if options.policy == "even" else "on each device that takes requests, one at least"
    table.add_row("shared weights", _gb(demand.shared_bytes), takers)
    caches = "KV cache, states" if answer.question.state_slot_bytes else "KV cache"
    table.add_row(caches, _gb(demand.kv_cache_bytes), "on each of those, at least")
    table.add_row("buffers", _gb(demand.buffer_bytes), f"on each of {num_members} devices")
    budgets = sum(member.memory.budget_bytes - member.memory.resident_bytes for member in answer.members)
    table.add_row("there is", _gb(budgets), "in all, processes taken off")
    table.add_row("weights", "", _weights_text(answer))
    yield Padding(table, (0, 0, 0, 1))
    if not answer.some_can_take_requests:
        needed = demand.fixed_bytes
        yield Text(f"no device has room for shared weights, KV cache and buffers together, {_gb(needed)} GB, "
                   "as one must that takes requests", style="yellow")
    yield _title("what would make it fit")
    yield _list(tuple(_remedies(answer)))


def _remedies(answer: PlanAnswer) -> Iterator[str]:
    for remedy in answer.remedies:
        if remedy.num_more_nodes is None:
            yield f"not more nodes of {remedy.kind} alone, up to {MAX_MORE_NODES} of them"
        else:
            tokens = answer.question.config.scheduler.max_batch_tokens
            fewer = "" if remedy.max_batch_tokens == tokens else f", with --max-batch-tokens {remedy.max_batch_tokens}"
            yield f"{remedy.num_more_nodes} more node{'s' if remedy.num_more_nodes > 1 else ''} of {remedy.kind}{fewer}"
    yield f"{_gb(answer.missing_bytes)} GB more memory_budget in all"
    if answer.fitting_batch_tokens is not None:
        yield (f"smaller buffers: --max-batch-tokens {answer.fitting_batch_tokens} instead of "
               f"{answer.question.config.scheduler.max_batch_tokens}")
    if answer.fits_with_one_copy:
        yield "one copy of each expert: --min-copies 1"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f}"
