"""What a rank sends: how the collectives of a step are counted. Which there are, each optimizer
wrapper says (`wrappers/`).

Bytes are those that leave a rank in bandwidth-optimal ring algorithms (Thakur et al. 2005; NCCL's
"bus bandwidth"): of a tensor of S bytes on W ranks an all-reduce sends 2 S (W - 1) / W, everything
else S (W - 1) / W. The ZeRO paper (arXiv 1910.02054, section 7) counts 2 and 1, for W so large that
the fraction is one. DeepSpeed's stages 1 and 2 send more than the paper's: by default they
all-reduce gradients (`use_multi_rank_bucket_allreduce`) of which each rank then keeps a part, and
gather the parameters after the step.

A ring over nodes of g ranks has one edge out of each node, so of what the ranks send 1 / g leaves
the node. Scalars (norms, flags) are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bf16prof.closed_form.passes import REMEMBERED
from bf16prof.profiles.gpus import GPUS_PER_NODE
from bf16prof.rounding import round_up
from bf16prof.step_records import Transfer
from bf16prof.vocabulary import Collective, Phase

if TYPE_CHECKING:
    from bf16prof.closed_form.walks import Walked

GATHER_STREAM, REDUCE_STREAM = 1, 2
"""Numbers of the streams that DeepSpeed gathers and reduces on, beside the one that computes."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job, and how many of them share a node."""

    count: int
    per_node: int = GPUS_PER_NODE

    def transfer(self, name: str, kind: Collective, phase: Phase, calls: int, size: int, source: str) -> Transfer:  # noqa: PLR0917
        """The collectives of one purpose, over tensors of so many bytes together."""
        sent = (2 if kind is Collective.ALL_REDUCE else 1) * size * (self.count - 1) // self.count
        outside = sent // self.per_node if self.count > self.per_node else 0
        return Transfer(name, kind, phase, calls, size, sent, outside, source)


class HostLink(NamedTuple):
    """Bytes between device and host in one step: down and up while forward and backward run, and up
    when the optimizer is done."""

    down: int = 0
    up: int = 0
    after: int = 0


@functools.lru_cache(maxsize=REMEMBERED)
def gathered(done: Walked, ranks: int, reducing: int, sequential: bool) -> Mapping[tuple[Phase, Collective], tuple[int, int]]:
    """How many collectives gather parameters, and their bytes: one per dtype for those gathered
    together, or one for each, or an all-reduce in `reducing` bytes per element
    (`zero/partition_parameters.py`, all_gather_coalesced; a single parameter is always
    gathered)."""
    padded = {key: round_up(n, ranks) for key, n in done.numels.items()}
    found: dict[tuple[Phase, Collective], tuple[int, int]] = {}
    for times, launched in done.launched:
        for phase, keys in launched.gathered:
            alone = sequential or len(keys) == 1
            if reducing and not alone:
                what, calls, size = (phase, Collective.ALL_REDUCE), 1, sum(padded[key] for key in keys) * reducing
            else:
                calls = len(keys) if alone else len({done.itemsizes[key] for key in keys})
                what, size = (phase, Collective.ALL_GATHER), sum(padded[key] * done.itemsizes[key] for key in keys)
            before = found.get(what, (0, 0))
            found[what] = before[0] + times * calls, before[1] + times * size
    return found


@functools.lru_cache(maxsize=REMEMBERED)
def reduced(done: Walked, pieces: int, most: int) -> Mapping[Collective, tuple[int, int]]:
    """Buckets of gradients and their bytes: those of up to `most` elements are reduced whole,
    others padded to so many equal pieces."""
    found = {Collective.ALL_REDUCE: (0, 0), Collective.REDUCE_SCATTER: (0, 0)}
    for times, keys in done.reduced:
        is_whole = most and sum(done.numels[key] for key in keys) <= most
        size = sum((done.numels[key] if is_whole else round_up(done.numels[key], pieces)) * done.communication[key] for key in keys)
        kind = Collective.ALL_REDUCE if is_whole else Collective.REDUCE_SCATTER
        found[kind] = found[kind][0] + times, found[kind][1] + times * size
    return found
