"""What a signature is the answer to: everything that decides the bytes of a forward and backward
pass, and a name for it.

Two halves: the inquiry (model, batch, precision, device) and the code that answers it (versions of
packages, our own source). A file in the cache is named after both, so that no stale answer is ever
taken for a fresh one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bf16prof
from bf16prof.cases import Job
from bf16prof.engine.batch import batch_spec
from bf16prof.engine.config import deepspeed_config, engine_facts, zero_settings
from bf16prof.profiles.gpus import has_small_shared_memory
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings, Model
from bf16prof.profiles.schema import ParallelSettings
from bf16prof.reductions import processor_of

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "liger_kernel")
"""Whose code runs in a trace."""

DIGITS = 20

OFF: tuple[object, ...] = (None, False, "", "none", [], {})
"""What is left out of a digest: an answer from before something could be asked at all is that of
asking for none of it."""


@dataclass(frozen=True)
class Inquiry:
    """What is asked, by its digest; `is_lasting`: whether nothing else decides the answer.

    What a function of the user's own builds depends on all that it reads as well (`sources.py`).
    """

    digest: str
    is_lasting: bool
    job: Job = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, job: Job) -> Inquiry:
        """What has to be known of a job's model. Jobs that differ in ranks, optimizer, recipe, ...
        alone may ask the same."""
        job = _own_tokens(_one_micro_step(job))
        return cls(_digest(_content(job)), not isinstance(job.profile.model, FactorySettings), job)

    @property
    def name(self) -> str:
        """What its file is called on this machine."""
        return f"{self.digest}-{environment()}"

    @functools.cached_property
    def general(self) -> str:
        """The digest of the same question for any batch and length, and any GPU that runs the same
        kernels; empty where only an exact answer is one: on CPU ranks, whose kernels are asked for
        their scratch, and of a function of the user's own."""
        return _digest(content) if (content := self._any_batch()) else ""

    @functools.cached_property
    def as_shipped(self) -> tuple[tuple[str, bool], ...]:
        """Digests under which the general answer may ship, the nearest first; `True`: it is one in
        bf16, and must have been shown to be the same in fp16.

        Compute capabilities 8.6 to 8.9 and 12.x run the attention kernels of 8.0, but for heads of
        more than 192 elements that are no more than 224 or have dropout. No preset has such heads.
        """
        content, found = self._any_batch(), dict[str, bool]()
        if not content:
            return ()
        of_an_a100 = [[8, 0]] if has_small_shared_memory(tuple(content["device"])) else []
        for device in (content["device"], *of_an_a100):
            on = content | {"device": device}
            found.setdefault(_digest(on), False)
            found.setdefault(_digest(_in_bf16(on)), True)
        return tuple(found.items())

    def _any_batch(self) -> dict[str, Any]:
        gpu = self.job.gpu
        if gpu is None or not self.is_lasting:
            return {}
        inputs = {name: each.dtype for name, each in batch_spec(self.job).items()}
        return _content(self.job) | {"batch": inputs, "device": list(gpu.compute_capability)}

    @property
    def point(self) -> tuple[int, int]:
        """Sequences of the micro-batch, and their length."""
        workload = self.job.profile.workload
        return workload.micro_batch_size, workload.sequence_length


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in content.items() if value not in OFF}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _in_bf16(content: dict[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = json.loads(json.dumps(content).replace('"fp16"', '"bf16"').replace('"float16"', '"bfloat16"'))
    return renamed


def _one_micro_step(job: Job) -> Job:
    workload = job.profile.workload.model_copy(update={"gradient_accumulation_steps": 1})
    return dataclasses.replace(job, profile=job.profile.model_copy(update={"workload": workload}))


def _own_tokens(job: Job) -> Job:
    """The job on the tokens of one rank alone: what ranks that share sequences return, and what
    their modules hold, is that of these."""
    ranks, workload = job.case.sequence_parallel, job.profile.workload
    if ranks == 1:
        return job
    own = workload.model_copy(update={"sequence_length": workload.sequence_length // ranks})
    alone = job.profile.model_copy(update={"workload": own, "parallel": ParallelSettings()})
    return dataclasses.replace(job, profile=alone, case=dataclasses.replace(job.case, sequence_parallel=1))


def _content(job: Job) -> dict[str, Any]:
    config = deepspeed_config(job)
    facts, workload = engine_facts(config), job.profile.workload
    is_third = job.case.zero_stage == 3
    return {
        "model": job.profile.model.model_dump(mode="json", exclude_defaults=True),
        "batch": {name: [list(each.shape), each.dtype] for name, each in batch_spec(job).items()},
        "checkpointing": [workload.use_reentrant, workload.checkpoint_every_n_layers] if workload.activation_checkpointing else [],
        "peft": job.profile.peft.model_dump(mode="json") if job.profile.peft else {},
        "keeps_outputs": workload.keeps_outputs,
        "parameters": facts.parameter_dtype,
        "autocast": facts.autocast_dtype,
        "zero3": [zero_settings(config).memory_efficient_linear] if is_third else [],
        "device": _device(job),
        "liger": workload.liger,
        "zero_init": job.is_inside_zero_init,
        "place": _place(job.profile.model),
    }


def _place(model: Model) -> list[str]:
    """Where a function of the user's own is looked for."""
    return [str(Path.cwd()), os.environ.get("PYTHONPATH", "")] if isinstance(model, FactorySettings) else []


def about(job: Job) -> str:
    """A job's question in a few words: `olmo2, 2 x 256, bf16, ZeRO-3`."""
    facts, workload = engine_facts(deepspeed_config(job)), job.profile.workload
    words = [f"{job.profile.model.family:.60}", f"{workload.micro_batch_size} x {workload.sequence_length}", facts.parameter_dtype]
    words += [f"autocast {facts.autocast_dtype}"] * (facts.autocast_dtype != "none")
    words += [job.profile.peft.method] if job.profile.peft else []
    words += ["Liger's kernels"] * (workload.liger != "none")
    words += ["checkpointing"] * workload.activation_checkpointing + ["ZeRO-3"] * (job.case.zero_stage == 3)
    return ", ".join([*words, str(job.device)])


def _device(job: Job) -> Any:
    """A GPU by what its kernels depend on; a CPU by what it is, and by the threads of a rank, each
    of which has scratch of its own."""
    if job.gpu is not None:
        return [list(job.gpu.compute_capability), dataclasses.astuple(processor_of(job.gpu))]
    from bf16prof.processes import threads_per_rank

    return [_processor(), threads_per_rank(job.case.world_size)]


@functools.cache
def _processor() -> str:
    """The machine's processor, whose instructions decide how its library of matrix products cuts
    them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        chosen = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
        return hashlib.sha256("\n".join(chosen).encode()).hexdigest()[:DIGITS]
    return platform.processor()


@functools.cache
def environment() -> str:
    """A digest of the code that answers: the versions of the packages, and our own source as it
    lies there."""
    folder = Path(bf16prof.__file__).parent
    own = sorted(f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in folder.rglob("*.py"))
    return hashlib.sha256("\n".join([*versions().values(), platform.python_version(), *own]).encode()).hexdigest()[:12]


@functools.cache
def versions() -> Mapping[str, str]:
    """The installed versions, as far as there are any; nothing is imported. Remembered: every job
    of a grid asks."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return MappingProxyType(found)


def can_trace(model: Model) -> bool:
    """Whether what a trace of this model needs is installed."""
    needed = {"torch", "deepspeed"} | ({"transformers"} if isinstance(model, HuggingFaceSettings) else set())
    return needed <= versions().keys()
