"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from diffpref.plan.planning import Plan

TERA = 1e12


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values: bytes, FLOPs an item, seconds; the GPU by its name."""
    found = asdict(plan)
    del found["config"]
    found["cards"] = [{**card, "gpu": card["gpu"]["name"]} for card in found["cards"]]
    return found


def as_text(plan: Plan, name: str) -> str:
    """The plan in sections with aligned figures."""
    config = plan.config
    train, data, one = config.train, config.data, plan.kind.removesuffix("s")
    shape = f"{data.resolution} x {data.resolution}"
    micro = f"micro-batch of {train.batch_size} {plan.kind if train.batch_size > 1 else one} at {shape}"
    precision = {"no": "fp32"}.get(train.mixed_precision, train.mixed_precision)
    checkpointing = ", gradient checkpointing" if train.gradient_checkpointing else ""
    lines = [f"plan of {name}", *(f"  {note}" for note in plan.notes), ""]
    lines += ["parameters", *_rows(_parameters(plan)), ""]
    lines += [f"GPU memory in training, GB ({micro}, {precision}{checkpointing})", *_rows(_memory(plan)), ""]
    lines += [f"disk, GB ({plan.items:,} {plan.kind})", *_rows(_disk(plan)), ""]
    lines += [f"work, TFLOP {'an' if one[0] in 'aeiou' else 'a'} {one} (2 x multiply-adds)", *_rows(_work(plan)), ""]
    total = train.batch_size * train.gradient_accumulation_steps
    steps = f"{train.max_steps:,} steps of {total:,} {plan.kind}"
    lines.append(f"one GPU, {steps}, at an assumed MFU of {plan.cards[0].mfu:.0%} (nothing was measured)")
    return "\n".join([*lines, *_cards(plan)])


def _rows(rows: list[tuple[str, str, str]]) -> list[str]:
    label = max(len(row[0]) for row in rows)
    value = max(len(row[1]) for row in rows)
    return [f"  {name:<{label}}  {number:>{value}}  {remark}".rstrip() for name, number, remark in rows]


def _parameters(plan: Plan) -> list[tuple[str, str, str]]:
    model, found = plan.config.model, plan.parameters
    how = (
        f"LoRA of rank {model.lora_rank} on {', '.join(model.lora_targets)}" if model.lora_rank else "the whole network"
    )
    return [
        ("network", f"{found['network']:,}", ""),
        ("trained", f"{found['trained']:,}", how),
        ("VAE", f"{found['vae']:,}", ""),
        ("text encoders", f"{found['text_encoders']:,}", ""),
    ]


def _memory(plan: Plan) -> list[tuple[str, str, str]]:
    memory, config = plan.memory, plan.config
    if memory.reference:
        reference = "a copy of the network"
    else:
        reference = "the adapters off" if config.objective.needs_reference else "the objective has none"
    if config.train.reference_cache:
        reference = "its errors are kept"
    if config.data.cache == "none":
        encoders = "encode at every step"
    else:
        encoders = "draw validation images" if memory.encoders else "not loaded: the store is finished"
    rows = [
        ("weights", memory.weights, ""),
        ("reference", memory.reference, reference),
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.optimizer, config.train.optimizer),
        ("activations", memory.activations, "what the backward pass needs, with autocast's casts of weights"),
        ("VAE and text encoders", memory.encoders, encoders),
        ("CUDA context, workspaces", memory.context, "assumed"),
        ("peak", memory.peak, "not all parts are at their most at the same time"),
        ("peak of building the store", plan.building, "`data cache`, or the start of training without a store"),
    ]
    if memory.ema:
        rows.insert(4, ("EMA", memory.ema, "on the CPU" if config.train.offload_ema else ""))
    return [(name, f"{size / 1e9:.2f}", remark) for name, size, remark in rows]


def _disk(plan: Plan) -> list[tuple[str, str, str]]:
    disk, train = plan.disk, plan.config.train
    limit = train.checkpoints_total_limit
    kept = limit or (train.max_steps // train.checkpointing_steps if train.checkpointing_steps else 1)
    # while a checkpoint is written, those that it takes the place of are still there
    rows = [
        ("latents", disk["latents"], "at most: a repeated image is stored once"),
        ("text embeddings", disk["text"], "at most: a repeated prompt is stored once"),
        (f"checkpoints, {kept + 1} of {disk['checkpoint'] / 1e9:.2f}", (kept + 1) * disk["checkpoint"], ""),
        ("final/", disk["final"], ""),
    ]
    return [(name, f"{size / 1e9:.2f}", remark) for name, size, remark in rows]


def _work(plan: Plan) -> list[tuple[str, str, str]]:
    work = plan.work
    cached = plan.config.data.cache != "none"
    rows = [("reference forward", work.reference, ""), ("policy forward", work.forward, "")]
    rows.append(("policy backward", work.backward, ""))
    if work.points:
        rows.append(("points", work.points, f"predictions of {plan.config.points.name} points and of the objective"))
    rows.append(("a step's", work.total(cached), ""))
    rows.append(
        ("VAE and text", work.encoders, "once, by the store" if cached else "at every step: data.cache is none")
    )
    return [(name, f"{flops / TERA:.3f}", remark) for name, flops, remark in rows]


def _cards(plan: Plan) -> list[str]:
    rows = [("GPU", "GB", "peak", f"{plan.kind}/s", "days", "settings")]
    for card in plan.cards:
        gpu = card.gpu
        if card.keys is None:
            rows.append((gpu.name, f"{gpu.memory:g}", f"{card.peak / 1e9:.1f}", "", "", "does not fit, LoRA neither"))
            continue
        changes = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in card.keys.items())
        speed, days = f"{card.pairs_per_second:.2f}", f"{card.days:.2f}"
        rows.append((gpu.name, f"{gpu.memory:g}", f"{card.peak / 1e9:.1f}", speed, days, changes or "fits as it is"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:5], widths[1:], strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *numbers, row[5]]).rstrip())
    return lines
