"""Adapters: the `[peft]` table of a profile, PEFT's own `adapter_config.json`, and the flag
`--lora`.

The keys are those of PEFT's LoraConfig (0.21.2, tuners/lora/config.py). A key that is null, false
or empty is nothing that somebody asked for, so a file may hold all that its version of PEFT writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from bf16prof.errors import InputError
from bf16prof.profiles.plain import read_json_object
from bf16prof.profiles.settings import Count, Settings

FILE_NAME = "adapter_config.json"

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Number = Annotated[float, Field(gt=0, lt=2**40)]

OF_THE_CHECKPOINT = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config",
)  # fmt: skip
"""Keys that say where a checkpoint comes from, and how it is loaded; those of two methods that are
off count for nothing."""

OF_THE_SCRIPT = ("autocast_adapter_dtype", "enable_input_require_grads")
"""Keys of ours: what a training script says beside the configuration."""

NOT_MODELLED = "expected LoRA, rsLoRA or DoRA with weights that are drawn (init_lora_weights true, false or gaussian)"


class AdapterSettings(Settings):
    """What PEFT puts beside the layers of a model, whose own parameters are frozen."""

    peft_type: Literal["LORA"] = "LORA"
    task_type: str | None = None
    """PEFT's wrapper of the whole model: `CAUSAL_LM`, `SEQ_2_SEQ_LM`, ...; its plain one when
    absent."""
    r: Count = 8
    """The rank: an adapter of a layer [out, in] has two matrices, [r, in] and [out, r]."""
    lora_alpha: Number = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Names | str | None = None
    """Ends of the names of the layers, a regular expression, or `all-linear`; PEFT's choice for the
    model type when absent."""
    exclude_modules: Names | str | None = None
    modules_to_save: Names | None = None
    """Modules that are trained whole: PEFT keeps a frozen and a trained copy."""
    layers_to_transform: Annotated[tuple[int, ...], Field(strict=False)] | int | None = None
    layers_pattern: Names | str | None = None
    rank_pattern: dict[str, Count] = Field(default_factory=dict)
    alpha_pattern: dict[str, Number] = Field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    autocast_adapter_dtype: bool = True
    """PEFT makes the adapter fp32 where it finds fp16 or bf16 (`get_peft_model`). DeepSpeed casts
    it back, but not inside `deepspeed.zero.Init`."""
    enable_input_require_grads: bool = False
    """The outputs of the embedding need gradients, as training scripts ask for
    (`model.enable_input_require_grads()`). Activation checkpointing does so by itself."""

    @model_validator(mode="before")
    @classmethod
    def _of_what_is_on(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        if isinstance(value.get("init_lora_weights"), str) and value["init_lora_weights"] not in ("gaussian", "true", "false"):
            raise PydanticCustomError("adapter", NOT_MODELLED)
        return {key: item for key, item in value.items() if key in cls.model_fields or _is_on(key, item)}

    @property
    def method(self) -> str:
        """What it is called."""
        return "DoRA" if self.use_dora else "rsLoRA" if self.use_rslora else "LoRA"

    @property
    def words(self) -> str:
        """What it is, and where: `LoRA r=16 on q_proj, v_proj`."""
        targets = self.target_modules
        where = ", ".join(targets) if isinstance(targets, tuple) else targets or "PEFT's choice of layers"
        return f"{self.method} r={self.r} on {where}"

    def for_peft(self) -> dict[str, Any]:
        """The keywords of PEFT's LoraConfig."""
        said = self.model_dump(mode="json", exclude_none=True, exclude={"peft_type", *OF_THE_SCRIPT})
        return {key: value for key, value in said.items() if value != {}}


class QuantizationSettings(Settings):
    """A frozen base of 4 bits a weight, under an adapter (QLoRA): the words of transformers'
    BitsAndBytesConfig, QLoRA's own values."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    """The scales, one for every 64 weights, in 8 bits each with scales of their own."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """The dtype in which packed weights are called: ZeRO-3 gathers dtypes one by one."""

    @property
    def words(self) -> str:
        """What it is: `4-bit nf4, double`."""
        return f"4-bit {self.bnb_4bit_quant_type}" + (", double" if self.bnb_4bit_use_double_quant else "")


def _is_on(key: str, value: object) -> bool:
    return key not in OF_THE_CHECKPOINT and bool(value)


SHORT = {"alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules", "rank": "r"}
"""Words of the flag, and the keys that they stand for."""

SWITCHES = {"dora": "use_dora", "rslora": "use_rslora"}

EXAMPLE = "--lora r=16,alpha=32,targets=q_proj+v_proj, or an adapter_config.json"


def read_lora(text: str, origin: str) -> dict[str, Any]:
    """The `[peft]` table that a flag means: a file of PEFT's, the folder that it is in, or
    `r=16,targets=q_proj+v_proj,dora`.

    Raises `InputError` for what is neither; keys and values are checked where the profile is.
    """
    path = Path(text)
    if text.endswith(".json") or (path / FILE_NAME).is_file():
        return read_json_object(path if text.endswith(".json") else path / FILE_NAME)
    table: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = (word.strip() for word in part.partition("="))
        if not sign and name not in SWITCHES:
            raise InputError(f"{origin} {text!r:.80}: {part!r:.60} is no key=value", hint=EXAMPLE)
        table[SHORT.get(name, SWITCHES.get(name, name))] = _value(SHORT.get(name, name), value) if sign else True
    if not table:
        raise InputError(f"{origin}: expected what to train", hint=EXAMPLE)
    return table


LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")


def _value(key: str, text: str) -> Any:
    """A number, a switch, or text; a list where `+` stands between names."""
    if key in LISTS and text != "all-linear":
        return [_value("", part) for part in text.split("+")]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
