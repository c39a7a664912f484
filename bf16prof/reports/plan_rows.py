"""Plans in words and tables, which console, Markdown and HTML lay out each in its way."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bf16prof.plans import EQUAL, Difference, Limits, Outlook, Plan, Room, StageComparison
from bf16prof.reports import palette
from bf16prof.reports.answers import counted
from bf16prof.reports.cells import Cell, Table, bytes_cell, number_cell, without_empty
from bf16prof.reports.units import gib, inert, seconds, share, signed_bytes
from bf16prof.reports.verdict import STYLES
from bf16prof.reports.views import case_label, component_name
from bf16prof.vocabulary import Offload

PLANS = (
    "#", "ZeRO", "recipe", "offload", "micro-batch", "verdict", "peak", "reserved", "free", "tokens/s at most", "calibrated",
    "against the first",
)  # fmt: skip
SIZES = ("GPUs", "first choice", "micro-batch", "peak", "free", "tokens/s at most", "per GPU")
CHANGES = ("change", "saves", "needs", "verdict", "flag")
DIFFERENCES = ("alive at the training peak", "ZeRO-2", "ZeRO-3", "more")
LEFT = ("verdict", "recipe", "offload", "against the first", "first choice", "change", "flag", "alive at the training peak")
"""Columns of words; the others are of numbers."""

BY_DRY_RUNS = "Order: less offloading, no recomputation, lowest stage, largest micro-batch. Peak: of the whole run. Speed: not known."

BY_DIMENSIONS = (
    "Order: less offloading, no recomputation, fewer ranks that share, fewer changes of the model, lowest stage. Peak: of the whole run. "
    "Speed: not known."
)

SMALL = 2**20
"""Differences below a MiB explain nothing."""
MOST_CHANGES = 8
_KEY = "--set deepspeed.zero_optimization."


def title(outlook: Outlook, profile: str, parameters: int) -> str:
    """What is planned."""
    return f"{inert(profile)}, {parameters:,} parameters, on {outlook.world_size} x {inert(outlook.room.gpu)}"


def room_text(room: Room) -> str:
    """How much there is for a plan, and why not more."""
    beside = "".join(f" - {gib(item.bytes)} {inert(item.name)} (assumed)" for item in room.beside)
    return (
        f"Room for what the allocator reserves: {gib(room.bytes)} = ({gib(room.memory_bytes)}{beside}) less a margin of "
        f"{room.margin:.0%} for what its replay does not know."
    )


def plan_words(plan: Plan) -> str:
    """A plan in a few words: "zero3-w8-bf16-full, micro-batch 4, activations recomputed"."""
    parts = [case_label(plan.case), f"micro-batch {plan.micro_batch_size}"]
    parts += ["activations recomputed"] if plan.activation_checkpointing else []
    parts += ["built inside zero.Init"] if plan.zero_init else []
    return ", ".join(parts + _chosen(plan))


def _chosen(plan: Plan) -> list[str]:
    """What a search of the dimensions chose of a plan, as flags."""
    return [inert(shlex.join(plan.chosen))] if plan.chosen else []


def first_choice(outlook: Outlook) -> str:
    """The first choice and what it leaves free, as one sentence."""
    first, room = outlook.plans[0], outlook.room
    offload = "" if first.case.offload is Offload.NONE else f", offloading {first.case.offload}"
    offload += "".join(f", {flags}" for flags in _chosen(first))
    held = _held(first)
    how = "allocated" if first.reserved_bytes is None else "reserved"
    tried = "; a dry run of the real engine says so" if first.is_tried else "; predicted"
    whose = "the allocator may reserve" if first.is_tried else "a plan may use"
    return (
        f"On {outlook.world_size} x {inert(room.gpu)}: ZeRO-{first.case.zero_stage}, {inert(first.case.recipe)}, micro-batch "
        f"{first.micro_batch_size}, checkpointing {'on' if first.activation_checkpointing else 'off'}{offload}: {first.verdict}, "
        f"{gib(held)} {how} of the {gib(held + first.free_bytes)} that {whose}{tried}."
    )


def brief_notes(outlook: Outlook) -> list[str]:
    """What a reader of the short table has to know."""
    plans = outlook.plans
    calibrated = any(plan.tokens_per_s is not None for plan in plans)
    said = ["Order: less offloading, tokens/s" + (" (calibrated)" if calibrated else " at most (an upper bound)")]
    said[0] += ", least risk in learning, lowest stage. Peak: of the whole run."
    if not outlook.limits.are_known:
        said = _by_dry_runs(plans)
    if any(plan.is_tried for plan in plans):
        said.append("Free: of what the allocator may reserve where a plan was tried, else of that without the margin.")
    if any(plan.zero_init for plan in plans):
        said.append("With ZeRO-3 the model has to be built inside deepspeed.zero.Init.")
    said += [*_offloading_comes_last(plans), *_failed(outlook)]
    if not outlook.complete:
        said.append(f"More than these {len(plans)} fit. -v: all of them, what each learns and reserves, and how the margin is made.")
    return said + _not_judged(outlook)


def _by_dry_runs(plans: Sequence[Plan]) -> list[str]:
    """How plans are ordered that were all run dry, and what a search of the dimensions chose of
    each."""
    if not any(plan.chosen for plan in plans):
        return [BY_DRY_RUNS]
    return [BY_DIMENSIONS, *(f"{rank}: {' '.join(_chosen(plan)) or 'as asked'}" for rank, plan in enumerate(plans, 1))]


def plan_rows(plans: Sequence[Plan]) -> Table:
    """One row per plan, each with what it loses and gains against the first."""
    rows = tuple(_row(n, plan, plans[0]) for n, plan in enumerate(plans, 1))
    table = without_empty(Table("What fits, the first choice first", PLANS, rows))
    kept = [i for i, header in enumerate(table.headers) if header != "offload" or any(p.case.offload is not Offload.NONE for p in plans)]
    return Table(table.caption, tuple(table.headers[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in table.rows))


def _row(rank: int, plan: Plan, first: Plan) -> tuple[Cell, ...]:
    micro = ["recompute"] if plan.activation_checkpointing else []
    micro += [f"up to {plan.largest_micro_batch_size}"] if plan.largest_micro_batch_size > plan.micro_batch_size else []
    return (
        Cell(str(rank), rank, "number"),
        Cell(str(plan.case.zero_stage), plan.case.zero_stage, "number"),
        Cell(inert(plan.case.recipe), style="label", detail=inert(plan.learning) + ("\nin zero.Init" if plan.zero_init else "")),
        _lined(str(plan.case.offload).replace("+", "\n+")),
        Cell(str(plan.micro_batch_size), plan.micro_batch_size, "number", detail="\n".join(micro)),
        verdict_cell(plan),
        bytes_cell(plan.peak_bytes, detail=str(plan.peak_phase)),
        bytes_cell(plan.reserved_bytes),
        bytes_cell(plan.free_bytes),
        number_cell(plan.tokens_per_s_at_most),
        number_cell(plan.tokens_per_s),
        _lined("\n".join(against(plan, first)) if rank > 1 else ""),
    )


def verdict_cell(plan: Plan) -> Cell:
    """The verdict with its symbol, and whether the dry run has said it."""
    if plan.verdict is None:
        return Cell("")
    style = STYLES[plan.verdict]
    return Cell(f"{palette.SYMBOLS[style]} {plan.verdict}", style=style, detail="tried" if plan.is_tried else "")


def _lined(text: str) -> Cell:
    """A cell whose first line is what is read first."""
    head, _, tail = text.partition("\n")
    return Cell(head, detail=tail)


def against(plan: Plan, first: Plan) -> list[str]:
    """What a plan loses against the first, and what it gains."""
    said = []
    if plan.case.offload is first.case.offload:
        rate = _rate(plan, first)
        said += [] if rate is None else [f"{rate:+.0%} tokens/s"] if abs(rate) >= 0.005 else ["as fast"]
    else:
        said.append("plus the CPU's time")
    said += [plan.learning] if plan.learning != first.learning else []
    free = _held(first) - _held(plan)
    said += [f"{signed_bytes(free)} free"] if abs(free) >= SMALL else []
    host = plan.host_bytes - first.host_bytes
    return said + ([f"{signed_bytes(host)} on the host"] if abs(host) >= SMALL else [])


def _held(plan: Plan) -> int:
    """What a plan takes of the room: what the allocator reserves, where that is known."""
    return plan.peak_bytes if plan.reserved_bytes is None else plan.reserved_bytes


def _rate(plan: Plan, first: Plan) -> float | None:
    """By what share a plan is faster than the first; `None` where nothing is known of the GPU's
    speed."""
    if plan.tokens_per_s and first.tokens_per_s:
        return plan.tokens_per_s / first.tokens_per_s - 1
    known = plan.tokens_per_s_at_most, first.tokens_per_s_at_most
    return None if known[0] is None or known[1] is None else known[0] / known[1] - 1


def order_text(outlook: Outlook) -> list[str]:
    """How the plans are ordered, what the numbers mean, and what else there is."""
    plans = outlook.plans
    calibrated = any(plan.tokens_per_s is not None for plan in plans)
    rate = "calibrated tokens/s (the error bar apart)" if calibrated else f"tokens/s at most (within {100 * EQUAL:.0f} % counts as equal)"
    said = [
        f"Order: less offloading, {rate}, least risk in learning, lowest stage. Tokens/s at most: an upper bound, from the floor of the "
        "step's time, and no prediction.",
        "Micro-batch: the smallest that is as fast as the largest that fits; recompute: with activation checkpointing. Peak: of the whole "
        "run, init included.",
    ]
    if not outlook.limits.are_known:
        said = _by_dry_runs(plans)
    said += tried_lines(outlook)
    if not outlook.complete:
        said.append(f"More than these {len(plans)} fit: -v shows all, and so does a file (-o).")
    said += _offloading_comes_last(plans)
    if any(plan.zero_init for plan in plans):
        said.append("In zero.Init: the model has to be built inside deepspeed.zero.Init.")
    return said


def tried_lines(outlook: Outlook) -> list[str]:
    """Which choices were run dry, and which of them failed."""
    ranks = [str(rank) for rank, plan in enumerate(outlook.plans, 1) if plan.is_tried]
    said = [f"Tried: a dry run of the real engine says so of {', '.join(ranks)}; the others are predicted."] if ranks else []
    return said + _failed(outlook)


def _failed(outlook: Outlook) -> list[str]:
    said = []
    for plan in outlook.tried:
        over = f", {gib(-plan.free_bytes)} too much" if plan.free_bytes < 0 else ""
        said.append(f"Failed the dry run: {plan_words(plan)}: {plan.verdict} ({gib(plan.peak_bytes)} allocated at most{over}).")
    return said


def left_out_text(outlook: Outlook) -> list[str]:
    """What could not be judged, and why the margin is what it is."""
    less = "" if outlook.room.expandable else " With --expandable-segments less is enough."
    said = [f"What the allocator reserves is replayed where the verdict turns on it; the margin is for what a replay does not know.{less}"]
    return said + _not_judged(outlook)


def _not_judged(outlook: Outlook) -> list[str]:
    return [f"Not judged: {inert(reason, 300)}" for reason in outlook.left_out]


def _offloading_comes_last(plans: Sequence[Plan]) -> list[str]:
    offloads = any(plan.case.offload is not Offload.NONE for plan in plans)
    return ["Offloading comes last: the optimizer then runs on the CPU, whose time no bound here knows."] if offloads else []


def size_rows(outlooks: Sequence[Outlook]) -> Table:
    """One row per number of GPUs: its first choice, or what the nearest lacks."""
    return Table("By the number of GPUs", SIZES, tuple(_size_row(outlook) for outlook in outlooks))


def _size_row(outlook: Outlook) -> tuple[Cell, ...]:
    plan = outlook.plans[0] if outlook.plans else outlook.nearest
    assert plan is not None, "where nothing fits there is a nearest miss"
    rate = plan.tokens_per_s_at_most
    words = inert(case_label(plan.case)) + ("\nactivations recomputed" if plan.activation_checkpointing else "")
    words += "\nin zero.Init" if plan.zero_init else ""
    if not outlook.plans:
        words = f"nothing fits; nearest:\n{words}"
    return (
        Cell(str(outlook.world_size), outlook.world_size, "number"),
        _lined(words),
        Cell(str(plan.micro_batch_size), plan.micro_batch_size, "number"),
        bytes_cell(plan.peak_bytes),
        bytes_cell(plan.free_bytes),
        *((number_cell(rate), number_cell(rate and rate / outlook.world_size)) if outlook.plans else (Cell(""), Cell(""))),
    )


def limit_lines(first: Plan, limits: Limits) -> list[str]:
    """How fast the first choice is at most and how far it goes, and how few GPUs do."""
    calibrated = f", {seconds(first.step_time_s)} calibrated" if first.step_time_s is not None else ""
    why = "the GPU's speed is not" if limits.are_known else "the work of such a job has no closed form"
    floor = f"not known, for {why}" if first.step_time_floor_s is None else f"at least {seconds(first.step_time_floor_s)}"
    said = [f"step time: {floor}{calibrated}, for {counted(first.train_batch_size, 'sequence')}"]
    said += [] if limits.are_known else ["largest micro-batch, longest sequence, fewest GPUs: not looked for, as each takes dry runs"]
    said += [f"host memory: {host_text(first)}"] if first.host_bytes >= SMALL else []
    if limits.micro_batch_size is not None:
        said.append(f"largest micro-batch: {limits.micro_batch_size}")
    if limits.sequence_length is not None:
        said.append(f"longest sequence: {limits.sequence_length} tokens" + (", the model's longest" if limits.longest else ""))
    if limits.same_gpus is not None:
        said.append(f"fewest GPUs for it: {limits.same_gpus}")
    return said + [f"fewest GPUs for anything: {fewest_words(plan)}" for plan in limits.fewest]


def fewest_words(plan: Plan) -> str:
    """On how few GPUs a plan fits, and which one."""
    offload = "without offloading" if plan.case.offload is Offload.NONE else f"offloading {plan.case.offload}"
    host = f", {host_text(plan)} of host memory" if plan.host_bytes >= SMALL else ""
    return f"{plan.case.world_size}, {offload}{host} ({plan_words(plan)})"


def host_text(plan: Plan) -> str:
    """Host memory of each rank and of a node."""
    return f"{gib(plan.host_bytes)} a rank, {gib(plan.host_bytes_per_node)} a node"


def change_rows(outlook: Outlook) -> Table:
    """What changes of the nearest miss are worth, alone and together."""
    rows = (
        (
            Cell(inert(change.what, 120)),
            bytes_cell(change.saved_bytes),
            bytes_cell(change.plan.peak_bytes),
            verdict_cell(change.plan),
            Cell(inert(change.flag, 300)),
        )
        for change in outlook.changes[:MOST_CHANGES]
    )
    return Table(
        "What to change: of the nearest, what fits first, fewest changes before more, then the most effective", CHANGES, tuple(rows)
    )


def nearest_lines(outlook: Outlook) -> list[str]:
    """That nothing fits, what comes nearest, and whether more GPUs help."""
    nearest = outlook.nearest
    assert nearest is not None, "where nothing fits there is a nearest miss"
    fewest = outlook.limits.fewest
    more = [f"Fewest GPUs on which anything fits: {fewest_words(plan)}." for plan in fewest]
    if not more and not outlook.limits.are_known:
        more = ["Other numbers of GPUs were not tried."]
    elif not more and not outlook.unjudged:
        more = ["More GPUs of this kind do not help."]
    held = nearest.peak_bytes if nearest.reserved_bytes is None else nearest.reserved_bytes
    how = "in " + str(nearest.peak_phase) if nearest.reserved_bytes is None else f"reserved for a peak of {gib(nearest.peak_bytes)}"
    lacks = f"{nearest.verdict}: {gib(held)} {how}, {gib(-nearest.free_bytes)} too much"
    inside = [only_init_text(nearest)] if nearest.inside_zero_init_bytes is not None else []
    none = "None of" if outlook.limits.are_known else "What needs least of"
    fits = "fits" if outlook.limits.are_known else "does not fit"
    if outlook.unjudged:
        none, fits = f"{none} the", f"that could be judged {fits}; {outlook.unjudged} were not judged"
    lines = [f"{none} {outlook.combinations} combinations {fits}. Nearest: {plan_words(nearest)}: {lacks}.", *inside, *more]
    return [*lines, *tried_lines(outlook), *outlook.beyond]


def only_init_text(plan: Plan) -> str:
    """That only init does not fit, and what does."""
    return (
        f"Only init does not fit: init {gib(plan.peak_bytes)}; inside deepspeed.zero.Init {gib(plan.inside_zero_init_bytes)} (--zero-init)."
    )


def difference_rows(stages: StageComparison) -> Table:
    """What ZeRO-3 holds more or less of than ZeRO-2."""
    rows = tuple(_difference(d) for d in stages.differences if abs(d.more_bytes) >= SMALL)
    return Table(stage_title(stages), DIFFERENCES, rows)


def _difference(found: Difference) -> tuple[Cell, ...]:
    name = component_name(found.component)
    name = name if found.name == name else f"{name}: {inert(found.name)}"
    more = Cell(signed_bytes(found.more_bytes), found.more_bytes, "number", title=f"{found.more_bytes:+,} B")
    return Cell(name, colour=palette.COMPONENTS[found.component]), bytes_cell(found.before_bytes), bytes_cell(found.after_bytes), more


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
