"""Ranks that share a batch: how it is said, what DeepSpeed's rules refuse, and what every source
makes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Main, main, refused
from hugging_face import config
from jobs import job, profile, write_profile
from pydantic import TypeAdapter

from bf16prof.cases import Job
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.closed_form.predict import predict
from bf16prof.dry_run.stages import of_all_stages, ranks_run
from bf16prof.engine.batch import batch_spec
from bf16prof.engine.config import deepspeed_config, engine_facts
from bf16prof.engine.constraints import refusal_reason
from bf16prof.engine.workload import workload_of
from bf16prof.errors import InputError
from bf16prof.models import experts
from bf16prof.models.autograd.events import local_variable
from bf16prof.parallelism import Parallelism
from bf16prof.planning.advice import beyond
from bf16prof.planning.by_dry_run import answer_by_dry_runs
from bf16prof.planning.judge import Judge
from bf16prof.planning.question import Question, powers_of_two
from bf16prof.profiles.ds_config import read_ds_config
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.identity import workload_digest
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.schema import DeepSpeedSettings, Profile
from bf16prof.records import Case, MemoryRecord
from bf16prof.reports.plan_rows import nearest_lines
from bf16prof.signatures.inquiry import Inquiry
from bf16prof.step_records import PhaseMemory
from bf16prof.verdict import judged
from bf16prof.vocabulary import Component, Device, Offload, Phase, Source, Verdict

__all__ = ["main"]

TOKENS, LOGITS = 16, local_variable("logits")[1]


def staged(stages: int = 2) -> Profile:
    """A model of ours whose layers lie on so many stages."""
    return profile("cpu-demo", parallel__pipeline=stages)


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


def test_stages_follow_one_another_and_replicas_lie_within() -> None:
    """As DeepSpeed lays them out (runtime/pipe/topology.py, PipeDataParallelTopology: axes pipe,
    data)."""
    case = job(staged(2), 1, world=6).case

    assert (case.label, case.parallelism.words) == ("zero1-w6-pp2-bf16-fp32-master", "3 data x 2 pipeline")
    assert [case.parallelism.stage(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [case.parallelism.reader(rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]
    assert ranks_run(case) == [0, 3]
    assert [Parallelism(2, sequence=2).reader(rank) for rank in range(4)] == [0, 0, 1, 1]


def test_a_pipelines_json_says_stages_and_what_is_recomputed(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    table = {"stages": 2, "partition": "best", "grad_partitioned": True}
    file.write_text(json.dumps({"train_batch_size": 8, "pipeline": table}), encoding="utf-8")
    said = {override.key: override.value for override in read_ds_config(file).overrides}
    recomputed = profile("cpu-demo", parallel__pipeline=2, workload__activation_checkpointing=True)

    assert said["parallel.pipeline"] == 2
    assert "workload.activation_checkpointing" not in said
    assert said["deepspeed"]["more"] == {"pipeline": {"partition": "best", "grad_partitioned": True}}
    assert deepspeed_config(job(recomputed, 1))["pipeline"] == {"stages": 2, "activation_checkpoint_interval": 1, "use_reentrant": False}
    file.write_text(json.dumps({"train_batch_size": 8, "pipeline": {"stages": 2, "activation_checkpoint_interval": 2}}), encoding="utf-8")
    said = {override.key: override.value for override in read_ds_config(file).overrides}
    keys = ("activation_checkpointing", "checkpoint_every_n_layers", "use_reentrant")
    assert [said[f"workload.{key}"] for key in keys] == [True, 2, True], "DeepSpeed's own default is reentrant"
    with pytest.raises(InputError, match=r"pipeline\.stages is said elsewhere"):
        load_profile("cpu-demo", [Override("deepspeed.more", {"pipeline": {"stages": 2}}, "test")])


def test_the_record_of_a_pipeline_is_of_the_stage_that_fits_worst() -> None:
    of = job(staged(3), 1, world=6)
    assert workload_of(of).gradient_accumulation_steps == 1
    stages = [
        MemoryRecord(Source.SIMULATE, of.case, Device.GPU, 10 + n, peak_allocated_bytes=peak, verdict=verdict, workload=workload_of(of))
        for n, (peak, verdict) in enumerate([(70, Verdict.FITS), (60, Verdict.TIGHT), (50, Verdict.FITS)])
    ]

    whole = of_all_stages(stages)

    assert (whole.peak_allocated_bytes, whole.parameters) == (60, 33)
    assert [(rank.rank, rank.host, rank.peak_allocated_bytes) for rank in whole.ranks] == [
        (0, "stage 1", 70),
        (2, "stage 2", 60),
        (4, "stage 3", 50),
    ]
    assert whole.notes == (
        "of stage 2 of 3, which fits worst",
        "each stage waits for 2 of 3 turns of the schedule (1F1B), where all take the same time",
    )
    assert of_all_stages(stages[:1]) is stages[0]


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
    "stages": ({}, ["--sp", "1", "--pp", "2"], "models of transformers are not"),
    "stages and parts": ({}, ["--pp", "2", "--gpus", "4"], "--pp with --sp or --tp"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_deepspeeds_rules_refuse_is_one_line(name: str, main: Main, tmp_path: Path) -> None:
    changes, flags, words = REFUSED[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama", **changes)), encoding="utf-8")

    given = {"--sp": "2", "--gpus": "2", "--seq": str(TOKENS), **dict(zip(flags[::2], flags[1::2], strict=True))}
    result = main("simulate", file, *(part for pair in given.items() for part in pair))

    assert words in refused(result)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--zero", "2"], "ZeRO-2 and ZeRO-3 are incompatible"),
        (["--zero", "1", "--gpus", "3"], "cannot be cut into groups of 2"),
        (["--zero", "1", "--lora", "r=4,targets=wte"], "--pp with an adapter"),
    ],
)
def test_what_a_pipeline_does_not_go_with_is_one_line(flags: list[str], words: str, main: Main) -> None:
    assert words in refused(main("simulate", "cpu-demo", "--pp", "2", "--recipe", "fp32", *flags))


def mixture(ranks: int, *, drops: bool = True) -> Any:
    """A model with one MoE layer, as far as it is asked."""
    gate = SimpleNamespace(drop_tokens=drops, capacity_factor=1.25, k=2, min_capacity=4)
    return SimpleNamespace(modules=lambda: [MoE(ranks, SimpleNamespace(gate=gate))])


class MoE:
    """What DeepSpeed's class of this name says of itself."""

    def __init__(self, ep_size: int, deepspeed_moe: Any) -> None:
        self.ep_size, self.deepspeed_moe = ep_size, deepspeed_moe


def test_a_model_says_over_how_many_ranks_its_experts_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, experts.MODULE, SimpleNamespace(MoE=MoE))

    experts.require_experts(mixture(2), 2)
    experts.require_capacities(mixture(2))
    assert experts.capacity_note(mixture(2)) == [
        "experts: room for 1.25 x 2 x tokens / experts each, 4 at least, as the layer says; what is beyond is dropped"
    ]
    with pytest.raises(InputError, match="have ep_size 2, and --ep is 1"):
        experts.require_experts(mixture(2), 1)
    with pytest.raises(InputError, match="has no layer of"):
        experts.require_experts(SimpleNamespace(modules=list), 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="drop_tokens=False"):
        experts.require_capacities(mixture(2, drops=False))
    assert experts.ranks_of_experts(SimpleNamespace(group_name="ep_size_4")) == 4
    assert experts.ranks_of_experts(SimpleNamespace()) == 1


def test_experts_are_spread_by_layers_of_a_model_of_ones_own() -> None:
    spread = load_profile(None, [Override("model.factory", "net:make", "test"), Override("parallel.expert", 2, "test"),
                                 Override("workload.sequence_length", 8, "test")]).profile  # fmt: skip
    case = job(spread, 2, world=4).case

    assert (case.label, case.parallelism.words) == ("zero2-w4-ep2-bf16-fp32-master", "4 data, experts over 2")
    assert "ZeRO-3" in str(refusal_reason(job(spread, 3, world=4)))
    assert "MODULE:FUNCTION" in str(refusal_reason(job(profile(parallel__expert=2), 1, world=4)))
    assert "--ep" in str(closed_form_gap(job(spread, 2, world=4)))
    with pytest.raises(InputError, match="3 ranks cannot be cut into groups of 2"):
        job(spread, 2, world=3)


def test_quantized_gathers_need_a_gpu() -> None:
    quantized = profile("cpu-demo", deepspeed__more={"zero_optimization": {"zero_quantized_weights": True}})

    assert "CUDA kernel" in str(refusal_reason(job(quantized, device=Device.CPU)))
    assert refusal_reason(job(quantized)) is None
    assert "zero_quantized_weights is not modelled" in str(closed_form_gap(job(quantized)))


def test_a_model_of_ours_has_no_attention_to_replace(main: Main, tmp_path: Path) -> None:
    assert "models of transformers" in refused(main("simulate", write_profile(tmp_path / "p.toml"), "--sp", "2", "--gpus", "2"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_batch_size": 3, "gradient_accumulation_steps": 1}, "makes up the train_batch_size of 3"),
        ({"train_micro_batch_size_per_gpu": 1}, "judged by dry runs alone"),
    ],
)
def test_what_cannot_be_planned_over_shared_ranks_is_one_line(config: dict[str, int], words: str, main: Main, tmp_path: Path) -> None:
    said = tmp_path / "ds.json"
    said.write_text(json.dumps({**config, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}), encoding="utf-8")
    verify = ("--verify", "1") if "alone" in words else ()

    assert words in refused(main("plan", "llama3.1-8b", "--gpus", "4", "--sp", "2", "--seq", "4096", "--ds-config", said, *verify))


def test_a_plan_over_shared_sequences_is_run_dry_from_what_needs_least() -> None:
    """The real engine is left out: a dry run that says how much a setting needs by rules of its
    own."""
    room, asked = find_gpu("h100-80gb").memory_bytes, list[tuple[int, str, bool, int]]()

    def dry_run(jobs: Sequence[Job]) -> list[MemoryRecord | None]:
        return [record_of(each) for each in jobs]

    def record_of(each: Job) -> MemoryRecord:
        workload, case = each.profile.workload, each.case
        asked.append((case.zero_stage, str(case.offload), workload.activation_checkpointing, workload.micro_batch_size))
        peak = (
            room
            // 8
            * workload.micro_batch_size
            * (1 if workload.activation_checkpointing else 5)
            * (9 if case.offload is Offload.NONE else 1)
        )
        phases = {Phase.BACKWARD: PhaseMemory(peak, 1)}
        sizes: dict[str, Any] = {
            "peak_allocated_bytes": peak,
            "run_peak_allocated_bytes": peak,
            "reserved_bytes": peak,
            "peak_phase": Phase.BACKWARD,
        }
        return judged(MemoryRecord(Source.SIMULATE, case, Device.GPU, 5, gpu="h100-80gb", phases=phases, limit_bytes=room, **sizes))

    judge = Judge(Question(shared(2), find_gpu("h100-80gb"), (2, 3), ("bf16-fp32-master",), powers_of_two(64)))
    found = answer_by_dry_runs(judge, 8, dry_run)

    assert asked[:3] == [(3, str(offload), True, 1) for offload in Offload]
    assert {offload for _, offload, _, _ in asked[3:]} == {"optimizer"}, "the least offloading with which something fits"
    assert [(p.activation_checkpointing, p.case.zero_stage, p.micro_batch_size) for p in found.outlook.plans] == [
        (False, 3, 1), (True, 2, 1), (True, 3, 1),
    ]  # fmt: skip
    assert [size for *_, size in asked[-2:]] == [2, 4], "larger micro-batches of the first choice, until one does not fit"
    assert all(plan.is_tried and plan.fits for plan in found.outlook.plans)
    assert found.outlook.plans[0].train_batch_size == 4, "of groups that share a sequence, not of ranks"
    nothing = answer_by_dry_runs(
        judge, 8, lambda jobs: [replace(record_of(each), verdict=Verdict.DOES_NOT_FIT, limit_bytes=1) for each in jobs]
    )
    assert nothing.outlook.nearest is not None
    assert "Other numbers of GPUs were not tried." in nearest_lines(nothing.outlook)


@pytest.mark.parametrize(("most", "flag"), [(Component.ACTIVATIONS, "--sp"), (Component.MOMENTUM, "--tp")])
def test_where_nothing_fits_the_ranks_of_a_model_of_transformers_may_share_more(most: Component, flag: str) -> None:
    nearest: Any = SimpleNamespace(job=job(shared(1)), record=SimpleNamespace(peak_components={most: 1}))

    assert [line for line in beyond(nearest) if f"plan {flag} N" in line]


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
    """The dtype is that of seq_parallel_communication_data_type, which is fp32 where nobody says it
    (runtime/constants.py)."""
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
