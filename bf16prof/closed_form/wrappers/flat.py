"""What the wrappers of stages 1 and 2 share: one flat buffer of parameters, of which each rank
updates a partition."""

from __future__ import annotations

import functools
from abc import ABC
from typing import ClassVar

from bf16prof.closed_form.layout import flat_numel
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.transfers import Ranks
from bf16prof.closed_form.wrappers.wrapper import OptimizerWrapper
from bf16prof.engine import labels
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.step_records import Transfer
from bf16prof.vocabulary import Collective, Phase


class FlatOptimizer(OptimizerWrapper, ABC):
    """The parameters of the model are views of the flat buffer."""

    updated_by: ClassVar[str]
    """The function of DeepSpeed's that gathers the updated parameters."""

    @property
    def layout_settings(self) -> ZeroSettings:
        """What decides how parameters lie in the flat buffer."""
        return self.zero

    @functools.cached_property
    def flat_numel(self) -> int:
        """Elements of the flat buffer, padding included."""
        return flat_numel(self.engine.numels, self.engine.world_size, self.layout_settings, self.parameter_bytes)

    @property
    def partition_numel(self) -> int:
        """Elements of a rank's partition of it."""
        return self.flat_numel // self.engine.world_size

    def flatten_the_model(self, meter: Meter) -> None:
        """Init: the flat buffer is there before the model's own tensors go."""
        meter.take(labels.FLAT_PARAMETERS, self.parameter_bytes * self.flat_numel)
        meter.give(labels.THE_MODEL, *(self.parameter_bytes * n for n in self.engine.numels))

    def updated_parameters(self, ranks: Ranks) -> Transfer:
        """The collective that follows the step."""
        size, source = self.parameter_bytes * self.flat_numel, f"{self.updated_by}: all_gather_dp_groups"
        return ranks.transfer("updated parameters", Collective.ALL_GATHER, Phase.STEP, 1, size, source)
