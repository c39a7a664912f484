"""What is planned, and the settings that there are to choose from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from bf16prof.cases import Job, Selection, expand
from bf16prof.plans import Room
from bf16prof.profiles.beside import beside_the_allocator
from bf16prof.profiles.gpus import GPUS_PER_NODE, Gpu
from bf16prof.profiles.schema import Profile
from bf16prof.verdict import Allocator
from bf16prof.vocabulary import Device, Offload


@dataclass(frozen=True)
class Question:
    """What is planned: a profile on a GPU, and which stages, recipes, micro-batches, ... to choose
    from.

    * `micro_batches`: in sequences per rank, ascending. `offloads`, `checkpointing`: as in the
      profile if there is one only.
    * `margin`: the share of the allocator's memory that is to stay free; the usual one if not given
      (`verdict.MARGIN`).
    * `may_change_init`: whether ZeRO-3 may be planned inside `zero.Init` where it does not fit
      otherwise.
    * `assumed`: what nobody said, in a word each.
    * `expandable`: the allocator has expandable segments; a plan's peak does not depend on it, what
      is reserved does.
    * `train_batch_size`: sequences of the whole job in a step, where a DeepSpeed JSON fixes it; the
      micro-steps follow from it.
    * `gpus_per_node`: so many share a node.
    """

    profile: Profile
    gpu: Gpu
    stages: tuple[int, ...]
    recipes: tuple[str, ...]
    micro_batches: tuple[int, ...]
    checkpointing: tuple[bool, ...] = (False, True)
    offloads: tuple[Offload, ...] = tuple(Offload)
    margin: float | None = None
    may_change_init: bool = True
    assumed: tuple[str, ...] = ()
    train_batch_size: int | None = None
    expandable: bool = False
    gpus_per_node: int = GPUS_PER_NODE

    @property
    def allocator(self) -> Allocator:
        """How the caching allocator is set, and the margin."""
        return Allocator(self.expandable, self.margin)

    def room(self, world_size: int) -> Room:
        """What there is to allocate on each of so many GPUs."""
        margin = self.allocator.share_to_keep
        beside = beside_the_allocator(world_size, self.gpu.compute_capability)
        return Room(self.gpu.id, self.gpu.memory_bytes, beside, margin, self.expandable)

    def combinations(self, world_size: int) -> Iterator[Setting]:
        """Every combination but for the micro-batch, each with the smallest one that the batch size
        of the job allows."""
        sizes = self.sizes(world_size)
        axes = itertools.product(self.stages, self.recipes, self.offloads, self.checkpointing)
        for stage, recipe, offload, checkpointing in axes if sizes else ():
            workload = self.profile.workload
            yield Setting(
                stage, world_size, recipe, offload, sizes[0], checkpointing, workload.zero_init and stage == 3, workload.sequence_length
            )

    def sizes(self, world_size: int) -> list[int]:
        """The micro-batches that so many ranks can have."""
        train = self.train_batch_size
        readers = world_size // self.profile.parallel.counted_once
        return [size for size in self.micro_batches if train is None or train % (size * readers) == 0]

    def sequences(self, job: Job) -> int:
        """The sequences of a whole job in a step, as a DeepSpeed JSON counts them."""
        workload, readers = job.profile.workload, job.case.world_size // job.profile.parallel.counted_once
        return workload.micro_batch_size * workload.gradient_accumulation_steps * readers

    def job(self, setting: Setting, profile: Profile | None = None) -> Job:
        """The job of a setting; with `profile`, that one in the place of the question's."""
        profile, train = profile or self.profile, self.train_batch_size
        readers = setting.world_size // profile.parallel.counted_once
        changes = {
            "micro_batch_size": setting.micro_batch_size,
            "activation_checkpointing": setting.checkpointing,
            "zero_init": setting.zero_init,
            "sequence_length": setting.sequence_length,
        }
        if train is not None:
            changes["gradient_accumulation_steps"] = max(1, train // (setting.micro_batch_size * readers))
        workload = profile.workload.model_copy(update=changes)
        profile = profile.model_copy(update={"workload": workload})
        sizes = [setting.stage], [setting.world_size], [setting.recipe]
        return expand(Selection(profile, *sizes, Device.GPU, self.gpu, setting.offload, None, self.assumed))[0]


@dataclass(frozen=True)
class Setting:
    """One choice of everything. `micro_batch_size` in sequences, `sequence_length` in tokens."""

    stage: int
    world_size: int
    recipe: str
    offload: Offload
    micro_batch_size: int
    checkpointing: bool
    zero_init: bool
    sequence_length: int

    @property
    def can_be_inside_zero_init(self) -> bool:
        """Whether ZeRO-3 builds the whole model first, and need not."""
        return self.stage == 3 and not self.zero_init

    def but(self, **changes: object) -> Setting:
        """The same with these changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def by_dry_runs(profile: Profile) -> bool:
    """Whether the peaks of such jobs have no closed form, as their ranks share a batch or have
    experts of their own."""
    return profile.parallel.shared > 1 or profile.parallel.expert > 1


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`."""
    return tuple(1 << power for power in range(most.bit_length()))
