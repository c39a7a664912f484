"""What each rank sends in one optimizer step, collective by collective, as DeepSpeed 0.19.8 runs them (files are those of `runtime/`).

Bytes are those that leave a rank in bandwidth-optimal ring algorithms (Thakur et al. 2005; NCCL's "bus bandwidth"): of a tensor of S
bytes on W ranks an all-reduce sends 2 S (W - 1) / W, everything else S (W - 1) / W. The ZeRO paper (arXiv 1910.02054, section 7) counts 2
and 1, for W so large that the fraction is one. DeepSpeed's stages 1 and 2 send more than its stages 1 and 2: by default they all-reduce
gradients (`use_multi_rank_bucket_allreduce`) of which each rank then keeps a part, and gather the parameters after the step.

A ring over nodes of g ranks has one edge out of each node, so of what the ranks send 1 / g leaves the node. Scalars (norms, flags) are
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.engine.config import Wrapper, dtype_bytes
from bf16prof.estimate.buckets import Buckets, Launch, bucket_numels, buckets, fetched_numels, padded
from bf16prof.estimate.layout import flat_numel, flat_spans, persistent
from bf16prof.estimate.steady import Engine
from bf16prof.profiles.models import ModelSettings
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.records import Collective, Phase, Transfer

GPUS_PER_NODE = 8
ENGINE_BUCKET = 500_000_000
"""Elements after which the engine's own all-reduce begins another bucket (`constants.py`, MEMORY_OPT_ALLREDUCE_SIZE)."""


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


def transfers(job: Job, engine: Engine, per_node: int = GPUS_PER_NODE) -> tuple[Transfer, ...]:
    """All collectives of one optimizer step of one rank; none on a single rank."""
    ranks = Ranks(engine.world_size, per_node)
    if ranks.count == 1:
        return ()
    return tuple(t for t in BY_WRAPPER[engine.facts.wrapper](job, engine, ranks) if t.size_bytes)


def family_model(job: Job) -> ModelSettings:
    """The job's model, which is one of a family: others have no closed form."""
    assert isinstance(job.profile.model, ModelSettings), "only families have a closed form"
    return job.profile.model


def _replicated(_: Job, engine: Engine, ranks: Ranks) -> Iterable[Transfer]:
    """Stage 0: the engine all-reduces the gradients of the last micro-step, into which all have accumulated."""
    size = dtype_bytes(engine.facts.communication_dtype)
    calls = _filled_over(engine.numels, ENGINE_BUCKET)
    source = "engine.py buffered_allreduce_fallback"
    yield ranks.transfer("gradients", Collective.ALL_REDUCE, Phase.BACKWARD, calls, size * sum(engine.numels), source)


def _bf16(job: Job, engine: Engine, ranks: Ranks) -> Iterable[Transfer]:
    """BF16_Optimizer: the same, then the updated parameters."""
    yield from _replicated(job, engine, ranks)
    yield _updated(engine, ranks, ZeroSettings(), "bf16_optimizer.py update_lp_params")


def _zero12(job: Job, engine: Engine, ranks: Ranks) -> Iterable[Transfer]:
    """Stage 1 reduces with the last micro-step, stage 2 in each; both gather the updated parameters."""
    zero, stage, model = engine.zero, job.case.zero_stage, family_model(job)
    micro_steps = job.profile.workload.gradient_accumulation_steps if stage == 2 else 1
    to_owner = zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce
    kind = Collective.REDUCE if to_owner else Collective.ALL_REDUCE
    mixed = is_mixed(engine)
    filled = bucket_numels(model, zero.reduce_bucket_size, mixed, 1)
    calls = filled.count
    if to_owner:
        calls = sum(_owners(engine, bucket) for _, bucket in buckets(model, zero.reduce_bucket_size, mixed))
    source = "zero/stage_1_and_2.py average_tensor"
    yield ranks.transfer("gradients", kind, Phase.BACKWARD, calls * micro_steps, _bytes(engine, filled) * micro_steps, source)
    yield _updated(engine, ranks, zero, "zero/stage_1_and_2.py step")


def _owners(engine: Engine, bucket: Sequence[int]) -> int:
    """How many ranks keep a part of a bucket of stages 1 and 2, each of which gets its part in a collective of its own."""
    size = dtype_bytes(engine.facts.parameter_dtype)
    spans = flat_spans(engine.numels, engine.world_size, engine.zero, size)
    own = flat_numel(engine.numels, engine.world_size, engine.zero, size) // engine.world_size
    return len({rank for i in bucket for rank in range(spans[i][0] // own, (spans[i][1] - 1) // own + 1)})


def _updated(engine: Engine, ranks: Ranks, zero: ZeroSettings, source: str) -> Transfer:
    size = dtype_bytes(engine.facts.parameter_dtype)
    total = size * flat_numel(engine.numels, ranks.count, zero, size)
    return ranks.transfer("updated parameters", Collective.ALL_GATHER, Phase.STEP, 1, total, f"{source}: all_gather_dp_groups")


def _zero3(job: Job, engine: Engine, ranks: Ranks) -> Iterable[Transfer]:
    """Stage 3 gathers parameters and scatters gradients in every micro-step, both padded to whole pieces of a parameter per rank."""
    zero, workload, model = engine.zero, job.profile.workload, family_model(job)
    micro_steps, mixed = workload.gradient_accumulation_steps, is_mixed(engine)
    for phase, launches in fetched_numels(model, workload.activation_checkpointing, zero, ranks.count, mixed):
        for kind, sizes in _fetched(engine, launches).items():
            source = "zero/partitioned_param_coordinator.py fetch_sub_module"
            yield ranks.transfer(f"parameters in {phase}", kind, phase, len(sizes) * micro_steps, sum(sizes) * micro_steps, source)
    whole = zero.contiguous_gradients and not zero.reduce_scatter
    kind = Collective.ALL_REDUCE if whole else Collective.REDUCE_SCATTER
    filled = bucket_numels(model, zero.reduce_bucket_size, mixed, 1 if whole else ranks.count)
    source = "zero/stage3.py __reduce_and_partition_ipg_grads"
    yield ranks.transfer("gradients", kind, Phase.BACKWARD, filled.count * micro_steps, _bytes(engine, filled) * micro_steps, source)
    size = dtype_bytes(engine.facts.parameter_dtype)
    kept = [size * padded(n, ranks.count) for n in persistent(engine.numels, zero)]
    yield ranks.transfer("persistent parameters", Collective.ALL_GATHER, Phase.STEP, len(kept), sum(kept), "zero/stage3.py _post_step")


def _fetched(engine: Engine, launches: Iterable[Launch]) -> dict[Collective, list[int]]:
    """Bytes of the collectives of some launches: an all-gather per dtype, or one all-reduce (`zero/partition_parameters.py`,
    all_gather_coalesced: a single parameter is always gathered)."""
    size, cast_size = dtype_bytes(engine.facts.parameter_dtype), dtype_bytes(engine.facts.autocast_dtype)
    gathered, reduced = [], []
    for launch in launches:
        if engine.zero.use_all_reduce_for_fetch_params and launch.parameters > 1:
            reduced.append(size * (launch.cast + launch.other))
        else:
            gathered += [n for n in (cast_size * launch.cast, size * launch.other) if n]
    return {Collective.ALL_GATHER: gathered, Collective.ALL_REDUCE: reduced}


def is_mixed(engine: Engine) -> bool:
    """Whether parameters travel in two dtypes: under autocast those that it casts do in its own (`torch_autocast.py`)."""
    return engine.facts.autocast_dtype not in ("none", engine.facts.parameter_dtype)


def _bytes(engine: Engine, filled: Buckets) -> int:
    """Bytes of all gradients in some buckets on their way. Under autocast the communication dtype has no say."""
    facts = engine.facts
    dtype = facts.communication_dtype if facts.autocast_dtype == "none" else facts.parameter_dtype
    return dtype_bytes(facts.autocast_dtype) * filled.cast + dtype_bytes(dtype) * filled.other


def _filled_over(numels: Sequence[int], limit: int) -> int:
    """Buckets that are reduced as soon as they hold more than `limit` elements (engine.py, allreduce_no_retain)."""
    count, held = 0, 0
    for n in numels:
        held += n
        if held > limit:
            count, held = count + 1, 0
    return count + bool(held)


BY_WRAPPER: Mapping[Wrapper, Callable[[Job, Engine, Ranks], Iterable[Transfer]]] = {
    Wrapper.PLAIN: _replicated,
    Wrapper.FUSED: _replicated,
    Wrapper.UNFUSED: _replicated,
    Wrapper.BF16: _bf16,
    Wrapper.ZERO12: _zero12,
    Wrapper.ZERO3: _zero3,
}
