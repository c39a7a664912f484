"""Ranks that share a batch: how it is said, what DeepSpeed's rules refuse, and what every source makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Main, main, refused
from hugging_face import config
from jobs import job, profile, write_profile
from pydantic import TypeAdapter

from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.closed_form.predict import predict
from bf16prof.engine.batch import batch_spec
from bf16prof.engine.config import deepspeed_config, engine_facts
from bf16prof.errors import InputError
from bf16prof.models.autograd.tape import local_variable
from bf16prof.parallelism import Parallelism
from bf16prof.planning.advice import beyond
from bf16prof.profiles.ds_config import read_ds_config
from bf16prof.profiles.identity import workload_digest
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.schema import DeepSpeedSettings, Profile
from bf16prof.records import Case, Component
from bf16prof.signatures.inquiry import Inquiry

__all__ = ["main"]

TOKENS, LOGITS = 16, local_variable("logits")[1]


def shared(sequence: int = 2, tensor: int = 1, **workload: Any) -> Profile:
    said = {"model.hf_config": config("llama"), "workload.sequence_length": TOKENS}
    said |= {"parallel.sequence": sequence, "parallel.tensor": tensor}
    said |= {f"workload.{key}": value for key, value in workload.items()}
    return load_profile(None, [Override(key, value, "test") for key, value in said.items()]).profile


def test_a_case_says_how_its_ranks_share_the_work() -> None:
    case = job(shared(2), world=4).case

    assert (case.sequence_parallel, case.parallelism) == (2, Parallelism(2, 2))
    assert case.label == "zero3-w4-sp2-bf16-fp32-master"
    assert case.parallelism.words == "2 data x 2 sequence"
    assert job(profile()).case.parallelism.words == ""
    layers = job(shared(1, 4), world=8).case
    assert (layers.label, layers.parallelism.words) == ("zero3-w8-tp4-bf16-fp32-master", "2 data x 4 tensor")


def test_a_record_from_before_is_of_data_parallel_ranks() -> None:
    old = {"profile": "p", "zero_stage": 3, "world_size": 4, "recipe": "fp32"}

    case = TypeAdapter(Case).validate_json(json.dumps(old))

    assert case.parallelism == Parallelism(4)
    assert case.label == "zero3-w4-fp32"


def test_cases_from_before_keep_their_digest() -> None:
    assert workload_digest(load_profile("cpu-demo").profile) == "409b5bd0fa41"
    assert len({workload_digest(shared(*sizes)) for sizes in ((1, 1), (2, 1), (1, 2))}) == 3


def test_a_json_that_has_autotp_keeps_what_else_it_says_of_it(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 8, "tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True}}), encoding="utf-8")

    said = {override.key: override.value for override in read_ds_config(file).overrides}

    assert said["parallel.tensor"] == 2
    assert said["deepspeed"]["more"] == {"tensor_parallel": {"tp_overlap_comm": True}}
    settings = shared(1, 2).model_copy(update={"deepspeed": DeepSpeedSettings(more=said["deepspeed"]["more"])})
    assert deepspeed_config(job(settings))["tensor_parallel"] == {"autotp_size": 2, "tp_overlap_comm": True}
    with pytest.raises(InputError, match="autotp_size is said elsewhere"):
        load_profile("cpu-demo", [Override("deepspeed.more", {"tensor_parallel": {"autotp_size": 2}}, "test")])


def test_layers_that_ranks_share_are_left_to_the_dry_run(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")
    said = (file, "--seq", str(TOKENS), "--zero", "2", "--recipe", "fp32", "--gpus", "4", "--tp", "2")

    assert "AutoTP" in str(closed_form_gap(job(shared(1, 2))))
    assert "simulate" in refused(main("estimate", *said))
    assert "--sp and --tp together" in refused(main("simulate", *said, "--sp", "2"))
    assert "--tp with an adapter" in refused(main("simulate", *said, "--lora", "r=4,targets=q_proj"))
    assert "--tp with Liger" in refused(main("simulate", *said, "--liger", "loss"))


@pytest.mark.parametrize("how", ["flag", "file", "json"])
def test_flag_profile_and_deepspeed_json_say_the_same(how: str, main: Main, tmp_path: Path) -> None:
    toml, model, ds = tmp_path / "p.toml", tmp_path / "config.json", tmp_path / "ds.json"
    model.write_text(json.dumps(config("llama")), encoding="utf-8")
    parallel = "[parallel]\nsequence = 2\n" if how == "file" else ""
    toml.write_text(f'{parallel}[model]\nhf_config = "config.json"\n[workload]\nsequence_length = {TOKENS}\n', encoding="utf-8")
    size = {"sequence_parallel_size": 2} if how == "json" else {}
    ds.write_text(
        json.dumps({"train_batch_size": 4, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, **size}), encoding="utf-8"
    )
    flags = ["--sp", "2"] if how == "flag" else []

    code, out, err = main("estimate", toml, "--ds-config", ds, "--gpus", "4", "--json", *flags)

    assert code == 0, err
    (record,) = json.loads(out)["records"]
    assert record["case"]["sequence_parallel"] == 2
    assert record["workload"]["micro_batch_size"] == 2, "train_batch_size over the two groups of ranks that share a sequence"
    assert record["workload"]["deepspeed"]["sequence_parallel_size"] == 2
    assert "simulate" in record["notes"][0]


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "ranks": ({}, ["--gpus", "3"], "3 ranks cannot be cut into groups of 2"),
    "one rank": ({}, ["--gpus", "1"], "1 rank cannot be cut into groups of 2"),
    "tokens": ({}, ["--seq", "15"], "15 tokens cannot be cut into 2"),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 3}, [], "3 attention heads cannot be shared by 2 ranks"),
    "heads of keys and values": (
        {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}, ["--sp", "4", "--gpus", "4"], "3 heads of keys and values",
    ),
    "eager": ({"_attn_implementation": "eager"}, [], "eager attention"),
    "none": ({}, ["--sp", "0"], "should be greater than or equal to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_deepspeeds_rules_refuse_is_one_line(name: str, main: Main, tmp_path: Path) -> None:
    changes, flags, words = REFUSED[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama", **changes)), encoding="utf-8")

    given = {"--sp": "2", "--gpus": "2", "--seq": str(TOKENS), **dict(zip(flags[::2], flags[1::2], strict=True))}
    result = main("simulate", file, *(part for pair in given.items() for part in pair))

    assert words in refused(result)


def test_a_model_of_ours_has_no_attention_to_replace(main: Main, tmp_path: Path) -> None:
    assert "models of transformers" in refused(main("simulate", write_profile(tmp_path / "p.toml"), "--sp", "2", "--gpus", "2"))


def test_a_plan_leaves_shared_sequences_to_the_dry_run(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    assert "use simulate" in refused(main("plan", file, "--sp", "2", "--seq", str(TOKENS)))


@pytest.mark.parametrize(("most", "flag"), [(Component.ACTIVATIONS, "--sp"), (Component.MOMENTUM, "--tp")])
def test_where_nothing_fits_the_ranks_of_a_model_of_transformers_may_share_more(most: Component, flag: str) -> None:
    nearest: Any = SimpleNamespace(job=job(shared(1)), record=SimpleNamespace(peak_components={most: 1}))

    assert [line for line in beyond(nearest) if f"simulate {flag} N" in line]


def test_the_key_of_the_json_is_not_for_more() -> None:
    with pytest.raises(InputError, match="sequence_parallel_size is said elsewhere"):
        load_profile("cpu-demo", [Override("deepspeed.more", {"sequence_parallel_size": 2}, "test")])


def test_sizes_that_were_nobodys_wish_are_left_out_where_groups_do_not_fit(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    code, out, _ = main("estimate", file, "--sp", "4", "--zero", "2", "--recipe", "fp32", "--seq", str(TOKENS), "--json")

    assert code == 0
    assert min(record["case"]["world_size"] for record in json.loads(out)["records"]) == 4


def test_a_rank_holds_its_own_tokens_and_reduces_in_a_dtype_of_its_own() -> None:
    """The dtype is that of seq_parallel_communication_data_type, which is fp32 where nobody says it (runtime/constants.py)."""
    settings = shared(2, keeps_outputs=True)
    one, two = job(shared(1, keeps_outputs=True), world=4), job(settings, world=4)

    assert {name: spec.shape for name, spec in batch_spec(two).items()} == dict.fromkeys(
        ("input_ids", "position_ids", "shift_labels"), (1, TOKENS // 2)
    )
    assert engine_facts(deepspeed_config(one)).communication_dtype == "bf16"
    assert engine_facts(deepspeed_config(two)).communication_dtype == "fp32"
    assert closed_form_gap(two) is None
    held = {name: {item.name: item.bytes for item in predict(each).items} for name, each in (("one", one), ("two", two))}
    assert held["two"]["flat parameters"] == held["one"]["flat parameters"], "ZeRO cuts over all ranks"
    assert held["two"]["reduce bucket"] == 2 * held["one"]["reduce bucket"]
    assert held["two"][LOGITS] * 2 == held["one"][LOGITS]
    assert predict(two).peak_allocated_bytes is None


def test_tiles_of_an_mlp_give_what_the_whole_gives() -> None:
    import torch

    from bf16prof.models.modules import build_trained
    from bf16prof.models.tiled import with_tiled_mlp

    plain, tiled = (build_trained(shared(1, tiled_mlp=is_tiled)) for is_tiled in (False, True))
    tiled.load_state_dict(plain.state_dict())
    tokens = torch.arange(60).expand(2, -1)
    found = [model(tokens, labels=tokens).loss for model in (plain, tiled)]
    for loss in found:
        loss.backward()
    norms = [sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None) for model in (plain, tiled)]

    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert "TiledMLP" in str(closed_form_gap(job(shared(1, tiled_mlp=True))))
    with pytest.raises(InputError, match="no dense MLP"):
        with_tiled_mlp(torch.nn.Linear(2, 2))


def test_what_is_recorded_is_a_rank_on_its_own_tokens() -> None:
    assert Inquiry.of(job(shared(2), world=4)).digest == Inquiry.of(job(shared(1, sequence_length=TOKENS // 2), world=4)).digest
