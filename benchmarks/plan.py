"""Hold plans that say "fits" against the dry run: `benchmarks/plan.py SEED...`, each a set of drawn questions (docs/plan.md: 0 1 2).

A plan is tried at the largest micro-batch that it says fits, where it is tightest. Printed are whether it runs out of memory, what share of
the allocator's memory its peak takes and what share it reserves, and by how much the closed form misses the peak.
"""

from __future__ import annotations

import sys

from drawn_plans import DrawnPlan, draw

from bf16prof.records import MemoryRecord
from bf16prof.simulate.runner import Options, simulate

PLANS = 24


def main() -> None:
    """Draw, predict, dry-run, compare."""
    for seed in map(int, sys.argv[1:] or ["0"]):
        for expandable in (False, True):
            drawn = draw(seed, PLANS, expandable=expandable)
            records = simulate([each.job for each in drawn], options=Options(expandable_segments=expandable))
            _report(seed, expandable, list(zip(drawn, records, strict=True)))


def _report(seed: int, expandable: bool, pairs: list[tuple[DrawnPlan, MemoryRecord]]) -> None:
    sys.stdout.write(f"seed {seed}, {'expandable segments' if expandable else 'default allocator'}, {len(pairs)} plans\n")
    for each, dry in pairs:
        share = (dry.reserved_bytes or 0) / each.room.allocator_bytes
        over = (dry.reserved_bytes or 0) / max(1, dry.run_peak_allocated_bytes or 1) - 1
        error = each.plan.peak_bytes / max(1, dry.run_peak_allocated_bytes or 1) - 1
        verdict = "OUT OF MEMORY" if dry.out_of_memory else "fits"
        sys.stdout.write(
            f"  {verdict}: peak at {each.plan.peak_bytes / each.room.allocator_bytes:.0%} of the memory, reserved {share:.0%} of it "
            f"({over:+.0%} over what is allocated), peak predicted {error:+.2%}: {each.family} {each.plan.case.label} "
            f"micro-batch {each.plan.micro_batch_size}{', recomputed' if each.plan.activation_checkpointing else ''}\n"
        )


if __name__ == "__main__":
    main()
