"""Sees every storage that the dry run allocates, and tells the ledger when it begins and when it
ends.

A dispatch mode looks at each operator's outputs and enters the storages it has not seen; a weak
reference tells when one is gone. Fake tensors own storages without memory, so sizes, sharing and
lifetimes are those of the real thing.

The host is `cpu`; the simulated GPU is `cpu:0`. To PyTorch both are CPUs, so that autograd runs
without a driver, yet they are different devices: fake tensors refuse to mix them, and copies
between them allocate, as between a host and a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bf16prof.bounds import bound_note
from bf16prof.dry_run.accumulation import InPlaceSums
from bf16prof.dry_run.hardware.asking import UnequalDtypes, outputs_of
from bf16prof.dry_run.labels import Labels
from bf16prof.dry_run.ledger import Allocation, Ledger
from bf16prof.dry_run.memo import Memo
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.vocabulary import Component, Label, Phase

GPU = torch.device("cpu", 0)
HOST = torch.device("cpu")

_ATEN = torch.ops.aten

DEVICE_OF = torch.ops.prim.device.default
ITEM = torch.ops.aten._local_scalar_dense.default
MATRIX_PRODUCTS = frozenset({
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default,
    torch.ops.aten.addmv.default, torch.ops.aten.mv.default, torch.ops.aten.dot.default,
})  # fmt: skip
"""Operators that cuBLAS computes."""


VALUES: dict[Any, Callable[..., Any]] = {
    **{
        getattr(getattr(_ATEN, name), kind): getattr(operator, name)
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("Scalar", "Tensor")
    },
    _ATEN.logical_not.default: operator.not_,
    _ATEN.bitwise_not.default: operator.not_,
    **dict.fromkeys(
        (_ATEN.mul.Tensor, _ATEN.bitwise_and.Tensor, _ATEN.logical_and.default),
        lambda a, b, **_: a and b if isinstance(a, bool) and isinstance(b, bool) else None,
    ),
    _ATEN.all.default: lambda _: True,
    _ATEN.sum.default: lambda summed, **_: summed.numel() if isinstance(summed, Tensor) and summed.dtype is torch.bool else None,
}
"""What a single number or truth is, by the operator that makes it; `None` where nothing follows. A
comparison follows from its numbers: DeepSpeed asserts that a norm is positive; `isfinite`
multiplies two. All elements are what is hoped of them - every token counts, every number is finite
- and are counted as many as there are, while `any` finds none that is not."""

VALUE = "_bf16prof_value"

ZEROS = frozenset({_ATEN.new_zeros.default, _ATEN.zeros.default, _ATEN.zeros_like.default})
ACCUMULATING = frozenset({
    _ATEN.index_add.default, _ATEN.index_put.default, _ATEN.index_fill.int_Scalar, _ATEN.index_fill.int_Tensor,
    _ATEN.scatter.src, _ATEN.scatter.value, _ATEN.scatter_add.default, _ATEN.masked_scatter.default,
})  # fmt: skip
"""Derivatives fill fresh zeros with these. On tensors of a subclass, and under any mode, autograd
takes them out of place (`areAnyTensorSubclassLike` in torch/csrc/autograd/FunctionsManual.cpp);
real ranks fill the zeros themselves."""


_C10D = torch.ops.c10d

COALESCED: dict[Any, Callable[..., Any]] = {
    _C10D.allreduce_coalesced_.default: lambda tensors, group, by, *_: _C10D.allreduce_(tensors, group, by, None),
    _C10D.allgather_into_tensor_coalesced_.default: lambda out, given, group, *_: _C10D._allgather_base_(out[0], given[0], group),
    _C10D.reduce_scatter_tensor_coalesced_.default: lambda out, given, group, by, *_: _C10D._reduce_scatter_base_(
        out[0], given[0], group, by
    ),
}
"""Collectives of several tensors, which fake tensors do not know, by those of one, which they
do."""


class KernelModel(Protocol):
    """What kernels do beyond the shapes of their outputs (`hardware.kernels`)."""

    lower_bounds: dict[str, str]

    def finish(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
        """Give the outputs of a call the storages that the kernel gives them; the bytes of its
        scratch memory."""


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Feeds a ledger.

    `home` is the simulated GPU, or the host for CPU ranks, which have one memory; what is elsewhere
    counts as host memory. `cublas_workspace` bytes are allocated by the first matrix product of
    each thread: the one that runs forward, and autograd's own.
    """

    def __init__(self, ledger: Ledger, home: torch.device, kernels: KernelModel, cublas_workspace: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.host_bytes = 0
        self._pieces = 1
        self._home = home
        self._kernels = kernels
        self._workspace = cublas_workspace
        self._threads: set[bool] = set()
        self._live: dict[int, tuple[weakref.ref[Any], Allocation | None]] = {}
        self._labels = Labels()
        self._memo = Memo()
        self._sums = InPlaceSums()
        self._work: Any = None
        self._zeros = 0
        self.watch: Callable[[Any, Any, Any, Any], None] | None = None
        """Told of every operator that has run, with its arguments and what it gave."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and the guard against it costs more than most operators here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and look at what it gave."""
        if self._sums.see(func, args):
            return args[0]
        if func is DEVICE_OF:
            return args[0].fake_device
        if func is ITEM:
            return scalar_answer(args[0])
        kwargs = kwargs or {}
        if func in MATRIX_PRODUCTS:
            _require_one_dtype(args)
            if self._workspace:
                self._use_cublas()
        question = self._memo.question(func, args, kwargs) if func not in ACCUMULATING else None
        if question is not None and (known := self._memo.recall(question)):
            out, fresh, scratch = known
            self._see_all(func, fresh)
        else:
            self._see_all(func, (each for each in args if not isinstance(each, FakeTensor)))
            out = self._run(func, args, kwargs)
            scratch = self._kernels.finish(func, args, kwargs, out)
            if question is not None:
                self._memo.learn(question, out, scratch)
            if func._schema.is_mutable and any(not isinstance(each, FakeTensor) for each in written(func, args, kwargs)):
                copies = [each for each in outputs_of(out) if isinstance(each, Tensor)]
                self.leave_out(copies)  # fake ones of the real tensor, which is counted
            self._see_all(func, out if isinstance(out, tuple | list) else (out,))
        if func in VALUES and out.dim() == 0:
            out.__dict__[VALUE] = VALUES[func](*map(_value, args), **kwargs)
        in_backward = torch._C._current_graph_task_id() != -1
        self._zeros = out.untyped_storage()._cdata if in_backward and func in ZEROS else 0
        if scratch:
            self.ledger.touch(scratch, scratch_label(func))
        if self.watch is not None:
            self.watch(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        if func in ACCUMULATING and self._zeros == args[0].untyped_storage()._cdata:
            return _ATEN.alias.default(args[0])
        return func(*args, **kwargs)

    def use_kernels(self, kernels: KernelModel) -> None:
        """Ask these kernels from now on."""
        self._kernels = kernels

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors, which are in nobody's allocator."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            gone = functools.partial(self._forget, storage._cdata)
            self._live.setdefault(storage._cdata, (weakref.ref(storage, gone), None))

    def is_left_out(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is in nobody's allocator."""
        known = self._live.get(tensor.untyped_storage()._cdata)
        return known is not None and known[1] is None

    def _forget(self, key: int, _: Any) -> None:
        self._live.pop(key, None)

    def lower_bounds(self) -> list[str]:
        """A line for every operator that met the tracker and whose memory is not fully known."""
        return [bound_note(name, reason) for name, reason in sorted(self._kernels.lower_bounds.items())]

    def enter_given(self, tensors: Iterable[Tensor]) -> None:
        """Enter the storages of tensors that no operator of this run made."""
        self._see_all(None, tensors)

    def claim(self, tensors: Iterable[tuple[Label, Tensor]]) -> None:
        """Label the storages of these tensors; the first claim to a storage counts."""
        self.ledger.relabel(self._claims(tensors))

    @contextlib.contextmanager
    def in_pieces(self, count: int) -> Iterator[None]:
        """Inside, a new storage stands for so many equal ones, allocated one after the other, that
        end together."""
        self._pieces = count
        try:
            yield
        finally:
            self._pieces = 1

    def index_of(self, tensor: Tensor) -> int | None:
        """The number of the tensor's storage in the ledger; `None` of one that is not on the
        device."""
        known = None if tensor.device.type == "meta" else self._live.get(tensor.untyped_storage()._cdata)
        return None if known is None or known[1] is None else self.ledger.held_by(known[1]).index

    def use_on_stream(self, tensor: Tensor, stream: int) -> None:
        """`Tensor.record_stream`."""
        known = self._live.get(tensor.untyped_storage()._cdata)
        if known is not None and known[1] is not None:
            self.ledger.use_on_stream(known[1], stream)

    def _claims(self, tensors: Iterable[tuple[Label, Tensor]]) -> Iterator[tuple[Allocation, Label]]:
        claimed: set[int] = set()
        for label, tensor in tensors:
            key = 0 if tensor.device.type == "meta" else tensor.untyped_storage()._cdata
            if key not in claimed and (known := self._live.get(key)) and known[1] is not None:
                claimed.add(key)
                yield known[1], label

    def _use_cublas(self) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward not in self._threads:
            self._threads.add(in_backward)
            self.ledger.begin(self._workspace, CUBLAS_WORKSPACES)

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A collective of the fake process group: it moves nothing, gives its first argument back,
        and its work is done at once."""
        returns = len(func._schema.returns)
        if self._work is not None and returns:
            return (args[0], self._work) if returns == 2 else self._work
        if func in COALESCED:
            _, self._work = COALESCED[func](*args, **kwargs)
            return self._work
        out = func(*args, **kwargs)
        if returns == 2 and _same(out[0], args[0]):
            self._work = out[1]
        return out

    def _see_all(self, func: Any, values: Iterable[Any]) -> None:
        """Enter the storages of those values that are tensors, unless they are known or have no
        memory (`meta`)."""
        for tensor in values:
            if not isinstance(tensor, Tensor):
                continue
            device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
            if device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live:
                continue
            size = storage.nbytes()
            if device == self._home:
                allocation = self.ledger.begin(size // self._pieces, self._labels.label(func, self._phase()), self._pieces)
                self._live[key] = weakref.ref(storage, self._end(key, allocation)), allocation
            else:
                self.host_bytes += size
                self._live[key] = weakref.ref(storage, self._end_on_host(key, size)), None

    def _phase(self) -> Phase | None:
        return self.ledger.marks[-1].phase if self.ledger.marks else None

    def _end(self, key: int, allocation: Allocation) -> Callable[[Any], None]:
        live, end = self._live, self.ledger.end

        def gone(_: Any) -> None:
            live.pop(key, None)
            end(allocation)

        return gone

    def _end_on_host(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self._live.pop(key, None)
            self.host_bytes -= size

        return gone


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a call that the operator writes into."""
    into = [(place, each.name) for place, each in enumerate(func._schema.arguments) if each.alias_info and each.alias_info.is_write]
    given = [args[place] if place < len(args) else kwargs.get(name) for place, name in into]
    return [tensor for each in given for tensor in (each if isinstance(each, tuple | list) else (each,)) if isinstance(tensor, Tensor)]


def scratch_label(operator: Any) -> Label:
    """What the scratch of an operator's kernel is called."""
    return Component.WORKSPACE, f"scratch of {operator._schema.name.partition('::')[2]}"


def _same(out: Any, given: Any) -> bool:
    return out is given or (isinstance(out, list) and len(out) == len(given) and all(a is b for a, b in zip(out, given, strict=True)))


def _require_one_dtype(args: Any) -> None:
    dtypes = {each.dtype for each in args if isinstance(each, Tensor)}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UnequalDtypes(f"a matrix product of {names}")


def _value(operand: Any) -> Any:
    return scalar_answer(operand) if isinstance(operand, Tensor) and operand.dim() == 0 else operand


def scalar_answer(tensor: Tensor) -> float | int | bool:
    """What `.item()` gives where there are no values: what follows for this one (`VALUES`), else no
    overflow, and a number between 0 and 1, since optimizers divide by such a number and by what is
    left of 1."""
    value = tensor.__dict__.get(VALUE)
    if value is None and isinstance(tensor, FakeTensor) and tensor.constant is not None:  # it was made of numbers, of the host
        with _disable_current_modes():
            value = tensor.constant.item()
    if value is not None:
        answer: float | int | bool = value
        return answer
    if tensor.dtype is torch.bool:
        return False
    return 0.5 if tensor.dtype.is_floating_point else 0
