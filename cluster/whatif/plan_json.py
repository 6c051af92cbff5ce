"""`moesaic plan --json`: everything that is known, under names with units."""

from __future__ import annotations

import json
from dataclasses import asdict

from cluster.planner.placement_plan import PlacementPlan
from cluster.whatif.answer import Outlook, PlanAnswer
from cluster.whatif.cluster_file import cluster_name, figures_of
from cluster.whatif.notes import notes

Json = dict[str, object]


def plan_json(answer: PlanAnswer) -> str:
    question, workload = answer.question, answer.question.workload
    content: Json = {
        "model": question.model_name, "dtype": question.dtype, "cluster": cluster_name(question.cluster),
        "figures": question.figures, "fits": answer.plan is not None, "missing_bytes": answer.missing_bytes,
        "batch": workload.num_rows, "context_tokens": workload.context_tokens,
        "max_batch_tokens": question.config.scheduler.max_batch_tokens, "min_copies": question.options.min_copies,
        "nodes": _nodes(answer), "demand": asdict(answer.demand),
        "checkpoint": {"stored_bytes": question.stored_bytes, "loaded_bytes": question.loaded_bytes,
                       "fp8_block_size": question.args.weight_block_size},
        "state_slots": answer.num_state_slots, "state_slot_bytes": answer.question.state_slot_bytes,
        "kv_cache_tokens": answer.kv_tokens, "kv_cache_tokens_asked": answer.wanted_kv_tokens,
        "start_sizes": asdict(answer.start_sizes) if answer.start_sizes else None,
        "plan": _plan(answer, answer.plan) if answer.plan else None,
        "held": _outlook(answer.held) | {"batch": answer.num_held_rows} if answer.held else None,
        "even": _outlook(answer.even) if answer.even else None,
        "one_more_node": {outlook.what: _outlook(outlook) for outlook in answer.one_more},
        "to_fit": {"more_nodes": {remedy.kind: {
                       "num_nodes": remedy.num_more_nodes, "max_batch_tokens": remedy.max_batch_tokens}
                       for remedy in answer.remedies},
                   "max_batch_tokens": answer.fitting_batch_tokens,
                   "one_copy_fits": answer.fits_with_one_copy} if answer.plan is None else None,
        "assumed": question.cluster.assumed.model_dump(), "notes": list(notes(question))}
    return json.dumps(content)


def _nodes(answer: PlanAnswer) -> list[Json]:
    """Describe the nodes by kind. `profile` is what one device is taken to do."""
    nodes = []
    for kind in answer.question.cluster.nodes:
        figures = figures_of(kind)
        profile = next(member.profile for member in answer.members if member.pool == kind.name)
        nodes.append({"name": kind.name, "device": kind.device if isinstance(kind.device, str) else "given",
                      "num_nodes": kind.count, "num_devices": kind.devices, "figures": profile.source,
                      "source": figures.source, "url": figures.url, "vendor": figures.vendor,
                      "memory_bytes": figures.memory, "profile": asdict(profile)})
    return nodes


def _plan(answer: PlanAnswer, plan: PlacementPlan) -> Json:
    prediction = plan.prediction
    return {
        "tokens_per_s": prediction.tokens_per_s, "step_s": prediction.step_s, "token_latency_s": prediction.step_s,
        "limit": prediction.limit, "bound_s": plan.bound_s, "ratio": plan.ratio, "solver": plan.solver,
        "members": [{
            "name": member.name, "kind": planned.pool, "num_expert_copies": member.num_expert_copies,
            "request_share": member.share.fraction, "token_budget": member.share.token_budget,
            "memory": asdict(member.memory) | {"budget_bytes": member.memory.budget_bytes}, "step": asdict(times)}
            for planned, member, times in zip(answer.members, plan.members, prediction.members, strict=True)],
        "holders": [[list(ranks) for ranks in layer] for layer in plan.placement.holders],
        "splits": [[list(parts) for parts in layer] for layer in plan.splits]}


def _outlook(outlook: Outlook) -> Json:
    return {"fits": outlook.tokens_per_s is not None, "tokens_per_s": outlook.tokens_per_s, "step_s": outlook.step_s,
            "why_not": outlook.why_not}
