"""Which accelerator torch sees, asked in a process of its own: a broken torch or a hanging driver
cannot take the command with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bf16prof.cases import Job, Refusal
from bf16prof.engine.constraints import refused_error
from bf16prof.engine.engines import engine_of
from bf16prof.errors import InputError, install_hint
from bf16prof.measuring.machine import package_version, usable_memory
from bf16prof.processes import child_environment, require_proc
from bf16prof.profiles.models import HuggingFaceSettings, Model
from bf16prof.profiles.optimizers import all_optimizers
from bf16prof.profiles.schema import Profile
from bf16prof.vocabulary import Device

TIMEOUT_S = 120.0
RANK_BYTES = 200 * 2**20
"""Less than what a process holds that has imported torch and DeepSpeed (243 MiB of torch 2.13 and
DeepSpeed 0.19.8 on a CPU)."""

_QUESTION = """
from bf16prof.processes import die_with_parent
die_with_parent()
import json, os, torch
cuda = torch.cuda
wanted = os.environ.get("DS_ACCELERATOR") != "cpu" and cuda.is_available()
gpus = [cuda.get_device_properties(i) for i in range(cuda.device_count())] if wanted else []
try:
    fp16 = bool(gpus) or torch.ops.mkldnn._is_mkldnn_fp16_supported()
except Exception:
    fp16 = False
print(json.dumps({"cuda": torch.version.cuda, "fp16": fp16, "gpus": [[g.name, g.total_memory, g.major, g.minor] for g in gpus]}))
"""


@dataclass(frozen=True)
class TorchGpu:
    """One GPU as torch sees it: name, total bytes, compute capability."""

    name: str
    total_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True)
class TorchAnswer:
    """torch's CUDA version (`None` for a CPU build) and its GPUs: none where DeepSpeed is told to
    use the CPU (`DS_ACCELERATOR=cpu`).

    `fp16`: whether DeepSpeed runs fp16 here (deepspeed/accelerator, is_fp16_supported): on every
    GPU, and where oneDNN has it for the CPU.
    """

    cuda: str | None
    gpus: tuple[TorchGpu, ...]
    fp16: bool = True

    @property
    def device(self) -> Device:
        """What ranks on this machine run on."""
        return Device.GPU if self.gpus else Device.CPU


def ask_torch(on: Callable[[list[str]], list[str]] = lambda words: words) -> TorchAnswer | str:
    """What torch says of its GPUs, or one line on why it could not be asked. Takes as long as
    importing torch once.

    `on` makes of a command one that runs it on another host. Here, the process ends with this one.
    """
    if package_version("torch") is None:
        return "torch is not installed"
    try:
        asked = on(words := [sys.executable, "-c", _QUESTION])
        done = run(asked, TIMEOUT_S, child_environment() if asked == words else None)
    except subprocess.TimeoutExpired:
        return f"no answer in {TIMEOUT_S:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    answer = json.loads(done.stdout.splitlines()[-1])
    gpus = tuple(TorchGpu(name, total, (major, minor)) for name, total, major, minor in answer["gpus"])
    return TorchAnswer(answer["cuda"], gpus, answer["fp16"])


def require_packages(purpose: str) -> None:
    """Raise `InputError` with a hint unless torch and DeepSpeed are installed."""
    for package in ("torch", "deepspeed"):
        _require(package, purpose, install_hint("train"))


def require_engine(profile: Profile) -> None:
    """Raise `InputError` with a hint unless the engine of a profile is installed."""
    extra = "megatron" if profile.is_for_megatron else "train"
    _require(profile.engine, f"--engine {profile.engine}", install_hint(extra))


def require_model_library(model: Model) -> None:
    """Raise `InputError` with a hint unless the library that builds this model is installed."""
    if isinstance(model, HuggingFaceSettings):
        _require("transformers", "a Hugging Face configuration", install_hint("hf"))


def require_optimizer_libraries(jobs: Sequence[Job]) -> None:
    """Raise `InputError` with a hint unless the libraries whose optimizers these jobs are handed
    are installed."""
    handed = {job.recipe.optimizer or job.profile.optimizer.library: job.recipe for job in jobs}
    for id_, recipe in handed.items():
        if id_:
            layout = all_optimizers()[id_]
            named = f"{recipe.id if recipe.optimizer else 'optimizer.library'} ({layout.class_})"
            _require(layout.distribution, named, f"{install_hint('recipes')}, or only '{layout.requirement}'")


def can_be_built(job: Job) -> bool:
    """Whether the libraries are installed that a job's model and optimizer need beside
    DeepSpeed."""
    try:
        require_model_library(job.profile.model)
        require_optimizer_libraries([job])
    except InputError:
        return False
    return True


def require_dtypes(jobs: Sequence[Job], torch: TorchAnswer) -> tuple[list[Job], list[Refusal]]:
    """The jobs whose dtype this machine has, and refusals of the others. Raises `Refused` when none
    is left."""
    lacking = [job for job in jobs if not torch.fp16 and engine_of(job).facts(job).parameter_dtype == "fp16"]
    refused = [Refusal(job.case, "DeepSpeed runs no fp16 on this CPU, where oneDNN has none; simulate does") for job in lacking]
    if len(lacking) == len(jobs):
        raise refused_error(refused[0])
    return [job for job in jobs if job not in lacking], refused


def require_memory(ranks: int) -> None:
    """Raise `InputError` when not even torch and DeepSpeed of so many ranks on the CPU fit this
    machine."""
    memory = usable_memory()
    if ranks * RANK_BYTES > memory:
        needs = f"{ranks} ranks take {ranks * RANK_BYTES >> 30} GiB for torch and DeepSpeed alone"
        raise InputError(f"{needs}, and this machine has {memory >> 30} GiB", hint="fewer --nproc-per-node; simulate runs any number")


def _require(package: str, purpose: str, hint: str) -> None:
    if package_version(package) is None:
        raise InputError(f"{purpose} needs {package}, which is not installed", hint=hint)


def require_torch(on: Callable[[list[str]], list[str]] = lambda words: words) -> TorchAnswer:
    """What torch says, here or `on` another host; `InputError` with a hint when torch or DeepSpeed
    is missing or does not work."""
    require_packages("measuring")
    require_proc("measuring")
    answer = ask_torch(on)
    if isinstance(answer, str):
        raise InputError(f"torch does not work: {answer}", hint="bf16prof doctor says what this machine can do")
    return answer


def run(command: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and keep what it prints."""
    return subprocess.run(
        list(command), capture_output=True, text=True, errors="replace", timeout=timeout, check=False, stdin=subprocess.DEVNULL, env=env
    )
