"""`--engine megatron-core`: who answers, what is refused, and what holds of any size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from command_line import Main, main, refused
from hugging_face import config
from hypothesis import given
from hypothesis import strategies as st
from jobs import profile, write_profile

from bf16prof.cases import Selection, expand
from bf16prof.closed_form.predict import predict
from bf16prof.engine.megatron.layout import buffer_spans, fullest_rank, shards
from bf16prof.measuring import accelerator, machine
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.identity import workload_digest
from bf16prof.scripts.hooks import nothing_built
from bf16prof.vocabulary import Component as C
from bf16prof.vocabulary import Device

__all__ = ["main"]

ON = ("--engine", "megatron-core")


@pytest.mark.parametrize("ranks", [1, 8, 48, 1000])
def test_it_takes_6_and_12_over_d_bytes_a_parameter(ranks: int) -> None:
    """Megatron Core's user guide, Distributed Optimizer: bf16 parameters, fp32 gradients."""
    settings = profile("gpt2-xl", engine="megatron-core")
    (job,) = expand(Selection(settings, [1], [ranks], ["megatron-bf16"], Device.GPU, find_gpu("h100-80gb")))
    record = predict(job)

    assert record.parameters is not None
    whole = record.components[C.PARAMETERS] + record.components[C.GRADIENTS]
    cut = sum(record.components[each] for each in (C.MASTER_PARAMETERS, C.MOMENTUM, C.VARIANCE))
    assert whole / record.parameters == pytest.approx(6, rel=1e-4)
    assert cut / record.parameters == pytest.approx(12 / ranks, rel=0.01)
    assert record.components[C.MASTER_GRADIENTS] == 0
    assert record.peak_allocated_bytes is None


def test_the_buffer_begins_with_the_last_parameter() -> None:
    spans, total = buffer_spans([10, 100, 3], 5)

    assert spans == [(0, 3), (64, 164), (192, 202)]
    assert total == 640  # a multiple of 128 and of 5


@given(st.lists(st.integers(1, 500), min_size=1, max_size=9), st.integers(1, 7))
def test_every_element_is_some_ranks_and_the_fullest_has_most(numels: list[int], ranks: int) -> None:
    held = [sum(shards(numels, ranks, rank)) for rank in range(ranks)]

    assert sum(held) == sum(numels)
    assert held[fullest_rank(numels, ranks)] == max(held)


def test_stages_and_recipes_are_those_that_it_has(main: Main) -> None:
    _, out, _ = main("estimate", "cpu-demo", *ON, "--gpus", "2", "--json")

    found = {(record["case"]["zero_stage"], record["case"]["recipe"]) for record in json.loads(out)["records"]}
    assert found == {(stage, recipe) for stage in (0, 1) for recipe in ("nemo-bf16", "megatron-bf16")}


def test_the_command_that_comes_next_is_the_dry_run(main: Main) -> None:
    _, out, said = main("estimate", "cpu-demo", *ON, "--gpus", "2")

    assert "next: bf16prof simulate cpu-demo --engine megatron-core --zero 0 --recipe nemo-bf16" in said
    assert "megatron-core, distributed optimizer off/on" in " ".join(out.split())


def test_what_is_assumed_of_deepspeed_is_neither_refused_nor_said(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    _, out, _ = main("estimate", file, *ON, "--gpus", "2", "--zero", "1", "--json")

    first = json.loads(out)["records"][0]["workload"]
    assert (first["engine"], first["zero_init"]) == ("megatron-core", False)
    assert not {"buckets", "zero.Init"} & set(first["assumed"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--zero 2", "megatron-core has no ZeRO stage 2: 0 is whole optimizer states on every rank; 1 is the distributed optimizer"),
        ("--offload optimizer --zero 1", "--offload is DeepSpeed's; megatron-core keeps all on the device here"),
        ("--tp 2", "--tp is DeepSpeed's; megatron-core is run data parallel only"),
        ("--pp 2", "--pp is DeepSpeed's; megatron-core is run data parallel only"),
        ("--lora r=4,targets=linear1", "adapters and 4-bit weights are not run with megatron-core"),
        ("--eval-batch-size 2", "evaluation (--eval-batch-size) is not run with megatron-core"),
        ("--set deepspeed.more.zero_allow_untested_optimizer=true", "keys of a DeepSpeed JSON mean nothing to megatron-core"),
        ("--optim adamw_torch", "--optim: says what DeepSpeed is to do, and --engine is megatron-core"),
        ("--recipe bf16-full", "megatron-core does not run bf16-full: it is DeepSpeed's"),
        ("--recipe megatron-precision-aware", "describes Megatron-LM on Transformer Engine's FusedAdam, which runs on GPUs only"),
        ("--recipe apex-o2", "megatron-core does not run apex-o2: NVIDIA's Apex is not on the package index"),
    ],
)
@pytest.mark.parametrize("command", ["estimate", "simulate"])
def test_what_it_does_not_run_is_refused_in_one_line(command: str, words: str, reason: str, main: Main) -> None:
    assert reason in refused(main(command, "cpu-demo", *ON, "--gpus", "4", *words.split()))


def test_commands_about_deepspeed_say_so(main: Main, tmp_path: Path) -> None:
    file = write_profile(tmp_path / "small.toml")
    file.write_text('engine = "megatron-core"\n' + file.read_text(encoding="utf-8"), encoding="utf-8")

    assert "engine megatron-core: plan is about DeepSpeed only" in refused(main("plan", "cpu-demo", *ON))
    assert "engine megatron-core: plan is about DeepSpeed only" in refused(main("plan", file))
    assert "no DeepSpeed engine runs megatron-bf16" in refused(main("simulate", "cpu-demo", "--recipe", "megatron-bf16"))
    assert "input should be 'deepspeed' or 'megatron-core', got 'nemo'" in refused(main("simulate", "cpu-demo", "--engine", "nemo"))
    assert "--engine: " in refused(main("simulate", *ON, "--", "train.py"))


def test_what_is_missing_is_named(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.package_version
    monkeypatch.setattr(accelerator, "package_version", lambda name: None if name == "megatron-core" else real(name))

    done = main("simulate", "cpu-demo", *ON)

    assert "--engine megatron-core needs megatron-core, which is not installed" in refused(done)
    assert "pip install 'bf16prof[megatron]'" in done[2]


def test_a_script_that_trains_with_it_hears_what_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    assert nothing_built() == "deepspeed.initialize was never called"

    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    assert nothing_built().endswith("it trains with megatron-core, which --engine megatron-core runs without a script")


def test_cases_of_two_engines_are_never_joined() -> None:
    assert workload_digest(profile()) == workload_digest(profile(engine="deepspeed"))
    assert workload_digest(profile()) != workload_digest(profile(engine="megatron-core"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--liger", "all"), "what such a pass leaves is not written down"),
        (("--packed-sequences", "4", "--seq", "32"), "what such a pass leaves is not written down"),
        (("--activation-checkpointing", "--set", "workload.use_reentrant=true"), "what such a pass leaves is not written down"),
    ],
)
def test_what_is_not_a_plain_pass_is_left_to_the_dry_run(main: Main, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    assert f"{said}: with megatron-core that is left to the dry run" in refused(main("estimate", file, *ON, "--gpus", "2", *flags))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--packed-sequences", "2"), "that read token ids and their positions"),
        (("--calibrate", "run"), "--calibrate: the work of a step is not counted"),
    ],
)
def test_rules_of_models_hold_for_every_engine(main: Main, flags: tuple[str, ...], said: str) -> None:
    assert said in refused(main("estimate", "cpu-demo", *ON, "--gpus", "2", *flags))
