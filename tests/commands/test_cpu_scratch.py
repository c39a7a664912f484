"""The table of CPU kernels' scratch against the kernels themselves: each runs under the counting
allocator, in a process of its own.

This file is also that process: `python test_cpu_scratch.py THREADS` prints by case what the
allocator counted beside the operator's outputs, and what the table says for those tensors and for
fake ones.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode

from bf16prof.dry_run.hardware.cpu_scratch import CPU_SCRATCH

pytestmark = pytest.mark.timeout(280)

ATEN, C10D = torch.ops.aten, torch.ops.c10d
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
THREADS = (1, 2)

Arguments = tuple[Any, ...]
Case = tuple[Any, Callable[[], Arguments], dict[str, Any]]
"""An operator, what it is given (made anew for each use), and what it is given by name."""

ARITHMETIC = ("add", "sub", "mul", "div")
IN_PLACE = ("add_", "sub_", "mul_", "div_")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
SUM, MEAN = ATEN.sum.dim_IntList, ATEN.mean.dim
NORM, NORM_BACKWARD = ATEN.native_layer_norm.default, ATEN.native_layer_norm_backward.default
EMBEDDING, EMBEDDING_BACKWARD = ATEN.embedding.default, ATEN.embedding_dense_backward.default
ATTENTION = ATEN._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
MM, ADDMM, BMM = ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default
PRODUCTS = (MM, ADDMM, BMM)
GATHER, SCATTER = C10D._allgather_base_.default, C10D._reduce_scatter_base_.default
GATHER_SEVERAL, SCATTER_SEVERAL = C10D.allgather_into_tensor_coalesced_.default, C10D.reduce_scatter_tensor_coalesced_.default


def some(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(dtype)


half = functools.partial(some, dtype=BF16)


def indices(*, expanded: bool) -> Tensor:
    row = torch.arange(16)
    return row.unsqueeze(0).expand(4, -1) if expanded else row.repeat(4, 1)


def norm_gradient(tensor: Tensor, wanted: list[bool]) -> Arguments:
    weight, bias = torch.ones_like(tensor[0, 0]), torch.zeros_like(tensor[0, 0])
    out, *moments = NORM(tensor, [weight.numel()], weight, bias, 1e-5)
    return out, tensor, [weight.numel()], *moments, weight, bias, wanted


def attention(*shape: int, dtype: torch.dtype = FP32) -> Arguments:
    """Batch, rows, heads, width; heads lie next to each other, as a projection leaves them."""
    return *(some(*shape, dtype=dtype).transpose(1, 2) for _ in range(3)), 0.0, True


def attention_gradient(*shape: int, scattered: bool = False) -> Arguments:
    given = attention(*shape)
    out, sums = ATTENTION(*given)
    return out.contiguous() if scattered else out, *given[:3], out, sums, *given[3:]


CASES: dict[str, Case] = {
    **{f"{name} number": (getattr(ATEN, name).Scalar, lambda: (some(3, 5), 2), {}) for name in (*ARITHMETIC, *IN_PLACE, *COMPARISONS)},
    **{f"{name} double": (getattr(ATEN, name).Scalar, lambda: (some(7, dtype=FP64), 2.5), {}) for name in (*ARITHMETIC, *IN_PLACE)},
    **{f"{name} half": (getattr(ATEN, name).Tensor, lambda: (half(3, 5), 2.5), {}) for name in (*ARITHMETIC, *IN_PLACE)},
    **{f"{name} wider": (getattr(ATEN, name).Tensor, lambda: (half(4, 3, 5), some(5)), {}) for name in (*IN_PLACE, *COMPARISONS)},
    **{f"{name} narrower": (getattr(ATEN, name).Tensor, lambda: (some(3, 5), half(3, 5)), {}) for name in (*ARITHMETIC, *IN_PLACE)},
    **{f"{name} infinity": (getattr(ATEN, name).Scalar, lambda: (half(), float("inf")), {}) for name in COMPARISONS},
    **{f"{name} equal": (getattr(ATEN, name).Tensor, lambda: (half(5), half(5)), {}) for name in COMPARISONS},
    **{f"foreach {name}": (getattr(ATEN, f"_foreach_{name}_").Scalar, lambda: ([some(3), half(4, 7)], 1.5), {}) for name in ARITHMETIC},
    **{f"foreach {name} int": (getattr(ATEN, f"_foreach_{name}_").Scalar, lambda: ([some()], 1), {}) for name in ARITHMETIC},
    "truth": (ATEN.add_.Tensor, lambda: (some(1), some() > 0), {}),
    "pow": (ATEN.pow.Scalar, lambda: (5e5, some(6)), {}),
    "pow half": (ATEN.pow.Scalar, lambda: (2, half(6)), {}),
    "where": (ATEN.where.self, lambda: (some() > 0, some(), some(dtype=FP64)), {}),
    "where half": (ATEN.where.self, lambda: (some(4, 3) > 0, half(3), some(4, 3)), {}),
    "isinf": (ATEN.isinf.default, lambda: (some(7, 3),), {}),
    "isinf double": (ATEN.isinf.default, lambda: (some(dtype=FP64),), {}),
    "sum of one run": (SUM, lambda: (half(16, 4, 32), [0, 1]), {}),
    "sum of two runs": (SUM, lambda: (half(4, 32, 16).permute(2, 0, 1), [0, 1]), {}),
    "sum around a dimension": (SUM, lambda: (some(16, 4, 32, dtype=FP16), [0, 2], True), {}),
    "sum of two runs in fp32": (SUM, lambda: (some(4, 32, 16).permute(2, 0, 1), [0, 1]), {}),
    "sum into fp32": (SUM, lambda: (half(9, 7), [0]), {"dtype": FP32}),
    "mean": (MEAN, lambda: (some(9, 7), [-1], True), {}),
    "mean half": (MEAN, lambda: (half(2, 3, 8, 8), [1]), {}),
    "mean of all": (MEAN, lambda: (some(9, 7, dtype=FP16).t(), []), {}),
    "norm": (NORM_BACKWARD, lambda: norm_gradient(some(4, 8, 24), [True, True, True]), {}),
    "norm half": (NORM_BACKWARD, lambda: norm_gradient(half(4, 8, 30), [True, True, False]), {}),
    "norm without weights": (NORM_BACKWARD, lambda: norm_gradient(some(4, 8, 24), [True, False, False]), {}),
    "norm transposed": (NORM_BACKWARD, lambda: norm_gradient(half(4, 8, 24).transpose(0, 1), [True, True, True]), {}),
    "embedding": (EMBEDDING, lambda: (half(16, 6), indices(expanded=False)), {}),
    "embedding expanded": (EMBEDDING, lambda: (some(16, 6), indices(expanded=True)), {}),
    "embedding gradient": (EMBEDDING_BACKWARD, lambda: (half(4, 16, 6), indices(expanded=True), 16, -1, False), {}),
    "embedding gradient transposed": (
        EMBEDDING_BACKWARD, lambda: (some(16, 4, 6).transpose(0, 1), indices(expanded=False), 16, -1, False), {},
    ),
    "attention": (ATTENTION, lambda: attention(2, 40, 2, 33), {}),
    "attention half": (ATTENTION, lambda: attention(2, 200, 3, 32, dtype=BF16), {}),
    "attention long": (ATTENTION, lambda: attention(1, 800, 2, 16, dtype=FP16), {}),
    "attention gradient": (ATTENTION_BACKWARD, lambda: attention_gradient(2, 40, 2, 33), {}),
    "attention gradient long": (ATTENTION_BACKWARD, lambda: attention_gradient(1, 800, 2, 16), {}),
    "attention gradient scattered": (ATTENTION_BACKWARD, lambda: attention_gradient(2, 200, 3, 32, scattered=True), {}),
    "mm": (MM, lambda: (half(64, 66), half(66, 131)), {}),
    "mm transposed": (MM, lambda: (half(66, 64).t(), half(66, 131)), {}),
    "mm with gaps": (MM, lambda: (half(64, 200)[:, ::2], half(131, 200)[:, 50:150].t()), {}),
    "mm with gaps in fp32": (MM, lambda: (some(64, 200)[:, ::2], some(100, 30)), {}),
    "addmm": (ADDMM, lambda: (half(192), half(512, 96), half(192, 96).t()), {}),
    "addmm small": (ADDMM, lambda: (half(5), half(3, 4), half(4, 5)), {}),
    "addmm expanded": (ADDMM, lambda: (half(80), half(1, 66).expand(64, -1), half(66, 80)), {}),
    "bmm": (BMM, lambda: (half(4, 32, 33), half(4, 32, 33).transpose(1, 2)), {}),
    "bmm of heads": (BMM, lambda: (half(32, 4, 33).transpose(0, 1), half(32, 4, 33).permute(1, 2, 0)), {}),
    "bmm of heads in fp32": (BMM, lambda: (some(32, 4, 33).transpose(0, 1), some(32, 4, 33).permute(1, 2, 0)), {}),
    "bmm expanded": (BMM, lambda: (half(16, 4, 48), half(48, 48).t().expand(16, -1, -1)), {}),
    "gather": (GATHER, lambda: (torch.empty(50), some(50)), {}),
    "gather half": (GATHER, lambda: (half(7), half(7)), {}),
    "scatter": (SCATTER, lambda: (torch.empty(50), some(50)), {}),
    "scatter half": (SCATTER, lambda: (half(7), half(7)), {}),
    "gather several": (GATHER_SEVERAL, lambda: ([torch.empty(50), torch.empty(7)], [some(50), some(7)]), {}),
    "gather several half": (GATHER_SEVERAL, lambda: ([half(7)], [half(7)]), {}),
    "scatter several": (SCATTER_SEVERAL, lambda: ([torch.empty(50), torch.empty(7)], [some(50), some(7)]), {}),
    "scatter several half": (SCATTER_SEVERAL, lambda: ([half(7)], [half(9)[1:8]]), {}),
}  # fmt: skip
FREE = {
    *(f"{name} equal" for name in COMPARISONS), "sum of one run", "sum of two runs in fp32", "norm without weights", "embedding",
    "addmm small", "bmm of heads in fp32",
}  # fmt: skip
"""Cases whose kernels allocate nothing but outputs."""


@functools.cache
def readings(threads: int) -> dict[str, list[int]]:
    """By case: beside the outputs as counted, as the table says, as it says for fake tensors."""
    done = subprocess.run([sys.executable, __file__, str(threads)], capture_output=True, text=True, check=False, timeout=270)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


TO_CHECK = [
    (name, threads) for name, (operator, *_) in CASES.items() for threads in THREADS if operator is not ATTENTION_BACKWARD or threads == 1
]
"""Each thread of attention's backward allocates its row sums when it gets to run, so with several
not always all at once."""


@pytest.mark.parametrize(("name", "threads"), TO_CHECK)
def test_kernels_take_what_the_table_says(name: str, threads: int) -> None:
    operator, *_ = CASES[name]
    if operator in PRODUCTS and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN does not multiply in bf16 on this CPU")
    counted, by_table, for_fake_tensors = readings(threads)[name]

    assert by_table == counted
    assert for_fake_tensors == counted
    assert (counted == 0) == (name in FREE)


def test_every_entry_is_held_against_its_kernel() -> None:
    cases = Counter(operator for operator, *_ in CASES.values())

    assert set(cases) == set(CPU_SCRATCH)
    assert min(cases.values()) >= 2


def test_large_products_are_not_run() -> None:
    with FakeTensorMode():
        assert CPU_SCRATCH[MM](half(2**18, 2**18), half(2**18, 2**18)) == 0
        assert CPU_SCRATCH[MM](half(2**18, 2**19)[:, ::2], half(2**18, 2**18)) == 2**37


def main() -> None:
    """Print the readings of all cases."""
    from bf16prof.measuring.probes.cpu import CpuProbe

    torch.set_num_threads(int(sys.argv[1]))
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    probe = CpuProbe()
    sys.stdout.write(json.dumps({name: reading(probe, *case) for name, case in CASES.items()}))


def reading(probe: Any, operator: Any, make: Callable[[], Arguments], named: dict[str, Any]) -> list[int]:
    given = make()
    by_table = CPU_SCRATCH[operator](*given, **named)
    with FakeTensorMode():
        for_fake_tensors = CPU_SCRATCH[operator](*make(), **named)
    run(operator, given, named)  # a kernel's first call may set something up
    probe.settle()
    probe.take_phase_peak()
    out = run(operator, given, named)
    peak = probe.take_phase_peak()
    probe.settle()
    held = probe.allocated_bytes()
    del out
    return [peak - held, by_table, for_fake_tensors]


def run(operator: Any, given: Arguments, named: dict[str, Any]) -> Any:
    world = dist.group.WORLD
    assert world is not None
    collectives: dict[Any, Callable[..., Any]] = {
        GATHER: dist.all_gather_into_tensor,
        SCATTER: dist.reduce_scatter_tensor,
        GATHER_SEVERAL: lambda *tensors: world.allgather_into_tensor_coalesced(*tensors).wait(),
        SCATTER_SEVERAL: lambda *tensors: world.reduce_scatter_tensor_coalesced(*tensors).wait(),
    }
    return collectives.get(operator, operator)(*given, **named)


if __name__ == "__main__":
    main()
