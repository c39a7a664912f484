"""What operators on the simulated GPU keep and allocate, against what PyTorch's CUDA kernels keep
and allocate.

The numbers are worked out from the sources that `docs/cuda-operators.md` names; where PyTorch
itself can say what CUDA does without a GPU, a fake `cuda` tensor is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from bf16prof.dry_run.hardware.cuda_operators import cuda_optimizers, cuda_scratch, register_cuda_operators
from bf16prof.dry_run.hardware.cuda_operators.attention import Backend, Call, choose
from bf16prof.dry_run.tracker import GPU, HOST
from bf16prof.reductions import Processor

CUDA = torch.device("cuda", 0)
AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

BLOCK = 512
CUDA_SCRATCH = cuda_scratch(Processor(108, 2048))


def blocks(size: int) -> int:
    """As the caching allocator rounds."""
    return -(-size // BLOCK) * BLOCK


Kept = list[tuple[tuple[int, ...], torch.dtype]]


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.fixture
def ampere() -> Iterator[None]:
    library = register_cuda_operators(AMPERE)
    yield
    library._destroy()  # type: ignore[no-untyped-call]


@pytest.fixture
def hopper() -> Iterator[None]:
    library = register_cuda_operators(HOPPER)
    yield
    library._destroy()  # type: ignore[no-untyped-call]


def tensor(*shape: int, dtype: torch.dtype = BF16, device: torch.device = GPU, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, requires_grad=grad and dtype.is_floating_point)


def kept(run: Callable[[], Tensor]) -> Kept:
    """Shapes and types that autograd keeps for the backward pass, which must then run on the right
    device."""
    saved: Kept = []

    def pack(each: Tensor) -> Tensor:
        saved.append((tuple(each.shape), each.dtype))
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        out = run()
    out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]
    return sorted(saved, key=str)


def expected(*tensors: tuple[tuple[int, ...], torch.dtype]) -> Kept:
    return sorted(tensors, key=str)


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that reach the kernels, with the shapes and types of their outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, Kept]] = []
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # an optimizer reads its count of steps
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            outputs = [each for each in (out if isinstance(out, tuple | list) else (out,)) if isinstance(each, Tensor)]
            self.seen.append((str(func), [(tuple(each.shape), each.dtype) for each in outputs]))
            self.calls.append((func, args))
            assert all(each.device == args[0].device for each in outputs if args and isinstance(args[0], Tensor))
        return out

    def names(self) -> list[str]:
        return [name.removeprefix("aten.").removesuffix(".default") for name, _ in self.seen]

    def scratch(self, name: str) -> int:
        return next(CUDA_SCRATCH[func](*args) for func, args in self.calls if str(func) == f"aten.{name}.default")


def operators(run: Callable[[], Any]) -> Operators:
    seen = Operators()
    with seen:
        run()
    return seen


def qkv(dim: int = 64, *, heads: int = 4, kv_heads: int = 4, sequence: int = 16, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As a model has them: [batch, sequence, heads, dim] in memory, seen as [batch, heads,
    sequence, dim]."""
    return tuple(tensor(2, sequence, each, dim, **options).transpose(1, 2) for each in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


def chosen(capability: tuple[int, int], tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> Backend:
    return choose(Call(*tensors, **{"mask": None, "dropout": 0.0, "causal": False, "grouped": False, **options}), capability)


# ---- Which attention: _fused_sdp_choice_cuda


@pytest.mark.parametrize("dim", [64, 72, 80, 100, 128, 256])
def test_flash_takes_every_head_up_to_256_and_cudnn_every_multiple_of_8(dim: int) -> None:
    assert chosen(AMPERE, qkv(dim), causal=True) is Backend.FLASH
    assert chosen(HOPPER, qkv(dim), causal=True) is (Backend.CUDNN if dim % 8 == 0 else Backend.FLASH)
    assert chosen(BLACKWELL, qkv(dim)) is (Backend.CUDNN if dim % 8 == 0 and dim <= 128 else Backend.FLASH)


def test_wider_heads_go_to_the_efficient_backend() -> None:
    assert chosen(AMPERE, qkv(320)) is chosen(HOPPER, qkv(320)) is Backend.EFFICIENT
    assert chosen(AMPERE, qkv(300)) is Backend.MATH  # no multiple of 8


def test_fp32_goes_to_the_efficient_backend() -> None:
    assert chosen(AMPERE, qkv(64, dtype=FP32)) is chosen(HOPPER, qkv(64, dtype=FP32)) is Backend.EFFICIENT
    assert chosen(AMPERE, qkv(66, dtype=FP32)) is Backend.MATH  # no multiple of 4
    assert chosen(AMPERE, qkv(64, dtype=torch.float64)) is Backend.MATH


def test_flash_takes_no_mask() -> None:
    mask = tensor(2, 1, 16, 16, dtype=torch.bool)
    assert chosen(AMPERE, qkv(), mask=mask) is Backend.EFFICIENT
    assert chosen(HOPPER, qkv(), mask=mask) is Backend.CUDNN
    assert chosen(HOPPER, qkv(), mask=tensor(2, 16, 16, grad=False)) is Backend.EFFICIENT  # cuDNN: two or four dimensions
    assert chosen(HOPPER, qkv(), mask=tensor(16, 16)) is Backend.EFFICIENT  # cuDNN: no gradient
    assert chosen(HOPPER, qkv(), mask=tensor(16, 3, grad=False)) is Backend.EFFICIENT  # cuDNN: of the matrix's size


def test_the_efficient_backend_does_not_group_heads() -> None:
    grouped = qkv(heads=8, kv_heads=2)
    mask = tensor(16, 16, grad=False)
    assert chosen(AMPERE, grouped, grouped=True) is Backend.FLASH
    assert chosen(AMPERE, grouped, grouped=True, mask=mask) is Backend.MATH
    assert chosen(HOPPER, grouped, grouped=True, mask=mask) is Backend.CUDNN
    assert chosen(HOPPER, grouped) is Backend.MATH
    assert chosen(HOPPER, qkv(heads=8, kv_heads=3), grouped=True) is Backend.MATH


def test_dropout_in_sixteenths_for_cudnn() -> None:
    assert chosen(HOPPER, qkv(), dropout=0.1) is Backend.FLASH
    assert chosen(HOPPER, qkv(), dropout=0.125) is Backend.CUDNN


def test_causal_attention_of_other_lengths_is_not_for_flash() -> None:
    query, (_, key, value) = qkv(sequence=16)[0], qkv(sequence=32)
    assert chosen(AMPERE, (query, key, value)) is Backend.FLASH
    assert chosen(AMPERE, (query, key, value), causal=True) is Backend.EFFICIENT


def test_layouts_and_empty_sequences() -> None:
    strided = tuple(each.transpose(2, 3) for each in qkv(16))
    assert chosen(HOPPER, strided) is Backend.MATH  # type: ignore[arg-type]
    assert chosen(HOPPER, qkv(sequence=0)) is Backend.MATH
    assert chosen(HOPPER, tuple(each[0] for each in qkv())) is Backend.MATH  # type: ignore[arg-type]
    assert chosen(HOPPER, qkv(sequence=1)) is Backend.FLASH


def test_gpus_with_little_shared_memory_do_not_train_wide_heads_with_flash() -> None:
    assert chosen(ADA, qkv(256)) is Backend.FLASH
    assert chosen(ADA, qkv(256), dropout=0.1) is Backend.EFFICIENT
    assert chosen(ADA, qkv(200)) is Backend.EFFICIENT
    assert chosen(ADA, qkv(200, grad=False)) is Backend.FLASH


def test_backends_can_be_turned_off() -> None:
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        assert chosen(HOPPER, qkv()) is Backend.EFFICIENT
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        assert chosen(AMPERE, qkv()) is Backend.CUDNN
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), pytest.raises(RuntimeError, match="No available kernel"):
        chosen(HOPPER, qkv(300))


# ---- What attention keeps (derivatives.yaml) and allocates


def test_flash_keeps_its_inputs_its_output_the_logsumexp_and_two_generator_states(ampere: None) -> None:
    full = (2, 4, 16, 64)
    assert kept(lambda: functional.scaled_dot_product_attention(*qkv(), is_causal=True, dropout_p=0.1)) == expected(
        *[(full, BF16)] * 4, ((2, 4, 16), FP32), ((2,), torch.uint64), ((), torch.uint64)
    )


def test_flash_pads_heads_to_a_multiple_of_8(ampere: None) -> None:
    seen = operators(lambda: functional.scaled_dot_product_attention(*qkv(100)).sum().backward())  # type: ignore[no-untyped-call]
    assert seen.names().count("constant_pad_nd") == 6  # query, key, value, and their gradients back
    assert ("aten._scaled_dot_product_flash_attention.default", (2, 4, 16, 104)) in [(name, out[0][0]) for name, out in seen.seen if out]
    assert functional.scaled_dot_product_attention(*qkv(100)).shape == (2, 4, 16, 100)


def test_cudnn_keeps_as_much(hopper: None) -> None:
    assert kept(lambda: functional.scaled_dot_product_attention(*qkv(), is_causal=True)) == expected(
        *[((2, 4, 16, 64), BF16)] * 4, ((2, 4, 16, 1), FP32), ((), torch.int64), ((), torch.int64)
    )


def test_the_efficient_backend_keeps_the_padded_mask_and_rows_of_32(ampere: None) -> None:
    mask = tensor(10, 10, dtype=torch.bool)
    saved = kept(lambda: functional.scaled_dot_product_attention(*qkv(sequence=10), attn_mask=mask))
    full = (2, 4, 10, 64)
    assert saved == expected(*[(full, BF16)] * 4, ((2, 4, 10, 10), BF16), ((2, 4, 32), FP32), *[((), torch.int64)] * 2)
    seen = operators(lambda: functional.scaled_dot_product_attention(*qkv(sequence=10), attn_mask=mask))
    assert ("aten.constant_pad_nd.default", [((10, 16), BF16)]) in seen.seen


def test_grouped_heads_are_not_repeated(ampere: None) -> None:
    saved = kept(lambda: functional.scaled_dot_product_attention(*qkv(heads=8, kv_heads=2), enable_gqa=True))
    assert saved.count(((2, 2, 16, 64), BF16)) == saved.count(((2, 8, 16, 64), BF16)) == 2


def test_attention_without_gradients(hopper: None) -> None:
    out = functional.scaled_dot_product_attention(*qkv(grad=False))
    assert (out.shape, out.device, out.requires_grad) == ((2, 4, 16, 64), GPU, False)
    with torch.no_grad():
        assert not functional.scaled_dot_product_attention(*qkv()).requires_grad


def test_attention_under_autocast(ampere: None) -> None:
    with torch.autocast("cpu", BF16):
        saved = kept(lambda: functional.scaled_dot_product_attention(*qkv(dtype=FP32), is_causal=True))
    assert saved.count(((2, 4, 16, 64), BF16)) == 4


def test_the_math_backend_drops_out_as_a_gpu(ampere: None) -> None:
    seen = operators(lambda: functional.scaled_dot_product_attention(*qkv(300), dropout_p=0.1))
    assert "_safe_softmax" in seen.names()
    assert "native_dropout" in seen.names()


def test_wrong_arguments_are_refused_in_pytorchs_words(hopper: None) -> None:
    query, key, value = qkv()
    with pytest.raises(RuntimeError, match="same dtype"):
        functional.scaled_dot_product_attention(query, key, value.float())


# ---- Dropout, softmax, norms


def test_dropout_keeps_a_mask_of_one_byte(hopper: None) -> None:
    assert kept(lambda: functional.dropout(tensor(4, 64), 0.1)) == [((4, 64), torch.bool)]
    assert operators(lambda: functional.dropout(tensor(4, 64), 0.1, training=False)).names() == ["empty.memory_format"]


@pytest.mark.parametrize("operator", [torch.softmax, torch.log_softmax])
def test_softmax_of_fp16_makes_no_fp32_copy(hopper: None, operator: Callable[..., Tensor]) -> None:
    assert "_to_copy" not in operators(lambda: operator(tensor(4, 64, dtype=FP16), -1, dtype=FP32)).names()
    assert "_to_copy" in operators(lambda: operator(tensor(4, 64), -1, dtype=FP32)).names()
    assert kept(lambda: operator(tensor(4, 64, dtype=FP16), -1, dtype=FP32)) == [((4, 64), FP32)]


@pytest.mark.parametrize(
    "run",
    [
        lambda x: functional.dropout(x, 0.1),
        lambda x: torch.softmax(x.half(), -1, dtype=FP32),
        lambda x: torch.log_softmax(x.half(), -1, dtype=FP32),
        lambda x: torch.softmax(x, -1, dtype=FP32),
        lambda x: functional.cross_entropy(x, torch.empty(4, dtype=torch.int64, device=x.device)),
        lambda x: functional.linear(x, torch.empty(8, 64, dtype=BF16, device=x.device), torch.empty(8, dtype=BF16, device=x.device)),
        functional.gelu,
        functional.silu,
    ],
)
def test_pytorch_chooses_the_same_operators_for_cuda(hopper: None, run: Callable[[Tensor], Tensor]) -> None:
    simulated, cuda = (operators(lambda place=place: run(tensor(4, 64, device=place, grad=False))) for place in (GPU, CUDA))  # type: ignore[misc]
    assert simulated.seen == cuda.seen


def test_layer_norm_keeps_its_statistics_in_fp32(hopper: None) -> None:
    norm = torch.nn.LayerNorm(64, device=GPU, dtype=BF16)
    rows = (4, 16, 1)
    assert kept(lambda: norm(tensor(4, 16, 64))) == expected(((4, 16, 64), BF16), *[((64,), BF16)] * 2, *[(rows, FP32)] * 2)
    assert norm.weight.grad is not None and norm.weight.grad.dtype is BF16
    cuda = operators(lambda: functional.layer_norm(tensor(4, 16, 64, device=CUDA, grad=False), (64,)))
    assert cuda.seen[-1][1] == [((4, 16, 64), BF16), (rows, FP32), (rows, FP32)]


def test_layer_norm_without_weights_or_in_fp32(hopper: None) -> None:
    assert kept(lambda: functional.layer_norm(tensor(4, 64), (64,))) == expected(((4, 64), BF16), *[((4, 1), FP32)] * 2)
    assert kept(lambda: functional.layer_norm(tensor(4, 64, dtype=FP32), (64,))) == expected(((4, 64), FP32), *[((4, 1), FP32)] * 2)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rms_norm_keeps_its_input_and_one_number_per_row(hopper: None, dtype: torch.dtype) -> None:
    norm = torch.nn.RMSNorm(64, device=GPU, dtype=dtype)
    assert kept(lambda: norm(tensor(4, 16, 64, dtype=dtype))) == expected(((4, 16, 64), dtype), ((64,), dtype), ((4, 16, 1), FP32))
    assert norm.weight.grad is not None and norm.weight.grad.dtype is dtype
    assert kept(lambda: functional.rms_norm(tensor(4, 64, dtype=dtype), (64,))) == expected(((4, 64), dtype), ((4, 1), FP32))


def test_rms_norm_of_two_types_is_composed(hopper: None) -> None:
    with pytest.warns(UserWarning, match="Mismatch dtype between input and weight"):
        seen = operators(lambda: functional.rms_norm(tensor(4, 64), (64,), tensor(64, dtype=FP32)))
    assert "rsqrt" in seen.names()


# ---- The host, and the end


CALLS: list[Callable[[torch.device], Any]] = [
    lambda place: functional.scaled_dot_product_attention(*qkv(device=place), is_causal=True),
    lambda place: functional.dropout(tensor(4, 64, device=place), 0.1),
    lambda place: torch.softmax(tensor(4, 64, dtype=FP16, device=place), -1, dtype=FP32),
    lambda place: functional.layer_norm(tensor(4, 64, device=place), (64,)),
    lambda place: functional.rms_norm(tensor(4, 64, device=place), (64,)),
]


def test_the_host_is_left_alone() -> None:
    before = [(operators(lambda: run(HOST)).seen, kept(lambda: run(HOST))) for run in CALLS]  # noqa: B023
    library = register_cuda_operators(HOPPER)
    during = [(operators(lambda: run(HOST)).seen, kept(lambda: run(HOST))) for run in CALLS]  # noqa: B023
    library._destroy()  # type: ignore[no-untyped-call]
    assert during == before


def test_nothing_is_left_when_the_library_is_destroyed() -> None:
    before = [operators(lambda: run(GPU)).seen for run in CALLS]  # noqa: B023
    library = register_cuda_operators(HOPPER)
    assert all(operators(lambda: run(GPU)).seen != old for run, old in zip(CALLS, before, strict=True))  # noqa: B023
    library._destroy()  # type: ignore[no-untyped-call]
    assert [operators(lambda: run(GPU)).seen for run in CALLS] == before  # noqa: B023


# ---- Scratch


def attention_backward(tensors: tuple[Tensor, Tensor, Tensor], name: str, **options: Any) -> int:
    def run() -> None:
        out = functional.scaled_dot_product_attention(*tensors, **options)
        out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]

    return operators(run).scratch(f"_scaled_dot_product_{name}_attention_backward")


def test_flash_backward_sums_in_fp32(ampere: None) -> None:
    """mha_bwd: dq_accum [2, 128, 4, 96] and softmax_d [2, 4, 128] in fp32 for 100 queries of 80."""
    assert attention_backward(qkv(80, sequence=100), "flash") == 4 * 2 * 128 * 4 * 96 + 4 * 2 * 4 * 128


def test_flash_backward_expands_grouped_heads(ampere: None) -> None:
    """The same and twice [2, 128, 8, 64] in bf16."""
    scratch = attention_backward(qkv(heads=8, kv_heads=2, sequence=128), "flash", enable_gqa=True)
    assert scratch == 4 * 2 * 128 * 8 * 64 + 4 * 2 * 8 * 128 + 2 * 2 * 2 * 128 * 8 * 64


def test_flash_backward_copies_what_is_in_another_layout(ampere: None) -> None:
    query, key, value = (tensor(2, 4, 128, 64) for _ in range(3))
    dense = attention_backward(qkv(sequence=128), "flash")
    assert attention_backward((query, key, value), "flash") == dense + 2 * query.nbytes  # output and its gradient


def test_cudnn_backward_sums_in_fp32(hopper: None) -> None:
    assert attention_backward(qkv(80, sequence=128), "cudnn") == 4 * 2 * 4 * 128 * 80 + 4 * 2 * 4 * 128


def test_efficient_backward_has_tiles_of_64_or_128(ampere: None) -> None:
    """GradQTempStorage is 16 bytes and a tile of fp32; delta [2, 4, 128] in fp32."""
    mask = tensor(128, 128, grad=False)
    delta = 4 * 2 * 4 * 128
    assert attention_backward(qkv(64, sequence=128), "efficient", attn_mask=mask) == delta + blocks(2 * 4 * 2 * (16 + 4 * 64 * 64))
    assert attention_backward(qkv(128, sequence=128), "efficient", attn_mask=mask) == delta + blocks(2 * 4 * (16 + 4 * 128 * 128))


def test_efficient_forward_and_backward_of_wide_heads(ampere: None) -> None:
    """256 > 128: the output in fp32; two tiles across, and sums of dK and dV: two splits of 64 keys
    by 256 for each of 8 heads."""
    mask = tensor(128, 128, grad=False)
    out = operators(lambda: functional.scaled_dot_product_attention(*qkv(256, sequence=128), attn_mask=mask))
    assert out.scratch("_scaled_dot_product_efficient_attention") == 4 * 2 * 4 * 128 * 256
    workspace = 2 * 4 * (2 * (16 + 4 * 128 * 128) + 4 * 2 * 64 * (256 + 256))
    assert attention_backward(qkv(256, sequence=128), "efficient", attn_mask=mask) == 4 * 2 * 4 * 128 + blocks(workspace)


def embedding_backward(tokens: int, vocabulary: int = 50_000, width: int = 64) -> int:
    def run() -> None:
        out = functional.embedding(torch.empty(tokens, dtype=torch.int64, device=GPU), tensor(vocabulary, width))
        out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]

    return operators(run).scratch("embedding_dense_backward")


def test_embedding_backward_of_few_tokens_needs_nothing() -> None:
    assert embedding_backward(3072) == 0


def test_embedding_backward_of_many_tokens_sums_rows_in_fp32() -> None:
    """5120 tokens: 5 lists of 5120 indices, one of 512 + 5120, two numbers (a block each), and
    [5632, 64] in fp32."""
    assert embedding_backward(5120) == 8 * (5 * 5120 + 5632) + 2 * BLOCK + 4 * 5632 * 64
    assert embedding_backward(5120, vocabulary=512) == 8 * (3 * 5120 + 2 * 512 + 1024) + 2 * BLOCK + 4 * 1024 * 64


def test_softmax_backward_multiplies_first() -> None:
    def run() -> None:
        out = torch.softmax(tensor(8, 512), -1)
        out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]

    assert operators(run).scratch("_softmax_backward_data") == 2 * 8 * 512


def test_norms_of_many_narrow_rows_sum_in_two_passes() -> None:
    """65 568 rows of 128: 2049 blocks of 32 rows, for the weight and the bias."""

    def scratch(rows: int, norm: type[torch.nn.Module]) -> int:
        module = norm(128, device=GPU, dtype=BF16)
        seen = operators(lambda: module(tensor(rows, 128)).sum().backward())
        return seen.scratch("native_layer_norm_backward" if norm is torch.nn.LayerNorm else "_fused_rms_norm_backward")

    library = register_cuda_operators(HOPPER)
    copy = 65_568 * 128 * 2  # the gradient of a sum is one number, expanded
    assert scratch(65_568, torch.nn.LayerNorm) == copy + 2 * blocks(2049 * 128 * 2)
    assert scratch(65_568, torch.nn.RMSNorm) == copy + blocks(2049 * 128 * 2)
    assert scratch(65_536, torch.nn.RMSNorm) == 65_536 * 128 * 2
    library._destroy()  # type: ignore[no-untyped-call]


def test_reductions_copy_what_they_cannot_read() -> None:
    """make_reduction_from_out_ty: only half precision into fp32 is read as it is."""
    reduce = CUDA_SCRATCH[torch.ops.aten.sum.default]
    assert reduce(tensor(1024, dtype=torch.bool)) == 8 * 1024
    assert reduce(tensor(1024)) == reduce(tensor(1024), dtype=FP32) == 0
    assert reduce(tensor(1024), dtype=torch.float64) == 8 * 1024


def test_the_host_has_no_scratch() -> None:
    grad, indices = tensor(5120, 64, device=HOST), torch.empty(5120, dtype=torch.int64)
    assert CUDA_SCRATCH[torch.ops.aten.embedding_dense_backward.default](grad, indices, 50_000, -1, False) == 0


# ---- Optimizers


def step(place: torch.device, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Operators:
    parameters = [tensor(width, dtype=FP32, device=place) for width in (64, 128)]
    for each in parameters:
        each.grad = torch.empty_like(each)
    return operators(optimizer(parameters, lr=0.1, **options).step)  # type: ignore[call-arg]


def test_optimizers_work_on_lists_for_parameters_on_the_gpu() -> None:
    with cuda_optimizers():
        assert "_foreach_sqrt" in step(GPU).names()
        assert "_foreach_sqrt" not in step(HOST).names()
        assert "_foreach_sqrt" not in step(GPU, foreach=False).names()
        assert "_fused_adamw_" in step(GPU, fused=True).names()
        assert "_foreach_add_.List" in step(GPU, torch.optim.SGD).names()
    assert "_foreach_sqrt" not in step(GPU).names()


def test_a_step_on_lists_holds_one_more_copy_of_the_parameters() -> None:
    """torch/optim/adam.py `_multi_tensor_adam`: of its operators that do not work in place, only
    the square root is as large."""
    with cuda_optimizers():
        seen = step(GPU).seen
    made = [(name, out) for name, out in seen if out and not name.split(".")[1].endswith("_") and out[0][0] == (64,)]
    assert made == [*[("aten.zeros_like.default", [((64,), FP32)])] * 2, ("aten._foreach_sqrt.default", [((64,), FP32), ((128,), FP32)])]
