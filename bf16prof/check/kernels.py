"""Single modules as Liger-Kernel's public benchmark runs them, on any device: a GPU, or the
simulated one of the dry run.

A program is built for one row of that benchmark: its module, its tensors, and what else its script
keeps alive. It is then called some times; the peak of the last call counts. Protocol:
linkedin/Liger-Kernel, benchmark/scripts (utils.py `_test_memory`), at the dates of the rows. The
modules are those of transformers and PyTorch; Liger's own kernels stand here as autograd functions
that allocate and keep what those do, at the version that the row names (src/liger_kernel/ops), and
compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bf16prof.check.liger import LigerCrossEntropy, LigerFusedLinearCrossEntropy, LigerRmsNorm, LigerSiluMul
from bf16prof.check.moe import mixture, tokens_of_experts

ITERATIONS = 4
"""The benchmark takes the median of ten; the first differs (it makes the gradients), the later ones
are alike."""

Forward = Callable[[], Tensor]
Shape = Mapping[str, Any]


@dataclass(frozen=True)
class BenchmarkFunction:
    """One benchmark function. `forward` computes the output; `gradient` is what the script hands to
    `backward` in each call, given the output (`None`: a scalar loss); `retain` is whether it keeps
    the graph."""

    forward: Forward
    gradient: Callable[[Tensor], Tensor] | None = None
    retain: bool = True

    def call(self, mode: str) -> Callable[[], None]:
        """What is called in each iteration of a mode: `forward`, `backward` (of a graph kept
        alive), or `full`."""
        if mode == "forward":
            return self._forward
        if mode == "full":
            return self._full
        gradient, out = None, self.forward()
        if self.gradient is not None:
            gradient = torch.randn_like(out)
        return lambda: out.backward(gradient, retain_graph=True)  # type: ignore[no-untyped-call]

    def _forward(self) -> None:
        self.forward()

    def _full(self) -> None:
        out = self.forward()
        gradient = self.gradient(out) if self.gradient else None
        out.backward(gradient, retain_graph=self.retain)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class PeakCounter:
    """The counters of a device: bytes allocated at most since `reset`."""

    reset: Callable[[], Any]
    peak: Callable[[], int]


def peak_bytes(call: Callable[[], None], memory: PeakCounter, iterations: int = ITERATIONS) -> int:
    """The peak of the last of several calls, the counter being reset before each."""
    peak = 0
    for _ in range(iterations):
        memory.reset()
        call()
        peak = memory.peak()
    return peak


def program(kernel: str, implementation: str, shape: Shape, device: torch.device) -> BenchmarkFunction | Callable[[], None]:
    """The program of a row; `shape` holds the benchmark's extents, the swept one among them."""
    return PROGRAMS[kernel](implementation, shape, device)


def callable_of(kernel: str, implementation: str, mode: str, shape: Shape, device: torch.device) -> Callable[[], None]:
    """What a row calls in each iteration."""
    made = program(kernel, implementation, shape, device)
    return made.call(mode) if isinstance(made, BenchmarkFunction) else made


def dtype_of(shape: Shape) -> torch.dtype:
    """The dtype that a shape names (`torch.bfloat16`), else float32."""
    found: torch.dtype = getattr(torch, str(shape.get("dtype", "torch.float32")).removeprefix("torch."))
    return found


class Mlp(nn.Module):
    """Llama's feed-forward network: `down(activation(gate(x)) * up(x))`, by transformers or with
    Liger's fused product."""

    def __init__(self, hidden: int, wide: int, activation: Callable[[Tensor], Tensor] | None, like: dict[str, Any]) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, wide, bias=False, **like)
        self.up = nn.Linear(hidden, wide, bias=False, **like)
        self.down = nn.Linear(wide, hidden, bias=False, **like)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        if self.activation is None:
            out: Tensor = self.down(LigerSiluMul.apply(self.gate(x), self.up(x)))  # type: ignore[no-untyped-call]
        else:
            out = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "gelu_pytorch_tanh": _gelu}


def _mlp(implementation: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    like: dict[str, Any] = {"dtype": dtype_of(shape), "device": device}
    hidden, batch = shape["hidden_size"], shape.get("bsz") or shape["B"]
    activation = None if implementation == "liger" else ACTIVATIONS[shape["hidden_act"]]
    x = torch.randn(batch, shape["T"], hidden, requires_grad=True, **like)
    layer: Any = Mlp(hidden, shape["intermediate_size"], activation, like)
    if implementation == "deepspeed_tiled":
        layer = _tiled(layer, shape.get("num_shards"))
    return BenchmarkFunction(lambda: layer(x), torch.randn_like)


def _tiled(mlp: Mlp, shards: int | None) -> Callable[[Tensor], Tensor]:
    """DeepSpeed's TiledMLP over that network; by default one shard for each `hidden_size`
    tokens."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def run(x: Tensor) -> Tensor:
        count = shards or max(1, -(-x.shape[-2] // x.shape[-1]))
        out: Tensor = TiledMLP.apply(lambda module, part: module(part), mlp, x, count, list(mlp.parameters()))
        return out

    return run


class RmsNorm(nn.Module):
    """transformers' LlamaRMSNorm."""

    def __init__(self, width: int, eps: float, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The normalised rows, times the weight."""
        dtype, x = x.dtype, x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


def _rms_norm(implementation: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    other_weight = torch.ones(shape["H"], device=device)  # the script makes both modules
    norm = RmsNorm(shape["H"], shape["eps"], device)
    x = torch.randn(shape["M"], shape["H"], dtype=dtype_of(shape), device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def forward() -> Tensor:
        if implementation == "liger":
            out: Tensor = LigerRmsNorm.apply(x, norm.weight)  # type: ignore[no-untyped-call]
            return out
        normalised: Tensor = norm(x) if other_weight is not None else x
        return normalised

    return BenchmarkFunction(forward, lambda _: gradient)


def _layer_norm(_: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    other = torch.ones(shape["N"], device=device), torch.zeros(shape["N"], device=device)
    norm = nn.LayerNorm(shape["N"], eps=shape["eps"], device=device)
    x = torch.randn(shape["M"], shape["N"], dtype=dtype_of(shape), device=device, requires_grad=True)
    gradient = torch.randn_like(x)
    return BenchmarkFunction(lambda: norm(x) if other else x, lambda _: gradient)


def _cross_entropy(implementation: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    rows, vocabulary = shape["B"] * shape["T"], shape["V"]
    logits = torch.randn(rows, vocabulary, requires_grad=True, device=device)
    target = torch.randint(vocabulary, (rows, 1), device=device).squeeze(1)

    def forward() -> Tensor:
        if implementation == "liger":
            out: Tensor = LigerCrossEntropy.apply(logits, target)  # type: ignore[no-untyped-call]
            return out
        return functional.cross_entropy(logits, target)

    return BenchmarkFunction(forward, retain=False)


def _linear_cross_entropy(implementation: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    like: dict[str, Any] = {"dtype": dtype_of(shape), "device": device}
    heads = [nn.Linear(shape["H"], shape["V"], bias=False, **like) for _ in range(2)]  # the script makes both modules
    x = torch.randn(shape["BT"], shape["H"], requires_grad=True, **like)
    target = torch.randint(shape["V"], (shape["BT"], 1), device=device).squeeze(1)

    def forward() -> Tensor:
        if implementation == "liger":
            out: Tensor = LigerFusedLinearCrossEntropy.apply(x, heads[1].weight, target)  # type: ignore[no-untyped-call]
            return out
        return functional.cross_entropy(heads[0](x), target)

    return BenchmarkFunction(forward, retain=False)


def _rope(_: str, shape: Shape, device: torch.device) -> Callable[[], None]:
    """transformers' rotary embedding of 2024, applied to queries and keys; the gradients are those
    of both together."""
    tokens, heads = shape.get("seq_len") or shape["T"], shape["num_q_heads"]
    width = (shape.get("hidden_size") or shape["H"]) // heads
    like: dict[str, Any] = {"dtype": dtype_of(shape), "device": device}

    def states(count: int) -> Tensor:
        drawn = torch.randn(1, tokens, count, width, requires_grad=True, **like)
        return drawn.transpose(1, 2)

    frequencies = torch.ones(width // 2, device=device)  # the module's buffer
    query, key = states(heads), states(shape["num_kv_heads"])
    gradients = torch.randn_like(query), torch.randn_like(key)
    positions = torch.arange(tokens, device=device).unsqueeze(0)
    with torch.no_grad():
        angles = (frequencies[None, :, None].float() @ positions[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        cosine, sine = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
    del angles

    def rotate(x: Tensor) -> Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-second, first), dim=-1)

    def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + rotate(x) * sin

    def full() -> None:
        cos, sin = cosine.unsqueeze(1), sine.unsqueeze(1)
        out = apply(query, cos, sin), apply(key, cos, sin)
        torch.autograd.grad(out, (query, key), gradients, allow_unused=True, retain_graph=positions is not None)
        assert frequencies is not None

    return full


def _divergence(_: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    rows, vocabulary = shape["B"] * shape["T"], shape["V"]
    logs = torch.randn(rows, vocabulary, requires_grad=True, device=device).log_softmax(dim=-1)
    target = torch.randn(rows, vocabulary, device=device).softmax(dim=-1)
    return BenchmarkFunction(lambda: functional.kl_div(logs, target, reduction="batchmean"))


def _total_variation(_: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    rows, vocabulary = shape["B"] * shape["T"], shape["V"]
    p = torch.randn(rows, vocabulary, requires_grad=True, device=device).softmax(dim=-1)
    q = torch.randn(rows, vocabulary, device=device).softmax(dim=-1)

    def forward() -> Tensor:
        distance = torch.abs(p - q) / 2.0
        return torch.sum(distance) / p.size(0)

    return BenchmarkFunction(forward)


def _jensen_shannon(_: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    rows, vocabulary = shape["B"] * shape["T"], shape["V"]
    p = torch.randn(rows, vocabulary, requires_grad=True, device=device).log_softmax(dim=-1)
    q = torch.randn(rows, vocabulary, device=device).log_softmax(dim=-1)

    def divergence(log_m: Tensor, log_target: Tensor) -> Tensor:
        return functional.kl_div(log_m, log_target, reduction="batchmean", log_target=True)

    def forward() -> Tensor:
        log_p, log_q = p.view(-1, vocabulary), q.view(-1, vocabulary)
        m = 0.5 * (torch.exp(log_p) + torch.exp(log_q))
        log_m = torch.log(m)
        return 0.5 * (divergence(log_m, log_p) + divergence(log_m, log_q))

    return BenchmarkFunction(forward)


def _softmax(_: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    x = torch.randn(shape["N"], dtype=dtype_of(shape), device=device, requires_grad=True)  # one row: the script's memory part forgets M
    return BenchmarkFunction(lambda: functional.softmax(x, dim=-1), torch.ones_like)


def _relu_squared(_: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    x = torch.randn(shape["N"], dtype=dtype_of(shape), device=device, requires_grad=True)  # likewise

    def forward() -> Tensor:
        kept = functional.relu(x)
        return torch.square(kept)

    return BenchmarkFunction(forward, torch.ones_like)


def _fused_moe(_: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    extents = {key: int(shape[key]) for key in ("T", "E", "K", "H", "intermediate_dim")}
    counts = tokens_of_experts(extents, shape["multiprocessors"])
    return BenchmarkFunction(mixture(extents, device, dtype_of(shape), counts), torch.randn_like)


def _linear_jensen_shannon(_: str, shape: Shape, device: torch.device) -> BenchmarkFunction:
    """Student and teacher with heads of their own, divergence in fp32; Liger's module shares the
    weights."""
    like: dict[str, Any] = {"dtype": dtype_of(shape), "device": device}
    heads = [nn.Linear(shape["H"], shape["V"], bias=False, **like) for _ in range(2)]
    inputs = torch.rand(shape["BT"], shape["H"], requires_grad=True, **like), torch.rand(shape["BT"], shape["H"], **like)

    def divergence(m: Tensor, log_target: Tensor) -> Tensor:
        return functional.kl_div(torch.log(m), log_target, reduction="none", log_target=True).sum(dim=-1)

    def jsd(log_q: Tensor, log_p: Tensor) -> Tensor:
        log_p, log_q = log_p.to(torch.float), log_q.to(torch.float)
        log_p, log_q = log_p.view(-1, log_p.size(-1)), log_q.view(-1, log_q.size(-1))
        m = torch.lerp(torch.exp(log_q), torch.exp(log_p), 0.5)
        loss = 0.5 * divergence(m, log_p) + 0.5 * divergence(m, log_q)
        return (loss / log_q.shape[0]).sum().to(dtype_of(shape))

    def forward() -> Tensor:
        student, teacher = heads[0](inputs[0]), heads[1](inputs[1])
        log_q = torch.log_softmax(student / 1.0, dim=-1)
        log_p = torch.log_softmax(teacher / 1.0, dim=-1)
        return jsd(log_q, log_p)

    return BenchmarkFunction(forward, retain=False)


PROGRAMS: dict[str, Callable[[str, Shape, torch.device], BenchmarkFunction | Callable[[], None]]] = {
    "cross_entropy": _cross_entropy,
    "fused_linear_cross_entropy": _linear_cross_entropy,
    "geglu": _mlp,
    "swiglu": _mlp,
    "tiled_geglu": _mlp,
    "tiled_swiglu": _mlp,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "kl_div": _divergence,
    "tvd": _total_variation,
    "jsd": _jensen_shannon,
    "softmax": _softmax,
    "relu_squared": _relu_squared,
    "fused_moe": _fused_moe,
    "fused_linear_jsd": _linear_jensen_shannon,
}
"""By the benchmark's name of a kernel, what makes its program from implementation, shape and
device."""
