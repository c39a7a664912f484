"""Hold plans that say "fits" against the dry run: `benchmarks/plan.py SEED...`, each a set of drawn
questions (docs/plan.md: 0 1 2).

A plan is tried at the largest micro-batch that it says fits, where it is tightest. Printed are
whether it runs out of memory, what share of the allocator's memory its peak takes and what share it
reserves, and by how much the closed form misses the peak; then the docs' table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from drawn_plans import DrawnPlan, draw

from bf16prof.dry_run.runner import Options, simulate
from bf16prof.records import MemoryRecord
from bf16prof.verdict import MARGIN, MARGIN_EXPANDABLE

PLANS = 24
TRIED = ((False, 0.0), (False, MARGIN), (True, 0.0), (True, MARGIN_EXPANDABLE))
"""Whether segments are expandable, and the margin: none, and those of `plan`."""
HEADERS = ("allocator", "margin", "plans", "out of memory", "reserved beyond the peak, at most", "replay of it", "peak predicted")

Pair = tuple[DrawnPlan, MemoryRecord]


def main(seeds: Sequence[int]) -> None:
    """Draw, predict, dry-run, compare."""
    rows = [f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|"]
    for expandable, margin in TRIED:
        name = "expandable segments" if expandable else "default"
        pairs = [pair for seed in seeds for pair in _pairs(seed, expandable=expandable, margin=margin)]
        sys.stdout.write(f"{name}, margin {margin:.0%}, {len(pairs)} plans\n" + "".join(map(_line, pairs)))
        rows.append(f"| {name} | {margin:.0%} | {_sums(pairs)} |")
    sys.stdout.write("\n".join(["", *rows, ""]))


def _pairs(seed: int, *, expandable: bool, margin: float) -> list[Pair]:
    drawn = draw(seed, PLANS, expandable=expandable, margin=margin)
    return list(zip(drawn, simulate([each.job for each in drawn], options=Options(expandable_segments=expandable)), strict=True))


def _line(pair: Pair) -> str:
    each, dry = pair
    plan, memory = each.plan, each.room.allocator_bytes
    return (
        f"  {'OUT OF MEMORY' if dry.out_of_memory else 'fits'}: peak at {plan.peak_bytes / memory:.0%} of the memory, reserved "
        f"{(dry.reserved_bytes or 0) / memory:.0%} of it ({_over(dry):+.0%} over what is allocated), peak predicted {_error(pair):+.2%}: "
        f"{each.family} {plan.case.label} micro-batch {plan.micro_batch_size}{', recomputed' if plan.activation_checkpointing else ''}\n"
    )


def _sums(pairs: Sequence[Pair]) -> str:
    finished = [pair for pair in pairs if not pair[1].out_of_memory]
    errors = sorted(_error(pair) for pair in finished)
    replayed = sorted(_replayed(pair) for pair in finished if pair[0].plan.reserved_bytes) or [0.0]
    most = max(_over(dry) for _, dry in finished)
    peaks, blocks = f"{errors[0]:+.2%} to {errors[-1]:+.2%}", f"{replayed[0]:+.0%} to {replayed[-1]:+.0%}"
    return f"{len(pairs)} | {len(pairs) - len(finished)} | {most:+.0%} | {blocks} | {peaks}"


def _over(dry: MemoryRecord) -> float:
    """What is reserved beyond the most that is allocated, as a share of that."""
    return (dry.reserved_bytes or 0) / max(1, dry.run_peak_allocated_bytes or 1) - 1


def _replayed(pair: Pair) -> float:
    """The error of what the replay says is reserved."""
    each, dry = pair
    return (each.plan.reserved_bytes or 0) / max(1, dry.reserved_bytes or 1) - 1


def _error(pair: Pair) -> float:
    """Of the closed form's peak of the whole run."""
    each, dry = pair
    return each.plan.peak_bytes / max(1, dry.run_peak_allocated_bytes or 1) - 1


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0])
