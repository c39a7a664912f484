"""Precision recipes: all of them there, their bytes as their sources state them, and what they give
DeepSpeed accepted by it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from jobs import job, small_profile

from bf16prof.commands.catalog import list_recipes
from bf16prof.engine.config import Wrapper, deepspeed_config, engine_facts
from bf16prof.errors import InputError, Refused
from bf16prof.profiles.recipes import BYTES_HEADER, all_recipes, find_recipe, nearest, require_runnable, runnable_recipes
from bf16prof.vocabulary import Component

PRODUCT = (
    "fp32", "bf16-fp32-master", "bf16-master", "bf16-full", "bf16-full-autocast", "autocast-fp32", "bf16-pure", "bf16-fp32-states",
    "fp16-fp32-master", "nemo-bf16", "megatron-bf16", "collage-light", "collage-plus", "apex-o1", "apex-o2",
    "bf16-stochastic-rounding", "bf16-kahan",
    "megatron-bf16-claimed", "megatron-bf16-corrected", "megatron-precision-aware", "megatron-precision-aware-remainders",
)  # fmt: skip


def test_every_recipe_that_was_promised_is_there_and_no_other() -> None:
    assert set(all_recipes()) == set(PRODUCT)


@pytest.mark.parametrize(
    ("recipe", "size", "why"),
    [
        ("nemo-bf16", 2 + 2 + 4 + 8, "forum thread, approach 1: bf16 weights and gradients, fp32 master and optimizer state"),
        ("megatron-bf16", 2 + 4 + 4 + 8, "Megatron-LM docs, distributed optimizer: 18 bytes without partitioning, fp32 main gradients"),
        ("megatron-bf16-claimed", 2 + 4 + 8, "forum thread, approach 2, as the question has it"),
        ("megatron-bf16-corrected", 2 + 4 + 2 + 8, "forum thread, the answer: 16 bytes, gradients in bf16"),
        ("megatron-precision-aware", 2 + 2 + 4 + 2 + 2, "Megatron Core OptimizerConfig: gradients and moments in bf16"),
        ("megatron-precision-aware-remainders", 2 + 2 + 2 + 2 + 2, "Transformer Engine: half of the master parameter's bits"),
        ("bf16-fp32-states", 2 + 2 + 8, "forum thread and Collage's D-MW: no master copy"),
        ("bf16-pure", 2 + 2 + 4, "Collage, Table 2, option A: everything bf16"),
        ("bf16-stochastic-rounding", 2 + 2 + 4, "as bf16-pure: rounding takes no memory"),
        ("bf16-kahan", 2 + 2 + 4 + 2, "one bf16 compensation per parameter"),
        ("collage-light", 10, "Collage, Table 2"),
        ("collage-plus", 12, "Collage, Table 2"),
        ("apex-o1", 4 + 4 + 8, "fp32 training with fp16 operators"),
        ("bf16-fp32-master", 16, "ZeRO paper: 2 + 2 + 12"),
        ("fp16-fp32-master", 16, "ZeRO paper: 2 + 2 + 12"),
        ("bf16-full", 10, "published README, 12 with the master gradients that no step leaves behind"),
        ("bf16-full-autocast", 10, "the same tensors as bf16-full"),
        ("fp32", 4 + 4 + 4 + 8, "DeepSpeed keeps a master copy of fp32 parameters too (zero/stage_1_and_2.py, __init__)"),
    ],
)
def test_bytes_per_parameter_between_steps_are_those_of_the_source(recipe: str, size: int, why: str) -> None:
    assert find_recipe(recipe).steady_bytes_per_parameter == size, why


@pytest.mark.parametrize(("recipe", "total"), [("bf16-fp32-master", 20), ("bf16-full-autocast", 12)])
def test_the_published_readme_counts_master_gradients_too(recipe: str, total: int) -> None:
    """DeepSpeedExamples training/bf16_master_weight/README.md: 20 and 12 bytes per parameter in
    all."""
    assert sum(find_recipe(recipe).bytes_per_parameter().values()) == total


def test_the_published_readme_by_component() -> None:
    baseline, low = (find_recipe(r).bytes_per_parameter() for r in ("bf16-fp32-master", "bf16-full"))

    rows = [(baseline[c], low[c]) for c in ("parameters", "gradients", "master_parameters", "master_gradients", "momentum", "variance")]
    assert rows == [(2, 2), (2, 2), (4, 2), (4, 2), (4, 2), (4, 2)]


@pytest.mark.parametrize("recipe", all_recipes().values(), ids=lambda r: r.id)
def test_a_recipe_either_runs_or_says_why_not_and_names_its_source(recipe: Any) -> None:
    assert (recipe.deepspeed is None) == bool(recipe.not_run)
    assert recipe.source
    assert recipe.title
    assert recipe.learning in ("fp32 master", "bf16 only", "stochastic rounding", "compensated")
    assert set(recipe.dtypes.values()) | set(recipe.extra.values()) <= {"fp32", "bf16", "fp16", "int16", "none"}
    assert recipe.dtypes[Component.PARAMETERS] != "none"


@pytest.mark.parametrize("recipe", [r.at(s) for r in runnable_recipes().values() for s in ((0, 1) if r.zero else (0,))], ids=lambda r: r.id)
def test_what_a_recipe_gives_deepspeed_is_accepted_by_its_own_models(recipe: Any) -> None:
    """DeepSpeed's pydantic models forbid unknown keys, so a misspelt one fails here."""
    from deepspeed.runtime.config import get_torch_autocast_dtype, get_torch_autocast_enabled
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    blocks = dict(recipe.deepspeed)
    bf16 = DeepSpeedBF16Config(**blocks.pop("bf16", {}))
    fp16 = DeepSpeedFP16Config(**blocks.pop("fp16", {}))
    enabled = get_torch_autocast_enabled(recipe.deepspeed)
    dtype = get_torch_autocast_dtype(recipe.deepspeed)
    blocks.pop("torch_autocast", None)
    untested = blocks.pop("zero_allow_untested_optimizer", False)

    assert not blocks, "no other block belongs to a recipe"
    assert untested == bool(recipe.optimizer and not recipe.cast), "only ZeRO asks"
    assert recipe.dtypes[Component.PARAMETERS] == (recipe.cast or ("fp16" if fp16.enabled else "bf16" if bf16.enabled else "fp32"))
    assert recipe.dtypes[Component.MASTER_PARAMETERS] == (
        "none" if recipe.cast else "bf16" if bf16.bf16_master_weights_and_grads else "fp32"
    )
    assert recipe.dtypes[Component.MOMENTUM] == ("bf16" if bf16.bf16_optimizer_states or recipe.cast else "fp32") or recipe.optimizer
    assert (recipe.autocast != "none") == enabled
    assert str(dtype) == {"bf16": "torch.bfloat16", "none": "None"}[recipe.autocast]


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown recipe 'nothing like it'") as caught:
        find_recipe("nothing like it")

    assert all(id_ in caught.value.hint for id_ in PRODUCT)


def test_a_mistyped_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown recipe 'bf16-ful'") as caught:
        find_recipe("bf16-ful")

    assert "did you mean bf16-full" in caught.value.hint


def test_apex_is_described_and_equals_what_runs() -> None:
    """O1 has no master copy: neither has DeepSpeed at ZeRO 0, where the optimizer works on fp32
    parameters."""
    facts = engine_facts(deepspeed_config(job(small_profile(), 0, 1, "autocast-fp32")))
    o1, o2 = find_recipe("apex-o1"), find_recipe("apex-o2")

    assert facts.wrapper is Wrapper.PLAIN
    assert [facts.parameter_dtype, facts.gradient_dtype, facts.master_dtype] == ["fp32"] * 3
    assert sum(o1.bytes_per_parameter().values()) == 4 + 4 + 8
    assert o2.dtypes == find_recipe("fp16-fp32-master").dtypes
    assert "byte for byte it is autocast-fp32 at ZeRO 0" in o1.not_run
    assert "byte for byte it is fp16-fp32-master" in o2.not_run


@pytest.mark.parametrize("id_", sorted(set(PRODUCT) - set(runnable_recipes())))
def test_a_recipe_that_nothing_runs_is_refused_with_the_nearest_that_run(id_: str) -> None:
    with pytest.raises(Refused) as caught:
        require_runnable(find_recipe(id_))

    assert caught.value.exit_code == 2
    assert find_recipe(id_).not_run in caught.value.message
    offered = caught.value.hint.rpartition("nearest that run: ")[2].split(", ")
    assert set(offered) <= set(runnable_recipes())


@pytest.mark.parametrize(
    ("recipe", "stage", "closest"),
    [
        ("nemo-bf16", 0, "bf16-fp32-master"),
        ("apex-o2", 0, "fp16-fp32-master"),
        ("apex-o1", 0, "fp32"),
        ("bf16-pure", 1, "bf16-full"),
        ("collage-light", 0, "bf16-kahan"),
    ],
)
def test_the_nearest_recipe_is_the_one_a_person_would_name(recipe: str, stage: int, closest: str) -> None:
    assert nearest(find_recipe(recipe), [other.at(stage) for other in runnable_recipes().values()])[0] == closest


def test_megatrons_distributed_optimizer_over_ranks() -> None:
    """Megatron Core user guide, Distributed Optimizer: 18 bytes, of which over d ranks 6 + 12/d."""
    assert find_recipe("megatron-bf16").over_ranks == (6, 12)
    assert find_recipe("bf16-full").over_ranks == (10, 0), "what DeepSpeed cuts depends on the stage"
    assert all(set(recipe.partitioned) <= set(recipe.bytes_per_parameter()) for recipe in all_recipes().values())


@pytest.mark.parametrize(("recipe", "words"), [("bf16-pure", "8"), ("bf16-kahan", "10"), ("bf16-fp32-master", "16 + 4 in the step")])
def test_bytes_per_parameter_are_the_same_wherever_they_are_shown(
    recipe: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the list of recipes, in the README's table and on the study's page, under the same
    header."""
    monkeypatch.setenv("COLUMNS", "200")
    list_recipes()
    listed = capsys.readouterr().out
    root = Path(__file__).parents[2]
    pages = [(root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/study.md")]

    assert find_recipe(recipe).bytes_in_words == words
    assert BYTES_HEADER in listed
    assert re.search(rf"^{recipe} +{re.escape(words)}  ", listed, re.MULTILINE)
    for page in pages:
        table = page.partition("<!-- study -->")[2]
        assert BYTES_HEADER in table
        assert re.search(rf"^\| {recipe} \|( [^|]+ \|)? {re.escape(words)} \|", table, re.MULTILINE)
