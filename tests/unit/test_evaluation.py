"""An evaluation between steps, and packed rows: how they are said, what is refused, and which
answers stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused
from hugging_face import config
from jobs import job, profile

from bf16prof.closed_form.predict import predict
from bf16prof.engine.batch import batch_spec, evaluation_of
from bf16prof.measuring.batches import make_batches
from bf16prof.profiles.identity import workload_digest
from bf16prof.profiles.schema import Profile
from bf16prof.reconcile import reconcile
from bf16prof.records import MemoryRecord, peak_phase
from bf16prof.step_records import PhaseMemory
from bf16prof.verdict import judged
from bf16prof.vocabulary import TRAINING, Phase, Source, Verdict

__all__ = ["main"]


def evaluating(**keys: Any) -> Profile:
    return profile(workload__micro_batch_size=4, workload__evaluation=keys)


def test_the_largest_peak_of_all_phases_decides() -> None:
    phases = {phase: PhaseMemory(10, 5) for phase in TRAINING}

    assert peak_phase({**phases, Phase.EVAL: PhaseMemory(11, 5)}) is Phase.EVAL
    assert peak_phase({**phases, Phase.INIT: PhaseMemory(99, 5)}) is Phase.FORWARD


def test_one_that_a_forward_pass_covers_leaves_the_answer_as_it_is() -> None:
    plain, covered = predict(job(profile(workload__micro_batch_size=4))), predict(job(evaluating(per_device_eval_batch_size=4)))

    assert (covered.phases, covered.verdict, covered.notes) == (plain.phases, plain.verdict, plain.notes)


@pytest.mark.parametrize("keys", [
    {"per_device_eval_batch_size": 5}, {"per_device_eval_batch_size": 1, "prediction_loss_only": False, "batches": 9},
])  # fmt: skip
def test_one_that_may_hold_more_is_left_to_the_dry_run_and_nothing_is_said_to_fit(keys: dict[str, Any]) -> None:
    plain, left = predict(job(profile(workload__micro_batch_size=4))), predict(job(evaluating(**keys)))

    assert plain.verdict is Verdict.FITS
    assert left.verdict is None
    assert left.phases == plain.phases
    assert [note for note in left.notes if "bf16prof simulate" in note]
    assert judged(left.__class__(**{**vars(left), "limit_bytes": 1})).verdict is Verdict.DOES_NOT_FIT, "the steps alone are too large"


def test_a_floor_of_a_prediction_is_no_error_below_what_was_measured() -> None:
    left = predict(job(evaluating(per_device_eval_batch_size=5)))
    peak = left.run_peak_allocated_bytes or 0

    def error(measured: int) -> float | None:
        truth = MemoryRecord(Source.MEASURE, left.case, left.device, left.parameters, run_peak_allocated_bytes=measured)
        (found,) = (each for each in reconcile([left, truth]) if each.quantity == "run_peak_allocated_bytes")
        return found.errors[Source.ESTIMATE]

    assert error(2 * peak) is None
    assert error(peak // 2) == pytest.approx(1, rel=0.01)


def test_an_estimate_says_that_its_peaks_are_a_floor(main: Main) -> None:
    code, _, said = main("estimate", "cpu-demo", "--gpus", "2", "--zero", "2", "--recipe", "fp32", "--eval-batch-size", "64")

    assert code == 0
    assert "an evaluation of 64 sequences (a micro-batch has 4) has no closed form" in said


def test_logits_that_stay_need_the_number_of_batches(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")
    logits = ("--eval-batch-size", "2", "--set", "workload.evaluation.prediction_loss_only=false")

    assert "say batches" in refused(main("estimate", file, *logits))
    assert main("estimate", file, *logits, "--set", "workload.evaluation.eval_accumulation_steps=3", "--no-trace")[0] == 0


def test_training_arguments_that_evaluate_say_so(main: Main, tmp_path: Path) -> None:
    file, arguments = tmp_path / "config.json", tmp_path / "args.yaml"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    def said(text: str) -> Any:
        arguments.write_text(text, encoding="utf-8")
        found = main("estimate", file, "--training-args", arguments, "--json", "--gpus", "2", "--zero", "2", "--no-trace")
        return json.loads(found[1])["records"][0]["workload"]["evaluation"]

    assert said("per_device_eval_batch_size: 3\neval_strategy: no\n") is None
    assert said("per_device_eval_batch_size: 3\neval_strategy: steps\n") == "3 x 2 (sequences, batches), losses kept"
    assert said("do_eval: true\neval_accumulation_steps: 4\n") == "8 x 2 (sequences, batches), losses kept"


def test_a_plan_is_one_of_the_steps_and_says_so(main: Main) -> None:
    code, _, said = main("plan", "cpu-demo", "--gpus", "2", "--no-verify", "--eval-batch-size", "64")

    assert code == 0
    assert "a plan is one of the steps" in said


def test_batches_of_an_evaluation_have_its_size() -> None:
    evaluation = evaluation_of(job(evaluating(per_device_eval_batch_size=7)))

    assert {spec.shape[0] for spec in batch_spec(evaluation).values()} == {7}


def test_packed_rows_are_one_whose_positions_start_again_and_no_first_token_is_a_label() -> None:
    import torch

    packed = profile(
        model__hf_config=config("llama"), workload__sequence_length=10, workload__micro_batch_size=2, workload__packed_sequences=3,
        workload__data="synthetic",
    )  # fmt: skip
    this = job(packed)
    batch = make_batches(this, 0, "cpu", shifted=False)()

    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {name: spec.shape for name, spec in batch_spec(this).items()}
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2, 3] * 2])
    assert torch.equal(batch["position_ids"], positions)
    assert torch.equal(batch["labels"] == -100, positions == 0)
    kept = positions != 0
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


@pytest.mark.parametrize(("more", "expected"), [
    (("--packed-sequences", "33", "--seq", "32"), "33 sequences (--packed-sequences) in a row of 32 tokens"),
    (("--packed-sequences", "1"), "one sequence is no packing"),
    (("--packed-sequences", "4", "--sp", "2", "--gpus", "2"), "--packed-sequences with --sp"),
    (("--eval-batch-size", "4", "--sp", "2", "--gpus", "2"), "has not been held against real ranks"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(more: tuple[str, ...], expected: str, main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    assert expected in refused(main("simulate", file, *more))
    assert "models of transformers" in refused(main("simulate", "cpu-demo", "--packed-sequences", "4"))


def test_jobs_without_either_are_the_cases_that_they_always_were() -> None:
    plain = profile()

    assert workload_digest(plain) == workload_digest(profile(workload__packed_sequences=0))
    assert workload_digest(plain) != workload_digest(evaluating(per_device_eval_batch_size=4))
