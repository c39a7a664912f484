"""Who trains a job: DeepSpeed, or megatron-core beside it. `engine_of` chooses; everybody else asks
the `TrainingEngine`.

What torch has to be there for is imported when it is asked for. `build` returns an object that our
training loop drives, whichever engine it is: it is called as its `module` is, `backward` and `step`
end every micro-step, and `attribution` knows what it holds.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, ClassVar

from bf16prof.cases import Job
from bf16prof.engine.config import EngineFacts, deepspeed_config, engine_facts
from bf16prof.engine.megatron.settings import MODULE, PACKAGE, megatron_facts, megatron_optimizer_words, megatron_refusal, settings_of


@dataclass(frozen=True)
class EngineWords:
    """What a record says of an engine: who updates the weights, in words, and the settings of the
    one or the other."""

    optimizer: str
    deepspeed: dict[str, Any] = field(default_factory=dict)
    megatron: dict[str, Any] = field(default_factory=dict)


class TrainingEngine(ABC):
    """What is asked of an engine about a job."""

    package: ClassVar[str]
    """As pip calls it."""
    name: ClassVar[str]
    """As people call it."""
    depends_on_recipe: ClassVar[bool] = True
    """Whether what it refuses of one recipe it may do with another."""

    @abstractmethod
    def facts(self, job: Job) -> EngineFacts:
        """Dtypes, wrapper and optimizer."""

    @abstractmethod
    def settings(self, job: Job) -> dict[str, Any]:
        """Its configuration: DeepSpeed's JSON, or options by name."""

    @abstractmethod
    def refusal(self, job: Job) -> str | None:
        """Why it cannot run this job as described; `None` if it can."""

    @abstractmethod
    def words(self, job: Job) -> EngineWords:
        """What a record says of it."""

    @abstractmethod
    def import_libraries(self, job: Job) -> None:
        """Import what it needs, so that what a library allocates for itself is not taken for the
        job's."""

    @abstractmethod
    def build(self, job: Job) -> Any:
        """It, with the job's model in it; the process group must be initialised."""

    def version(self) -> str:
        """What is installed of it."""
        return f"{self.name} {metadata.version(self.package)}"


class OnDeepSpeed(TrainingEngine):
    """DeepSpeed."""

    package: ClassVar[str] = "deepspeed"
    name: ClassVar[str] = "DeepSpeed"

    def facts(self, job: Job) -> EngineFacts:
        """What it makes of its JSON."""
        return engine_facts(deepspeed_config(job))

    def settings(self, job: Job) -> dict[str, Any]:
        """Its JSON."""
        return deepspeed_config(job)

    def refusal(self, job: Job) -> str | None:
        """The rules of `constraints.py`."""
        from bf16prof.engine.constraints import deepspeed_refusal

        return deepspeed_refusal(job)

    def words(self, job: Job) -> EngineWords:
        """Its JSON with ZeRO's defaults filled in."""
        from bf16prof.engine.workload import optimizer_words, resolved

        config = deepspeed_config(job)
        return EngineWords(optimizer_words(config), deepspeed=resolved(config))

    def import_libraries(self, job: Job) -> None:
        """A library's optimizer, which it is handed."""
        from bf16prof.engine.client import import_client_optimizer

        import_client_optimizer(deepspeed_config(job))

    def build(self, job: Job) -> Any:
        """Its engine."""
        from bf16prof.engine.training import build_deepspeed_engine

        return build_deepspeed_engine(job)


class OnMegatron(TrainingEngine):
    """megatron-core, data parallel."""

    package: ClassVar[str] = PACKAGE
    name: ClassVar[str] = PACKAGE
    depends_on_recipe: ClassVar[bool] = False

    def facts(self, job: Job) -> EngineFacts:
        """The recipe's dtypes, and one of its two optimizers."""
        return megatron_facts(job)

    def settings(self, job: Job) -> dict[str, Any]:
        """The options that the job sets."""
        return settings_of(job)

    def refusal(self, job: Job) -> str | None:
        """What it does not have, and what nobody has held against ranks."""
        return megatron_refusal(job)

    def words(self, job: Job) -> EngineWords:
        """Its options."""
        return EngineWords(megatron_optimizer_words(job), megatron=settings_of(job))

    def import_libraries(self, job: Job) -> None:
        """Its optimizer."""
        importlib.import_module(MODULE)

    def build(self, job: Job) -> Any:
        """Its two wrappers of model and optimizer as one engine."""
        from bf16prof.engine.megatron.engine import build_megatron_engine

        return build_megatron_engine(job)


ENGINES: Mapping[str, TrainingEngine] = {each.package: each for each in (OnDeepSpeed(), OnMegatron())}
"""By the name that a profile and `--engine` have."""


def engine_of(job: Job) -> TrainingEngine:
    """Who trains a job."""
    return ENGINES[job.profile.engine]
