"""What kernels hold beyond shapes: losses that keep a whole storage, recurrent layers, and notes
about what is not known."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from bf16prof.dry_run.hardware.asking import Oracle, UnequalDtypes
from bf16prof.dry_run.hardware.cuda_operators import register_cuda_operators
from bf16prof.dry_run.hardware.devices import bare_cpu_kernels, cpu_kernels, cuda_kernels
from bf16prof.dry_run.hardware.kernels import Kernels
from bf16prof.dry_run.hardware.registry import Entry, OperatorState, Registry, cpu_registry, cuda_registry
from bf16prof.dry_run.ledger import Ledger
from bf16prof.dry_run.tracker import GPU, HOST, Tracker, scalar_answer
from bf16prof.kernels import norm_partial_sums
from bf16prof.profiles.gpus import find_gpu
from bf16prof.reductions import Processor

ATEN = torch.ops.aten
H100 = find_gpu("h100-80gb")
LOSSES = ("mse_loss", "smooth_l1_loss", "soft_margin_loss", "huber_loss", "l1_loss", "binary_cross_entropy")


@pytest.fixture
def cpu() -> Iterator[Tracker]:
    with FakeTensorMode(), Tracker(Ledger(), HOST, cpu_kernels()) as tracker:
        yield tracker


@pytest.fixture
def gpu() -> Iterator[Tracker]:
    library = register_cuda_operators(H100.compute_capability)
    with FakeTensorMode(), Tracker(Ledger(), GPU, cuda_kernels(H100)) as tracker:
        yield tracker
    library._destroy()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_holds_the_storage_that_the_real_one_holds(name: str, reduction: str) -> None:
    """The real loss is asked, on real tensors; the storage's size follows from how it is computed,
    on a GPU as on a CPU."""
    loss = getattr(functional, name)
    real = loss(torch.rand(6, 7), torch.rand(6, 7), reduction=reduction).untyped_storage().nbytes()
    with FakeTensorMode(), Tracker(Ledger(), GPU, cuda_kernels(H100)):
        given = [torch.empty(6, 7, device=GPU) for _ in range(2)]
        assert loss(*given, reduction=reduction).untyped_storage().nbytes() == real


def test_a_layer_that_is_asked_keeps_its_workspace(cpu: Tracker) -> None:
    layer = nn.LSTM(8, 16, batch_first=True)
    given = torch.empty(3, 5, 8)
    before = cpu.ledger.allocated_bytes()
    out = layer(given)
    kept = cpu.ledger.allocated_bytes() - before
    assert kept > 4 * 16 * 3 * 5 * 4, "four gates a step in fp32, at least"
    del out
    assert cpu.lower_bounds() == []


@pytest.mark.parametrize(("kind", "least"), [("LSTM", 5), ("GRU", 4), ("RNN", 1)])
def test_cudnn_keeps_a_reserve_and_the_record_says_that_more_is_not_known(gpu: Tracker, kind: str, least: int) -> None:
    layer = getattr(nn, kind)(8, 16, num_layers=2, batch_first=True, device=GPU)
    given = torch.empty(3, 5, 8, device=GPU, requires_grad=True)
    before = gpu.ledger.allocated_bytes()
    out = layer(given)
    assert gpu.ledger.allocated_bytes() - before >= 2 * least * 16 * 3 * 5 * 4
    out[0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.device == GPU for parameter in layer.parameters())
    assert any(line.startswith("memory of _cudnn_rnn is a lower bound: ") for line in gpu.lower_bounds())


def test_without_a_gradient_nothing_is_reserved(gpu: Tracker) -> None:
    layer = nn.LSTM(8, 16, device=GPU).eval()
    with torch.no_grad():
        given = torch.empty(5, 3, 8, device=GPU)
        before = gpu.ledger.allocated_bytes()
        out = layer(given)
        assert gpu.ledger.allocated_bytes() - before == sum(each.nbytes for each in (out[0], *out[1]))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_a_cell_runs_as_one_kernel_on_a_gpu(gpu: Tracker, kind: str) -> None:
    cell = getattr(nn, kind)(8, 16, device=GPU)
    out = cell(torch.empty(3, 8, device=GPU, requires_grad=True))
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert gpu.lower_bounds() == []


def test_a_convolution_on_a_gpu_is_a_lower_bound(gpu: Tracker) -> None:
    nn.Conv2d(3, 4, 3, device=GPU)(torch.empty(1, 3, 8, 8, device=GPU))
    assert [line.split()[2] for line in gpu.lower_bounds()] == ["convolution"]


def test_an_operator_that_nobody_looked_at_is_named(gpu: Tracker) -> None:
    torch.linalg.qr(torch.empty(4, 4, device=GPU))
    assert any("linalg_qr is a lower bound: nobody" in line for line in gpu.lower_bounds())


def test_usual_operators_say_nothing(gpu: Tracker) -> None:
    layer = nn.Sequential(nn.Linear(8, 8, device=GPU), nn.LayerNorm(8, device=GPU), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 5, device=GPU))
    out = layer(torch.empty(6, 8, device=GPU))
    functional.cross_entropy(out, torch.empty(6, dtype=torch.int64, device=GPU)).backward()  # type: ignore[no-untyped-call]
    assert gpu.lower_bounds() == []


def test_a_listed_operator_is_named_even_where_it_has_a_formula() -> None:
    registry = Registry({"mm": Entry(OperatorState.LOWER_BOUND, reason="for the test")}, "not seen")
    kernels = Kernels({ATEN.mm.default: lambda *_: 7}, registry, {})
    with FakeTensorMode():
        given = torch.empty(2, 2), torch.empty(2, 2)
        assert kernels.finish(ATEN.mm.default, given, {}, ATEN.mm.default(*given)) == 7
    assert kernels.lower_bounds == {"mm": "for the test"}


def test_views_take_nothing_and_are_not_named() -> None:
    kernels = bare_cpu_kernels()
    with FakeTensorMode():
        given = torch.empty(2, 6)
        kernels.finish(ATEN.view.default, (given, [3, 4]), {}, ATEN.view.default(given, [3, 4]))
    assert kernels.lower_bounds == {}


def test_the_oracle_runs_a_kernel_once_and_no_large_ones() -> None:
    oracle = Oracle()
    with FakeTensorMode():
        small, large = torch.empty(1, 3, 8, 8), torch.empty(1 << 20, 3, 8, 8)
        weight = torch.empty(4, 3, 3, 3)
    options: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    first = oracle.reply(ATEN.convolution.default, (small, weight, None, *options), {})
    assert first is not None
    assert first.outputs[0] is not None
    assert first.outputs[0].shape == (1, 4, 6, 6)
    assert oracle.reply(ATEN.convolution.default, (small, weight, None, *options), {}) is first
    assert oracle.reply(ATEN.convolution.default, (large, weight, None, *options), {}) is None


def norm(parameters: torch.dtype, statistics: torch.dtype) -> nn.BatchNorm1d:
    """A batch norm whose buffers DeepSpeed has left as they are."""
    made = nn.BatchNorm1d(6, dtype=parameters)
    for name, buffer in made.named_buffers():
        setattr(made, name, buffer.to(statistics))
    return made


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("statistics", [torch.bfloat16, torch.float32])
def test_dtypes_are_refused_where_the_real_kernel_refuses_them(parameters: torch.dtype, statistics: torch.dtype, cpu: Tracker) -> None:
    def given() -> Tensor:
        return torch.zeros(4, 6, dtype=torch.bfloat16)

    with torch.utils._python_dispatch._disable_current_modes():
        try:
            norm(parameters, statistics)(given())
            real = ""
        except RuntimeError as error:
            real = str(error)
    try:
        norm(parameters, statistics)(given())
        dry = ""
    except UnequalDtypes as error:
        dry = str(error)

    assert dry == (real and f"native_batch_norm on a CPU: {real}")


def test_what_a_kernel_keeps_has_the_dtype_that_the_real_one_has(cpu: Tracker) -> None:
    kept = ATEN.native_batch_norm.default(torch.zeros(4, 6, dtype=torch.bfloat16), *[torch.zeros(6)] * 4, True, 0.1, 1e-5)
    with torch.utils._python_dispatch._disable_current_modes():
        real = ATEN.native_batch_norm.default(torch.zeros(4, 6, dtype=torch.bfloat16), *[torch.zeros(6)] * 4, True, 0.1, 1e-5)
    assert [each.dtype for each in kept] == [each.dtype for each in real]


def test_entries_are_found_by_overload_by_name_and_in_place() -> None:
    registry = Registry({"add": Entry(OperatorState.READ), "mul.Tensor": Entry(OperatorState.READ)}, "not seen")
    assert registry.is_exact(ATEN.add.Tensor)
    assert registry.is_exact(ATEN.add_.Scalar)
    assert registry.is_exact(ATEN.mul.Tensor)
    assert not registry.is_exact(ATEN.mul.Scalar)
    assert not registry.is_exact(ATEN.mm.default)
    assert registry.reason(ATEN.mm.default) == "not seen"


def test_every_entry_names_an_operator_of_pytorch() -> None:
    importlib.import_module("bitsandbytes")
    names = {schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas()}
    entries = {entry.partition(".")[0] for registry in (cpu_registry(), cuda_registry()) for entry in registry.entries}
    assert {entry for entry in entries if {entry, f"{entry}_"}.isdisjoint(names)} <= {"torch_nn"}


def test_every_entry_for_cuda_has_a_source_and_a_lower_bound_has_a_reason() -> None:
    registry = cuda_registry()
    for entry in [*registry.entries.values(), *registry.tags.values()]:
        assert entry.source
        assert entry.state is not OperatorState.MEASURED or entry.confirmed_by
        assert entry.state is not OperatorState.LOWER_BOUND or entry.reason


def test_every_operator_of_the_cuda_model_is_in_the_registry() -> None:
    from bf16prof.dry_run.hardware.cuda_operators import cuda_scratch
    from bf16prof.dry_run.hardware.storages import STORAGES

    registry = cuda_registry()
    assert [str(operator) for operator in {*cuda_scratch(Processor(108, 2048)), *STORAGES} if registry.entry(operator) is None] == []


@pytest.mark.parametrize(("multiprocessors", "widest"), [(108, 1727), (132, 2111), (84, 1343)])
def test_norms_split_their_rows_by_the_gpus_multiprocessors(multiprocessors: int, widest: int) -> None:
    """cuda/layer_norm_kernel.cu: `N / warp_size < multi_processor_count / 2` for the width N, and
    more than 64 Ki rows."""
    rows = 64 * 1024 + 1
    assert norm_partial_sums(rows, widest, 2, multiprocessors) > 0
    assert norm_partial_sums(rows, widest + 1, 2, multiprocessors) == 0
    assert norm_partial_sums(rows - 1, widest, 2, multiprocessors) == 0


# ---- Numbers that nobody has


def test_answers_follow_from_each_other(cpu: Tracker) -> None:
    norm, flags = torch.empty(()), torch.empty(5, dtype=torch.bool)
    assert norm > 0
    assert norm != float("inf")
    assert not torch.isnan(norm)
    assert flags.all()
    assert flags.sum() == flags.numel()
    assert not flags.any()
    assert not torch.isinf(norm).any()
    assert 0 < norm.item() < 1


def test_a_plain_tensor_has_no_answer_of_its_own() -> None:
    with FakeTensorMode():
        assert scalar_answer(torch.empty(())) == 0.5
        assert scalar_answer(torch.empty((), dtype=torch.int64)) == 0
        assert scalar_answer(torch.empty((), dtype=torch.bool)) is False


@pytest.mark.parametrize("run", [
    lambda x: x.index_select(0, torch.zeros(3, dtype=torch.int64, device=x.device)),
    lambda x: x.gather(0, torch.zeros(2, 64, dtype=torch.int64, device=x.device)),
    lambda x: x.max(dim=0).values,
])  # fmt: skip
def test_derivatives_fill_fresh_zeros_in_place(cpu: Tracker, run: Any) -> None:
    """As on real tensors: one tensor of the input's size beside its gradient would be what a
    subclass gets."""
    x: Tensor = torch.empty(32, 64, requires_grad=True)
    out = run(x)
    seed = torch.empty_like(out)
    cpu.ledger.take_phase_peak()
    before = cpu.ledger.allocated_bytes()
    torch.autograd.grad(out, x, seed)
    assert cpu.ledger.take_phase_peak() - before == x.nbytes
