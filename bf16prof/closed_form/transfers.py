"""What each rank sends in one optimizer step, collective by collective, as DeepSpeed 0.19.8 runs them (files are those of `runtime/`).

Bytes are those that leave a rank in bandwidth-optimal ring algorithms (Thakur et al. 2005; NCCL's "bus bandwidth"): of a tensor of S
bytes on W ranks an all-reduce sends 2 S (W - 1) / W, everything else S (W - 1) / W. The ZeRO paper (arXiv 1910.02054, section 7) counts 2
and 1, for W so large that the fraction is one. DeepSpeed's stages 1 and 2 send more than the paper's: by default they all-reduce
gradients (`use_multi_rank_bucket_allreduce`) of which each rank then keeps a part, and gather the parameters after the step.

A ring over nodes of g ranks has one edge out of each node, so of what the ranks send 1 / g leaves the node. Scalars (norms, flags) are
left out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.closed_form.gradients import Key, Share
from bf16prof.closed_form.passes import REMEMBERED
from bf16prof.closed_form.steady import Engine, persistent_sizes
from bf16prof.closed_form.training import Walked, share
from bf16prof.engine.config import Wrapper, dtype_bytes
from bf16prof.profiles.gpus import GPUS_PER_NODE
from bf16prof.records import Collective, Phase, Transfer
from bf16prof.rounding import round_up


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


def transfers(job: Job, engine: Engine, done: Walked, per_node: int = GPUS_PER_NODE) -> tuple[Transfer, ...]:
    """All collectives of one optimizer step of one rank; none on a single rank."""
    ranks = Ranks(engine.world_size, per_node)
    if ranks.count == 1:
        return ()
    return tuple(t for t in BY_WRAPPER[engine.facts.wrapper](job, engine, done, ranks) if t.size_bytes)


def _replicated(_: Job, engine: Engine, done: Walked, ranks: Ranks) -> Iterable[Transfer]:
    """Stage 0: the engine all-reduces the gradients of the last micro-step, into which all have accumulated."""
    size = dtype_bytes(engine.facts.communication_dtype) * sum(engine.numels)
    source = "engine.py buffered_allreduce_fallback"
    yield ranks.transfer("gradients", Collective.ALL_REDUCE, Phase.BACKWARD, len(done.reduced), size, source)


def _bf16(_: Job, engine: Engine, __: Walked, ranks: Ranks) -> Iterable[Transfer]:
    """BF16_Optimizer: the flat buffer of gradients, then that of the updated parameters."""
    size = dtype_bytes(engine.facts.communication_dtype) * engine.flat_numel
    source = "bf16_optimizer.py get_grads_for_reduction"
    yield ranks.transfer("gradients", Collective.ALL_REDUCE, Phase.BACKWARD, 1, size, source)
    yield _updated(engine, ranks, "bf16_optimizer.py update_lp_params")


def _zero12(job: Job, engine: Engine, done: Walked, ranks: Ranks) -> Iterable[Transfer]:
    """Stage 1 reduces with the last micro-step, stage 2 in each; both gather the updated parameters."""
    zero, source = engine.zero, "zero/stage_1_and_2.py average_tensor"
    to_owners = zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce
    kind = Collective.REDUCE if to_owners else Collective.ALL_REDUCE
    calls, total = _reduced(done, 1, sys.maxsize)[Collective.ALL_REDUCE]
    if zero.reduce_scatter:
        calls += _more_reductions(done, share(engine), zero.reduce_bucket_size, to_owners=to_owners)
    yield ranks.transfer("gradients", kind, Phase.BACKWARD, calls, total, source)
    yield _updated(engine, ranks, "zero/stage_1_and_2.py step")


def _more_reductions(done: Walked, spread: Share, bucket_size: int, *, to_owners: bool) -> int:
    """Collectives of stages 1 and 2 beyond one per bucket: one for each owner of a part of it, or, as a parameter that is too large for a
    bucket is alone in one, one for each piece of it."""
    if to_owners:
        return sum(times * (len({rank for key in keys for rank in spread.ranks(key)}) - 1) for times, keys in done.reduced)
    return sum(times * (len(list(spread.chunks(keys, bucket_size))) - 1) for times, keys in _too_large(done, bucket_size))


@functools.lru_cache(maxsize=REMEMBERED)
def _too_large(done: Walked, bucket_size: int) -> Sequence[tuple[int, Sequence[Key]]]:
    return [(times, keys) for times, keys in done.reduced if len(keys) == 1 and done.numels[keys[0]] > bucket_size]


def _updated(engine: Engine, ranks: Ranks, source: str) -> Transfer:
    total = dtype_bytes(engine.facts.parameter_dtype) * engine.flat_numel
    return ranks.transfer("updated parameters", Collective.ALL_GATHER, Phase.STEP, 1, total, f"{source}: all_gather_dp_groups")


def _zero3(_: Job, engine: Engine, done: Walked, ranks: Ranks) -> Iterable[Transfer]:
    """Stage 3 gathers parameters and scatters gradients in every micro-step, both padded to whole pieces of a parameter per rank.

    Without `reduce_scatter`, gradients in the bucket's buffer are all-reduced instead; one that is too large for it is not in it.
    """
    zero, size = engine.zero, dtype_bytes(engine.facts.parameter_dtype)
    source = "zero/partitioned_param_coordinator.py fetch_sub_module"
    how = size if zero.use_all_reduce_for_fetch_params else 0, zero.allgather_sequential
    for (phase, kind), (calls, total) in _gathered(done, ranks.count, *how).items():
        yield ranks.transfer(f"parameters in {phase}", kind, phase, calls, total, source)
    most = zero.reduce_bucket_size if zero.contiguous_gradients and not zero.reduce_scatter else 0
    source = "zero/stage3.py __reduce_and_partition_ipg_grads"
    for kind, (calls, total) in _reduced(done, ranks.count, most).items():
        yield ranks.transfer("gradients", kind, Phase.BACKWARD, calls, total, source)
    kept = persistent_sizes(engine, size)
    yield ranks.transfer("persistent parameters", Collective.ALL_GATHER, Phase.STEP, len(kept), sum(kept), "zero/stage3.py _post_step")


@functools.lru_cache(maxsize=REMEMBERED)
def _gathered(done: Walked, ranks: int, reducing: int, sequential: bool) -> Mapping[tuple[Phase, Collective], tuple[int, int]]:
    """How many collectives gather parameters, and their bytes: one per dtype for those gathered together, or one for each, or an all-reduce
    in `reducing` bytes per element (`zero/partition_parameters.py`, all_gather_coalesced; a single parameter is always gathered)."""
    padded = {key: round_up(n, ranks) for key, n in done.numels.items()}
    found: dict[tuple[Phase, Collective], tuple[int, int]] = {}
    for times, launched in done.launched:
        for phase, keys in launched.gathered:
            alone = sequential or len(keys) == 1
            if reducing and not alone:
                what, calls, size = (phase, Collective.ALL_REDUCE), 1, sum(padded[key] for key in keys) * reducing
            else:
                calls = len(keys) if alone else len({done.widths[key] for key in keys})
                what, size = (phase, Collective.ALL_GATHER), sum(padded[key] * done.widths[key] for key in keys)
            before = found.get(what, (0, 0))
            found[what] = before[0] + times * calls, before[1] + times * size
    return found


@functools.lru_cache(maxsize=REMEMBERED)
def _reduced(done: Walked, pieces: int, most: int) -> Mapping[Collective, tuple[int, int]]:
    """Buckets of gradients and their bytes: those of up to `most` elements are reduced whole, others padded to so many equal pieces."""
    found = {Collective.ALL_REDUCE: (0, 0), Collective.REDUCE_SCATTER: (0, 0)}
    for times, keys in done.reduced:
        is_whole = most and sum(done.numels[key] for key in keys) <= most
        size = sum((done.numels[key] if is_whole else round_up(done.numels[key], pieces)) * done.wires[key] for key in keys)
        kind = Collective.ALL_REDUCE if is_whole else Collective.REDUCE_SCATTER
        found[kind] = found[kind][0] + times, found[kind][1] + times * size
    return found


BY_WRAPPER: Mapping[Wrapper, Callable[[Job, Engine, Walked, Ranks], Iterable[Transfer]]] = {
    Wrapper.PLAIN: _replicated,
    Wrapper.FUSED: _replicated,
    Wrapper.UNFUSED: _replicated,
    Wrapper.BF16: _bf16,
    Wrapper.ZERO12: _zero12,
    Wrapper.ZERO3: _zero3,
}
