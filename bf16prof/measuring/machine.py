"""What this machine is, for the manifest of a run: hardware, versions, and the environment
variables that change a measurement.

Nothing here imports torch or DeepSpeed: versions come from the packages' metadata, GPUs from NVML.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import bf16prof
from bf16prof.control_groups import memory_limit
from bf16prof.measuring.probes import nvml
from bf16prof.processes import usable_cores, whole_memory
from bf16prof.profiles.secrets import is_secret

PACKAGES = (
    "torch", "deepspeed", "tokenizers", "transformers", "torchao", "torch-optimi", "bitsandbytes", "megatron-core", "nvidia-ml-py", "numpy",
)  # fmt: skip
"""Packages whose version is recorded where they are installed."""

_ALLOWED = """
CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING CUDA_DEVICE_MAX_CONNECTIONS
CUBLAS_WORKSPACE_CONFIG CUBLASLT_WORKSPACE_SIZE NVIDIA_TF32_OVERRIDE
PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_NO_CUDA_MEMORY_CACHING PYTORCH_NVML_BASED_CUDA_CHECK
TORCH_CUDA_ARCH_LIST TORCH_CUDNN_V8_API_DISABLED TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_EXTENSIONS_DIR
NCCL_DEBUG NCCL_ALGO NCCL_PROTO NCCL_BUFFSIZE NCCL_MIN_NCHANNELS NCCL_MAX_NCHANNELS NCCL_P2P_DISABLE NCCL_SHM_DISABLE
NCCL_IB_DISABLE NCCL_CUMEM_ENABLE NCCL_NVLS_ENABLE
DS_ACCELERATOR DS_SKIP_CUDA_CHECK OMP_NUM_THREADS MKL_NUM_THREADS MALLOC_ARENA_MAX TOKENIZERS_PARALLELISM
SLURM_JOB_ID SLURM_NNODES SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_GPUS_PER_NODE
BF16PROF_PROFILE BF16PROF_ZERO BF16PROF_RECIPE BF16PROF_ENGINE BF16PROF_OFFLOAD BF16PROF_HF_CONFIG BF16PROF_MODEL BF16PROF_DS_CONFIG
BF16PROF_SEQUENCE_LENGTH BF16PROF_MICRO_BATCH_SIZE BF16PROF_GRADIENT_ACCUMULATION_STEPS BF16PROF_ACTIVATION_CHECKPOINTING
BF16PROF_CPU_MEMORY_LIMIT
"""

ALLOWED_ENVIRONMENT = frozenset(_ALLOWED.split())
"""The variables that may be recorded: those that change memory, speed or placement. Any other stays
out, whatever it is called; of our own, those that `measure` reads are in it."""


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The allowed environment variables that are set, but for a value that is a secret by its
    form."""
    variables = os.environ if variables is None else variables
    return {name: value for name, value in sorted(variables.items()) if name in ALLOWED_ENVIRONMENT and not is_secret("", value)}


def versions() -> dict[str, str]:
    """Versions of Python, bf16prof, the packages that matter (those installed) and the NVIDIA
    driver (where there is one)."""
    found = {"python": platform.python_version(), "bf16prof": bf16prof.__version__}
    found |= {name: version for name in PACKAGES if (version := package_version(name)) is not None}
    driver = nvml.driver_version()
    return found if driver is None else {**found, "nvidia_driver": driver}


def hardware() -> dict[str, str]:
    """CPU model, cores (those this process may use), memory and its limit in bytes, system, kernel,
    GPUs."""
    found = {
        "cpu": _cpu_model(),
        "cores": str(usable_cores()),
        "memory_bytes": str(whole_memory()),
        "system": _system(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpus": ", ".join(gpu.name for gpu in nvml.list_gpus()) or "none",
    }
    limit = memory_limit()
    return found if limit is None else {**found, "memory_limit_bytes": str(limit)}


def usable_memory() -> int:
    """The bytes of memory that processes here may have in all: the machine's, or less in a
    container."""
    total = whole_memory()
    return min(total, memory_limit() or total)


def package_version(name: str) -> str | None:
    """The version of an installed package, without importing it; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model(file: Path = Path("/proc/cpuinfo")) -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read(file), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return f"{platform.system()} {platform.version()}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
