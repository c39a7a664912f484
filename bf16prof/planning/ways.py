"""The ways to lay out a job that a plan chooses from: how ranks share a batch, and what keeps
activations small in the model.

They are data. Whether DeepSpeed runs one is for its own rules to say (`engine/constraints.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bf16prof.parallelism import FLAGS
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings, ModelSettings
from bf16prof.profiles.schema import ParallelSettings, Profile


@dataclass(frozen=True)
class Saver:
    """A key of the workload that keeps activations small, its value, and the flag that says it.
    `package`: what it needs installed."""

    key: str
    value: str | bool
    flags: tuple[str, str]
    package: str = ""


SAVERS = (
    Saver("liger", "loss", ("--liger", "loss"), "liger-kernel"),
    Saver("tiled_mlp", True, ("--set", "workload.tiled_mlp=true")),
)
"""As ALST uses them, what helps most first: a way with one has those before it as well."""


@dataclass(frozen=True)
class Way:
    """So many ranks share one dimension (none if its name is empty), and these savers are on the
    model."""

    dimension: str = ""
    size: int = 1
    savers: tuple[Saver, ...] = ()

    @property
    def dimension_flags(self) -> tuple[str, ...]:
        """The flag of the dimension."""
        return (FLAGS[self.dimension], str(self.size)) if self.dimension else ()

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that say it."""
        return (*self.dimension_flags, *self.saver_flags)

    @property
    def saver_flags(self) -> tuple[str, ...]:
        """The flags of what keeps activations small."""
        return tuple(word for saver in self.savers for word in saver.flags)

    def is_more_than(self, other: Way) -> bool:
        """Whether it is the same dimension with these savers at least, so that it does not run
        where the other does not."""
        return self.dimension == other.dimension and self.savers[: len(other.savers)] == other.savers

    def laid_over(self, profile: Profile) -> Profile:
        """The profile laid out like this."""
        parallel = {self.dimension: self.size} if self.dimension else {}
        changed = {
            "parallel": profile.parallel.model_copy(update=parallel),
            "workload": profile.workload.model_copy(update={saver.key: saver.value for saver in self.savers}),
        }
        return profile.model_copy(update=changed)


def ways(profile: Profile, world_size: int, packages: frozenset[str], *, alone: bool = False) -> Iterator[Way]:
    """Every way, with the profile's own, which shares nothing, first if `alone`; `packages`: those
    of the savers' that are installed."""
    savers = savers_of(profile, packages)
    chains = [savers[:count] for count in range(len(savers) + 1)]
    for dimension, size in [("", 1), *_dimensions(profile, world_size)]:
        yield from (Way(dimension, size, chain) for chain in chains if alone or dimension or chain)


def savers_of(profile: Profile, packages: frozenset[str]) -> tuple[Saver, ...]:
    """The savers that a profile's model could have and has not. Another fused loss stays in the
    place of Liger's."""
    workload = profile.workload
    if not isinstance(profile.model, HuggingFaceSettings) or profile.model.inputs:
        return ()
    taken = {"liger": workload.liger != "none" or workload.fused_loss != "none", "tiled_mlp": workload.tiled_mlp}
    return tuple(saver for saver in SAVERS if not taken[saver.key] and (not saver.package or saver.package in packages))


def _dimensions(profile: Profile, world_size: int) -> Iterator[tuple[str, int]]:
    """Every divisor of the ranks for every dimension that makes sense for such a model.

    A function of one's own says itself how it is cut into stages, and over how many ranks its
    experts lie.
    """
    has_experts = isinstance(profile.model, HuggingFaceSettings) and any("expert" in key for key in profile.model.text)
    names = {
        "sequence": not isinstance(profile.model, FactorySettings),
        "tensor": not isinstance(profile.model, FactorySettings),
        "pipeline": not isinstance(profile.model, FactorySettings),
        "expert": has_experts,
    }
    assert names.keys() == ParallelSettings.model_fields.keys(), "every dimension is here"
    sizes = [size for size in range(2, world_size + 1) if world_size % size == 0]
    yield from ((name, size) for name, is_possible in names.items() if is_possible for size in sizes)


@dataclass(frozen=True)
class Sizes:
    """What activations depend on at least: layers, the width of what goes from one to the next, the
    words."""

    layers: int
    hidden: int
    vocabulary: int


def sizes_of(profile: Profile) -> Sizes | None:
    """The sizes of a profile's model, where its configuration says them."""
    model = profile.model
    if isinstance(model, ModelSettings):
        return Sizes(model.num_layers, model.hidden_size, model.vocab_size)
    if not isinstance(model, HuggingFaceSettings) or model.inputs:
        return None
    layers, hidden, vocabulary = (model.text.get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    if isinstance(layers, int) and isinstance(hidden, int) and isinstance(vocabulary, int):
        return Sizes(layers, hidden, vocabulary)
    return None
