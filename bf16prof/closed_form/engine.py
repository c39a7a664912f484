"""A job's engine: its configuration over the parameters of the model. What it allocates, its
wrapper says (`wrappers/`, `megatron.py`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import Anatomy, anatomy_of
from bf16prof.engine.config import EngineFacts, engine_facts, zero_settings
from bf16prof.engine.engines import engine_of
from bf16prof.models.shapes import ParameterSpec
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.vocabulary import Device

FP32_BYTES = 4
FP64_BYTES = 8

REMEMBERED = 256
"""So many engines, and what follows from each, are remembered."""

_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_ENGINES: dict[Hashable, Engine] = {}


@dataclass(frozen=True, eq=False)
class Engine:
    """A configuration of DeepSpeed, or megatron-core's options, over the parameters of a model. The
    optimizer has those that are trained.

    One object for all micro-batches and lengths, which change nothing of it, so that what follows
    from it can be remembered.
    """

    config: Mapping[str, Any]
    parameters: Sequence[ParameterSpec]
    world_size: int
    device: Device = Device.GPU
    given: Anatomy | None = None
    made: EngineFacts | None = None
    """What the engine makes of the job; where it is not given, what DeepSpeed makes of the
    configuration."""

    @classmethod
    def of(cls, job: Job) -> Engine:
        """The engine of a job whose model's parameters are known."""
        anatomy, chosen = anatomy_of(job), engine_of(job)
        config = chosen.settings(job)
        config.pop(_MICRO_BATCH, None)
        key = (chosen.package, anatomy, job.case.world_size, job.device, json.dumps(config, default=str))
        if key not in _ENGINES:
            if len(_ENGINES) >= REMEMBERED:
                _ENGINES.clear()
            _ENGINES[key] = cls(config, anatomy.parameters, job.case.world_size, job.device, anatomy, chosen.facts(job))
        return _ENGINES[key]

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """The model that has these parameters."""
        return self.given or Anatomy(self.parameters)

    @functools.cached_property
    def facts(self) -> EngineFacts:
        """What DeepSpeed makes of the configuration."""
        return self.made or engine_facts(self.config)

    @functools.cached_property
    def zero(self) -> ZeroSettings:
        """Its ZeRO settings."""
        return zero_settings(self.config)

    @functools.cached_property
    def numels(self) -> list[int]:
        """Elements of each parameter that is trained."""
        return [p.numel for p in self.parameters if p.trainable]

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each parameter that is trained."""
        return [p.shape for p in self.parameters if p.trainable]

    @functools.cached_property
    def all_numels(self) -> list[int]:
        """Elements of each parameter, trained or not."""
        return [p.numel for p in self.parameters]

    @functools.cached_property
    def frozen(self) -> list[int]:
        """Elements of each parameter that is not trained: no optimizer knows it, and it stays where
        the model has it."""
        return [p.numel for p in self.parameters if not p.trainable]


def block_bytes(job: Job) -> int:
    """What the allocator rounds to."""
    return ALLOCATOR_BLOCK_BYTES if job.device is Device.GPU else 1
