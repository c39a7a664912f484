"""The model of a profile: one of our families, a Hugging Face configuration, or what a function of
the user's own makes.

Which of the three a `[model]` table describes is told by its keys: `hf_config`, `factory`, else a
family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, PlainValidator, Tag
from pydantic_core import PydanticCustomError

from bf16prof.errors import InputError
from bf16prof.profiles.plain import checked
from bf16prof.profiles.secrets import without_secrets
from bf16prof.profiles.settings import Count, Settings

EXTENTS = ("micro_batch", "sequence")
"""Words for what the workload says, in the shape of an input."""

InputDtype = Literal["bool", "int32", "int64", "float16", "float32", "bfloat16", "fp16", "fp32", "bf16", "parameters"]


def _extent(value: object) -> int | str:
    if value in EXTENTS or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40):
        return value
    raise PydanticCustomError("extent", "expected a whole number above 0, micro_batch or sequence")


def _factory(value: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", value):
        raise PydanticCustomError("factory", "expected PACKAGE.MODULE:FUNCTION")
    return value


def _hf_config(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("model_type"), str):
        raise PydanticCustomError("hf_config", "expected a Hugging Face configuration with a model_type, a string")
    return dict(without_secrets(checked(value)))


class NoVocabulary(InputError):
    """A configuration without a vocabulary, of which no token ids can be drawn; a model that reads
    images has none."""


EXAMPLE_INPUT = "[model.inputs.pixel_values] dtype = 'parameters', shape = ['micro_batch', 3, 224, 224]"
"""How a profile describes a tensor that a model is called with."""


class ModelSettings(Settings):
    """A model of one of our families: the family and its sizes."""

    family: str
    """One of `bf16prof.models.families()`."""
    hidden_size: Count
    num_layers: Annotated[int, Field(gt=0, lt=2**14)]
    num_heads: Count
    vocab_size: Count
    max_sequence_length: Count
    """Rows of the position table, for families that have one; the longest sequence for all."""
    intermediate_size: Count | None = None
    """Width of the MLP; the family's own rule when absent (4 x hidden_size)."""
    num_kv_heads: Count | None = None
    """Key and value heads of grouped-query attention; as many as heads when absent."""
    tie_embeddings: bool | None = None
    """Whether the output head shares the token embedding; the family's own habit when absent."""

    @property
    def longest_sequence(self) -> tuple[str, int] | None:
        """The key that limits the sequence, and the limit."""
        return "model.max_sequence_length", self.max_sequence_length

    @property
    def inputs(self) -> dict[str, InputSettings]:
        """Families are called with token ids."""
        return {}


class InputSettings(Settings):
    """`[model.inputs.NAME]`: a tensor that the model is called with, as the keyword NAME; its
    values are random."""

    dtype: InputDtype
    """`parameters` is the dtype that the recipe gives the model's parameters."""
    shape: Annotated[tuple[Annotated[int | str, PlainValidator(_extent)], ...], Field(strict=False)]
    """Whole numbers, and the words `micro_batch` and `sequence` for what the workload says."""
    high: Count | None = None
    """Integers are drawn below this; below the model's vocab_size when absent."""


Inputs = dict[Annotated[str, Field(pattern=r"^[^\W\d]\w*$")], InputSettings]


Shape = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**40)], ...], Field(strict=False)]
"""The extents of a tensor."""


class HuggingFaceSettings(Settings):
    """A model of the transformers library with random weights, built from its configuration without
    network or remote code.

    Its class is the first of the configuration's `architectures`, else the model type's causal,
    masked or sequence-to-sequence language model, else its bare model.
    """

    hf_config: Annotated[dict[str, Any], AfterValidator(_hf_config)]
    """Hugging Face's `config.json`: in a file the path (from the file's folder; from the working
    directory when given by a flag), once loaded its content."""
    safetensors: Annotated[dict[str, Shape], Field(min_length=1)] | None = None
    """The parameters of a checkpoint, for models that have no closed form otherwise: in a file the
    path of a `model.safetensors` or of a `model.safetensors.index.json` beside its parts, once
    loaded names and shapes. A closed form then counts them in the file's order, which is the
    alphabet's: totals and ZeRO-3's partitions are exact; where a sub-group or a rank's share of a
    flat buffer ends may differ."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, ...; when absent transformers' own choice, which is sdpa wherever the
    architecture has it."""
    inputs: Inputs = Field(default_factory=dict)
    """What the model is called with; token ids and labels when absent."""

    def __hash__(self) -> int:
        """By the configuration, so that what follows from it can be remembered."""
        return hash((self._content, self.attn_implementation))

    @cached_property
    def _content(self) -> str:
        return repr(self.hf_config)

    @property
    def attention(self) -> object:
        """The implementation of attention that is asked for, here or else in the configuration;
        `None` where transformers chooses."""
        said = self.hf_config.get("_attn_implementation", self.hf_config.get("attn_implementation"))
        return self.attn_implementation or said

    @property
    def family(self) -> str:
        """Transformers' name for the architecture."""
        return str(self.hf_config["model_type"])

    @property
    def vocab_size(self) -> int:
        """Token ids are drawn below this. Raises `InputError` where the configuration does not say
        it."""
        found = self.text.get("vocab_size")
        if not isinstance(found, int) or found < 1:
            raise NoVocabulary(
                f"model.hf_config has no vocab_size: what this {self.family[:60]!r} model is called with is not known",
                hint=f"describe it: {EXAMPLE_INPUT}; or say --set model.hf_config.vocab_size=N if it reads token ids",
            )
        return found

    @property
    def longest_sequence(self) -> tuple[str, int] | None:
        """The key that limits the sequence, and the limit, where positions are learned: there is no
        sign of another kind of them."""
        config = self.text
        if self.inputs or any(sign in key for key in config for sign in _POSITIONS_NOT_LEARNED):
            return None
        for key in ("n_positions", "max_position_embeddings"):
            if isinstance(limit := config.get(key), int) and limit > 0:
                return f"model.hf_config.{key}", limit
        return None

    @property
    def text(self) -> dict[str, Any]:
        """The part that describes the language model of a model of several parts; else all of
        it."""
        part = self.hf_config.get("text_config")
        return part if isinstance(part, dict) else self.hf_config


_POSITIONS_NOT_LEARNED = ("rope", "rotary", "relative", "alibi", "rms_norm")
"""Parts of keys that say so; Llama's first configurations name no rope key, and no model with
RMSNorm learns positions."""


class FactorySettings(Settings):
    """A model of the user's own: what a function without arguments returns, an `nn.Module` in fp32
    that is trained as it is.

    The function is imported where the model is built, with the working directory on `sys.path`.
    Without `inputs` the model is called with token ids [micro_batch, sequence], and as `labels`
    with the labels if its forward has such a parameter.
    """

    factory: Annotated[str, AfterValidator(_factory)]
    """`package.module:function`."""
    vocab_size: Count = 256
    """Token ids are drawn below this."""
    inputs: Inputs = Field(default_factory=dict)
    """What the model is called with; token ids when absent."""

    def __hash__(self) -> int:
        """By what is said, so that what follows from it can be remembered."""
        return hash((self.factory, self.vocab_size, repr(self.inputs)))

    @property
    def family(self) -> str:
        """The function is all that is known of it."""
        return self.factory

    @property
    def longest_sequence(self) -> tuple[str, int] | None:
        """Not known."""
        return None


KINDS: dict[str, type[Settings]] = {"hf_config": HuggingFaceSettings, "factory": FactorySettings, "family": ModelSettings}
"""The kinds of model by the key that tells them; the first that is there counts, and the last if
none is."""


def kind(value: object) -> str:
    """Which kind of model a table (or a model) is."""
    if isinstance(value, Settings):
        return next(name for name, settings in KINDS.items() if isinstance(value, settings))
    return next((name for name in KINDS if isinstance(value, Mapping) and name in value), "family")


Model = Annotated[
    Annotated[ModelSettings, Tag("family")] | Annotated[HuggingFaceSettings, Tag("hf_config")] | Annotated[FactorySettings, Tag("factory")],
    Discriminator(kind),
]
