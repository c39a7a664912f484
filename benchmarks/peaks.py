"""How near the closed form's peaks come to the dry run's: the worst error by stage and phase over drawn jobs, as a table for the docs.

`make peaks` - ten jobs a seed, about 30 s each on two cores.
"""

from __future__ import annotations

import sys

from drawn_cases import draw

from bf16prof.estimate.predict import predict
from bf16prof.records import TRAINING, Component, MemoryRecord
from bf16prof.simulate.runner import simulate

EACH = 10


def storages(record: MemoryRecord) -> int:
    """Bytes of the storages that are alive at the training peak, without what the allocator adds."""
    return sum(item.bytes for item in record.peak_items if item.component is not Component.ROUNDING)


def main(seeds: list[int]) -> None:
    """Search and print."""
    worst: dict[tuple[int, str], float] = {}
    right = told_apart = 0
    for job in (job for seed in seeds for job in [draw(seed, EACH)]):
        for each, dry in zip(job, simulate(job), strict=True):
            closed, stage = predict(each), each.case.zero_stage
            order = sorted((dry.phases[phase].peak_bytes or 0 for phase in TRAINING), reverse=True)
            told_apart += order[0] > 1.02 * order[1]
            right += order[0] > 1.02 * order[1] and closed.peak_phase is dry.peak_phase
            errors = {str(phase): (closed.phases[phase].peak_bytes or 0) / (dry.phases[phase].peak_bytes or 1) - 1 for phase in dry.phases}
            if closed.peak_phase is dry.peak_phase:
                errors["training peak, storages"] = storages(closed) / storages(dry) - 1
            for name, error in errors.items():
                worst[stage, name] = max(worst.get((stage, name), 0.0), error, key=abs)
    names = sorted({name for _, name in worst}, key=[*map(str, dry.phases), "training peak, storages"].index)
    sys.stdout.write("| stage | " + " | ".join(names) + " |\n|---" * (1) + "|---" * len(names) + "|\n")
    for stage in sorted({stage for stage, _ in worst}):
        sys.stdout.write(f"| {stage} | " + " | ".join(f"{worst.get((stage, name), 0):+.2%}" for name in names) + " |\n")
    sys.stdout.write(f"the phase is right in {right} of {told_apart} jobs in which the two highest differ by more than 2 %\n")


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]] or [0, 1, 2, 3])
