"""What an answer is about, in one line that stands over every table and page; and every setting
with its origin.

Example:

    qwen2, 7.62 B parameters | 8,192 tokens x 1 x 1 (sequence, micro-batch, accumulation) |
    checkpointing off | attention sdpa | AdamW (FusedAdam) | ZeRO-3, buckets 500 M, zero.Init |
    assumed: checkpointing, attention
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bf16prof.profiles.plain import dotted
from bf16prof.records import MemoryRecord, Workload
from bf16prof.reports.units import inert
from bf16prof.rounding import short_count
from bf16prof.vocabulary import Offload

MOST_VALUES = 4
"""So many different values of one setting are listed; of more, how many there are."""

SEPARATOR = " | "


def asked_lines(records: Sequence[MemoryRecord]) -> list[str]:
    """One line for each model that the records are about, in their order; values that differ among
    its records are listed."""
    groups: dict[tuple[str, str], list[MemoryRecord]] = {}
    for record in records:
        if record.workload is not None:
            groups.setdefault((record.case.profile, record.workload.model), []).append(record)
    return [_line(group) for group in groups.values()]


def _line(records: Sequence[MemoryRecord]) -> str:
    workloads = [record.workload for record in records if record.workload is not None]
    parts = [
        _model(records),
        _optional(workloads, "", lambda w: w.adapter),
        _tokens(workloads),
        _parallelism(records),
        "checkpointing " + _values(workloads, lambda w: "on" if w.activation_checkpointing else "off"),
        _optional(workloads, "attention ", lambda w: w.attention or ("sdpa (default)" if "attention" in w.assumed else None)),
        _optional(workloads, "Liger's kernels: ", lambda w: None if w.liger == "none" else w.liger),
        _optional(workloads, "fused loss: ", lambda w: None if w.fused_loss == "none" else w.fused_loss),
        _optional(workloads, "DPO: ", lambda w: None if w.dpo == "none" else w.dpo),
        "reward model" if any(w.reward for w in workloads) else "",
        _optional(workloads, "packed, sequences in a row: ", lambda w: str(w.packed_sequences or "")),
        _optional(workloads, "evaluation: ", lambda w: w.evaluation),
        "MLPs in tiles" if any(w.tiled_mlp for w in workloads) else "",
        "" if all(w.keeps_outputs for w in workloads) else "outputs dropped before backward",
        _values(workloads, lambda w: w.optimizer),
        _zero(records, workloads),
    ]
    assumed = list(dict.fromkeys(word for workload in workloads for word in workload.assumed))
    parts += ["assumed: " + ", ".join(map(inert, assumed))] if assumed else []
    return SEPARATOR.join(part for part in parts if part)


def _model(records: Sequence[MemoryRecord]) -> str:
    workload, case = records[0].workload, records[0].case
    assert workload is not None, "only records with a workload are in a group"
    counts = list(dict.fromkeys(record.parameters for record in records if record.parameters))
    named = inert(workload.model) if case.profile.startswith(workload.model) else f"{inert(case.profile)} ({inert(workload.model)})"
    return named + "".join(f", {short_count(count, ' ')} parameters" for count in counts[:1])


def _tokens(workloads: Sequence[Workload]) -> str:
    micro = _values(workloads, lambda w: str(w.micro_batch_size))
    steps = _values(workloads, lambda w: str(w.gradient_accumulation_steps))
    if all(workload.sequence_length is None for workload in workloads):
        return f"{micro} x {steps} (micro-batch, accumulation)"
    tokens = _values(workloads, lambda w: "?" if w.sequence_length is None else f"{w.sequence_length:,}")
    return f"{tokens} tokens x {micro} x {steps} (sequence, micro-batch, accumulation)"


def _parallelism(records: Sequence[MemoryRecord]) -> str:
    """Over what the ranks share the work, where they do; of several numbers of ranks, each."""
    known = [words for record in records if (words := record.case.parallelism.words)]
    return f"ranks: {', '.join(dict.fromkeys(known))}" if known else ""


def _zero(records: Sequence[MemoryRecord], workloads: Sequence[Workload]) -> str:
    stages = sorted({record.case.zero_stage for record in records})
    sizes = [int(w.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", 0)) for w in workloads]
    engines = {workload.engine for workload in workloads} - {"deepspeed"}
    switched = "/".join("on" if stage else "off" for stage in stages)
    parts = [f"{inert(name)}, distributed optimizer {switched}" for name in sorted(engines)] or ["ZeRO-" + ",".join(map(str, stages))]
    if any(sizes):
        parts.append("buckets " + _distinct(short_count(size, " ") for size in sizes))
    if any(workload.zero_init for workload in workloads):
        parts.append("zero.Init")
    offloads = [str(record.case.offload) for record in records if record.case.offload is not Offload.NONE]
    parts += [f"offload {_distinct(offloads)}"] if offloads else []
    return ", ".join(parts)


def _values(workloads: Sequence[Workload], value: Callable[[Workload], str]) -> str:
    return _distinct(value(workload) for workload in workloads)


def _optional(workloads: Sequence[Workload], before: str, value: Callable[[Workload], str | None]) -> str:
    known = [found for workload in workloads if (found := value(workload))]
    return before + _distinct(known) if known else ""


def _distinct(values: Iterable[str]) -> str:
    found = list(dict.fromkeys(map(inert, values)))
    return "/".join(found) if len(found) <= MOST_VALUES else f"{found[0]} to {found[-1]}"


def planned_line(workload: Workload, profile: str, parameters: int, chosen: Sequence[str]) -> str:
    """What a plan is about. `chosen`: what it chooses itself, in a word each, so that nothing of it
    counts as asked or assumed."""
    parts = [inert(workload.model) if profile.startswith(workload.model) else f"{inert(profile)} ({inert(workload.model)})"]
    parts[0] += f", {short_count(parameters, ' ')} parameters"
    parts += [inert(workload.adapter)] if workload.adapter else []
    parts += [f"Liger's kernels: {inert(workload.liger)}"] if workload.liger != "none" else []
    parts += [] if workload.sequence_length is None else [f"sequences of {workload.sequence_length:,} tokens"]
    fixed = {
        "micro-batch": f"micro-batch {workload.micro_batch_size}",
        "accumulation": f"accumulation {workload.gradient_accumulation_steps}",
        "checkpointing": f"checkpointing {'on' if workload.activation_checkpointing else 'off'}",
    }
    parts += [text for word, text in fixed.items() if word not in chosen]
    parts += [f"attention {inert(workload.attention)}"] if workload.attention else []
    parts += ["buckets " + short_count(int(workload.deepspeed["zero_optimization"]["reduce_bucket_size"]), " ")]
    parts += ["chosen by the plan: " + ", ".join(chosen)] if chosen else []
    assumed = [inert(word) for word in workload.assumed if word not in chosen]
    return SEPARATOR.join(parts + (["assumed: " + ", ".join(assumed)] if assumed else []))


def settings(profile: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Every resolved setting of a profile by its dotted key: its value, and where it comes from
    ("default": the library's own). Those of DeepSpeed are left out where another engine trains."""
    from bf16prof.profiles.explain import documented
    from bf16prof.profiles.identity import PLACES

    places = {f"{table}.{key}" for table, keys in dotted(PLACES).items() for key in keys}
    left_out = {"name", "description", *places}
    said = profile if profile.get("engine", "deepspeed") == "deepspeed" else {**profile, "deepspeed": {}}
    keys = {documented(key): value for key, value in dotted(said).items() if key not in left_out}
    return {key: {"value": value, "origin": _origin(key, origins)} for key, value in keys.items()}


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """The origin of a key, or of the table that it was given in."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return "default"
