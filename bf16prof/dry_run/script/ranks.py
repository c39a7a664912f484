"""The other ranks of a dry-run script, who are not there: whoever asks them hears this rank's
answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh
from torch.utils._python_dispatch import _disable_current_modes

from bf16prof.dry_run.script import known
from bf16prof.dry_run.script.invented import Invented
from bf16prof.scripts.face.callers import asked_from_inside
from bf16prof.scripts.face.module import Row

OTHERS = "other ranks' objects: all have this rank's"


def replacements(invented: Invented, backend: str) -> Iterator[Row]:
    """All that is replaced in `torch.distributed`. `backend` is the one that the script believes
    in."""
    real_group, real_mesh, real_backend = dist.new_group, device_mesh.init_device_mesh, dist.get_backend

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return real_group(*args, **{**kwargs, "backend": None})

    def mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():  # the ranks of a mesh are numbers in a tensor
            return real_mesh("cpu", *args, **kwargs)

    def gathered(object_list: list[Any], obj: Any, group: Any = None) -> None:
        invented.note(OTHERS)
        object_list[:] = [obj] * len(object_list)

    def gathered_at(obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if object_gather_list is not None:
            gathered(object_gather_list, obj)

    def scattered(output: list[Any], given: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if given:
            output[0] = given[dist.get_rank()]

    yield from _reductions()
    yield dist, "init_process_group", _nothing
    yield dist, "destroy_process_group", _nothing
    yield dist, "barrier", _nothing
    yield dist, "monitored_barrier", _nothing
    yield dist, "new_group", new_group
    yield dist, "get_backend", lambda *args: real_backend(*args) if asked_from_inside() else backend
    yield dist, "init_device_mesh", mesh
    yield device_mesh, "init_device_mesh", mesh
    yield dist, "broadcast_object_list", _nothing
    yield dist, "all_gather_object", gathered
    yield dist, "gather_object", gathered_at
    yield dist, "scatter_object_list", scattered


def _reductions() -> Iterator[Row]:
    """Collectives of tensors whose values are known: what all ranks would agree on if they had this
    one's."""
    real_reduce, real_gather, real_into = dist.all_reduce, dist.all_gather, dist.all_gather_into_tensor

    def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        before = known.value(tensor)
        work = real_reduce(tensor, op, group, async_op)
        known.reduced(tensor, before, op, dist.get_world_size(group))
        return work

    def all_gather(tensor_list: list[Any], tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        work = real_gather(tensor_list, tensor, group, async_op)
        known.gathered(tensor_list, known.value(tensor))
        return work

    def all_gather_into_tensor(output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        work = real_into(output_tensor, input_tensor, group, async_op)
        known.gathered_into(output_tensor, known.value(input_tensor))
        return work

    yield dist, "all_reduce", all_reduce
    yield dist, "all_gather", all_gather
    yield dist, "all_gather_into_tensor", all_gather_into_tensor


def _nothing(*_: Any, **__: Any) -> None:
    return None
