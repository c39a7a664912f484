"""What is known of single optimizer steps: time and memory, losses, what updates lost, and the work
that a step has to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from bf16prof.vocabulary import STRICT, Amount, Collective, Phase, Share, Size


@dataclass(frozen=True)
class PhaseMemory:
    """Allocated bytes during one phase: the highest, and at its end."""

    __pydantic_config__ = STRICT

    peak_bytes: Size | None = None
    end_bytes: Size | None = None


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of a run: its loss, its seconds (wall clock; on a GPU also between two
    CUDA events) and its memory by phase.

    `phase_time_s`: seconds in each phase over all micro-steps, by the clock, on a GPU between CUDA
    events. `loss_not_finite`: the source said a loss that is no finite number, so that `loss` is
    `None` (else it is just not known). The steps of a measured record all say their loss or none
    does: without one among others that have one, it was not finite.
    """

    __pydantic_config__ = STRICT

    step: Size
    loss: float | None
    time_s: Amount | None
    allocated_bytes: Size | None
    phases: dict[Phase, PhaseMemory] = field(default_factory=dict)
    warmup: bool = False
    device_time_s: Amount | None = None
    phase_time_s: dict[Phase, Amount] = field(default_factory=dict)
    loss_not_finite: bool = False


@dataclass(frozen=True)
class LossSummary:
    """What was published of a loss curve whose steps were not: over so many `steps` its mean and
    standard deviation, printed with so many `decimals`; its last value is the record's `loss`.
    `source` is the citation."""

    __pydantic_config__ = STRICT

    steps: Size
    mean: float
    deviation: float
    decimals: Size
    source: str


@dataclass(frozen=True)
class UpdateQuality:
    """What became of the updates that the optimizer intended, on the `elements` that were looked at
    (see `quality/`).

    * `lost_updates`: the share of non-zero intended updates that changed no stored value.
    * `edq`: effective descent quality, the projection of the update that took effect on the
      intended one as a share of that.
    """

    __pydantic_config__ = STRICT

    elements: Size
    lost_updates: Share | None
    edq: float | None


@dataclass(frozen=True)
class CastShares:
    """Of so many finite values the share that a cast to `bf16` and to `fp16` makes zero, of values
    that are not, and infinite."""

    __pydantic_config__ = STRICT

    values: Size
    zero: dict[str, Share]
    infinite: dict[str, Share]


@dataclass(frozen=True)
class QualityStep:
    """One step of the pass in which updates were watched, after the measured steps: its loss, and
    updates in total and by layer.

    `casts`: what lower precisions cannot hold of `weights`, `gradients` and `updates`, whatever
    they are kept in.
    """

    __pydantic_config__ = STRICT

    step: Size
    loss: float | None
    total: UpdateQuality
    layers: dict[str, UpdateQuality]
    casts: dict[str, CastShares] = field(default_factory=dict)


@dataclass(frozen=True)
class Transfer:
    """What one rank sends in one optimizer step for one purpose.

    * `size_bytes`: the whole tensors that the `calls` collectives work on; `sent_bytes` of them
      leave each rank (ring algorithms).
    * `between_nodes_bytes`: the part of `sent_bytes` that leaves the node, as a mean over its
      ranks.
    * `phase`: when; `source`: DeepSpeed's file and function.
    """

    __pydantic_config__ = STRICT

    name: str
    collective: Collective
    phase: Phase
    calls: Size
    size_bytes: Size
    sent_bytes: Size
    between_nodes_bytes: Size
    source: str = ""


@dataclass(frozen=True)
class StepWork:
    """What one rank has to do in one optimizer step, whatever the time it takes.

    * `tokens`, in `micro_steps` forward and backward passes.
    * `forward_flops`, `backward_flops` of the model, and `recomputed_flops` of activation
      checkpointing on top (matrix products only, a multiply-add is two, causal masks not taken
      off); `compute_dtype` is what they run in.
    * `transfers`: its collectives. `optimizer_read_bytes`, `optimizer_written_bytes`: the model
      states that the optimizer has to read and to write, once each. `host_link_bytes`: offloaded
      gradients and parameters between host and device.
    * `floor_s`: the seconds below which each part cannot take on the record's GPU, beyond what runs
      beside the parts before it; empty without one. `hidden_s`: the seconds of communication and of
      the host link that run beside computation and are not in the floor.
    """

    __pydantic_config__ = STRICT

    tokens: Size
    compute_dtype: str
    forward_flops: Size
    backward_flops: Size
    recomputed_flops: Size
    transfers: tuple[Transfer, ...]
    optimizer_read_bytes: Size
    optimizer_written_bytes: Size
    host_link_bytes: Size = 0
    micro_steps: Size = 1
    floor_s: dict[str, Amount] = field(default_factory=dict)
    hidden_s: dict[str, Amount] = field(default_factory=dict)

    @property
    def model_flops(self) -> int:
        """Operations that the model asks for: forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def hardware_flops(self) -> int:
        """Operations that are carried out: those of the model, and the recomputation."""
        return self.model_flops + self.recomputed_flops

    @property
    def step_time_floor_s(self) -> float | None:
        """No step is faster than this on the record's GPU; `None` without one, or without its
        peaks."""
        return sum(self.floor_s.values()) if self.floor_s else None

    @property
    def sent_bytes(self) -> int:
        """What the rank sends in all its collectives."""
        return sum(transfer.sent_bytes for transfer in self.transfers)

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizer reads and writes."""
        return self.optimizer_read_bytes + self.optimizer_written_bytes
