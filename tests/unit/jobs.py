"""Profiles and jobs to test with: small sizes that divide nothing evenly, so that padding shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.roofline import engine_work
from bf16prof.closed_form.training import walked
from bf16prof.profiles.gpus import GPUS_PER_NODE, find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.models import ModelSettings
from bf16prof.profiles.schema import Profile
from bf16prof.step_records import StepWork
from bf16prof.vocabulary import Device, Offload

SMALL_MODEL = {
    "family": "transformer-postln",
    "hidden_size": 12,
    "num_layers": 3,
    "num_heads": 3,
    "vocab_size": 31,
    "max_sequence_length": 9,
}


def write_profile(path: Path, text: str = "", **model: Any) -> Path:
    """A valid profile file of a small model, some of its sizes replaced, with more TOML after
    it."""
    sizes = {**SMALL_MODEL, **model}
    lines = ["[model]", *(f"{key} = {_toml(value)}" for key, value in sizes.items()), "[workload]", "sequence_length = 5", text]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def small_profile(model: dict[str, Any] | None = None, **zero: Any) -> Profile:
    """The small model as a profile; keywords are ZeRO settings."""
    return Profile.model_validate(
        {
            "name": "small",
            "model": model or SMALL_MODEL,
            "workload": {"sequence_length": 5, "micro_batch_size": 2},
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000, **zero}},
        }
    )


def profile(name: str = "cpu-demo", **overrides: Any) -> Profile:
    """A preset with overrides; a double underscore in a keyword stands for a dot."""
    return load_profile(name, [Override(key.replace("__", "."), value, "test") for key, value in overrides.items()]).profile


def model_settings(**sizes: Any) -> ModelSettings:
    """The small model with other sizes."""
    return ModelSettings.model_validate({**SMALL_MODEL, **sizes})


def job(
    settings: Profile,
    stage: int = 3,
    world: int = 4,
    recipe: str = "bf16-fp32-master",
    *,
    offload: Offload | None = None,
    device: Device = Device.GPU,
) -> Job:
    """One job over a profile, for an H100 unless the device is a CPU."""
    gpu = find_gpu("h100-80gb") if device is Device.GPU else None
    return expand(Selection(settings, [stage], [world], [recipe], device, gpu, offload))[0]


def step_work(job: Job, per_node: int = GPUS_PER_NODE) -> StepWork:
    """The work of one rank in one optimizer step of a job."""
    engine = Engine.of(job)
    return engine_work(job, engine, walked(job, engine), per_node)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
