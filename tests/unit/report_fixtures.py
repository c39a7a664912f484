"""Runs to feed the reports with: a realistic one of six cases, partial and failed ones, and one
whose every name is hostile."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from bf16prof import runs
from bf16prof.records import Case, Item, MemoryRecord, OutOfMemory, PhaseStart, RankSummary, Timeline
from bf16prof.runs import CaseStatus, Manifest, Run, Status
from bf16prof.step_records import PhaseMemory, QualityStep, StepRecord, UpdateQuality
from bf16prof.vocabulary import Component, Device, Phase, Source

PARAMETERS = 1_557_611_200
RECIPES = {"bf16-fp32-master": (2, 4), "bf16-full": (2, 2)}
HOSTILE = (
    "<script>alert(1)</script>",
    "[/red][bold]red[/bold]",
    "\x1b[31mred\x1b[0m\x07",
    "two\nlines\r\tand a tab",
    "\u202eright to left\u2066\u200b",
    "=1+1",
    "<b>bold</b><a href='javascript:alert(2)'>%{x}</a>",
    "x" * 300,
    '"};alert(3);//</style><img src=x onerror=alert(4)>',
)


def case(stage: int = 3, recipe: str = "bf16-fp32-master", world: int = 2, profile: str = "gpt2-1.5b") -> Case:
    return Case(profile, stage, world, recipe)


def components(which: Case, error: int = 0) -> dict[Component, int]:
    """The textbook sizes of a case, sharded as ZeRO does; `error` bytes are added to the
    communication buckets."""
    weight, state = RECIPES.get(which.recipe, (2, 4))
    shard = PARAMETERS // which.world_size
    return {
        Component.PARAMETERS: weight * (shard if which.zero_stage >= 3 else PARAMETERS),
        Component.GRADIENTS: weight * (shard if which.zero_stage >= 2 else PARAMETERS),
        Component.MASTER_PARAMETERS: state * shard,
        Component.MOMENTUM: state * shard,
        Component.VARIANCE: state * shard,
        Component.BUFFERS: 100_000_000 + error,
        Component.ROUNDING: 123_904,
    }


def phases(allocated: int) -> dict[Phase, PhaseMemory]:
    rise = {Phase.INIT: 0.55, Phase.FORWARD: 1.12, Phase.BACKWARD: 1.31, Phase.STEP: 1.22}
    return {phase: PhaseMemory(int(allocated * factor), int(allocated * (factor + 1) / 2)) for phase, factor in rise.items()}


def steps(allocated: int, which: Case, count: int = 12) -> tuple[StepRecord, ...]:
    slower = 1.3 if which.zero_stage == 3 else 1.0
    worse = 0.12 if which.recipe == "bf16-full" else 0.0
    return tuple(
        StepRecord(
            step=i,
            loss=3.1 + 7.7 * math.exp(-i / 4) + worse * i / count + 0.05 * math.sin(i * 3.1),
            time_s=slower * (0.41 + 0.012 * math.sin(i * 2.3) + (1.1 if i == 0 else 0)),
            allocated_bytes=allocated,
            phases={phase: memory for phase, memory in phases(allocated).items() if phase is not Phase.INIT},
            warmup=i < 3,
        )
        for i in range(count)
    )


def estimate(which: Case, error: int = 0) -> MemoryRecord:
    parts = components(which, error)
    allocated = sum(parts.values())
    return MemoryRecord(
        Source.ESTIMATE, which, Device.GPU, PARAMETERS, allocated_bytes=allocated, components=parts, phases=phases(allocated + 40_000_000),
        peak_allocated_bytes=int((allocated + 40_000_000) * 1.31), peak_phase=Phase.BACKWARD,
    )  # fmt: skip


def ranks(allocated: int) -> tuple[RankSummary, ...]:
    """Two ranks on two hosts, of which the second holds less and computes longer."""
    found = []
    for number, less, forward in ((0, 0, 0.2), (1, 512, 0.3)):
        size = allocated - less
        times = {Phase.FORWARD: forward, Phase.BACKWARD: 0.8 - forward}
        found.append(
            RankSummary(
                number, "<b>host</b>" if number else "hosta", number, f"cuda:{number}", size, int(size * 1.31), None, None, 1.0, times
            )
        )
    return tuple(found)


def measure(which: Case) -> MemoryRecord:
    parts = components(which)
    allocated = sum(parts.values())
    curve = steps(allocated, which)
    items = (
        Item(
            Component.PARAMETERS,
            "parameters",
            parts[Component.PARAMETERS],
            "deepspeed/runtime/zero/partition_parameters.py: _partition_param",
        ),
        Item(Component.BUFFERS, "reduce bucket", 50_000_000, "deepspeed/runtime/zero/stage3.py: ipg_buckets"),
        Item(Component.BUFFERS, "prefetch bucket", 40_000_000, "deepspeed/runtime/zero/stage3.py"),
    )
    return MemoryRecord(
        Source.MEASURE, which, Device.GPU, PARAMETERS, gpu="NVIDIA H200", allocated_bytes=allocated, components=parts, items=items,
        peak_allocated_bytes=int(allocated * 1.31), peak_phase=Phase.BACKWARD, run_peak_allocated_bytes=int(allocated * 1.31),
        phases=phases(allocated), reserved_bytes=int(allocated * 1.4), device_bytes=int(allocated * 1.4) + 600 * 2**20,
        step_time_s=curve[5].time_s, step_time_iqr_s=0.013, tokens_per_s=8192 / (curve[5].time_s or 1), loss=curve[-1].loss, steps=curve,
        ranks=ranks(allocated), notes=("NVML saw one process",),
    )  # fmt: skip


def timeline(which: Case, points: int = 800) -> Timeline:
    """A step in which activations rise in forward and fall in backward, while gradients come; the
    highest point is in backward."""
    parts = components(which)
    backward, step = points // 4, points * 3 // 4
    sizes: dict[Component, list[int]] = {c: [size] * points for c, size in parts.items()}
    sizes[Component.ACTIVATIONS] = [max(0, min(i, backward + (backward - i) // 2)) * 2**23 for i in range(points)]
    sizes[Component.MASTER_GRADIENTS] = [0] * step + [2**20] * (points - step)
    sizes[Component.WORKSPACE] = [2**28 if i == backward + 1 else 2**20 for i in range(points)]
    starts = (PhaseStart(Phase.FORWARD, 4), PhaseStart(Phase.BACKWARD, 2 * backward), PhaseStart(Phase.STEP, 2 * step))
    changes = tuple((2**23 if i < backward else -(2**22), i % 2) for i in range(points))
    names = ("activations: mm (forward), <b>layers.0</b>", "activations: mul (forward), layers.1")
    return Timeline(tuple(range(0, 2 * points, 2)), starts, {c: tuple(values) for c, values in sizes.items()}, names, changes)


def simulate(which: Case, points: int = 800) -> MemoryRecord:
    """A dry run on an H100: exact between steps, with the inside of a step, what is alive at its
    peak, and what the device adds."""
    line = timeline(which, points)
    peak, at = max((sum(values), i) for i, values in enumerate(zip(*line.components.values(), strict=True)))
    alive = {c: values[at] for c, values in line.components.items()}
    items = tuple(Item(c, f"all {c}", size, "simulated") for c, size in alive.items() if c is not Component.ACTIVATIONS)
    layers = tuple(Item(Component.ACTIVATIONS, f"layer {i}", alive[Component.ACTIVATIONS] // 32, "simulated") for i in range(32))
    extra = (Item(Component.WORKSPACE, "CUDA context", 500 * 2**20, "assumed: 500 MiB"),)
    reserved = peak + 3 * 2**29
    return dataclasses.replace(
        estimate(which), source=Source.SIMULATE, gpu="h100-80gb", phases=phases(peak), peak_allocated_bytes=peak, peak_phase=Phase.BACKWARD,
        run_peak_allocated_bytes=peak + 2**20, peak_components=alive, peak_items=(*items, *layers), reserved_bytes=reserved,
        fragmentation_bytes=2**29, device_bytes=reserved + 500 * 2**20, device_items=extra, timeline=line,
    )  # fmt: skip


def shortage(which: Case) -> MemoryRecord:
    """The same, on a GPU that runs out in backward of the first step."""
    allocated = {Component.ACTIVATIONS: 4 * 2**30, Component.PARAMETERS: 8 * 2**30, Component.ROUNDING: 2**20, Component.MOMENTUM: 2**31}
    short = OutOfMemory(
        Phase.BACKWARD, 0, "parameter gradients", 384 * 2**20, sum(allocated.values()), 16 * 2**30 - 2**28, 16 * 2**30, allocated,
    )  # fmt: skip
    return dataclasses.replace(simulate(which), out_of_memory=short)


def simulated_run(records: list[MemoryRecord] | None = None, name: str = "dry") -> Run:
    """Estimates and dry runs of six cases, two of which run out of memory."""
    chosen = cases()
    made = [r for which in chosen for r in (estimate(which), (shortage if which in chosen[1:3] else simulate)(which))]
    return run(made if records is None else records, name=name)


def cases(stages: tuple[int, ...] = (1, 2, 3)) -> list[Case]:
    return [case(stage, recipe) for stage in stages for recipe in RECIPES]


def run(records: list[MemoryRecord] | None = None, statuses: list[CaseStatus] | None = None, name: str = "sweep-2026-03-01") -> Run:
    """A finished run; by default the six cases, each estimated exactly (but for the last) and
    measured."""
    if records is None:
        chosen = cases()
        records = [r for which in chosen for r in (estimate(which, 0 if which is not chosen[-1] else 1200), measure(which))]
    finished = [CaseStatus(which, Status.FINISHED) for which in dict.fromkeys(r.case for r in records)]
    manifest = Manifest(
        name=name,
        created="2026-03-01T10:00:00Z",
        finished="2026-03-01T10:09:41Z",
        status=Status.FINISHED,
        device=Device.GPU,
        argv=("bf16prof", "measure", "--profile", "gpt2-1.5b", "--zero", "1,2,3", "--gpus", "2"),
        cases=tuple(statuses or finished),
        profile={
            "model": {"family": "gpt2", "hidden_size": 1600, "num_layers": 48},
            "workload": {"sequence_length": 1024, "micro_batch_size": 4},
        },
        versions={"bf16prof": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8"},
        hardware={"gpu": "2 x NVIDIA H200", "driver": "580.65"},
        environment={"NCCL_DEBUG": "WARN"},
    )
    return Run(Path("runs") / "sweep", manifest, tuple(records))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run directory on disk."""
    folder = tmp_path / "run"
    folder.mkdir()
    whole = run()
    runs.save(runs.Run(folder, whole.manifest, whole.records))
    return folder


def failed_run() -> Run:
    """Six cases planned: one finished, one out of memory, one crashed, the others never started;
    only the estimates are complete."""
    chosen = cases()
    tail = (
        'step 3 rank 1\nTraceback (most recent call last):\n  File "worker.py", line 88\ntorch.OutOfMemoryError: tried to allocate 2.91 GiB'
    )
    statuses = [
        CaseStatus(chosen[0], Status.FINISHED),
        CaseStatus(chosen[1], Status.OOM, "rank 1 asked for 2.91 GiB with 138.2 GiB in use", tail),
        CaseStatus(chosen[2], Status.FAILED, "rank 0 was killed by SIGSEGV", "last words"),
        *(CaseStatus(which, Status.PLANNED) for which in chosen[3:]),
    ]
    whole = run([*(estimate(which) for which in chosen), measure(chosen[0])], statuses, "half a sweep")
    return Run(whole.path, dataclasses.replace(whole.manifest, status=Status.OOM, finished=None), whole.records)


def bare_record(which: Case | None = None, source: Source = Source.ESTIMATE) -> MemoryRecord:
    """A record in which everything that may be unknown is."""
    return MemoryRecord(source, which or case(), Device.GPU, PARAMETERS)


def hostile_simulation(which: Case, text: str) -> MemoryRecord:
    short = shortage(which)
    item = Item(Component.BUFFERS, text, 1000, text)
    assert short.out_of_memory is not None
    full = dataclasses.replace(short.out_of_memory, tensor=text)
    return dataclasses.replace(short, out_of_memory=full, gpu=text, peak_items=(item,), device_items=(item,), notes=(text,))


def watched(layer: str = "layers.0") -> QualityStep:
    """A step in which a quarter of the updates was lost."""
    found = UpdateQuality(elements=400, lost_updates=0.25, edq=0.9)
    return QualityStep(step=4, loss=3.5, total=found, layers={layer: found})


def hostile_run(texts: tuple[str, ...] = HOSTILE) -> Run:
    """One case per hostile string, which stands wherever a string may stand; harmless `texts` make
    a run of the same shape."""
    records: list[MemoryRecord] = []
    statuses = []
    for text in texts:
        which = Case(text, 2, 2, text)
        item = Item(Component.BUFFERS, text, 1000, text)
        records.append(estimate(which))
        records.append(hostile_simulation(which, text))
        records.append(dataclasses.replace(measure(which), items=(item,), notes=(text,), gpu=text, quality=(watched(text),)))
        statuses.append(CaseStatus(which, Status.FAILED, text, f"{text}\n{text}"))
    whole = run(records, statuses, texts[0])
    pairs = {text: text for text in texts}
    manifest = dataclasses.replace(
        whole.manifest, argv=texts, created=texts[2], finished=texts[4], versions=pairs, hardware=pairs, environment=pairs,
        profile={text: {text: text} for text in texts},
    )  # fmt: skip
    return Run(Path("runs") / "\x1b[31m</title>", manifest, whole.records)


def extreme_run() -> Run:
    """Losses that are missing, infinite, tiny or huge, and bytes at the edge of 64 bits."""
    values = [None, 1e30, 1e-30, -5.0, 0.0, float("inf"), float("nan"), 3.2]
    whole = measure(case())
    curve = tuple(dataclasses.replace(step, loss=loss, time_s=loss) for step, loss in zip(whole.steps, values, strict=False))
    huge = 2**62
    odd = dataclasses.replace(
        whole, steps=curve, loss=None, components={Component.PARAMETERS: huge - 5, Component.OTHER: 5}, allocated_bytes=huge,
        step_time_s=1e-9, peak_allocated_bytes=2**63 - 1, phases={}, tokens_per_s=1e30,
    )  # fmt: skip
    guess = dataclasses.replace(estimate(case()), components={Component.PARAMETERS: 1}, allocated_bytes=1)
    return run([guess, odd, bare_record(case(1)), bare_record(case(2), Source.MEASURE)])
