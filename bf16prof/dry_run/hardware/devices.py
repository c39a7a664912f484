"""The kernels of the two devices that can be modelled."""

from __future__ import annotations

import torch

from bf16prof.dry_run.hardware.asking import Oracle
from bf16prof.dry_run.hardware.cpu_scratch import CPU_SCRATCH
from bf16prof.dry_run.hardware.cuda_operators import cuda_scratch
from bf16prof.dry_run.hardware.cuda_operators.recurrent import reserve
from bf16prof.dry_run.hardware.kernels import Kernels
from bf16prof.dry_run.hardware.registry import NOTHING, cpu_registry, cuda_registry
from bf16prof.dry_run.hardware.storages import STORAGES
from bf16prof.profiles.gpus import Gpu
from bf16prof.reductions import processor_of


def cpu_kernels(*, asks_all: bool = False) -> Kernels:
    """This machine's CPU, which can be asked: of what the census did not find exact, or of
    everything that has no formula."""
    return Kernels(CPU_SCRATCH, NOTHING if asks_all else cpu_registry(), STORAGES, Oracle(), asks_all=asks_all)


def bare_cpu_kernels() -> Kernels:
    """The CPU as shapes and formulas say, without asking."""
    return Kernels(CPU_SCRATCH, NOTHING, STORAGES)


def cuda_kernels(gpu: Gpu) -> Kernels:
    """A GPU, which cannot."""
    return Kernels(cuda_scratch(processor_of(gpu)), cuda_registry(), {**STORAGES, torch.ops.aten._cudnn_rnn.default: reserve})
