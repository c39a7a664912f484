"""One operator of PyTorch's own database, on real CPU tensors and in the dry run: what it keeps,
and the highest on the way.

Two readings of each sample:

* the whole sample: bytes kept after the forward pass, after the gradient, and both peaks, really
  and in the dry run;
* every operator below it (`aten.mm.default`, ...): bytes of its outputs and of its scratch memory,
  really and as the dry run says - by shapes and formulas alone, and after asking the kernel. This
  is what says which operator is wrong.

`python census.py NAME...` prints one line of JSON an operator. Each runs in a process of its own
with a limit of time.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from bf16prof.engine.nested import tensors_in

MODULE = "module "
"""Before the name of one of `torch.nn`."""
SAMPLES = 3
AMONG = 13
"""Of the first so many samples that many are taken, the same distance apart: the first ones are
often scalars."""
SECONDS = 40
DTYPES = (torch.float32, torch.bfloat16)

Reading = tuple[int, ...]
"""Bytes kept by forward, the peak of forward, bytes kept by backward, the peak of backward; without
a gradient the first two."""


def names() -> list[str]:
    """Every operator and module that has samples with floating-point tensors, in the order of
    PyTorch's databases."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    return [_name(op) for op in op_db] + [f"{MODULE}{info.name.removeprefix('nn.')}" for info in module_db]


def _name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


class Sample:
    """A function of tensors: the arguments hold all of them, a module's parameters too, so that
    they can be exchanged for fake ones."""

    def __init__(self, run: Callable[..., Any], arguments: Any) -> None:
        self.run, self.arguments = run, arguments

    def leaves(self, arguments: Any) -> list[Tensor]:
        return [each for each in tensors_in(arguments) if each.requires_grad]


def samples(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The first samples of an operator or module."""
    from torch.testing._internal.common_methods_invocations import op_db

    torch.manual_seed(0)
    if name.startswith(MODULE):
        yield from _module_samples(name, dtype)
        return
    op: Any = next(op for op in op_db if _name(op) == name)
    if dtype not in op.supported_dtypes("cpu"):
        return
    trains = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    for sample in _spread(op.sample_inputs("cpu", dtype, requires_grad=trains)):
        yield Sample(lambda given, op=op: op(given[0], *given[1], **given[2]), (sample.input, tuple(sample.args), dict(sample.kwargs)))


def _spread(found: Iterable[Any]) -> Iterator[Any]:
    first = list(itertools.islice(found, AMONG))
    step = max(1, len(first) // SAMPLES)
    yield from first[::-step][:SAMPLES]


def _module_samples(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if MODULE + info.name.removeprefix("nn.") == name)
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    for given in _spread([each for each in inputs if each.forward_input is not None]):
        made = given.constructor_input
        module = info.module_cls(*made.args, **made.kwargs).to(dtype)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        forward = given.forward_input
        yield Sample(
            lambda all_, module=module: torch.func.functional_call(module, all_[0], all_[1], all_[2]),
            (state, tuple(forward.args), dict(forward.kwargs)),
        )


def exchange(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with other tensors."""
    if isinstance(value, Tensor):
        return make(value)
    if isinstance(value, dict):
        return {key: exchange(each, make) for key, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [exchange(each, make) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def reading(sample: Sample, arguments: Any, read: Callable[[], int], peak: Callable[[], int]) -> Reading:
    """Forward, and the gradient of all outputs."""
    leaves = sample.leaves(arguments)
    peak()
    start = read()
    out = sample.run(arguments)
    found = [read() - start, peak() - start]
    outs = [each for each in tensors_in(out) if each.requires_grad and each.dtype.is_floating_point]
    if outs and leaves:
        seeds = [torch.ones_like(each) for each in outs]
        peak()
        start = read()
        grads = torch.autograd.grad(outs, leaves, seeds, allow_unused=True)
        found += [read() - start, peak() - start]
        del grads, seeds
    del out, outs
    return tuple(found)


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Holds every operator below a sample against what the dry run says of it."""

    def __init__(self, probe: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from bf16prof.dry_run.hardware.devices import bare_cpu_kernels, cpu_kernels

        self._probe, self._bare, self._asking = probe, bare_cpu_kernels(), cpu_kernels(asks_all=True)
        self.found: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        said = [self._said(kernels, func, args, kwargs) for kernels in (self._bare, self._asking)]
        known = {each.untyped_storage()._cdata for each in tensors_in((args, kwargs))}
        self._probe.take_phase_peak()
        start = self._probe.allocated_bytes()
        out = func(*args, **kwargs)
        peak, end = self._probe.take_phase_peak() - start, self._probe.allocated_bytes() - start
        row = self.found.setdefault(str(func), {"calls": 0, "wrong": 0, "wrong when asked": 0, "worst": None})
        row["calls"] += 1
        really = [held(out, known), max(0, peak - end)]
        row["wrong"] += said[0] != really
        row["wrong when asked"] += said[1] != really
        if said[0] != really and (row["worst"] is None or _distance(said[0], really) > _distance(*row["worst"][:2])):
            row["worst"] = [said[0], really, said[1]]
        return out

    def _said(self, kernels: Any, func: Any, args: Any, kwargs: Any) -> list[int] | None:
        """Bytes of new storages, and of scratch memory; `None` where fake tensors cannot run it."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        made: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = mode.from_tensor(tensor.detach())
            return made[id(tensor)]

        try:
            given, named = exchange(args, fake), exchange(kwargs, fake)
            known = {each.untyped_storage()._cdata for each in made.values()}
            with mode:
                out = func(*given, **named)
            scratch = kernels.finish(func, given, named, out)
            return [held(out, known), scratch]
        except Exception:  # noqa: BLE001 - of a database of 600 operators, any may be refused for any reason
            return None


def _distance(said: Sequence[int] | None, really: Sequence[int]) -> int:
    return sum(abs(a - b) for a, b in zip(said, really, strict=True)) if said is not None else -1


def held(out: Any, known: set[int]) -> int:
    """Bytes of the storages of outputs that are not those of inputs."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors_in(out)}
    return sum(size for key, size in storages.items() if key not in known)


def census(name: str, probe: Any, *, asks_all: bool = False) -> dict[str, Any]:
    """All readings of one operator, in this process, which must do nothing else afterwards.

    `asks_all`: as the dry run would do if nothing were known of any operator.
    """
    from bf16prof.dry_run.hardware.devices import cpu_kernels
    from bf16prof.dry_run.world import world

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _leave_random_state_alone()
    calls = Calls(probe)
    rows: list[dict[str, Any]] = []
    taken: list[Sample] = []
    for dtype in DTYPES:
        for index, sample in enumerate(samples(name, dtype)):
            try:
                reading(
                    sample, sample.arguments, probe.allocated_bytes, probe.take_phase_peak
                )  # a kernel's first call may set something up
                real = reading(sample, sample.arguments, probe.allocated_bytes, probe.take_phase_peak)
                with calls:
                    reading(sample, sample.arguments, lambda: 0, lambda: 0)
            except Exception as error:  # noqa: BLE001
                rows.append({"sample": index, "dtype": str(dtype), "error": _said_by(error)})
                continue
            rows.append({"sample": index, "dtype": str(dtype), "real": real})
            taken.append(sample)
    with world(1, None) as tracker:
        torch.set_num_threads(1)
        if asks_all:
            tracker.use_kernels(cpu_kernels(asks_all=True))
        for row, sample in zip([row for row in rows if "real" in row], taken, strict=True):
            try:
                row["dry"] = _dry(sample, tracker)
            except Exception as error:  # noqa: BLE001
                row["error"] = _said_by(error)
    return {"name": name, "samples": rows, "operators": calls.found}


def _leave_random_state_alone() -> None:
    """Samples of random operators save the generator's state around each call, which is no memory
    of the operator."""
    for module in [each for key, each in sys.modules.items() if key.startswith("torch.testing.")]:
        if hasattr(module, "freeze_rng_state"):
            module.freeze_rng_state = contextlib.nullcontext  # type: ignore[attr-defined]


def _dry(sample: Sample, tracker: Any) -> Reading:
    mode = next(each for each in _get_current_dispatch_mode_stack() if isinstance(each, FakeTensorMode))
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with _disable_current_modes():
                made[id(tensor)] = mode.from_tensor(tensor)
        return made[id(tensor)]

    arguments = exchange(sample.arguments, fake)
    tracker.enter_given(made.values())
    return reading(sample, arguments, tracker.ledger.allocated_bytes, tracker.ledger.take_phase_peak)


def _said_by(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def run(chosen: Sequence[str], seconds: float = SECONDS, *, asks_all: bool = False) -> Iterator[dict[str, Any]]:
    """The readings of these operators, one process each; one that takes too long, or dies, says
    so."""
    import bf16prof.dry_run.world  # noqa: F401 - what the forks will not have to import again
    from bf16prof.measuring.probes.cpu import CpuProbe

    names()
    probe = CpuProbe()
    context = multiprocessing.get_context("fork")
    for name in chosen:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(name, probe, asks_all, theirs))
        process.start()
        theirs.close()
        try:
            found = mine.recv() if mine.poll(seconds) else _nothing(name, f"not done in {seconds:g} s")
        except EOFError:
            found = _nothing(name, "the process died")
        process.kill()
        process.join()
        yield found


def _nothing(name: str, why: str) -> dict[str, Any]:
    return {"name": name, "samples": [], "operators": {}, "error": why}


def _answer(name: str, probe: Any, asks_all: bool, pipe: Any) -> None:
    try:
        pipe.send(census(name, probe, asks_all=asks_all))
    except Exception as error:  # noqa: BLE001
        pipe.send(_nothing(name, _said_by(error)))


def main() -> None:
    gc.freeze()  # what has been imported is no garbage
    chosen = sys.argv[1:]
    for found in run([name for name in chosen if name != "--ask"] or names(), asks_all="--ask" in chosen):
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
