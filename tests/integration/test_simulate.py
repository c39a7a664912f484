"""The dry run against the allocator: real ranks on CPU, and the same cases on fake tensors, phase by phase.

What is allocated at the end of init, backward and step is equal to the byte, and so is the peak of the step but for less than a kilobyte
that kernels need for scalars. The other peaks are a little higher on real ranks: kernels and gloo use scratch space that fake ones do
not, some ten kilobytes, which is up to 2 % of models as small as these (0.7 % of the `cpu-demo` profile).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Measured
from test_exact import CASES, IDS

from bf16prof import runs
from bf16prof.cases import JobFile
from bf16prof.records import Component, MemoryRecord, Phase, Source
from bf16prof.simulate.runner import simulate

pytestmark = pytest.mark.timeout(280)

ENDS = ("init", "backward", "step")
SCALARS = 1024
"""Bytes that may be missing in the peak of the step: scalars that kernels make of Python numbers, and a norm's fp64 copy of a small
gradient."""
SCRATCH = 0.02

Pairs = dict[tuple[int, str], tuple[MemoryRecord, MemoryRecord]]


@pytest.fixture(scope="session")
def simulated(measured: Callable[..., Measured]) -> Callable[[tuple[str, ...]], Pairs]:
    """A function that gives, for the words of a measurement, each case's measured and dry-run record."""
    made: dict[tuple[str, ...], Pairs] = {}

    def get(words: tuple[str, ...]) -> Pairs:
        if words not in made:
            run = runs.load(measured(*words).folder)
            real = [record for record in run.records if record.source is Source.MEASURE]
            dry = simulate([JobFile(record.case, run.manifest.profile, record.device).job() for record in real])
            made[words] = {(a.case.zero_stage, a.case.recipe): (a, b) for a, b in zip(real, dry, strict=True)}
        return made[words]

    return get


@pytest.mark.parametrize(("words", "stage", "recipe"), [case[:3] for case in CASES], ids=IDS)
def test_the_dry_run_holds_what_real_ranks_hold(
    simulated: Callable[[tuple[str, ...]], Pairs], words: tuple[str, ...], stage: int, recipe: str
) -> None:
    real, dry = simulated(words)[stage, recipe]

    assert dry.parameters == real.parameters
    assert dry.allocated_bytes == real.allocated_bytes
    assert dry.components == real.components
    assert dry.components[Component.OTHER] == 0
    for phase in ENDS:
        assert dry.phases[Phase(phase)].end_bytes == real.phases[Phase(phase)].end_bytes, phase
    assert 0 <= peak(real, "step") - peak(dry, "step") <= SCALARS
    for phase in ("init", "forward", "backward"):
        assert 0 <= peak(real, phase) - peak(dry, phase) <= SCRATCH * peak(real, phase), phase


def peak(record: MemoryRecord, phase: str) -> int:
    """The peak of a phase, which both sources know."""
    found = record.phases[Phase(phase)].peak_bytes
    assert found is not None
    return found
