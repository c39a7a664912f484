"""The textbook accountings against the tables that they come from."""

from __future__ import annotations

from typing import Any

import pytest
from jobs import job, profile
from korthikanti import figure_bytes, layer_bytes, states_bytes
from published import rows

from bf16prof.closed_form.predict import predict
from bf16prof.closed_form.textbook import readme_bytes, textbook, zero_paper_bytes
from bf16prof.profiles.recipes import find_recipe
from bf16prof.vocabulary import Phase

PAPER = rows("ZeRO Table 1", "model_states_per_gpu")


@pytest.mark.parametrize("row", PAPER, ids=lambda row: f"stage{row['zero_stage']}-dp{row['gpus']}")
def test_the_zero_papers_table(row: dict[str, Any]) -> None:
    """Rajbhandari et al., table 1, 7.5B column: gigabytes (1e9) with three significant digits."""
    value = zero_paper_bytes(row["parameters"], row["zero_stage"], row["gpus"]) / 1e9

    assert value == pytest.approx(row["value"], rel=0.005, abs=0.005)


def test_the_zero_papers_table_is_whole() -> None:
    assert {(row["zero_stage"], row["gpus"]) for row in PAPER} == {(s, g) for s in (1, 2, 3) for g in (1, 4, 16, 64, 256, 1024)}


def test_without_zero_everything_is_on_every_gpu() -> None:
    """Figure 1 of the paper: 7.5B parameters take (2 + 2 + 12) * 7.5e9 = 120 GB on each GPU,
    whatever their number."""
    assert zero_paper_bytes(7.5e9, 0, 1) == zero_paper_bytes(7.5e9, 0, 64) == 120e9


BASELINE, LOW = rows("example README", "bytes_per_param_sum")


@pytest.mark.parametrize(("recipe", "row"), [("bf16-fp32-master", BASELINE), ("bf16-full-autocast", LOW)])
def test_the_published_readme(recipe: str, row: dict[str, Any]) -> None:
    """Its memory breakdown: 20N bytes for the baseline, 12N in bf16 throughout, all of it
    partitioned at stage 3."""
    parameters = row["parameters"]

    assert readme_bytes(parameters, 3, row["gpus"], find_recipe(recipe)) == row["value"] * parameters / row["gpus"]
    assert readme_bytes(parameters, 0, row["gpus"], find_recipe(recipe)) == row["value"] * parameters


def test_both_accountings_side_by_side_for_the_published_run() -> None:
    """16 * 6,858,007,633 / 4 = 27,432,030,532 and 20 * 6,858,007,633 / 4 = 34,290,038,165 bytes."""
    accounts = textbook(6_858_007_633, 3, 4, find_recipe("bf16-fp32-master"))

    assert accounts == {"ZeRO paper": 27_432_030_532, "example README": 34_290_038_165}


def test_stages_1_and_2_of_a_low_precision_recipe() -> None:
    """bf16-full on 4 GPUs, 1,000 parameters. Stage 1: 2 + 2 + 6/4 = 5.5 bytes; stage 2: 2 + (2 +
    6)/4 = 4 bytes per parameter.

    With master gradients (README): 2 + 2 + 8/4 = 6 and 2 + (2 + 8)/4 = 4.5.
    """
    recipe = find_recipe("bf16-full")

    assert textbook(1000, 1, 4, recipe) == {"ZeRO paper": 5500, "example README": 6000}
    assert textbook(1000, 2, 4, recipe) == {"ZeRO paper": 4000, "example README": 4500}


TABLE_2 = rows("Korthikanti Table 2", "activation_bytes_per_layer")
SYMBOLS = {"s": 2048, "b": 4, "h": 6144, "a": 64, "t": 8}


@pytest.mark.parametrize("row", TABLE_2, ids=lambda row: f"{row['recompute']}-t{row['tensor_parallel']}-s{row['sequence_parallel']}")
def test_the_activations_of_a_layer(row: dict[str, Any]) -> None:
    """The expressions of table 2 as printed, evaluated for its 22B model."""
    printed = eval(row["value"], {"__builtins__": {}}, SYMBOLS)

    ours = layer_bytes(
        SYMBOLS["s"],
        SYMBOLS["b"],
        SYMBOLS["h"],
        SYMBOLS["a"],
        tensor_parallel=SYMBOLS["t"] if row["tensor_parallel"] else 1,
        sequence_parallel=row["sequence_parallel"],
        recompute=row["recompute"],
    )

    assert ours == printed


@pytest.mark.parametrize("row", rows("Korthikanti Fig 1", "activations"), ids=lambda row: f"{row['model']}-{row['recompute']}")
def test_the_activations_of_figure_1(row: dict[str, Any]) -> None:
    layer = layer_bytes(
        row["sequence"],
        row["micro_batch"],
        row["hidden"],
        row["heads"],
        tensor_parallel=row["tensor_parallel"],
        sequence_parallel=row["sequence_parallel"],
        recompute=row["recompute"],
    )

    total = figure_bytes(row["layers"], layer, pipeline_parallel=row["pipeline_parallel"], interleave=row["interleave"])

    assert total / 2**30 == row["value"]


@pytest.mark.parametrize("row", rows("Korthikanti Fig 1", "params_grads_optimizer"), ids=lambda row: row["model"])
def test_the_states_of_figure_1(row: dict[str, Any]) -> None:
    total = states_bytes(row["layers"], row["hidden"], tensor_parallel=row["tensor_parallel"], pipeline_parallel=row["pipeline_parallel"])

    assert total / 2**30 == row["value"]


def test_what_our_layers_keep_of_the_papers() -> None:
    """GPT-2 without dropout, and with attention that keeps no scores: the paper's 34 less the two
    masks of 1, so 32 s b h.

    Besides, each layer keeps what the paper leaves out: mean and deviation of two norms, fp32
    log-sums of the scores, and random seeds.
    """
    sequence, batch, hidden, heads = 512, 2, 768, 12
    kept = []
    for layers in (4, 5):
        overrides: dict[str, Any] = {
            "model__family": "gpt2",
            "model__hidden_size": hidden,
            "model__num_heads": heads,
            "model__num_layers": layers,
            "model__max_sequence_length": sequence,
            "workload__sequence_length": sequence,
            "workload__micro_batch_size": batch,
            "workload__activation_checkpointing": False,
        }
        record = predict(job(profile(**overrides), 0, 1))
        kept.append((record.phases[Phase.FORWARD].end_bytes or 0) - (record.allocated_bytes or 0))
    paper = layer_bytes(sequence, batch, hidden, heads, recompute="selective") - 2 * sequence * batch * hidden
    left_out = 4 * batch * sequence * (2 * 2 + heads)

    assert kept[1] - kept[0] == pytest.approx(paper + left_out, abs=2 * 512)
