"""How megatron-core's distributed optimizer lays parameters out in its buffers, and what of them
each rank has the states of. Imports no torch; all counts are elements.

References are to megatron-core 0.16.1 (distributed/param_and_grad_buffer.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bf16prof.cases import Job
from bf16prof.models.shapes import NoInventory, inventory
from bf16prof.rounding import round_up

Span = tuple[int, int]

BUCKET_ALIGNMENT, PARAMETER_ALIGNMENT = 128, 64
"""To multiples of these buffers are padded, and the start of each parameter in them
(_pad_end_of_bucket_if_needed and _pad_start_of_param_if_needed)."""


def buffer_spans(numels: Sequence[int], ranks: int) -> tuple[list[Span], int]:
    """Where each parameter starts and ends in the buffer, the last of the model first, and the size
    of the whole."""
    spans, end = list[Span](), 0
    for n in reversed(numels):
        start = round_up(end, PARAMETER_ALIGNMENT)
        end = start + n
        spans.append((start, end))
    return spans, round_up(end, math.lcm(ranks, BUCKET_ALIGNMENT))


def shards(numels: Sequence[int], ranks: int, rank: int) -> list[int]:
    """What lies in a rank's part of the buffer, by parameter: the padding between them has no
    states."""
    spans, total = buffer_spans(numels, ranks)
    begin, end = (total // ranks * number for number in (rank, rank + 1))
    return [min(stop, end) - max(start, begin) for start, stop in spans if start < end and stop > begin]


def fullest_rank(numels: Sequence[int], ranks: int) -> int:
    """The rank, or the first of those, whose part of the buffer has the least padding in it."""
    spans, total = buffer_spans(numels, ranks)
    own, held = total // ranks, dict.fromkeys(range(ranks), 0)
    for start, end in spans:
        for rank in range(start // own, (end - 1) // own + 1):
            held[rank] += min(end, own * (rank + 1)) - max(start, own * rank)
    return max(held, key=lambda rank: held[rank])


def fullest_rank_of(job: Job) -> int:
    """The same of a job; the first where nobody knows its model's parameters, and where ranks have
    no parts."""
    if job.case.zero_stage == 0:
        return 0
    try:
        numels = [spec.numel for spec in inventory(job.profile.model) if spec.trainable]
    except NoInventory:
        return 0
    return fullest_rank(numels, job.case.world_size)
