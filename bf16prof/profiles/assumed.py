"""What is assumed where nobody says it, with the rule that it follows: DeepSpeed's own default, or
the Hugging Face Trainer's.

A profile is read in layers: its file, the user's DeepSpeed JSON, flags. A key of `RULES` that no
layer sets is filled in here, last; its origin starts with `assumed: `. So every answer can list
what it was not told (`Resolved.assumed`).

Example: `--hf-config config.json` alone says nothing of the workload. It becomes sequences of
min(max_position_embeddings, 4096) tokens, micro-batches of one, no activation checkpointing, the
model built inside `deepspeed.zero.Init`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bf16prof.profiles.shipped import shipped_table

ASSUMED = "assumed: "
"""How the origin of an assumed value begins."""

LONGEST_ASSUMED = 4096
"""Tokens of a sequence that nobody named, unless the model allows fewer."""

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Where Hugging Face configurations say the longest sequence."""

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Assumption:
    """A value that nobody gave, and why it is taken. `value` is `None` where the key stays absent:
    the library decides, as `why` says."""

    value: Any
    why: str


@dataclass(frozen=True)
class Rule:
    """One key of a profile, the word for it in the line that says what was assumed, and what is
    assumed of it for a `[model]` table.

    `others`: further keys that settle the same question; where one of them is given, nothing is
    assumed.
    """

    key: str
    word: str
    assume: Callable[[Table], Assumption | None]
    others: tuple[str, ...] = ()


def fill_in(table: dict[str, Any], origins: Mapping[str, str]) -> dict[str, str]:
    """Put what is assumed into the table of a profile; the origins of these keys. `origins`: those
    of the keys that somebody gave."""
    model = table.get("model")
    added: dict[str, str] = {}
    for rule in RULES:
        if any(_is_given(key, origins) for key in (rule.key, *rule.others)):
            continue
        found = rule.assume(model if isinstance(model, Mapping) else {})
        if found is None or (found.value is not None and not _put(table, rule.key, found.value)):
            continue
        added[rule.key] = ASSUMED + found.why
    return added


def assumed_words(origins: Mapping[str, str]) -> tuple[str, ...]:
    """What was assumed, in the words of the rules; of another key its last part."""
    return tuple(dict.fromkeys(_word(key) for key, origin in origins.items() if origin.startswith(ASSUMED)))


def _word(key: str) -> str:
    return next((rule.word for rule in RULES if key == rule.key or key.startswith(f"{rule.key}.")), key.rpartition(".")[2])


def _is_given(key: str, origins: Mapping[str, str]) -> bool:
    return any(known == key or known.startswith(f"{key}.") for known in origins)


def _put(table: dict[str, Any], key: str, value: Any) -> bool:
    """Set a dotted key; whether that was possible (a table that is none is refused by the schema,
    later)."""
    *path, last = key.split(".")
    inner: Any = table
    for part in path:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            return False
    inner[last] = value
    return True


def _sequence(model: Table) -> Assumption:
    key, longest = next(_limits(model), ("", None))
    if longest is None:
        return Assumption(LONGEST_ASSUMED, f"{LONGEST_ASSUMED} tokens")
    return Assumption(min(longest, LONGEST_ASSUMED), f"min({key}, {LONGEST_ASSUMED})")


def _limits(model: Table) -> Iterator[tuple[str, int]]:
    """Keys that limit the sequence, and the limits: of our families, and of a Hugging Face
    configuration (its text model's first)."""
    config = model.get("hf_config")
    config = config if isinstance(config, Mapping) else {}
    text = config.get("text_config")
    places: tuple[tuple[object, tuple[str, ...]], ...] = ((model, ("max_sequence_length",)), (text, POSITION_KEYS), (config, POSITION_KEYS))
    for place, keys in places:
        for key in keys:
            limit = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
                yield key, limit


def is_hugging_face(model: Table) -> bool:
    """Whether a `[model]` table describes a model of transformers, which people train with its
    Trainer."""
    return "hf_config" in model


def _of_the_trainer(value: Any, why: str) -> Callable[[Table], Assumption | None]:
    """The same for every Hugging Face model, nothing for others."""
    return lambda model: Assumption(value, why) if is_hugging_face(model) else None


def _always(value: Any, why: str) -> Callable[[Table], Assumption | None]:
    return lambda model: Assumption(value, why)


def _attention(model: Table) -> Assumption | None:
    config = model.get("hf_config")
    if not isinstance(config, Mapping) or config.get("_attn_implementation") or config.get("attn_implementation"):
        return None
    return Assumption(None, "transformers' own choice, sdpa wherever the architecture has it")


TRAINERS_OPTIMIZER = "adamw_torch_fused"
"""TrainingArguments' default of `optim` since torch 2.8 (transformers 5.24, training_args.py)."""


def _optimizer(model: Table) -> Assumption:
    """The Trainer makes it, and hands it to DeepSpeed, where the JSON has none
    (`integrations/deepspeed.py`, deepspeed_optim_sched)."""
    if not is_hugging_face(model):
        return Assumption(None, "AdamW, as DeepSpeed builds it")
    made = {"type": "AdamW", "from_trainer": True, **shipped_table("trainer_optimizers.toml")[TRAINERS_OPTIMIZER]["settings"]}
    return Assumption(made, f"the Trainer's default, {TRAINERS_OPTIMIZER}")


def image_inputs(model: Table) -> Assumption | None:
    """What a plain image model of transformers is called with: one image a sequence, and a class
    where it classifies."""
    config = model.get("hf_config")
    if not isinstance(config, Mapping) or not is_plain_image_model(config):
        return None
    side = config["image_size"]
    sides = [side, side] if isinstance(side, int) else list(side)
    inputs: dict[str, Any] = {
        "pixel_values": {"dtype": "parameters", "shape": ["micro_batch", config.get("num_channels", IMAGE_CHANNELS), *sides]},
    }
    names = config.get("architectures")
    if not names or "ForImageClassification" in str(names):
        classes = len(config.get("id2label") or ()) or config.get("num_labels") or CLASSES
        inputs["labels"] = {"dtype": "int64", "shape": ["micro_batch"], "high": classes}
    return Assumption(inputs, "pixel_values [micro_batch, num_channels, image_size, image_size] and the class, from its configuration")


IMAGE_CHANNELS, CLASSES = 3, 2
"""transformers' defaults (configuration_utils.py: `num_labels`; `num_channels` of its image
models)."""


def is_plain_image_model(config: Table) -> bool:
    """Whether a Hugging Face configuration is of a model that reads images alone: it has an image
    size, and no vocabulary or parts."""
    side = config.get("image_size")
    known = (side,) if isinstance(side, int) else tuple(side) if isinstance(side, list) else ()
    has_parts = any(key in config for key in ("vocab_size", "text_config", "vision_config", "decoder", "encoder"))
    return bool(known) and len(known) <= 2 and all(isinstance(s, int) and s > 0 for s in known) and not has_parts


_ZERO = "deepspeed.zero_optimization."

RULES: tuple[Rule, ...] = (
    Rule("workload.sequence_length", "sequence length", _sequence),
    Rule("workload.micro_batch_size", "micro-batch", _always(1, "one sequence per rank")),
    Rule("workload.gradient_accumulation_steps", "accumulation", _always(1, "DeepSpeed's default")),
    Rule("workload.activation_checkpointing", "checkpointing", _always(False, "off, as in DeepSpeed and in the Trainer")),
    Rule(
        "workload.zero_init",
        "zero.Init",
        _of_the_trainer(True, "from_pretrained inside deepspeed.zero.Init, as the Trainer does at ZeRO-3"),
    ),
    Rule(
        "workload.keeps_outputs",
        "outputs dropped",
        _of_the_trainer(False, "the loop drops the model's outputs before backward, as the Trainer's does"),
    ),
    Rule("model.attn_implementation", "attention", _attention),
    Rule("model.inputs", "image inputs", image_inputs),
    Rule(
        f"{_ZERO}reduce_bucket_size",
        "buckets",
        _always(None, "DeepSpeed's default"),
        tuple(_ZERO + key for key in ("allgather_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")),
    ),
    Rule("optimizer", "optimizer", _optimizer, ("deepspeed.more.optimizer",)),
)
"""In the order in which the line names them. A setting that every answer depends on and that people
often leave out belongs here."""
