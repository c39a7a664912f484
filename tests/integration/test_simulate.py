"""The dry run against the allocator: real ranks on CPU, and the same cases on fake tensors, phase
by phase.

What is allocated at the end of init, backward and step is equal to the byte, and so are the peaks
but for what gloo's threads still hold when a collective is over, which is different from step to
step of one run, and for eight bytes a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Measured
from harness import INSIDE
from test_exact import BF16, CASES, FULL, LLAMA, Run, by_day_or_night, sets

from bf16prof import runs
from bf16prof.cases import Job, JobFile
from bf16prof.dry_run.runner import simulate
from bf16prof.models.modules import build_trained
from bf16prof.profiles.recipes import DTYPE_BYTES, find_recipe
from bf16prof.records import MemoryRecord
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Component, Phase, Source

pytestmark = pytest.mark.timeout(600)

DATA = Path(__file__).parents[1] / "data"
FOUR_RANKS = ("--zero", "1,3", "--recipe", FULL, "--num-gpus", "4", "--gradient-accumulation-steps", "3", *sets("model.family=gpt2"))
FOUR_LLAMAS = ("--zero", "2", "--recipe", BF16, "--num-gpus", "4", "--activation-checkpointing", *sets(*LLAMA))
HF_LLAMA = ("--zero", "2,3", "--recipe", BF16, "--hf-config", str(DATA / "hf-llama.json"), "--activation-checkpointing")
HF_GPT2 = (
    "--zero", "0,3", "--recipe", "fp32", "--hf-config", str(DATA / "hf-gpt2.json"), "--gradient-accumulation-steps", "3",
    *sets("workload.keeps_outputs=false"),
)  # fmt: skip
ENCODER = (
    "--zero", "3", "--recipe", BF16, "--num-gpus", "3", "--model", "encoder:make",
    *sets(
        "model.vocab_size=101",
        "deepspeed.zero_optimization.reduce_bucket_size=5000",
        "deepspeed.zero_optimization.sub_group_size=3000",
        "deepspeed.zero_optimization.stage3_prefetch_bucket_size=3000",
        "deepspeed.zero_optimization.stage3_param_persistence_threshold=100",
    ),
)  # fmt: skip
RECURRENT = ("--zero", "2", "--recipe", BF16, "--model", "recurrent:make", *sets("model.vocab_size=101"))
ZERO_INIT = ("--zero", "3", "--recipe", FULL, *sets("workload.zero_init=true"))
MORE: dict[str, list[tuple[Run, int, str]]] = {
    "four-gpt2": [(FOUR_RANKS, 1, FULL), (FOUR_RANKS, 3, FULL)],
    "four-llama": [(FOUR_LLAMAS, 2, BF16)],
    "hf-llama": [(HF_LLAMA, 2, BF16), (HF_LLAMA, 3, BF16)],
    "hf-gpt2": [(HF_GPT2, 0, "fp32"), (HF_GPT2, 3, "fp32")],
    "encoder": [(ENCODER, 3, BF16)],
    "recurrent": [(RECURRENT, 2, BF16)],
    "zero-init": [(ZERO_INIT, 3, FULL)],
}
AT_NIGHT = ("four-gpt2", "four-llama", "hf-gpt2", "encoder")
"""More ranks than this machine has cores, and families that the other tests have too."""

ALL = [by_day_or_night(*case[:3]) for case in CASES] + [
    pytest.param(*case, id=f"{name}-zero{case[1]}", marks=[pytest.mark.nightly] if name in AT_NIGHT else [])
    for name, cases in MORE.items()
    for case in cases
]

ENDS = ("init", "backward", "step")
LATE_IN_STEP = 640
"""Bytes of small collectives of the step (norms, overflow flags, small parameters) that gloo has
finished and still holds."""
LATE = 0.002
"""The same for gradients of small tensors in backward, as a share of the peak; and eight bytes a
layer, a number that autograd keeps."""

Phases = dict[Phase, PhaseMemory]
Pairs = dict[tuple[int, str], tuple[MemoryRecord, Phases, MemoryRecord, int]]
"""By stage and recipe: the measured record, the phases of its rank 0, the dry run's record, which
is of rank 0, and `late_in_init`."""


@pytest.fixture(scope="session")
def simulated(measured: Callable[..., Measured]) -> Callable[[tuple[str, ...]], Pairs]:
    """A function that gives, for the words of a measurement, each case's measured and dry-run
    record."""
    made: dict[tuple[str, ...], Pairs] = {}

    def get(words: tuple[str, ...]) -> Pairs:
        if words not in made:
            done = measured(*words)
            run = runs.load(done.folder)
            real = [record for record in run.records if record.source is Source.MEASURE]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", str(INSIDE))
                patch.syspath_prepend(INSIDE)
                jobs = [JobFile(record.case, run.manifest.profile, record.device).job() for record in real]
                found = list(zip(real, simulate(jobs), map(late_in_init, jobs), strict=True))
            made[words] = {
                (a.case.zero_stage, a.case.recipe): (a, done.quickest(a.case.zero_stage, a.case.recipe), b, late) for a, b, late in found
            }
        return made[words]

    return get


@pytest.mark.parametrize(("words", "stage", "recipe"), ALL)
def test_the_dry_run_holds_what_real_ranks_hold(
    simulated: Callable[[tuple[str, ...]], Pairs], words: tuple[str, ...], stage: int, recipe: str
) -> None:
    real, phases, dry, late_init = simulated(words)[stage, recipe]

    assert dry.parameters == real.parameters
    assert dry.allocated_bytes == real.allocated_bytes
    assert dry.components == real.components
    assert dry.components[Component.OTHER] == 0
    for phase in ENDS:
        assert dry.phases[Phase(phase)].end_bytes == phases[Phase(phase)].end_bytes, phase
    assert 0 <= peak(phases, "init") - peak(dry.phases, "init") <= late_init
    for phase in ("forward", "backward"):
        assert 0 <= peak(phases, phase) - peak(dry.phases, phase) <= LATE * peak(phases, phase), phase
    assert 0 <= peak(phases, "step") - peak(dry.phases, "step") <= LATE_IN_STEP


def late_in_init(job: Job) -> int:
    """Bytes that gloo may hold longer than it needs them: ZeRO-3's init broadcasts one parameter
    after the other, and each of gloo's two threads (ProcessGroupGloo's options) may still hold the
    last that it has sent."""
    if job.case.zero_stage < 3:
        return 0
    width = DTYPE_BYTES[find_recipe(job.case.recipe).dtypes[Component.PARAMETERS]]
    return width * sum(sorted(parameter.numel() for parameter in build_trained(job.profile).parameters())[-2:])


def peak(phases: Phases, phase: str) -> int:
    """The peak of a phase, which both sources know."""
    found = phases[Phase(phase)].peak_bytes
    assert found is not None
    return found
