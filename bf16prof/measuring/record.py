"""From what the ranks of a case wrote to the record of the case."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.engine.workload import workload_of
from bf16prof.measuring.launcher import RanksOutcome
from bf16prof.measuring.results import RankQuality, RankResult
from bf16prof.measuring.utilisation import peak_note, utilisation
from bf16prof.parallelism import Parallelism
from bf16prof.profiles.gpus import Gpu
from bf16prof.quality.casts import Casts
from bf16prof.quality.sums import SAMPLE, Sums, total
from bf16prof.records import Case, MemoryRecord, RankSummary, Workload, by_component, peak_phase, with_other
from bf16prof.runs import Status
from bf16prof.step_records import CastShares, QualityStep, StepRecord, StepWork, UpdateQuality
from bf16prof.summaries import interquartile_range, not_finite
from bf16prof.verdict import of_a_run
from bf16prof.vocabulary import Device, Phase, Source


@dataclass(frozen=True)
class TrainedSubject:
    """What the ranks of a record have trained, on what: the GPU where it is one that is known, and
    tokens in a step where there are any."""

    case: Case
    device: Device
    workload: Workload | None
    gpu: Gpu | None = None
    tokens_per_step: int | None = None


def measured_record(job: Job, outcome: RanksOutcome, work: StepWork | None = None) -> MemoryRecord | None:
    """The record of the rank that holds most between steps (of several, the first), with losses
    averaged over the ranks and step times of the slowest. That another rank's peak is higher is
    said in the notes.

    `work` is what a step has to do, as the estimate counts it. A case that did not finish gives
    what is known of it, and says in its notes that it is partial; `None` if no rank got as far as
    init.
    """
    tokens = None if job.profile.model.inputs else _tokens_per_step(job)
    return record_of_ranks(outcome, TrainedSubject(job.case, job.device, workload_of(job), job.gpu, tokens), work)


def record_of_ranks(outcome: RanksOutcome, subject: TrainedSubject, work: StepWork | None = None) -> MemoryRecord | None:
    """The same of whatever the ranks have trained."""
    ranks = [rank for rank in outcome.ranks if rank is not None and rank.parameters]
    if not ranks:
        return None
    heaviest = _heaviest(ranks, subject.case.parallelism)
    steps = _job_steps(heaviest, ranks)
    times = [s.time_s for s in steps if not s.warmup and s.time_s is not None]
    median = _median(times)
    allocated = heaviest.allocated_bytes
    items, doubt = ((), None) if allocated is None else with_other(heaviest.items, allocated)
    phases = heaviest.training_phases()
    highest = peak_phase(phases)
    mfu, hfu = utilisation(work, subject.gpu, median)
    record = MemoryRecord(
        source=Source.MEASURE,
        case=subject.case,
        device=subject.device,
        gpu=heaviest.device_name if heaviest.device_name != "cpu" else None,
        workload=subject.workload,
        parameters=_parameters(heaviest, ranks, subject.case.parallelism),
        allocated_bytes=allocated,
        components={} if allocated is None else by_component(items),
        items=items,
        peak_allocated_bytes=phases[highest].peak_bytes if highest else None,
        peak_phase=highest,
        run_peak_allocated_bytes=heaviest.run_peak_bytes,
        phases=phases,
        reserved_bytes=heaviest.reserved_bytes,
        device_bytes=heaviest.device_bytes,
        host_bytes=sum(i.bytes for i in heaviest.host_items) if heaviest.host_items else None,
        host_bytes_per_node=_fullest_node(ranks) if heaviest.host_items else None,
        step_time_s=median,
        step_time_iqr_s=interquartile_range(times),
        tokens_per_s=subject.tokens_per_step / median if median and subject.tokens_per_step else None,
        step_time_floor_s=work.step_time_floor_s if work else None,
        mfu=mfu,
        hfu=hfu,
        work=work,
        loss=steps[-1].loss if steps else None,
        allocator_retries=heaviest.allocator_retries,
        gpu_utilisation=heaviest.gpu_utilisation,
        power_w=heaviest.power_w,
        steps=steps,
        quality=job_quality(ranks),
        ranks=tuple(_summary(rank) for rank in ranks),
        notes=(
            *_notes(outcome, steps),
            *_higher_peak(heaviest, ranks),
            *peak_note(work, subject.gpu),
            *([doubt] if doubt else []),
            *([SAMPLED] * any(rank.quality for rank in ranks)),
        ),
    )
    return of_a_run(record, subject.gpu, finished=outcome.status is Status.FINISHED, out_of_memory=outcome.status is Status.OOM)


def _summary(rank: RankResult) -> RankSummary:
    phases = rank.training_phases()
    highest = peak_phase(phases)
    measured = [step for step in rank.steps if not step.warmup]
    timed = {phase: [step.phase_time_s[phase] for step in measured if phase in step.phase_time_s] for phase in Phase}
    return RankSummary(
        rank.rank,
        rank.host,
        rank.node,
        "cpu" if rank.device_index is None else f"cuda:{rank.device_index}",
        allocated_bytes=rank.allocated_bytes,
        peak_allocated_bytes=phases[highest].peak_bytes if highest else None,
        run_peak_allocated_bytes=rank.run_peak_bytes,
        reserved_bytes=rank.reserved_bytes,
        step_time_s=_median([step.time_s for step in measured if step.time_s is not None]),
        phase_time_s={phase: statistics.median(times) for phase, times in timed.items() if times},
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _fullest_node(ranks: Sequence[RankResult]) -> int:
    """The bytes that the ranks of one node hold in its memory, on the node where that is most."""
    by_node: Counter[int] = Counter()
    for rank in ranks:
        by_node[rank.node] += sum(item.bytes for item in rank.host_items)
    return max(by_node.values())


SAMPLED = f"lost updates and EDQ: at most {SAMPLE:,} elements of each parameter and rank, evenly spaced, after the measured steps"


def job_quality(ranks: Sequence[RankResult]) -> tuple[QualityStep, ...]:
    """The watched steps that all ranks made: sums over the ranks, which at stages 1 to 3 each
    update a part."""
    steps = []
    for of_ranks in zip(*(rank.quality for rank in ranks), strict=False):
        names = dict.fromkeys(name for rank in of_ranks for name in rank.layers)
        layers = {name: total(rank.layers.get(name, Sums()) for rank in of_ranks) for name in names}
        losses = [rank.loss for rank in of_ranks if rank.loss is not None]
        loss = statistics.fmean(losses) if len(losses) == len(of_ranks) else None
        by_layer = {name: _update_quality(sums) for name, sums in layers.items()}
        steps.append(QualityStep(of_ranks[0].step, loss, _update_quality(total(layers.values())), by_layer, _casts(of_ranks)))
    return tuple(steps)


def _casts(of_ranks: Sequence[RankQuality]) -> dict[str, CastShares]:
    names = dict.fromkeys(name for rank in of_ranks for name in rank.casts)
    summed = {name: sum((rank.casts.get(name, Casts()) for rank in of_ranks), Casts()) for name in names}
    return {name: shares for name, casts in summed.items() if (shares := casts.shares)}


def _update_quality(sums: Sums) -> UpdateQuality:
    return UpdateQuality(sums.elements, sums.lost_updates, sums.edq)


def _notes(outcome: RanksOutcome, steps: Sequence[StepRecord]) -> tuple[str, ...]:
    notes = [] if outcome.status is Status.FINISHED else [f"partial: {outcome.status}: {outcome.message}"]
    known = any(step.loss is not None or step.loss_not_finite for step in steps)
    return (*notes, *not_finite([step.step + 1 for step in steps if step.loss is None], len(steps))) if known else tuple(notes)


def _higher_peak(heaviest: RankResult, ranks: Sequence[RankResult]) -> list[str]:
    """That another rank's peak is higher by more than a thousandth: at ZeRO stages 1 and 2
    parameters straddle partitions.

    Told by steps in which memory settles only; else it may be gloo that has not let go of something
    yet.
    """
    if any(sum(step.warmup for step in rank.steps) < 2 for rank in ranks):
        return []
    highest = max(ranks, key=_settled_peak)
    own = _settled_peak(heaviest)
    more = _settled_peak(highest) - own
    if more * 1000 <= own:
        return []
    return [f"the peak of rank {highest.rank} is {more} bytes higher than that of rank {heaviest.rank}, of which this is"]


def _settled_peak(rank: RankResult) -> int:
    return max((memory.peak_bytes or 0 for memory in rank.training_phases().values()), default=0)


def _heaviest(ranks: Sequence[RankResult], parallelism: Parallelism) -> RankResult:
    """The rank that holds most between steps; of a pipeline, whose stages do different things, one
    of the stage with the highest peak."""
    if parallelism.pipeline > 1:
        highest = max(ranks, key=_settled_peak)
        ranks = [rank for rank in ranks if parallelism.stage(rank.rank) == parallelism.stage(highest.rank)]
    return max(ranks, key=_weight)


def _parameters(heaviest: RankResult, ranks: Sequence[RankResult], parallelism: Parallelism) -> int | None:
    """Those of the whole model: of one rank, or of one for each stage of a pipeline."""
    if parallelism.pipeline == 1:
        return heaviest.parameters
    by_stage = {parallelism.stage(rank.rank): rank.parameters or 0 for rank in ranks}
    return sum(by_stage.values())


def _weight(rank: RankResult) -> tuple[int, int, int]:
    """What a rank holds between steps, or has held if it never got there; of equal ones the
    first."""
    known = rank.allocated_bytes is not None
    return rank.allocated_bytes or 0, 0 if known else rank.run_peak_bytes or 0, -rank.rank


def _job_steps(heaviest: RankResult, ranks: Sequence[RankResult]) -> tuple[StepRecord, ...]:
    """The heaviest rank's steps with the mean loss of all ranks that made the step and the times of
    the slowest."""
    by_step: dict[int, list[StepRecord]] = {}
    for rank in ranks:
        for step in rank.steps:
            by_step.setdefault(step.step, []).append(step)
    return tuple(_job_step(step, by_step[step.step]) for step in heaviest.steps)


def _job_step(own: StepRecord, all_ranks: Sequence[StepRecord]) -> StepRecord:
    losses = [s.loss for s in all_ranks if s.loss is not None]
    return StepRecord(
        step=own.step,
        loss=statistics.fmean(losses) if len(losses) == len(all_ranks) else None,
        time_s=max(s.time_s for s in all_ranks if s.time_s is not None),
        allocated_bytes=own.allocated_bytes,
        phases=own.phases,
        phase_time_s=max(all_ranks, key=lambda s: s.time_s or 0.0).phase_time_s,
        warmup=own.warmup,
        device_time_s=own.device_time_s,
        loss_not_finite=any(s.loss_not_finite for s in all_ranks),
    )


def _tokens_per_step(job: Job) -> int:
    workload = job.profile.workload
    return workload.rows * workload.sequence_length * workload.gradient_accumulation_steps * job.case.parallelism.data
