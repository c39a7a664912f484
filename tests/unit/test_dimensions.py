"""Plans that search the dimensions: what is tried, in which order, how often, and what is said of
the rest.

The real engine is left out here: dry runs need so much more than the bound, by a rule of each
test's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Main, main, refused
from hugging_face import config
from jobs import job, profile

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import anatomy_of
from bf16prof.closed_form.predict import predict
from bf16prof.commands import plan as command
from bf16prof.errors import InputError
from bf16prof.planning.bound import least_of, states_of
from bf16prof.planning.by_dimensions import answer_by_dimensions, field_of
from bf16prof.planning.judge import Judge
from bf16prof.planning.question import Question
from bf16prof.planning.ways import Way, sizes_of, ways
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.profiles.schema import Profile
from bf16prof.records import MemoryRecord
from bf16prof.step_records import PhaseMemory
from bf16prof.verdict import judged
from bf16prof.vocabulary import Component, Device, Offload, Phase, Source

__all__ = ["main"]

GPU = find_gpu("h100-80gb")
LIGER = frozenset({"liger-kernel"})
MOST = 8

Needs = Callable[[Job, int], int]


def question(settings: Profile, *stages: int) -> Question:
    return Question(settings, GPU, stages or (3,), ("bf16-fp32-master",), (1,))


def record_of(each: Job, peak: int) -> MemoryRecord:
    sizes: dict[str, Any] = {"peak_allocated_bytes": peak, "run_peak_allocated_bytes": peak, "reserved_bytes": peak}
    phases = {Phase.BACKWARD: PhaseMemory(peak, 1)}
    return judged(
        MemoryRecord(
            Source.SIMULATE, each.case, Device.GPU, 5, gpu=GPU.id, peak_phase=Phase.BACKWARD, phases=phases,
            limit_bytes=GPU.memory_bytes, **sizes,
        )
    )  # fmt: skip


class Engine:
    """Stands for dry runs: a job needs what a rule says of it and of its bound. Remembers what it
    was asked."""

    def __init__(self, needs: Needs) -> None:
        self.asked: list[list[Job]] = []
        self._needs = needs

    def __call__(self, jobs: Sequence[Job]) -> list[MemoryRecord | str]:
        self.asked.append(list(jobs))
        return [record_of(each, self._needs(each, least_of(each, {}).kept_bytes)) for each in jobs]

    @property
    def count(self) -> int:
        return sum(map(len, self.asked))


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-30b-a3b", "gemma2-2b", "gpt2-xl", "cpu-demo"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_bound_is_below_every_peak_in_closed_form(name: str, stage: int) -> None:
    for checkpointing in (False, True):
        for offload in (Offload.NONE, Offload.OPTIMIZER):
            each = job(profile(name, workload__activation_checkpointing=checkpointing), stage, 8, offload=offload)
            peak = predict(each).peak_allocated_bytes

            assert peak is not None
            assert 0 < least_of(each, states_of(each)).bytes <= peak


def test_shared_layers_divide_all_that_a_stage_leaves_whole() -> None:
    """By hand, with masters and two moments in fp32: 2 + 12 bytes a parameter, which stage 0 cuts
    among no ranks that share nothing. Stage 3 has gradients between steps as well, and a bucket of
    5e8 elements."""
    alone = profile("llama3.2-1b")
    parameters = sum(each.numel for each in anatomy_of(job(alone)).parameters)
    shared = Way("tensor", 8).laid_over(alone)
    for stage, expected in enumerate([14 / 8, 14 / 8, 14 / 8, 16 / 8]):
        held = least_of(job(shared, stage, 8), states_of(job(alone, stage, 8))).held_bytes
        bucket = 2 * 500_000_000 if stage == 3 else 0

        assert held - bucket == pytest.approx(expected * parameters, rel=1e-3), stage


def test_the_loss_is_on_one_stage_of_a_pipeline_and_of_pairs_is_another() -> None:
    def kept(size: int, **more: object) -> int:
        pipeline = Way("pipeline", size).laid_over(profile("llama3.2-1b", **more))
        return least_of(job(pipeline, 1, 8), {}).kept_bytes

    assert kept(4) * 4 == kept(1), "the largest stage has the mean of all at least"
    assert kept(1, workload__reward=True) < kept(1) / 2


def test_shared_sequences_divide_what_is_kept() -> None:
    alone = profile("llama3.1-8b", workload__activation_checkpointing=True)

    def kept(dimension: str) -> int:
        return least_of(job(Way(dimension, 8 if dimension else 1).laid_over(alone), 3, 8), {}).bytes

    assert kept("sequence") * 8 == kept("")


def test_every_way_is_a_divisor_of_the_ranks_with_the_savers_in_their_order() -> None:
    found = list(ways(profile("llama3.1-8b"), 6, LIGER, alone=True))

    assert list(ways(profile("llama3.1-8b"), 6, LIGER)) == found[1:]
    assert {way.size for way in found if way.dimension == "sequence"} == {2, 3, 6}
    assert [way.flags for way in found[:2]] == [(), ("--liger", "loss")], "ranks that share nothing are among the choices"
    assert ("--sp", "6", "--liger", "loss", "--set", "workload.tiled_mlp=true") in [way.flags for way in found]
    assert all("--liger" not in way.flags for way in ways(profile("llama3.1-8b"), 6, frozenset()))
    assert all("--liger" not in way.flags for way in ways(profile("llama3.1-8b", workload__fused_loss="tiled"), 6, LIGER))
    assert {way.flags for way in ways(profile("cpu-demo"), 2, LIGER)} == {(flag, "2") for flag in ("--sp", "--tp", "--pp")}
    assert not list(ways(profile("cpu-demo", model__factory="net:make"), 4, LIGER)), "a function says itself how it is cut"


def test_a_model_that_says_no_sizes_has_none() -> None:
    settings = profile("llama3.1-8b")
    assert isinstance(settings.model, HuggingFaceSettings)
    without = settings.model.model_copy(update={"hf_config": {**config("llama"), "hidden_size": None}})

    assert sizes_of(settings) is not None
    assert sizes_of(settings.model_copy(update={"model": without})) is None


def test_what_deepspeed_refuses_is_said_once_for_each_reason() -> None:
    field = field_of(question(profile("qwen3-30b-a3b"), 2, 3), 16, GPU.memory_bytes, LIGER)

    assert [line.partition(":")[0] for line in field.refused] == ["--tp 2,4,8,16 --liger loss", "--pp 2,4,8,16", "--ep 2,4,8,16"]
    assert "AutoEP" in field.refused[-1]
    assert field.hopeless
    assert "by what they keep between steps" in field.left_out[-1]
    assert not field_of(question(profile("qwen3-30b-a3b")), 16, 2**20, LIGER).choices, "nothing fits a MiB"


def test_the_search_begins_with_what_needs_least_and_ends_with_what_is_to_be_preferred() -> None:
    # GIVEN a model whose dry runs need 20 GiB more than they keep
    engine = Engine(lambda _, least: least + 20 * 2**30)
    found = answer_by_dimensions(Judge(question(profile("qwen2.5-72b", workload__sequence_length=2**17))), 64, engine, MOST, LIGER)

    # THEN for each offloading the widest way is tried first, the least offloading first
    first = engine.asked[0][0]
    assert (first.case.sequence_parallel, first.case.offload, first.profile.workload.tiled_mlp) == (64, Offload.NONE, True)
    # and the first choice is what nothing that fits is preferred to, after few dry runs
    assert engine.count <= MOST
    assert found.outlook.plans
    choice = found.outlook.plans[0]
    assert choice.case.sequence_parallel < 64
    assert choice.case.offload is Offload.NONE
    assert choice.chosen[:2] == ("--sp", str(choice.case.sequence_parallel))
    assert all(plan.fits and plan.is_tried for plan in found.outlook.plans)
    assert f"of {found.outlook.combinations} settings that may fit" in found.outlook.left_out[0]


def test_where_nothing_fits_other_dimensions_are_tried_and_the_nearest_is_said() -> None:
    engine = Engine(lambda _, least: least + 200 * 2**30)
    found = answer_by_dimensions(Judge(question(profile("llama3.1-8b"), 1, 3)), 4, engine, MOST, LIGER)

    assert found.first is None
    assert found.outlook.nearest is not None
    assert engine.count <= MOST
    assert {bool(each.case.tensor_parallel > 1) for jobs in engine.asked for each in jobs} == {False, True}


def test_a_dry_run_that_breaks_is_named_and_the_next_takes_its_place() -> None:
    asked: list[tuple[str, ...]] = []

    def no_tiles(jobs: Sequence[Job]) -> list[MemoryRecord | str]:
        asked.extend((str(each.case.offload), str(each.profile.workload.tiled_mlp)) for each in jobs)
        return ["there is no dense MLP" if each.profile.workload.tiled_mlp else record_of(each, 2**30) for each in jobs]

    judge = Judge(question(profile("llama3.1-8b", workload__sequence_length=2**15)))
    found = answer_by_dimensions(judge, 4, no_tiles, 2, LIGER)

    assert found.first is not None
    assert found.first.plan.case.offload is Offload.NONE
    count = found.outlook.combinations
    assert found.outlook.left_out[0].startswith(f"{count - 2} of {count} settings that may fit were not run dry"), (
        "what breaks is not counted"
    )
    assert [line for line in found.outlook.left_out if line.endswith("there is no dense MLP")]
    assert asked[:4] == [(level, is_tiled) for is_tiled in ("True", "False") for level in ("none", "optimizer")]
    with pytest.raises(InputError, match=r"no dry run on 4 GPUs came to its end: .*out of order"):
        answer_by_dimensions(judge, 4, lambda jobs: ["out of order"] * len(jobs), MOST, LIGER)
    with pytest.raises(InputError, match="nothing to try on 1 GPUs"):
        answer_by_dimensions(Judge(question(profile("cpu-demo"))), 1, no_tiles, MOST, LIGER)


def test_activations_of_a_dry_run_tell_what_a_longer_part_of_the_sequence_needs() -> None:
    # GIVEN dry runs in which nothing but activations is large: 16 GiB on 8 ranks, so 64 on 2
    def run(jobs: Sequence[Job]) -> list[MemoryRecord | str]:
        asked.extend(each.case.sequence_parallel for each in jobs)
        activations = [{Component.ACTIVATIONS: 2**37 // each.case.sequence_parallel} for each in jobs]
        return [replace(record_of(each, sum(a.values())), peak_components=a) for each, a in zip(jobs, activations, strict=True)]

    asked: list[int] = []
    settings = question(profile("llama3.1-8b", workload__sequence_length=2**18, workload__liger="loss", workload__tiled_mlp=True))
    found = answer_by_dimensions(Judge(replace(settings, checkpointing=(True,), offloads=(Offload.NONE,))), 8, run, MOST, LIGER)

    # THEN ranks that share nothing, which would need 128 GiB, are not tried
    assert (asked, found.outlook.plans[0].case.sequence_parallel) == ([8, 2, 4], 2)


def test_a_dry_run_tells_of_its_own_stage_alone() -> None:
    choices = field_of(question(profile("llama3.2-1b"), 1, 2, 3), 2, GPU.memory_bytes, frozenset()).choices
    like = {
        choice.setting.stage: choice for choice in choices if choice.but_for_the_way[2:] == (Offload.NONE, True) and choice.way.size > 1
    }
    record = record_of(like[3].job, 2**40)

    assert like[3].estimate_bytes(like[3], record) >= 2**40
    assert like[1].estimate_bytes(like[3], record) == 0, "stage 3 gathers parameters and has a bucket that stage 1 has not"


ALONE = (
    "plan",
    "llama3.1-8b",
    "--gpus",
    "4",
    "--gpu",
    "h100-80gb",
    "--zero",
    "3",
    "--recipe",
    "bf16-fp32-master",
    "--offload",
    "optimizer",
)


def test_where_nothing_fits_ranks_that_share_nothing_others_are_tried(main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    asked: list[int] = []

    def dry_run(jobs: Sequence[Job], _: Any) -> list[MemoryRecord | None]:
        asked.append(len(jobs))
        return [record_of(each, 2**30) for each in jobs]

    monkeypatch.setattr(command, "_dry_run", dry_run)
    words = (*ALONE, "--seq", "8192", "--micro-batch-size", "16", "--activation-checkpointing", "--dry-runs", "3")
    code, out, err = main(*words, "--write", tmp_path / "ds.json")

    assert code == 0
    assert sum(asked) <= 3
    assert "in search of other ways: 3 dry runs at most" in err
    assert "chosen by the plan" in out
    assert "ranks that share a batch" in out
    assert "launch: deepspeed --num_gpus 4 train.py" in err
    assert "--zero 3 --gpus 4" in err
    assert json.loads((tmp_path / "ds.json").read_text())["zero_optimization"]["stage"] == 3

    asked.clear()
    code, out, err = main(*words, "--no-search-dimensions")
    assert (code, asked) == (0, [])
    assert "None of " in out


@pytest.mark.parametrize(
    ("more", "said"),
    [(("--sp", "2"), "the dimensions are given"), (("--no-verify",), "judged by dry runs alone"), (("--dry-runs", "0"), "--dry-runs")],
)
def test_what_cannot_be_searched_is_one_line(more: tuple[str, ...], said: str, main: Main) -> None:
    assert said in refused(main(*ALONE, "--search-dimensions", *more))


def test_what_could_not_be_judged_is_not_said_to_fit_nowhere(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped passes of qwen2.5-7b in fp32 are of layers that are not recomputed."""
    asked = ("plan", "qwen2.5-7b", "--gpus", "4", "--gpu", "h100-80gb", "--recipe", "fp32", "--zero", "3", "--no-trace")
    monkeypatch.setattr(command, "_search_dimensions", lambda *_: pytest.fail("no ground to search"))
    monkeypatch.setattr(command, "_to_try", lambda *_: 0)
    code, out, err = main(*asked)

    assert code == 0
    words = " ".join(out.split())
    assert "None of the 3 combinations that could be judged fits; 3 were not judged." in words
    assert "More GPUs" not in words
    assert "were not tried, for some that share nothing could not be judged" in err


def test_several_numbers_of_gpus_are_searched_where_somebody_asks(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searched = answer_by_dimensions

    def search(judge: Judge, world_size: int, *_: object) -> Any:
        if world_size == 3:
            raise InputError("--search-dimensions: nothing to try on 3 GPUs: no head is cut in three")
        return searched(judge, world_size, lambda jobs: [record_of(each, 2**30) for each in jobs], 2, LIGER)

    monkeypatch.setattr(command, "_search_dimensions", search)
    asked = ("plan", "llama3.1-8b", "--gpu", "h100-80gb", "--zero", "3", "--recipe", "bf16-fp32-master")

    # an answer stays where another number of GPUs has none
    code, out, err = main(*asked, "--gpus", "3,4", "--search-dimensions")
    assert code == 0
    assert "nothing to try on 3 GPUs" in err
    assert "by the number of GPUs" in out or "4 x h100-80gb" in out
    # which is an error where no number has one
    assert "nothing to try on 3 GPUs" in refused(main(*asked, "--gpus", "3", "--search-dimensions"))
    # and where nobody asks, a line says that nothing else was tried
    silent: Any = SimpleNamespace(no_verify=False, search_dimensions=None, quiet=False)
    several: Any = [None, None]
    assert not command._may_search(silent, several)
    assert "as there are several numbers of GPUs" in capsys.readouterr().err
