"""Plans in words and rows, which console, Markdown and HTML lay out each in its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.plans import Limits, Outlook, Plan, Room, StageComparison
from bf16prof.records import Offload
from bf16prof.reports.units import gib, inert, number, seconds, share, signed_bytes
from bf16prof.reports.views import case_label, component_name

PLANS = ("#", "ZeRO", "recipe", "offload", "micro-batch", "peak", "free", "tokens/s at most", "calibrated", "against the first")
SIZES = ("GPUs", "first choice", "micro-batch", "peak", "free", "tokens/s at most", "per GPU")
CHANGES = ("change", "saves", "needs", "fits", "flag")
DIFFERENCES = ("alive at the training peak", "ZeRO-2", "ZeRO-3", "more")
SMALL = 2**20
"""Differences below a MiB explain nothing."""
MOST_CHANGES = 8
_KEY = "--set deepspeed.zero_optimization."


@dataclass(frozen=True)
class Rows:
    """A table as text: lines within a cell are parted by newlines, the first is what is read first."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def title(outlook: Outlook, profile: str, parameters: int) -> str:
    """What is planned."""
    return f"{inert(profile)}, {parameters:,} parameters, on {outlook.world_size} x {inert(outlook.room.gpu)}"


def room_text(room: Room) -> str:
    """How much there is for a plan, and why not more."""
    beside = "".join(f" - {gib(item.bytes)} {inert(item.name)} (assumed)" for item in room.beside)
    return (
        f"Room for the peak: {gib(room.bytes)} = ({gib(room.memory_bytes)}{beside}) less a margin of {room.margin:.0%} for fragmentation."
    )


def plan_words(plan: Plan) -> str:
    """A plan in a few words: "zero3-w8-bf16-full, micro-batch 4, activations recomputed"."""
    parts = [case_label(plan.case), f"micro-batch {plan.micro_batch_size}"]
    parts += ["activations recomputed"] if plan.activation_checkpointing else []
    parts += ["built inside zero.Init"] if plan.zero_init else []
    return ", ".join(parts)


def plan_rows(plans: Sequence[Plan]) -> Rows:
    """One row per plan, each with what it loses and gains against the first."""
    rows = [_row(n, plan, plans[0]) for n, plan in enumerate(plans, 1)]
    said = {"offload": any(p.case.offload is not Offload.NONE for p in plans), "calibrated": any(p.tokens_per_s for p in plans)}
    kept = [i for i, header in enumerate(PLANS) if said.get(header, True)]
    return Rows(tuple(PLANS[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows))


def _row(rank: int, plan: Plan, first: Plan) -> tuple[str, ...]:
    recipe = f"{inert(plan.case.recipe)}\n{inert(plan.learning)}" + ("\nin zero.Init" if plan.zero_init else "")
    micro = [str(plan.micro_batch_size)] + (["recompute"] if plan.activation_checkpointing else [])
    micro += [f"up to {plan.largest_micro_batch_size}"] if plan.largest_micro_batch_size > plan.micro_batch_size else []
    return (
        str(rank),
        str(plan.case.zero_stage),
        recipe,
        str(plan.case.offload).replace("+", "\n+"),
        "\n".join(micro),
        f"{gib(plan.peak_bytes)}\n{plan.peak_phase}",
        gib(plan.free_bytes),
        number(plan.tokens_per_s_at_most),
        number(plan.tokens_per_s),
        "\n".join(against(plan, first)) if rank > 1 else "",
    )


def against(plan: Plan, first: Plan) -> list[str]:
    """What a plan loses against the first, and what it gains."""
    said = []
    if plan.case.offload is first.case.offload:
        said += [f"{_rate(plan, first):+.0%} tokens/s"] if abs(_rate(plan, first)) >= 0.005 else ["as fast"]
    else:
        said.append("plus the CPU's time")
    said += [plan.learning] if plan.learning != first.learning else []
    free = plan.free_bytes - first.free_bytes
    said += [f"{signed_bytes(free)} free"] if abs(free) >= SMALL else []
    host = plan.host_bytes - first.host_bytes
    return said + ([f"{signed_bytes(host)} on the host"] if abs(host) >= SMALL else [])


def _rate(plan: Plan, first: Plan) -> float:
    if plan.tokens_per_s and first.tokens_per_s:
        return plan.tokens_per_s / first.tokens_per_s - 1
    return plan.tokens_per_s_at_most / first.tokens_per_s_at_most - 1


def order_text(outlook: Outlook) -> list[str]:
    """How the plans are ordered, what the numbers mean, and what else there is."""
    plans = outlook.plans
    calibrated = any(plan.tokens_per_s is not None for plan in plans)
    rate = "calibrated tokens/s (the error bar apart)" if calibrated else "tokens/s at most (within 13 % counts as equal)"
    said = [
        f"Order: less offloading, {rate}, least risk in learning, lowest stage. Tokens/s at most: an upper bound, from the floor of the "
        "step's time, and no prediction.",
        "Micro-batch: the smallest that is as fast as the largest that fits; recompute: with activation checkpointing. Peak: of the whole "
        "run, init included.",
    ]
    if not outlook.complete:
        said.append(f"More than these {len(plans)} fit: -v shows all, and so does a file (-o).")
    if any(plan.case.offload is not Offload.NONE for plan in plans):
        said.append("Offloading comes last: the optimizer then runs on the CPU, whose time no bound here knows.")
    if any(plan.zero_init for plan in plans):
        said.append("In zero.Init: the model has to be built inside deepspeed.zero.Init.")
    return said


def left_out_text(outlook: Outlook) -> list[str]:
    """What could not be judged, and why the margin is what it is."""
    less = "" if outlook.room.expandable else " With --expandable-segments less is enough."
    said = [f"The margin stands for fragmentation, which has no closed form; a dry run (bf16prof simulate) knows it.{less}"]
    return said + [f"Not judged: {inert(reason, 300)}" for reason in outlook.left_out]


def size_rows(outlooks: Sequence[Outlook]) -> Rows:
    """One row per number of GPUs: its first choice, or what the nearest lacks."""
    return Rows(SIZES, tuple(_size_row(outlook) for outlook in outlooks))


def _size_row(outlook: Outlook) -> tuple[str, ...]:
    plan = outlook.plans[0] if outlook.plans else outlook.nearest
    assert plan is not None, "where nothing fits there is a nearest miss"
    rate = plan.tokens_per_s_at_most
    words = inert(case_label(plan.case)) + ("\nactivations recomputed" if plan.activation_checkpointing else "")
    words += "\nin zero.Init" if plan.zero_init else ""
    if not outlook.plans:
        words = f"nothing fits; nearest:\n{words}"
    rates = (number(rate), number(rate / outlook.world_size)) if outlook.plans else ("", "")
    return str(outlook.world_size), words, str(plan.micro_batch_size), gib(plan.peak_bytes), gib(plan.free_bytes), *rates


def limit_lines(first: Plan, limits: Limits) -> list[str]:
    """How fast the first choice is at most and how far it goes, and how few GPUs do."""
    calibrated = f", {seconds(first.step_time_s)} calibrated" if first.step_time_s is not None else ""
    said = [f"step time: at least {seconds(first.step_time_floor_s)}{calibrated}, for {first.train_batch_size} sequences"]
    if limits.same_gpus is not None:
        said.append(f"largest micro-batch: {limits.micro_batch_size}")
        said.append(f"longest sequence: {limits.sequence_length} tokens" + (", the model's longest" if limits.longest else ""))
        said.append(f"fewest GPUs for it: {limits.same_gpus}")
    return said + [f"fewest GPUs for anything: {fewest_words(plan)}" for plan in limits.fewest]


def fewest_words(plan: Plan) -> str:
    """On how few GPUs a plan fits, and which one."""
    offload = "without offloading" if plan.case.offload is Offload.NONE else f"offloading {plan.case.offload}"
    return f"{plan.case.world_size}, {offload} ({plan_words(plan)})"


def change_rows(outlook: Outlook) -> Rows:
    """What single changes of the nearest miss are worth."""
    rows = [
        (inert(c.what, 120), gib(c.saved_bytes), gib(c.plan.peak_bytes), "yes" if c.plan.fits else "no", inert(c.flag, 300))
        for c in outlook.changes[:MOST_CHANGES]
    ]
    return Rows(CHANGES, tuple(rows))


def nearest_lines(outlook: Outlook) -> list[str]:
    """That nothing fits, what comes nearest, and whether more GPUs help."""
    nearest = outlook.nearest
    assert nearest is not None, "where nothing fits there is a nearest miss"
    fewest = outlook.limits.fewest
    more = [f"Fewest GPUs on which anything fits: {fewest_words(plan)}." for plan in fewest] or ["More GPUs of this kind do not help."]
    lacks = f"{gib(nearest.peak_bytes)} in {nearest.peak_phase}, {gib(-nearest.free_bytes)} too much"
    return [f"None of {outlook.combinations} combinations fits. Nearest: {plan_words(nearest)}: {lacks}.", *more]


def difference_rows(stages: StageComparison) -> Rows:
    """What ZeRO-3 holds more or less of than ZeRO-2."""
    rows = []
    for d in stages.differences:
        if abs(d.more_bytes) >= SMALL:
            name = component_name(d.component)
            name = name if d.name == name else f"{name}: {inert(d.name)}"
            rows.append((name, gib(d.before_bytes), gib(d.after_bytes), signed_bytes(d.more_bytes)))
    return Rows(DIFFERENCES, tuple(rows))


def stage_title(stages: StageComparison) -> str:
    """The question that a comparison answers."""
    like = f"{inert(stages.zero3.case.recipe)}, micro-batch {stages.zero3.micro_batch_size}"
    return f"Why ZeRO-3 needs more than ZeRO-2 here ({like}): {signed_bytes(stages.more_bytes)} at the training peak"


def stage_lines(stages: StageComparison) -> list[str]:
    """The keys that change it, each with the size of the change; where ZeRO-3 needs less, that."""
    if stages.more_bytes <= 0:
        return [f"ZeRO-3 instead of ZeRO-2, all else equal: {signed_bytes(stages.more_bytes)} at the training peak."]
    peak = stages.zero3.peak_bytes
    said = [
        f"{inert(change.flag.replace(_KEY, ''), 200)}: {gib(change.saved_bytes)} less ({share(change.saved_bytes, peak)})"
        for change in stages.changes
        if change.saved_bytes >= SMALL
    ]
    if stages.second_copy_bytes:
        said.append(f"Parameters are fp32 here, and ZeRO keeps a second fp32 copy as masters: {gib(stages.second_copy_bytes)}.")
    return said or ["None of DeepSpeed's bucket and gathering keys lowers the whole-run peak of ZeRO-3."]
