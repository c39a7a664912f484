"""What one change of a plan is worth, and why ZeRO-3 may need more than ZeRO-2. Every change is predicted, none is guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bf16prof.cases import STAGES
from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.limits import MOST_GPUS
from bf16prof.planning.question import Setting
from bf16prof.plans import Change, Difference, StageComparison
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.profiles.schema import Profile, ZeroSettings
from bf16prof.records import Component, MemoryRecord, Offload

TENTH, NONE = 10, 0
KEYS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("reduce_bucket_size",), TENTH),
    (("allgather_bucket_size",), TENTH),
    (("prefetch_bucket_size",), TENTH),
    (("max_live_parameters",), TENTH),
    (("max_reuse_distance",), TENTH),
    (("max_live_parameters", "max_reuse_distance"), TENTH),
    (("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"), TENTH),
    (("param_persistence_threshold",), NONE),
    (("model_persistence_threshold",), NONE),
    (("sub_group_size",), TENTH),
)
"""Keys of `zero_optimization` that trade memory for speed, and the part of their value that is tried; some work only together."""


@dataclass(frozen=True)
class Trial:
    """A change to try: in words, as a flag, and the setting or the profile with it."""

    what: str
    flag: str
    setting: Setting
    profile: Profile | None = None


def all_changes(judge: Judge, start: Judged) -> list[Change]:
    """Every single change that saves memory, those that make the plan fit first, then by what they save."""
    found = _predicted(judge, start, [*_of_the_setting(judge, start.setting), *_of_keys(start)])
    return sorted(found, key=lambda change: (not change.plan.fits, -change.saved_bytes))


def compare_stages(judge: Judge, like: Judged) -> StageComparison | None:
    """ZeRO-2 and ZeRO-3 with everything else as in a plan; `None` unless both run."""
    setting = like.setting.but(zero_init=False)
    zero2, zero3 = (judge(setting.but(stage=stage)) for stage in (2, 3))
    if zero2 is None or zero3 is None:
        return None
    second_copy = zero3.record.components.get(Component.MASTER_PARAMETERS, 0) if _keeps_two_copies(zero3) else 0
    more = (zero3.record.peak_allocated_bytes or 0) - (zero2.record.peak_allocated_bytes or 0)
    found = StageComparison(zero2.plan, zero3.plan, more, _differences(zero2.record, zero3.record), second_copy)
    return replace(found, changes=tuple(_key_changes(judge, zero3))) if more > 0 else found


def _key_changes(judge: Judge, start: Judged) -> list[Change]:
    """What DeepSpeed's keys save, and for fp32 parameters a recipe without a second fp32 copy, most effective first."""
    trials = list(_of_keys(start))
    if _keeps_two_copies(start):
        recipe = "bf16-fp32-master"
        trials.append(Trial("one fp32 copy of the parameters instead of two", f"--recipe {recipe}", start.setting.but(recipe=recipe)))
    return sorted(_predicted(judge, start, trials), key=lambda change: -change.saved_bytes)


def _keeps_two_copies(judged: Judged) -> bool:
    """Under fp32 and autocast ZeRO keeps an fp32 master copy of parameters that are fp32 themselves."""
    return judged.job.recipe.dtypes[Component.PARAMETERS] == "fp32" and bool(judged.record.components.get(Component.MASTER_PARAMETERS))


def _differences(before: MemoryRecord, after: MemoryRecord) -> tuple[Difference, ...]:
    """All kinds of tensors whose bytes differ at the training peaks, what ZeRO-3 adds first; activations are one kind."""
    sizes: dict[tuple[Component, str], list[int]] = {}
    for index, record in enumerate((before, after)):
        for item in record.peak_items:
            name = "activations" if item.component is Component.ACTIVATIONS else item.name
            sizes.setdefault((item.component, name), [0, 0])[index] += item.bytes
    found = [Difference(*label, *pair) for label, pair in sizes.items() if pair[0] != pair[1]]
    return tuple(sorted(found, key=lambda d: -d.more_bytes))


def _predicted(judge: Judge, start: Judged, trials: Sequence[Trial]) -> list[Change]:
    changes: list[Change] = []
    for trial in trials:
        judged = judge.changed(trial.setting, trial.profile) if trial.profile else judge(trial.setting)
        if judged is not None and (saved := start.plan.peak_bytes - judged.plan.peak_bytes) > 0:
            changes.append(Change(trial.what, trial.flag, judged.plan, saved))
    return [change for change in changes if not _adds_nothing(change, changes)]


def _adds_nothing(change: Change, changes: Sequence[Change]) -> bool:
    """Whether fewer of its keys save as much."""
    keys = set(change.flag.split(" --set "))
    return any(set(other.flag.split(" --set ")) < keys and other.saved_bytes >= change.saved_bytes for other in changes)


def _of_the_setting(judge: Judge, start: Setting) -> Iterator[Trial]:
    if not start.checkpointing:
        yield Trial("recompute activations", "--activation-checkpointing", start.but(checkpointing=True))
    if start.micro_batch_size > 1:
        yield Trial("micro-batch 1", "--micro-batch-size 1", start.but(micro_batch_size=1))
    if start.sequence_length > 1:
        half = start.sequence_length // 2
        yield Trial("sequences half as long", f"--sequence-length {half}", start.but(sequence_length=half))
    for offload in Offload:
        if offload is not start.offload:
            yield Trial(f"offload: {offload}", f"--offload {offload}", start.but(offload=offload))
    for stage in STAGES:
        if stage != start.stage:
            yield Trial(f"ZeRO stage {stage}", f"--zero {stage}", start.but(stage=stage, zero_init=start.zero_init and stage == 3))
    for recipe in runnable_recipes():
        if recipe != start.recipe:
            yield Trial(f"recipe {recipe}", f"--recipe {recipe}", start.but(recipe=recipe))
    yield from _more_gpus(judge, start)


def _more_gpus(judge: Judge, start: Setting) -> Iterator[Trial]:
    """Twice as many, four times as many, ... until it fits; the last where it never does."""
    size = start.world_size * 2
    while size * 2 <= MOST_GPUS and not judge.fits(start.but(world_size=size)):
        size *= 2
    if size <= MOST_GPUS:
        yield Trial(f"{size} GPUs", f"--gpus {size}", start.but(world_size=size))


def _of_keys(start: Judged) -> Iterator[Trial]:
    profile = start.job.profile
    zero = profile.deepspeed.zero_optimization
    for keys, part in KEYS:
        smaller = {key: getattr(zero, key) // (2 * part) * 2 if part else 0 for key in keys}
        if any(smaller[key] != getattr(zero, key) for key in keys) and (all(smaller.values()) or not part):
            names = {key: ZeroSettings.model_fields[key].alias or key for key in keys}
            what = ", ".join(f"{names[key]} {_short(value)}" for key, value in smaller.items())
            flag = " ".join(f"--set deepspeed.zero_optimization.{names[key]}={value}" for key, value in smaller.items())
            deepspeed = profile.deepspeed.model_copy(update={"zero_optimization": zero.model_copy(update=smaller)})
            yield Trial(what, flag, start.setting, profile.model_copy(update={"deepspeed": deepspeed}))


def _short(value: int) -> str:
    """50000000 as "5e7", and what has more digits as it is."""
    text = f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return text if value and float(text) == value else str(value)
