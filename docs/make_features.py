"""Write docs/features.md: what can be described, and what not, from the tables that decide it.
Usage: `make features`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bf16prof.profiles.features import Fate, Feature, features
from bf16prof.profiles.optimizers import all_optimizers, library_ids
from bf16prof.profiles.recipes import all_recipes, megatron_recipes
from bf16prof.profiles.trainer_optimizers import modelled, trainer_optimizers

PAGE = Path(__file__).parent / "features.md"

TITLE = """# What can be described, and what not

<!-- Written by docs/make_features.py (make features) from the tables that decide it: profiles/features.toml, optimizers.toml,
trainer_optimizers.toml, recipes.toml. A test compares. -->

One table decides for all commands alike. What is refused here is refused by every command, by name and with the same words; what is
switched off in a DeepSpeed JSON is no feature. Each is said in DeepSpeed's own JSON unless something else stands there."""

BEYOND = """## Training beyond one model and its parameters

| what | how it is said | where |
|---|---|---|
| LoRA, rsLoRA, DoRA | `--lora`, `[peft]`, `adapter_config.json` ([adapters](adapters.md)) | every command |
| a frozen base in 4 bits, QLoRA ([adapters](adapters.md)) | `--load-in-4bit`, `[quantization]` | `simulate`, `measure` |
| frozen parameters, tied embeddings, several inputs | the model's own code: `MODULE:FUNCTION`, `[model.inputs]` | every command |
| Liger's kernels, the head fused with the loss | `--liger loss`, `--liger all` ([Liger](liger.md)) | every command, on GPUs |
| head and loss in tiles (TiledFusedLogitsLoss, ALST) | `--fused-loss tiled` ([Liger](liger.md)) | `simulate`, `measure` |
| activation checkpointing | `workload.activation_checkpointing`, `use_reentrant`, `checkpoint_every_n_layers` | every command |
| evaluation between steps ([loops](loops.md)) | `--eval-batch-size`, `[workload.evaluation]` | all but `plan`; `estimate` gives a floor |
| FlashAttention's package on a modelled GPU ([loops](loops.md)) | `model.attn_implementation=flash_attention_2` | every command |
| preference optimization: a policy and its reference, or without one ([loops](loops.md)) | `--dpo` | `simulate`, `measure` |
| a reward model on pairs of answers ([loops](loops.md)) | `--reward` | `simulate`, `measure` |
| packed sequences, padding-free batches | `--packed-sequences` ([loops](loops.md)) | every command |
| sequences that ranks share (Ulysses, ALST) | `--sp`, `[parallel] sequence`, the JSON ([parallel](parallel.md)) | every command |
| MLPs in tiles of the sequence (TiledMLP, ALST) | `workload.tiled_mlp` ([parallel](parallel.md)) | `simulate`, `measure` |
| layers that ranks share (AutoTP) | `--tp`, `[parallel] tensor`, the JSON ([parallel](parallel.md)) | all but `estimate` |
| layers spread over stages (PipelineModule) | `--pp`, `[parallel] pipeline`, the JSON ([parallel](parallel.md)) | all but `estimate` |
| experts spread over ranks (DeepSpeed) | `--ep`, `[parallel] expert`, the model itself ([parallel](parallel.md)) | all but `estimate` |
| megatron-core in the place of DeepSpeed | `--engine megatron-core` ([engines](engines.md)) | `estimate`, `simulate`, `measure` |
| anything that a training script does | `-- train.py` ([scripts](scripts.md)) | `simulate`, `measure` |
| Apple's cut cross entropy (`--fused-loss cce`) | - | refused, by name |
| IA3, prompt and prefix tuning, LoRA weights computed from data or from the model's | - | refused |"""

FATES: Sequence[tuple[Fate, str, str]] = (
    (Fate.READ, "Known to the closed form", "`estimate` and `plan` know these, and `simulate` and `measure` run them."),
    (
        Fate.RUN,
        "Run, but not known to the closed form",
        "`simulate` and `measure` run these in the real engine; `estimate` and `plan` name the key and leave it to them. "
        "With `sequence_parallel_size` `estimate` gives what is held between steps ([parallel](parallel.md)).",
    ),
    (Fate.REFUSED, "Refused", "No command answers, because the answer would be wrong or nobody could check it."),
    (Fate.PASSED, "Handed on", "No tensor that lasts comes of these; they may hold anything."),
    (Fate.LEFT_OUT, "Left out", "They write files, call out or measure by themselves; runs of this tool go without them."),
)


def page() -> str:
    """The whole page."""
    parts = [TITLE, BEYOND, "\n".join(_optimizers()), "\n".join(_recipes())]
    for fate, title, words in FATES:
        found = [feature for feature in features().values() if feature.fate is fate]
        parts.append(f"## DeepSpeed's keys: {title[0].lower()}{title[1:]}\n\n{words}")
        parts.append("\n".join(_reasons(found) if fate is Fate.REFUSED else [_listed(found)]))
    return "\n\n".join(parts) + "\n"


def _reasons(found: Iterable[Feature]) -> Iterator[str]:
    yield from ("| key | why |", "|---|---|")
    for feature in found:
        yield f"| `{feature.key}` | {_cell(feature.why)} |"


def _listed(found: Iterable[Feature]) -> str:
    """Keys by their table, so that they fill lines and not pages."""
    tables: dict[str, list[str]] = {}
    for feature in found:
        table, _, name = feature.key.rpartition(".")
        tables.setdefault(table, []).append(f"`{name}`")
    return "\n".join(f"* {f'`{table}`: ' if table else ''}{', '.join(names)}" for table, names in tables.items())


def _optimizers() -> Iterator[str]:
    rows, reasons = all_optimizers(), [(name, row["why"]) for name, row in trainer_optimizers().items() if "why" in row]
    yield from ("## Optimizers", "", f"`--optim`: {', '.join(f'`{name}`' for name in modelled())}.", "")
    yield f"`[optimizer] library`: {', '.join(f'`{id_}` ({rows[id_].class_})' for id_ in library_ids())}. [What each keeps](optimizers.md)."
    yield from ("", "| `--optim` | why it is refused |", "|---|---|")
    yield from (f"| `{name}` | {_cell(why)} |" for name, why in reasons)


def _recipes() -> Iterator[str]:
    runnable = [recipe.id for recipe in all_recipes().values() if recipe.deepspeed is not None]
    others = [recipe.id for recipe in all_recipes().values() if recipe.deepspeed is None and recipe.megatron is None]
    yield "## Precision recipes"
    yield ""
    yield f"Run by DeepSpeed: {', '.join(f'`{id_}`' for id_ in runnable)}."
    yield ""
    yield f"Run by megatron-core ([engines](engines.md)): {', '.join(f'`{id_}`' for id_ in megatron_recipes())}."
    yield ""
    yield f"Described only, for comparison: {', '.join(f'`{id_}`' for id_ in others)} (`bf16prof recipes show NAME` says from where)."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
