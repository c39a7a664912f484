"""What must be replaced in PyTorch and DeepSpeed so that the real engine runs on fake tensors, each
with its reason.

Everything is put back when the world is left. Nothing here changes what DeepSpeed allocates.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, MutableSet
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from bf16prof.dry_run.compiler import not_compiled
from bf16prof.dry_run.hardware.accelerator import StubBuilder
from bf16prof.dry_run.hardware.nvme import FOLDERS, TREES
from bf16prof.dry_run.memo import SERIAL
from bf16prof.dry_run.ranks import replacements
from bf16prof.dry_run.tracker import GPU, Tracker
from bf16prof.dry_run.versions import does_not_fit
from bf16prof.engine.config import SHARED_MEMORY_BUILDER
from bf16prof.scripts.face.around import cpu_autocast

_DATA: Any = torch.Tensor.data

RNG_STATE_BYTES = torch.get_rng_state().numel()

RANK_COMPARISONS = ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks")
"""ZeRO-3's checks that all ranks agree compare what other ranks sent; a fake process group delivers
nothing."""

BUILDERS = "deepspeed.ops.op_builder"
SWAPPING = "deepspeed.runtime.swap_tensor"
NEEDED_BUILDERS = {
    "deepspeed.ops.adam.fused_adam": "FusedAdamBuilder",
    "deepspeed.ops.adam.cpu_adam": "CPUAdamBuilder",
    f"{SWAPPING}.partitioned_optimizer_swapper": "AsyncIOBuilder",
    f"{SWAPPING}.pipelined_optimizer_swapper": "AsyncIOBuilder",
    f"{SWAPPING}.partitioned_param_swapper": "AsyncIOBuilder",
}
"""Where DeepSpeed's compiled operators are asked for, and who must have taken some from there."""

WRITING = ("deepspeed.runtime.zero.stage3", f"{SWAPPING}.optimizer_utils", f"{SWAPPING}.partitioned_param_swapper")
"""Who makes folders for files on NVMe."""

PARTITIONING = "deepspeed.runtime.zero.partition_parameters"

COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"

CHECKPOINTING = "deepspeed.runtime.activation_checkpointing.checkpointing"

GROUPS, ENGINE = "deepspeed.utils.groups", "deepspeed.runtime.engine"
SHARES_LAYERS = "_configure_tensor_parallel_states"
"""Where DeepSpeed's engine makes AutoTP's groups and its check."""

LOSSES, SHARDS_OF_A_HEAD = "deepspeed.sequence.cross_entropy", "_validate_vocab_shard_bounds"

COMPARING_MODULES = tuple(
    f"deepspeed.runtime.zero.{name}"
    for name in ("utils", "partition_parameters", "partitioned_param_coordinator", "parameter_offload", "stage3")
)


@contextlib.contextmanager
def shims(tracker: Tracker, rank: int = 0) -> Iterator[None]:
    """Replace, and put back at the end; `rank` is the one that is run."""
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any, *, create: bool = False) -> None:
            try:
                stack.enter_context(mock.patch.object(owner, name, value, create=create))
            except AttributeError as error:
                raise does_not_fit(f"there is no {name} in {getattr(owner, '__name__', owner)}") from error

        # `nn.Module.to` swaps fake parameters for new objects, which fails where something holds a
        # weak reference to one; the plain way, which real tensors take, works on fake ones as well.
        replace(nn.Module, "_apply", _apply)
        # `parameter.data = tensor` moves a real parameter to the tensor's device; a fake one has to
        # be told.
        replace(FakeTensor, "data", property(_DATA.__get__, _set_data), create=True)
        # DeepSpeed keeps parameters in sets, whose order follows their addresses; a dry run gives
        # the same result every time.
        replace(FakeTensor, "__hash__", _hash)
        # ZeRO-3 waits for a module's parameters in the order of such a set; when it copies them out
        # of gathered buckets follows from it.
        replace(_module(COORDINATOR), "set", InOrder, create=True)
        # The random generator's state is read and written as raw memory, which fake tensors do not
        # have. Checkpointing keeps one per layer.
        for owner in (torch, torch.random):
            replace(owner, "get_rng_state", lambda: torch.empty(RNG_STATE_BYTES, dtype=torch.uint8))
            replace(owner, "set_rng_state", lambda state: None)
        replace(_module(CHECKPOINTING), "_set_cuda_rng_state", lambda state, device=-1: None)
        # A fake tensor made from values remembers them as a real tensor on the host, wherever it
        # was asked for.
        replace(torch, "tensor", _tensor)
        replace(_module(PARTITIONING), "_orig_torch_tensor", _tensor)  # what `zero.Init` calls, and leaves behind
        # A copied tensor stays one of this dry run's; with a copy of the mode each use of it would
        # be a new tensor to the real one.
        replace(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True)
        replace(FakeTensor, "__deepcopy__", _deepcopy, create=True)
        # Streams of the simulated GPU are not PyTorch's.
        replace(FakeTensor, "record_stream", lambda tensor, stream: tracker.use_on_stream(tensor, stream.number), create=True)
        # The simulated GPU's name is no device type to autocast, and a script asks for "cuda".
        replace(torch, "autocast", cpu_autocast())
        # In inference mode PyTorch tells nobody of the parts of an operator (`linear`, attention),
        # and fake tensors fail in views. Without gradients the same bytes are allocated.
        replace(torch._C, "_InferenceMode", _WithoutGradients)
        # Nothing is compiled here; asking for it would import the whole compiler.
        replace(torch, "compile", not_compiled)
        # A distribution checks its parameters by their values.
        replace(torch.distributions.Distribution, "_validate_args", False)
        # DeepSpeed's compiled operators read memory; their Python halves, which allocate an
        # optimizer's states, stay.
        for module, builder in NEEDED_BUILDERS.items():
            replace(_module(module), builder, StubBuilder)
        builders = {name for name in vars(_module(BUILDERS)) if name.endswith("Builder")} - {
            SHARED_MEMORY_BUILDER,
            *NEEDED_BUILDERS.values(),
        }
        for loaded in [module for name, module in sys.modules.items() if name.startswith("deepspeed.ops")]:
            for builder in builders & vars(loaded).keys():
                replace(loaded, builder, StubBuilder)
        # Swappers make folders on NVMe, and empty them: a dry run leaves them alone.
        for module in WRITING:
            replace(_module(module), "os", FOLDERS)
        replace(_module(WRITING[-1]), "shutil", TREES)
        for owner, name, value in replacements(tracker, rank):
            replace(owner, name, value, create=True)
        # AutoTP asks for a mesh, which reads its ranks as values; groups made one by one, its own
        # way out, are the same.
        replace(_module(GROUPS), "_init_tp_mesh_device", _tensor_groups, create=True)
        # It compares the batches of ranks that share layers, in the first forward pass: a dry run's
        # have no values.
        if real := getattr(_module(ENGINE).DeepSpeedEngine, SHARES_LAYERS, None):
            replace(_module(ENGINE).DeepSpeedEngine, SHARES_LAYERS, functools.partialmethod(_without_comparing, real))
        # A head whose rows ranks share asks each of them for its part, which a fake process group
        # does not tell.
        if hasattr(losses := _module(LOSSES), SHARDS_OF_A_HEAD):
            replace(losses, SHARDS_OF_A_HEAD, _shards_of_a_head)
        for module in COMPARING_MODULES:
            for name in RANK_COMPARISONS:
                if hasattr(_module(module), name):
                    replace(_module(module), name, lambda *_, **__: None)
        yield


@contextlib.contextmanager
def library_shims(*, packed: bool = False, padded: bool = False) -> Iterator[None]:
    """Replace in libraries that have been imported with the model; put back at the end.

    `packed`: a row holds several sequences; `padded`: attention masks that are handed to the model
    hide something.
    """
    rows = [*ASKING_FOR_VALUES, *([("transformers.masking_utils", "_ignore_causal_mask_sdpa", _only_without_padding)] if padded else ())]
    with contextlib.ExitStack() as stack:
        for module, name, replacement in rows:
            if hasattr(sys.modules.get(module), name):
                real = getattr(sys.modules[module], name)
                instead = _several_sequences if packed and replacement is _packed_sequences else replacement
                stack.enter_context(mock.patch.object(sys.modules[module], name, functools.partial(instead, real)))
        yield


def _only_without_padding(real: Callable[..., Any], padding_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
    return False if padding_mask is not None else real(padding_mask, *args, **kwargs)


def _several_sequences(real: Callable[..., Any], position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The indices that positions give which start again: as where no values can be looked at."""
    with mock.patch.object(sys.modules[real.__module__], "is_tracing", lambda *_: True):
        return real(position_ids, *args, **kwargs)


def _packed_sequences(real: Callable[..., Any], position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the installed version gives for one sequence a row: it is asked with positions that have
    values.

    Its operators run on the dry run's positions too, for what they allocate. Releases before 5
    always give indices, from which a mask is built in every forward pass; later ones give `None`.
    """
    with _disable_current_modes():
        answer = real(torch.arange(position_ids.shape[-1]).expand(position_ids.shape), *args, **kwargs)
    indices = real(position_ids, *args, **kwargs)
    return None if answer is None else indices


def _without_values(real: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """A table that is computed from its own values, on the host."""
    with _disable_current_modes():
        table = real(*args, **kwargs)
    return torch.empty(table.shape, dtype=table.dtype)


ASKING_FOR_VALUES: tuple[tuple[str, str, Any], ...] = (
    # Transformers takes a model on fake tensors for one that is traced and then builds attention
    # masks that training does without.
    ("transformers.utils.import_utils", "is_fake_tensor", lambda real, tensor: False),
    # It looks at the positions for several sequences in one row. A dry run's positions have no
    # values; they are one sequence's.
    ("transformers.masking_utils", "find_packed_sequence_indices", _packed_sequences),
    # optimi corrects its decay rates by the number of the step, which has no value here.
    ("optimi.adam", "debias_beta", lambda real, beta, step: beta),
    # bitsandbytes makes the table of its 8-bit numbers from lists of values.
    ("bitsandbytes.functional", "create_dynamic_map", _without_values),
)
"""Module, name, and what is called in its place: with what it was, and its arguments."""


def _tensor_groups(tensor_model_parallel_size: int = 1, data_parallel_size: int | None = None) -> Any:
    groups: Any = _module(GROUPS)
    if not hasattr(groups, "_init_tp_groups_with_new_group"):
        raise does_not_fit(f"there is no _init_tp_groups_with_new_group in {GROUPS}")
    if groups._TENSOR_MODEL_PARALLEL_GROUP is None:
        groups._init_tp_groups_with_new_group(tensor_model_parallel_size, data_parallel_size)


def _without_comparing(self: Any, real: Callable[..., Any], model: Any) -> None:
    real(self, model)
    self.first_dataloader_check.remove()


def _shards_of_a_head(own: int, start: int, end: int, group: Any, device: Any) -> int:
    """Rows of all ranks, as if they had as many each; for what that decides, any number above the
    labels does."""
    ranks: int = torch.distributed.get_world_size(group)
    mine = torch.tensor([start, end, own], dtype=torch.long, device=device)
    every = torch.empty(ranks * mine.numel(), dtype=torch.long, device=device)
    torch.distributed.all_gather_into_tensor(every, mine, group=group)
    return max(own * ranks, end)


def _module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise does_not_fit(f"there is no module {name}") from error


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` as it treats parameters whose type does not change."""
    if recurse:
        for child in self.children():
            child._apply(fn)  # type: ignore[no-untyped-call]
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = fn(parameter.data)
            if parameter.grad is not None:
                parameter.grad.data = fn(parameter.grad.data)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            if isinstance(buffer, FakeTensor):
                buffer.constant = None  # one that remembers its value is copied as a real tensor of the host, wherever it should go
            self._buffers[name] = fn(buffer)
    return self


_REAL_TENSOR = torch.tensor


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """`torch.tensor`, without the values where the simulated GPU is asked for."""
    if device is None or torch.device(device) != GPU:
        return _REAL_TENSOR(data, device=device, **kwargs)
    with _disable_current_modes():
        shape = _REAL_TENSOR(data, **kwargs)
    return torch.empty(shape.shape, dtype=shape.dtype, device=GPU, requires_grad=shape.requires_grad)


def _set_data(self: FakeTensor, value: torch.Tensor) -> None:
    _DATA.__set__(self, value)
    if isinstance(value, FakeTensor):
        self.fake_device, self.constant = value.fake_device, None


def _deepcopy(self: FakeTensor, memo: dict[int, Any]) -> Any:
    """A copy of the tensor with all its attributes but the number by which it is hashed."""
    known = id(self) in memo
    copied = torch.Tensor.__deepcopy__(self, memo)  # type: ignore[no-untyped-call]
    if not known:
        copied.__dict__.pop(SERIAL, None)
    return copied


_serials = itertools.count()


def _hash(self: FakeTensor) -> int:
    """A tensor's number among those whose hash was ever asked for."""
    if SERIAL not in self.__dict__:
        self.__dict__[SERIAL] = next(_serials)
    serial: int = self.__dict__[SERIAL]
    return serial


class InOrder(MutableSet[Any]):
    """A set that is walked in the order in which it was filled: for a module's parameters, the
    model's."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self._values = dict.fromkeys(values)

    def __contains__(self, value: object) -> bool:
        return value in self._values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: Any) -> None:
        """Put it at the end, if it is not there."""
        self._values[value] = None

    def discard(self, value: Any) -> None:
        """Take it out, if it is there."""
        self._values.pop(value, None)

    def update(self, values: Iterable[Any]) -> None:
        """Add them all."""
        self._values |= dict.fromkeys(values)


class _WithoutGradients:
    """What `torch.inference_mode` enters, without its marks on tensors; `enabled=False` turns
    gradients on (c10/core/InferenceMode.h)."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled, self._before = enabled, True

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        torch.set_grad_enabled(not self._enabled)

    def __exit__(self, *_: object) -> None:
        torch.set_grad_enabled(self._before)
