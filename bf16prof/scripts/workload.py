"""What a script trains, read off its engine and off what its forward passes are called with: the
case and the workload of its record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bf16prof.profiles.ds_config import recipe_of
from bf16prof.profiles.features import Fate, features
from bf16prof.profiles.settings import short_dtype
from bf16prof.records import Case, Workload
from bf16prof.scripts.command import Script
from bf16prof.scripts.watch import trains
from bf16prof.vocabulary import Offload

WITHOUT_EFFECT = frozenset({"steps_per_print", "wall_clock_breakdown", "tensorboard", "wandb", "csv_monitor", "comet", "dump_state"})
"""Keys of DeepSpeed's configuration that change what is logged and no byte."""


class Calls:
    """What the forward passes of an engine were called with: shapes of token ids, rows of a batch,
    labels, and the dtype of an autocast."""

    def __init__(self) -> None:
        self.sequence_lengths: set[int] = set()
        self.rows: set[int] = set()
        self.autocast: str | None = None
        self.has_labels = False
        self._seen: set[tuple[Any, ...]] = set()

    def see(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Look at the arguments of a forward pass; the first tensor tells the rows, the first of
        integers in two dimensions the tokens."""
        import torch

        values = (*arguments, *keywords.values())
        shapes = (*keywords, *[value.shape if isinstance(value, torch.Tensor) else None for value in values])
        if shapes in self._seen:
            return
        self._look(arguments, keywords)
        if None not in shapes:  # a container may hold others the next time
            self._seen.add(shapes)

    def _look(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        import torch

        from bf16prof.engine.nested import tensors_in

        self.has_labels |= keywords.get("labels") is not None
        if self.autocast is None and torch.is_autocast_enabled():
            self.autocast = str(torch.get_autocast_gpu_dtype()) if torch.cuda.is_available() else str(torch.get_autocast_dtype("cpu"))
        tensors = [tensor for tensor in tensors_in((*arguments, dict(keywords))) if tensor.dim()]
        if tensors:
            self.rows.add(int(tensors[0].shape[0]))
        tokens = [tensor for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype is not torch.bool]
        if tokens:
            self.sequence_lengths.add(int(tokens[0].shape[1]))


def workload_of_engine(engine: Any, calls: Calls, *, zero_init: bool, keeps_outputs: bool) -> Workload:
    """The workload, as far as an engine tells it. Of sequences of several lengths the longest is
    named."""
    checkpointing = any(getattr(module, "gradient_checkpointing", False) is True for module in engine.module.modules())
    model = getattr(engine.module, "config", None)
    attention = getattr(model, "_attn_implementation", None)
    return Workload(
        model=str(getattr(model, "model_type", None) or type(engine.module).__name__),
        sequence_length=max((length * _sequence_ranks(engine) for length in calls.sequence_lengths), default=None),
        micro_batch_size=int(engine.train_micro_batch_size_per_gpu()),
        gradient_accumulation_steps=int(engine.gradient_accumulation_steps()),
        activation_checkpointing=checkpointing,
        attention=attention if isinstance(attention, str) else None,
        optimizer=optimizer_words(engine),
        zero_init=zero_init,
        keeps_outputs=keeps_outputs,
        deepspeed=configuration(engine),
    )


def case_of_engine(script: Script, engine: Any, world_size: int, calls: Calls) -> Case:
    """The case: the script's name and arguments stand for the model and the workload."""
    settings = configuration(engine)
    autocast = {"torch_autocast": {"enabled": True, "dtype": calls.autocast}} if calls.autocast else {}
    return Case(
        profile=script.name,
        zero_stage=int(engine.zero_optimization_stage()),
        world_size=world_size,
        recipe=recipe_of({**settings, **autocast}),
        offload=_offload(settings.get("zero_optimization")),
        workload=_digest(script, engine, settings),
        sequence_parallel=_sequence_ranks(engine),
        tensor_parallel=max(1, int(engine.autotp_size())) if hasattr(engine, "autotp_size") else 1,
        pipeline_parallel=int(getattr(engine, "num_stages", 1)),
    )


def _sequence_ranks(engine: Any) -> int:
    """Ranks that share each sequence, of which each is called with a part."""
    return int(getattr(engine, "sequence_parallel_size", 1))


def optimizer_words(engine: Any) -> str:
    """What updates the weights: "AdamW (torch)", "FusedAdam (DeepSpeed)", or a library's class."""
    if not trains(engine):
        return "none"
    optimizer = engine.basic_optimizer
    package = type(optimizer).__module__.partition(".")[0]
    return f"{type(optimizer).__name__} ({'DeepSpeed' if package == 'deepspeed' else package})"


def main_engine(engines: Sequence[Any], called: Container[int]) -> Any:
    """The engine with the most parameters of those whose ids are among those that were called (of
    all, where none was), one that trains before one that only evaluates."""
    from bf16prof.engine.training import parameter_count

    return max(
        [engine for engine in engines if id(engine) in called] or engines,
        key=lambda engine: (trains(engine), parameter_count(engine)),
    )


def configuration(engine: Any) -> dict[str, Any]:
    """The configuration that the engine was given, in plain JSON."""
    given: dict[str, Any] = json.loads(json.dumps(engine._config._param_dict, default=str), parse_constant=str)
    return given


def unchecked(engine: Any) -> dict[str, str]:
    """What is on in the engine's configuration and is refused where a model is described: by key,
    why."""
    found, settings = {}, configuration(engine)
    for key, feature in features().items():
        value: Any = settings
        for word in key.split("."):
            value = value.get(word) if isinstance(value, Mapping) else None
        if feature.fate is Fate.REFUSED and feature.is_on(value):
            found[key] = feature.why
    if getattr(engine, "num_stages", 1) > 1:
        found["PipelineModule"] = "stages tell each other the shapes of what they send"
    return found


def _offload(zero: object) -> Offload:
    """What ZeRO's block keeps in host memory; parameters at stage 3 only."""
    block = zero if isinstance(zero, Mapping) else {}
    optimizer, parameters = (_device(block.get(key)) != "none" for key in ("offload_optimizer", "offload_param"))
    if parameters and block.get("stage") == 3:
        return Offload.OPTIMIZER_AND_PARAMETERS
    return Offload.OPTIMIZER if optimizer or block.get("cpu_offload") is True else Offload.NONE


def _device(block: object) -> str:
    return str(block.get("device") or "none") if isinstance(block, Mapping) else "none"


def _digest(script: Script, engine: Any, settings: Mapping[str, Any]) -> str:
    """Twelve digits of all that decides the memory and is known: the model's parameters and the
    configuration, and the script's arguments.

    Not its own text: a comment in it changes no byte.
    """
    shapes = [(name, list(getattr(p, "ds_shape", p.shape)), short_dtype(str(p.dtype))) for name, p in engine.module.named_parameters()]
    decisive = {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT}
    said = [Path(script.path).name or script.module, list(_plain(script.arguments)), decisive, shapes]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _plain(arguments: tuple[str, ...]) -> Iterator[str]:
    """The arguments without what a launcher adds for each rank."""
    return (argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank")))
