"""Precision recipes: which dtype every component has, what runs them, and where they come from
(`recipes.toml`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bf16prof.errors import Refused
from bf16prof.profiles.names import named
from bf16prof.profiles.shipped import shipped_table
from bf16prof.vocabulary import Component

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int16": 2, "none": 0}
DTYPE_COMPONENTS = (
    Component.PARAMETERS,
    Component.GRADIENTS,
    Component.MASTER_PARAMETERS,
    Component.MASTER_GRADIENTS,
    Component.MOMENTUM,
    Component.VARIANCE,
)


@dataclass(frozen=True)
class Recipe:
    """One precision recipe.

    * `dtypes`: by component, `none` where there is no such tensor. `extra`: further tensors that
      its optimizer keeps, by name.
    * `autocast`: the dtype that `torch.autocast` computes in, `none` without it.
    * `cast`: the dtype that the model's parameters are cast to before DeepSpeed is given it, so
      that it keeps no other copy; empty if not.
    * `optimizer`: the library's optimizer that runs it (`optimizers.toml`); empty for DeepSpeed's
      or PyTorch's, as the profile says.
    * `learning`: how its updates reach the weights - fp32 master, bf16 only, stochastic rounding,
      compensated.
    * `deepspeed`: the fragment of DeepSpeed's JSON that runs it; `None` where DeepSpeed cannot, and
      then `not_run` says why.
    * `megatron`: the options of megatron-core that run it (`--engine megatron-core`); `None` where
      it does not.
    * `partitioned`: the components that an engine other than DeepSpeed's cuts into as many parts as
      there are ranks; see `over_ranks`.
    * `zero`: what is different at ZeRO stages 1 to 3, if anything: the fragment (`deepspeed`) and
      `dtypes`. See `at`.
    """

    id: str
    title: str
    learning: str
    source: str
    dtypes: dict[Component, str]
    autocast: str = "none"
    extra: dict[str, str] = field(default_factory=dict)
    cast: str = ""
    optimizer: str = ""
    deepspeed: Mapping[str, Any] | None = None
    zero: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    megatron: Mapping[str, Any] | None = None
    not_run: str = ""
    partitioned: Sequence[str] = ()

    @property
    def is_json(self) -> bool:
        """Whether DeepSpeed's JSON says all of it."""
        return self.deepspeed is not None and not self.cast and not self.optimizer

    def at(self, stage: int) -> Recipe:
        """The recipe as it runs at that ZeRO stage: where it is a different one there, that one."""
        if stage == 0 or not self.zero:
            return self
        dtypes = {**self.dtypes, **{Component(name): dtype for name, dtype in self.zero["dtypes"].items()}}
        return dataclasses.replace(self, dtypes=dtypes, deepspeed=self.zero["deepspeed"], cast="", zero={})

    def bytes_per_parameter(self) -> dict[str, int]:
        """Bytes that one parameter costs in each component, unpartitioned, at the moment when all
        of them exist."""
        extra = {name: DTYPE_BYTES[dtype] for name, dtype in self.extra.items()}
        return {str(c): DTYPE_BYTES[self.dtypes[c]] for c in DTYPE_COMPONENTS} | extra

    @property
    def steady_bytes_per_parameter(self) -> int:
        """Bytes of one parameter between steps, all partitions together: everything but the
        transient master gradients.

        This is what "bytes per parameter" means wherever a recipe's are shown (`bytes_in_words`).
        What a job holds may be less: the gradients of stages 0 to 2 are gone after a step, and only
        ZeRO makes a master copy of fp32 parameters.
        """
        return sum(size for name, size in self.bytes_per_parameter().items() if name != Component.MASTER_GRADIENTS)

    @property
    def bytes_in_words(self) -> str:
        """Bytes of one parameter between steps and, if there are such, those of the transient
        master gradients: "16 + 4 in the step"."""
        transient = sum(self.bytes_per_parameter().values()) - self.steady_bytes_per_parameter
        return f"{self.steady_bytes_per_parameter}{f' + {transient} in the step' if transient else ''}"

    @property
    def over_ranks(self) -> tuple[int, int]:
        """Bytes of one parameter that every rank keeps, and those that are cut into d parts for d
        ranks."""
        cut = sum(size for name, size in self.bytes_per_parameter().items() if name in self.partitioned)
        return self.steady_bytes_per_parameter - cut, cut


BYTES_HEADER = "bytes per parameter (between steps)"
"""Over a column of `Recipe.bytes_in_words`."""

DS_CONFIG = "ds-config"
"""The id under which a case runs whose precision a DeepSpeed JSON of the user's own describes and
no recipe does."""


@functools.cache
def all_recipes() -> dict[str, Recipe]:
    """Every recipe by id, in the order of the file."""
    table = shipped_table("recipes.toml")
    return {id_: _recipe(id_, row) for id_, row in table.items()}


def find_recipe(id_: str) -> Recipe:
    """The recipe of that id. Raises `InputError` naming the known ones."""
    if id_ == DS_CONFIG:
        return _of_the_user()
    return named("recipe", id_, all_recipes())


def _of_the_user() -> Recipe:
    """What stands for a precision that is no recipe's; what it is lies in the profile
    (`deepspeed.more`)."""
    title = "the precision of the user's DeepSpeed JSON"
    return Recipe(DS_CONFIG, title, "not known", "--ds-config", dict.fromkeys(DTYPE_COMPONENTS, "none"), deepspeed={})


def runnable_recipes() -> dict[str, Recipe]:
    """The recipes that a DeepSpeed engine can run."""
    return {id_: recipe for id_, recipe in all_recipes().items() if recipe.deepspeed is not None}


def megatron_recipes() -> dict[str, Recipe]:
    """The recipes that megatron-core can run."""
    return {id_: recipe for id_, recipe in all_recipes().items() if recipe.megatron is not None}


def require_runnable(recipe: Recipe, *, on_megatron: bool = False) -> Recipe:
    """The recipe itself, or `Refused` with the reason and the runnable recipes that come nearest to
    it."""
    if on_megatron and recipe.megatron is None:
        why = recipe.not_run or "it is DeepSpeed's"
        raise Refused(f"megatron-core does not run {recipe.id}: {why}", hint="it runs " + ", ".join(megatron_recipes()))
    if not on_megatron and recipe.deepspeed is None:
        other = "--engine megatron-core runs it; " if recipe.megatron is not None else ""
        hint = f"{other}nearest that run: " + ", ".join(nearest(recipe, list(runnable_recipes().values()))[:3])
        raise Refused(f"no DeepSpeed engine runs {recipe.id}: {recipe.not_run}", hint=hint)
    return recipe


def nearest(recipe: Recipe, candidates: list[Recipe]) -> list[str]:
    """The ids of other recipes, those that share most dtypes first, and of these those that learn
    alike."""

    def shared(other: Recipe) -> tuple[int, bool]:
        dtypes = sum(recipe.dtypes[c] == other.dtypes[c] for c in DTYPE_COMPONENTS) * 2
        return dtypes + (recipe.autocast == other.autocast), recipe.learning == other.learning

    return [other.id for other in sorted(candidates, key=shared, reverse=True) if other.id != recipe.id]


def _recipe(id_: str, row: dict[str, Any]) -> Recipe:
    dtypes = {c: row["dtypes"][c] for c in DTYPE_COMPONENTS}
    assert ("deepspeed" in row) != ("not_run" in row), f"recipe {id_} needs either deepspeed or not_run"
    return Recipe(id=id_, **{**row, "dtypes": dtypes})
