"""What ranks that share a batch send each other in a step, counted as the dry run calls it: by
phase and kind of collective.

Bytes that leave a rank are those of ring algorithms, as in `closed_form/transfers.py`. ZeRO's own
collectives are of other groups of ranks and are not counted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from bf16prof.cases import Job
from bf16prof.dry_run.ledger import Ledger
from bf16prof.engine.nested import tensors_in
from bf16prof.models.experts import GROUP
from bf16prof.step_records import Transfer
from bf16prof.vocabulary import Collective, Phase

ULYSSES = "deepspeed::dim_zero_all_to_all"
"""DeepSpeed's own operator around the exchange of tokens for heads (sequence/layer.py)."""

KINDS = {
    "c10d::allreduce_": Collective.ALL_REDUCE,
    "c10d::allgather_": Collective.ALL_GATHER,
    "c10d::_allgather_base_": Collective.ALL_GATHER,
    ULYSSES: Collective.ALL_TO_ALL,
}
"""Operators whose first argument is as large as what the ranks together send or get."""

OF_EXPERTS = {"c10d::alltoall_base_": Collective.ALL_TO_ALL}

OF_STAGES = {"c10d::send": Collective.SEND}
"""Those are of the group of all ranks."""


@dataclass
class Exchanges:
    """Counts the collectives of one group of ranks in the optimizer step that runs; `group` is its
    name."""

    group: str
    ranks: int
    name: str
    source: str
    ledger: Ledger
    kinds: Mapping[str, Collective] = field(default_factory=lambda: KINDS)
    _found: dict[tuple[Phase, Collective], list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, ledger: Ledger) -> Exchanges | None:
        """Those of a job whose engine is built; `None` where no ranks share a batch."""
        from deepspeed.utils import groups

        sequence, tensor, stages = job.case.sequence_parallel, job.case.tensor_parallel, job.case.pipeline_parallel
        if sequence > 1:
            source = "runtime/sequence_parallel/ulysses_sp.py UlyssesSPAttentionHF"
            return cls(groups._get_sequence_parallel_group().group_name, sequence, "shared sequences", source, ledger)
        if tensor > 1:
            source = "module_inject/layers.py"
            return cls(groups.get_tensor_model_parallel_group().group_name, tensor, "shared layers", source, ledger)
        if (spread := job.case.expert_parallel) > 1:
            group = groups._get_expert_parallel_group(f"{GROUP}{spread}")
            return cls(group.group_name, spread, "experts", "moe/sharded_moe.py _AllToAll", ledger, OF_EXPERTS)
        if stages > 1:
            return cls(
                dist.distributed_c10d._get_default_group().group_name,
                stages,
                "stages of the pipeline",
                "runtime/pipe/p2p.py send",
                ledger,
                OF_STAGES,
            )
        return None

    def begin_step(self) -> None:
        """An optimizer step begins: forget the one before it."""
        self._found.clear()

    def see(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """Told of every operator that has run (`Tracker.watch`)."""
        kind = self.kinds.get(func._schema.name)
        phase = self.ledger.marks[-1].phase if self.ledger.marks else None
        if kind is None or phase is None or self.group not in _groups(args):
            return
        tensors = [tensor for tensor in tensors_in(args[0]) if tensor.numel() > 1]  # a loss, a norm
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size:
            found = self._found.setdefault((phase, kind), [0, 0])
            found[0] += 1
            found[1] += size

    def transfers(self, micro_steps_run: int, micro_steps: int) -> tuple[Transfer, ...]:
        """Those of a whole step, of which so many of its micro-steps were run: all do the same."""
        return tuple(
            self._transfer(phase, kind, *(number if phase is Phase.STEP else number * micro_steps // micro_steps_run for number in found))
            for (phase, kind), found in self._found.items()
        )

    def _transfer(self, phase: Phase, kind: Collective, calls: int, size: int) -> Transfer:
        rings = (2 if kind is Collective.ALL_REDUCE else 1) * size * (self.ranks - 1) // self.ranks
        sent = size if kind is Collective.SEND else rings
        return Transfer(self.name, kind, phase, calls, size, sent, 0, self.source)


def _groups(args: Any) -> Iterator[str]:
    """The names of the groups among the arguments of an operator: one is a group of PyTorch's, or
    its name."""
    for each in args:
        if isinstance(each, str):
            yield each
        elif isinstance(each, torch.ScriptObject):
            try:
                yield ProcessGroup.unbox(each).group_name
            except RuntimeError:  # it is what the ranks are to do with the values
                continue
