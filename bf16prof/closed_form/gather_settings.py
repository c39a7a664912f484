"""What decides about ZeRO-3's gathers and reductions, and the parameters of each module."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bf16prof.closed_form.gathers import Gathers
from bf16prof.closed_form.layout import cut_order
from bf16prof.closed_form.leaves import Leaves
from bf16prof.closed_form.passes import REMEMBERED
from bf16prof.closed_form.strategy import StrategySettings
from bf16prof.models.autograd.events import ParameterKey
from bf16prof.models.shapes import TIED_HEAD

if TYPE_CHECKING:
    from bf16prof.closed_form.anatomy import Anatomy
    from bf16prof.closed_form.passes import Meter
    from bf16prof.closed_form.program import Program
    from bf16prof.closed_form.walks import WalkPlan


@dataclass(frozen=True)
class GatherSettings(StrategySettings):
    """What decides about gathers and reductions, in elements; `persistent` parameters are never
    released."""

    world_size: int
    prefetch_bucket: int
    max_live: int
    max_reuse_distance: int
    reduce_bucket: int
    contiguous: bool
    itemsize: int
    """Bytes of an element of a parameter."""
    gradient: int
    """Bytes of an element of the gradient partition."""
    persistent: frozenset[ParameterKey]
    on_host: bool = False
    """Whether partitions are in host memory (`offload_param`)."""
    offloads: bool = False
    """Whether gradients go to host memory (`offload_optimizer`)."""
    scatters: bool = True
    """Whether buckets are reduce-scattered rather than all-reduced (`reduce_scatter`)."""
    copies: bool = False
    """Whether collectives work on copies, as gloo's do
    (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, AsyncAllgatherWork, _reduce_scatter_base)."""

    is_partitioned: ClassVar[bool] = True

    def strategy(self, plan: WalkPlan, meter: Meter, program: Program) -> Gathers:
        """For all parameters, with the order of modules known (`forget` forgets it)."""
        anatomy, trace = plan.anatomy, list(program.modules())
        order = _cut(anatomy) if plan.zero_init else anatomy.keys
        owned, leaves = _modules(anatomy, trace)
        return Gathers(
            meter,
            anatomy.numels,
            itemsizes=plan.itemsizes(),
            communication=plan.communication_itemsizes(),
            owned=owned,
            trace=trace,
            order=order,
            settings=self,
            leaves=leaves,
        )


def owners(
    modules: Iterable[ParameterKey], parameters: Iterable[ParameterKey], tied: Mapping[ParameterKey, ParameterKey]
) -> dict[ParameterKey, list[ParameterKey]]:
    """The parameters of each module that is called: its own, and those of modules inside it that
    are not (`nn.MultiheadAttention`).

    `tied`: modules that use another module's parameter.
    """
    called = set(modules)
    owned: dict[ParameterKey, list[ParameterKey]] = {}
    for key in parameters:
        module = key
        while module not in called:
            module = ParameterKey(key.layer, module.name.rpartition(".")[0])
        owned.setdefault(module, []).append(key)
    for module_key, parameter in tied.items():
        owned.setdefault(module_key, []).append(parameter)
    return owned


def _modules(anatomy: Anatomy, trace: Sequence[ParameterKey]) -> tuple[dict[ParameterKey, list[ParameterKey]], Leaves | None]:
    """The parameters of each module that is called, and those that are taken as one with all that
    is in them."""
    if (signature := anatomy.signature) is not None:
        called = {anatomy.key(each.name): [anatomy.key(name) for name in each.parameters] for each in signature.modules}
        modules = {anatomy.key(each.name) for each in signature.modules if each.is_leaf}
        return called, Leaves(modules, trace, anatomy.numels) if modules else None
    tied = {ParameterKey.of(TIED_HEAD): ParameterKey.of(spec.name) for spec in anatomy.parameters if spec.tied}
    return owners(trace, anatomy.numels, tied), None


@functools.lru_cache(maxsize=REMEMBERED)
def _cut(anatomy: Anatomy) -> list[ParameterKey]:
    """The parameters in the order in which `deepspeed.zero.Init` cuts them."""
    modules = [each.name.rpartition(".")[0] for each in anatomy.parameters]
    return [anatomy.keys[index] for index in cut_order(modules) if index is not None]
