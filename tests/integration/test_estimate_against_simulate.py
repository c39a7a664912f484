"""The peaks of the closed form against the dry run of the real engine, over drawn jobs.

What the caching allocator holds beyond the storages (unsplit remainders of up to 1 MiB a block) has no closed form; of jobs as small as
these it is up to 3 %. So the training peak is compared without it, to 0.75 %, and the other phases may lack as much of it as that
peak has.
"""

from __future__ import annotations

import pytest
from drawn_cases import draw

from bf16prof.estimate.predict import predict
from bf16prof.records import TRAINING, Component, MemoryRecord
from bf16prof.simulate.runner import simulate

pytestmark = pytest.mark.timeout(280)

SEEDS = range(2)
EACH = 10


def storages(record: MemoryRecord) -> int:
    """Bytes of the storages that are alive at the training peak."""
    return sum(item.bytes for item in record.peak_items if item.component is not Component.ROUNDING)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_peak_of_every_training_phase(seed: int) -> None:
    jobs = draw(seed, EACH)
    worst: list[tuple[float, str]] = []
    for job, dry in zip(jobs, simulate(jobs), strict=True):
        closed = predict(job)
        remainders = (dry.peak_allocated_bytes or 0) - storages(dry)
        order = sorted((dry.phases[phase].peak_bytes or 0 for phase in TRAINING), reverse=True)
        if order[0] > 1.02 * order[1]:
            assert closed.peak_phase is dry.peak_phase, job.case.label
        if closed.peak_phase is dry.peak_phase:
            assert storages(closed) == pytest.approx(storages(dry), rel=0.0075), job.case.label
        for phase in TRAINING:
            expected, found = dry.phases[phase].peak_bytes or 0, closed.phases[phase].peak_bytes or 0
            worst.append((found / expected - 1, f"{job.case.label} {job.profile.model.family} {phase}"))
            assert 0.98 * (expected - remainders) <= found <= 1.02 * expected, f"{job.case.label} {phase}"
    for error, name in sorted(worst, key=lambda each: -abs(each[0]))[:5]:
        print(f"{error:+.3%} {name}")  # noqa: T201 - shown with -s
