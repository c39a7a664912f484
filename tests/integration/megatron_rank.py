"""One of two gloo ranks that train a small bf16 model with megatron-core's own gradient buffers and optimizers, two steps.

Rank 0 prints, for every arrangement, the bytes per parameter of what is held after a step, by component. Megatron asks for "cuda" in many
places; here that is the CPU.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WIDTH, INNER = 256, 512
SMALLEST = 1000
"""Bytes: scalars (step counters, norms) are no matter of bytes per parameter."""


class Cpu(TorchFunctionMode):
    """What is asked of a GPU is done by the CPU, and tensors give their type as if they were there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "type" and len(args) == 1:
            return function(*args).replace("torch.", "torch.cuda.")
        if name == "type" and isinstance(args[1], str):
            return function(args[0], args[1].replace("torch.cuda.", "torch."))
        return function(*map(home, args), **{key: home(value) for key, value in (kwargs or {}).items()})


def home(value: Any) -> Any:
    """`cuda` as the CPU."""
    if isinstance(value, str):
        return "cpu" if value.startswith("cuda") else value
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def held(*, fp32_gradients: bool, distributed: bool) -> dict[str, float]:
    """Bytes per parameter after two steps."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    model = nn.Sequential(nn.Linear(WIDTH, INNER, bias=False), nn.GELU(), nn.Linear(INNER, WIDTH, bias=False)).to(torch.bfloat16)
    sizes = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=4, use_cpu_initialization=True, **bf16)
    how = DistributedDataParallelConfig(
        grad_reduce_in_fp32=fp32_gradients, use_distributed_optimizer=distributed, overlap_grad_reduce=False
    )
    ranks = DistributedDataParallel(sizes, how, model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=distributed, **bf16)
    optimizer = get_megatron_optimizer(settings, [ranks])
    for _ in range(2):
        ranks.zero_grad_buffer()
        optimizer.zero_grad()
        ranks(torch.randn(4, WIDTH, dtype=torch.bfloat16)).float().pow(2).mean().backward()
        ranks.finish_grad_sync()
        optimizer.step()
    return by_component(model, ranks, optimizer)


def by_component(model: nn.Module, ranks: Any, optimizer: Any) -> dict[str, float]:
    """Every storage once, by the first that holds it; `other` is what nobody is known to hold."""
    seen: set[int] = set()
    found: dict[str, float] = {}
    elements = sum(parameter.numel() for parameter in model.parameters())

    def claim(component: str, tensors: Iterable[Tensor | None]) -> None:
        for tensor in tensors:
            if tensor is None or (storage := tensor.untyped_storage())._cdata in seen or storage.nbytes() < SMALLEST:
                continue
            seen.add(storage._cdata)
            found[component] = found.get(component, 0) + storage.nbytes() / elements

    claim("parameters", [*(buffer.param_data for buffer in ranks.buffers), *(parameter.data for parameter in model.parameters())])
    claim("gradients", (buffer.grad_data for buffer in ranks.buffers))
    masters = [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
    claim("master_parameters", masters)
    claim("master_gradients", (parameter.grad for parameter in masters))
    for state in optimizer.optimizer.state.values():
        claim("momentum", [state["exp_avg"]])
        claim("variance", [state["exp_avg_sq"]])
    gc.collect()
    claim("other", (each for each in gc.get_objects() if isinstance(each, Tensor)))
    return found


def main() -> None:
    """All four arrangements, one after the other; what one has held is gone before the next."""
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(torch.cuda, name, getattr(torch, name))
    dist.init_process_group("gloo")
    with Cpu():
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel()
        arrangements = [(wide, cut) for wide in (True, False) for cut in (False, True)]
        found = [[wide, cut, held(fp32_gradients=wide, distributed=cut)] for wide, cut in arrangements]
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)  # noqa: T201
    os._exit(0)


if __name__ == "__main__":
    main()
