"""DeepSpeed's own engine in this process, as rank 0 of any number of ranks that do not exist.

PyTorch's `fake` process group answers every collective without communicating, so DeepSpeed's own
code partitions, pads and allocates as on a real job. Compiled operators are replaced by stubs that
do nothing: what is looked at is what is allocated, never what is computed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from bf16prof.cases import Job
from bf16prof.engine.config import deepspeed_config
from bf16prof.engine.training import initialize
from bf16prof.models.modules import build

DEEPSPEED_WARNINGS = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.:FutureWarning"),
]
"""What DeepSpeed 0.19.8 still calls although PyTorch 2.13 has deprecated it."""


class _Operator:
    """A compiled operator that does nothing."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_keywords: None


@contextlib.contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Be rank 0 of `world_size` ranks while the context lasts."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(world_size)}
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, disabled)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        patch.setattr(gc, "collect", lambda *_generation: 0)  # DeepSpeed collects before every message about memory
        patch.setattr(nn.functional, "linear", nn.functional.linear)  # stage 3 puts its own there, for good
        _replace_compiled_operators(patch)
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        stack.callback(_leave)
        yield


def build_engine(job: Job, config: Mapping[str, Any] | None = None) -> Any:
    """DeepSpeed's engine for a job (or for another DeepSpeed configuration of its model). Raises
    what DeepSpeed raises."""
    model = build(job.profile.model, activation_checkpointing=False)
    return initialize(model, deepspeed_config(job) if config is None else config, dist_init_required=False)


def step(engine: Any, job: Job) -> None:
    """One training step on random tokens, so that the lazily created optimizer states exist."""
    workload, vocab = job.profile.workload, job.profile.model.vocab_size
    tokens = torch.randint(vocab, (workload.micro_batch_size, workload.sequence_length))
    for _ in range(workload.gradient_accumulation_steps):
        logits = engine(tokens)
        engine.backward(nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()))
        engine.step()


def _replace_compiled_operators(patch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, FusedAdamBuilder

    patch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    patch.setattr(CPU_Accelerator, "is_fp16_supported", lambda _self: True)
    patch.setattr(importlib.import_module("cpuinfo"), "get_cpu_info", dict)
    for builder in (FusedAdamBuilder, CPUAdamBuilder):
        patch.setattr(builder, "load", lambda _self, verbose=True: _Operator())


def _leave() -> None:
    torch.distributed.destroy_process_group()
    setattr(importlib.import_module("deepspeed.comm.comm"), "cdb", None)  # noqa: B010 - mypy knows no attributes of it
    setattr(importlib.import_module("deepspeed.utils.groups"), "_WORLD_GROUP", None)  # noqa: B010
