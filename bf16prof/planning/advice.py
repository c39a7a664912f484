"""What changes of a plan are worth, alone and together, and why ZeRO-3 may need more than ZeRO-2.
All are predicted, none guessed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bf16prof.cases import STAGES, Job
from bf16prof.engine.shared_batches import packed_rows, shared_layers, shared_sequences, shared_stages
from bf16prof.parallelism import Parallelism
from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.limits import MOST_GPUS
from bf16prof.planning.question import Setting
from bf16prof.plans import Change, Difference, StageComparison
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.profiles.schema import Profile, ZeroSettings
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import Component, Offload

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
"""Keys of `zero_optimization` that trade memory for speed, and the part of their value that is
tried; some work only together."""


MOST_TOGETHER = 3
"""So many things are changed at once at most."""
MOST_SETS = 60
"""So many sets of changes are predicted at most; the sets of the most effective changes come
first."""
AXES = 8
"""So many of the most effective changes, one of each kind, are put together."""


@dataclass(frozen=True)
class Trial:
    """Things to change together: in words, as flags, in the setting, and among DeepSpeed's keys
    (`ZeroSettings`).

    `harm`: how many of them change what is learned.
    """

    what: str
    flag: str
    setting: Mapping[str, object] = field(default_factory=dict)
    keys: Mapping[str, int] = field(default_factory=dict)
    harm: int = 0
    things: int = 1

    def kinds(self) -> frozenset[str]:
        """What it changes; two trials of one kind exclude each other."""
        return frozenset({*self.setting, *self.keys})

    def and_(self, other: Trial) -> Trial:
        """Both together."""
        flags = f"{self.flag} {other.flag}"
        both = {**self.setting, **other.setting}, {**self.keys, **other.keys}
        return Trial(f"{self.what} and {other.what}", flags, *both, self.harm + other.harm, self.things + other.things)

    def profile(self, start: Profile) -> Profile | None:
        """The profile with its keys; `None` if it has none."""
        if not self.keys:
            return None
        zero = start.deepspeed.zero_optimization.model_copy(update=dict(self.keys))
        return start.model_copy(update={"deepspeed": start.deepspeed.model_copy(update={"zero_optimization": zero})})


Tried = tuple[Trial, Change]


def all_changes(judge: Judge, start: Judged) -> list[Change]:
    """Every single change that saves memory, and where none that leaves the learning alone
    suffices, the smallest sets that do.

    Those that make the plan fit come first, fewer things before more; then by what they save.
    """
    found = _single(judge, start)
    if not any(change.plan.fits and not trial.harm for trial, change in found):
        found += _together(judge, start, [trial for trial, _ in sorted(found, key=lambda pair: -pair[1].saved_bytes)])
    ordered = sorted(found, key=lambda pair: (not pair[1].plan.fits, pair[0].things, pair[0].harm > 1, -pair[1].saved_bytes))
    return [change for _, change in ordered]


def single_changes(judge: Judge, start: Judged) -> list[Change]:
    """Every single change that saves memory, the most effective first."""
    return sorted((change for _, change in _single(judge, start)), key=lambda change: -change.saved_bytes)


def _single(judge: Judge, start: Judged) -> list[Tried]:
    return _predicted(judge, start, [*_of_the_setting(judge, start.setting), *_of_keys(start)])


def _together(judge: Judge, start: Judged, trials: Sequence[Trial]) -> list[Tried]:
    """The smallest sets of changes, one of each kind, with which the plan fits; empty where none
    does."""
    best: dict[frozenset[str], Trial] = {}
    for trial in trials:
        if "world_size" not in trial.setting:
            best.setdefault(trial.kinds(), trial)
    chosen = list(best.values())[:AXES]
    left = MOST_SETS
    for count in range(2, MOST_TOGETHER + 1):
        sets = [_combined(each) for each in itertools.combinations(chosen, count) if _are_apart(each)]
        sets = sorted(sets, key=lambda trial: trial.harm)[:left]
        left -= len(sets)
        if found := [pair for pair in _predicted(judge, start, sets) if pair[1].plan.fits]:
            return found
    return []


def _combined(trials: Sequence[Trial]) -> Trial:
    whole, *rest = trials
    for trial in rest:
        whole = whole.and_(trial)
    return whole


def _are_apart(trials: Sequence[Trial]) -> bool:
    kinds = [kind for trial in trials for kind in trial.kinds()]
    return len(kinds) == len(set(kinds))


def beyond(nearest: Judged) -> list[str]:
    """How people train such a model where nothing here fits: less of it, less kept, ranks that
    share it, and what is not expressed here."""
    profile, sizes = nearest.job.profile, nearest.record.peak_components
    total = sum(sizes.values())
    is_states = sum(sizes.get(component, 0) for component in STATES) * 3 > total
    is_activations = sizes.get(Component.ACTIVATIONS, 0) * 3 > total
    has_logits = isinstance(profile.model, HuggingFaceSettings) and profile.workload.liger == "none"
    said = ["An adapter trains few parameters: --lora r=16,targets=all-linear."] if is_states and not profile.peft else []
    said += ["A loss that never makes the whole logits: --liger loss."] if is_activations and has_logits else []
    shares = (
        (Parallelism(1, sequence=2), "Ranks that share each sequence", is_activations),
        (Parallelism(1, tensor=2), "Ranks that share each layer", is_states),
        (Parallelism(1, pipeline=2), "A pipeline, each stage with some of the layers", is_states),
    )
    for parallelism, what, helps in shares:
        if helps and _can_share(nearest.job, parallelism):
            said.append(f"{what}: plan {parallelism.flags[0]} N, which runs a few choices dry.")
    return said


STATES = (
    Component.PARAMETERS, Component.GRADIENTS, Component.MASTER_PARAMETERS, Component.MASTER_GRADIENTS, Component.MOMENTUM,
    Component.VARIANCE, Component.COMPENSATION,
)  # fmt: skip
"""What adapters have little of."""


def compare_stages(judge: Judge, like: Judged) -> StageComparison | None:
    """ZeRO-2 and ZeRO-3 with everything else as in a plan; `None` unless both run."""
    setting = like.setting.but(zero_init=False)
    zero2, zero3 = (judge.roughly(setting.but(stage=stage)) for stage in (2, 3))
    if zero2 is None or zero3 is None:
        return None
    second_copy = zero3.record.components.get(Component.MASTER_PARAMETERS, 0) if _keeps_two_copies(zero3) else 0
    more = (zero3.record.peak_allocated_bytes or 0) - (zero2.record.peak_allocated_bytes or 0)
    found = StageComparison(zero2.plan, zero3.plan, more, _differences(zero2.record, zero3.record), second_copy)
    return replace(found, changes=tuple(_key_changes(judge, zero3))) if more > 0 else found


def _key_changes(judge: Judge, start: Judged) -> list[Change]:
    """What DeepSpeed's keys save, and for fp32 parameters a recipe without a second fp32 copy, most
    effective first."""
    trials = list(_of_keys(start))
    if _keeps_two_copies(start):
        recipe = "bf16-fp32-master"
        trials.append(Trial("one fp32 copy of the parameters instead of two", f"--recipe {recipe}", {"recipe": recipe}))
    return sorted((change for _, change in _predicted(judge, start, trials)), key=lambda change: -change.saved_bytes)


def _keeps_two_copies(judged: Judged) -> bool:
    """Under fp32 and autocast ZeRO keeps an fp32 master copy of parameters that are fp32
    themselves."""
    return judged.job.recipe.dtypes[Component.PARAMETERS] == "fp32" and bool(judged.record.components.get(Component.MASTER_PARAMETERS))


def _differences(before: MemoryRecord, after: MemoryRecord) -> tuple[Difference, ...]:
    """All kinds of tensors whose bytes differ at the training peaks, what ZeRO-3 adds first;
    activations are one kind."""
    sizes: dict[tuple[Component, str], list[int]] = {}
    for index, record in enumerate((before, after)):
        for item in record.peak_items:
            name = "activations" if item.component is Component.ACTIVATIONS else item.name
            sizes.setdefault((item.component, name), [0, 0])[index] += item.bytes
    found = [Difference(*label, *pair) for label, pair in sizes.items() if pair[0] != pair[1]]
    return tuple(sorted(found, key=lambda d: -d.more_bytes))


def _predicted(judge: Judge, start: Judged, trials: Sequence[Trial]) -> list[Tried]:
    found: list[Tried] = []
    for trial in trials:
        setting, profile = start.setting.but(**trial.setting), trial.profile(start.job.profile)
        judged = judge.changed(setting, profile) if profile else judge(setting)
        if judged is not None and (saved := start.plan.peak_bytes - judged.plan.peak_bytes) > 0:
            found.append((trial, Change(trial.what, trial.flag, judged.plan, saved, trial.things)))
    return [pair for pair in found if not _adds_nothing(pair[1], [change for _, change in found])]


def _adds_nothing(change: Change, changes: Sequence[Change]) -> bool:
    """Whether fewer of its keys save as much."""
    keys = set(change.flag.split(" --set "))
    return any(set(other.flag.split(" --set ")) < keys and other.saved_bytes >= change.saved_bytes for other in changes)


def _of_the_setting(judge: Judge, start: Setting) -> Iterator[Trial]:
    if not start.checkpointing:
        yield Trial("recompute activations", "--activation-checkpointing", {"checkpointing": True})
    if start.micro_batch_size > 1:
        yield Trial("micro-batch 1", "--micro-batch-size 1", {"micro_batch_size": 1})
    if start.sequence_length > 1:
        half = start.sequence_length // 2
        yield Trial("sequences half as long", f"--sequence-length {half}", {"sequence_length": half}, harm=2)
    if start.can_be_inside_zero_init:
        yield Trial("build the model inside zero.Init", "--zero-init", {"zero_init": True})
    for offload in Offload:
        if offload is not start.offload:
            yield Trial(f"offload: {offload}", f"--offload {offload}", {"offload": offload})
    for stage in STAGES:
        if stage != start.stage:
            yield Trial(f"ZeRO stage {stage}", f"--zero {stage}", {"stage": stage, "zero_init": start.zero_init and stage == 3})
    for recipe in runnable_recipes():
        if recipe != start.recipe:
            yield Trial(f"recipe {recipe}", f"--recipe {recipe}", {"recipe": recipe}, harm=1)
    yield from _more_gpus(judge, start)


def _more_gpus(judge: Judge, start: Setting) -> Iterator[Trial]:
    """Twice as many, four times as many, ... until it fits; the last where it never does."""
    size = start.world_size * 2
    while size * 2 <= MOST_GPUS and not judge.fits(start.but(world_size=size)):
        size *= 2
    if size <= MOST_GPUS:
        yield Trial(f"{size} GPUs", f"--gpus {size}", {"world_size": size}, harm=1)


def _of_keys(start: Judged) -> Iterator[Trial]:
    zero = start.job.profile.deepspeed.zero_optimization
    for keys, part in KEYS:
        smaller = {key: getattr(zero, key) // (2 * part) * 2 if part else 0 for key in keys}
        if any(smaller[key] != getattr(zero, key) for key in keys) and (all(smaller.values()) or not part):
            names = {key: ZeroSettings.model_fields[key].alias or key for key in keys}
            what = ", ".join(f"{names[key]} {_short(value)}" for key, value in smaller.items())
            flag = " ".join(f"--set deepspeed.zero_optimization.{names[key]}={value}" for key, value in smaller.items())
            yield Trial(what, flag, keys=smaller)


def _short(value: int) -> str:
    """50000000 as "5e7", and what has more digits as it is."""
    text = f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return text if value and float(text) == value else str(value)


def _can_share(job: Job, parallelism: Parallelism) -> bool:
    """Whether ranks could share the job's batch like that, where they share nothing yet."""
    if not job.case.parallelism.is_data_only:
        return False
    case = replace(
        job.case,
        world_size=2,
        sequence_parallel=parallelism.sequence,
        tensor_parallel=parallelism.tensor,
        pipeline_parallel=parallelism.pipeline,
        zero_stage=min(job.case.zero_stage, 1) if parallelism.pipeline > 1 else job.case.zero_stage,
    )
    shared = replace(job, case=case)
    return all(rule(shared) is None for rule in (shared_sequences, shared_layers, shared_stages, packed_rows))
