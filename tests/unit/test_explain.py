"""`bf16prof explain`: the message in words, the prediction of its phase, and what would fit."""

from __future__ import annotations

import inspect
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Main, main, refused
from logs import written
from pasted import BACKWARD, ENDS_IN_INIT, OUT_OF_MEMORY

from bf16prof.commands.explain import explain
from bf16prof.commands.importing import import_
from bf16prof.imports.finding import GIB

__all__ = ["main"]

JOB = ("-p", "llama3-8b", "--gpus", "8", "--zero", "2", "--recipe", "bf16-fp32-master")


def test_a_message_alone_is_explained_by_its_own_numbers(main: Main, tmp_path: Path) -> None:
    code, out, _ = main("explain", *written(tmp_path, OUT_OF_MEMORY))

    assert code == 0
    assert "out of memory on GPU 1" in out
    for line in ("tried to allocate", "2.00 GiB", "reserved, not allocated", "2.25 GiB", "beside the allocator", ">= 21.00 GiB"):
        assert line in out
    assert "the allocator lacked 512.00 MiB" in out
    assert "expandable_segments:True" in out
    assert "name the model" in out


@pytest.mark.parametrize("how", ["argument", "stdin"])
def test_a_message_is_taken_as_it_was_pasted(how: str, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(OUT_OF_MEMORY.encode())))

    code, out, err = main("explain", OUT_OF_MEMORY if how == "argument" else "-")

    assert code == 0, err
    assert ">= 21.00 GiB" in out


def test_with_the_job_the_prediction_of_the_phase_and_what_fits_are_said(main: Main, tmp_path: Path) -> None:
    code, out, err = main("explain", *written(tmp_path, BACKWARD + OUT_OF_MEMORY), *JOB, "--json")
    document = json.loads(out)
    found = document["explanation"]

    assert code == 0, err
    assert found["phase"] == "backward"
    assert "loss.backward" in found["evidence"]
    assert found["prediction"]["phase"] == "backward"
    estimate = document["records"][1]
    assert found["prediction"]["peak_bytes"] == estimate["phases"]["backward"]["peak_bytes"]
    assert found["prediction"]["needed_bytes"] == 21 * GIB
    assert found["start"]["peak_bytes"] == estimate["run_peak_allocated_bytes"]
    for change in found["fits_with"]:
        assert change["plan"]["peak_bytes"] <= 23.5 * GIB, "on the GPU of the message"
    assert found["fits_with"] or found["saves"]


EVALUATION = """Traceback (most recent call last):
  File "/opt/venv/lib/python3.11/site-packages/transformers/trainer.py", line 3868, in evaluation_loop
    losses, logits, labels = self.prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1736, in _wrapped_call_impl
    return self._call_impl(*args, **kwargs)
"""


def test_an_evaluation_is_no_forward_pass_of_a_step(main: Main, tmp_path: Path) -> None:
    code, out, err = main("explain", *written(tmp_path, EVALUATION + OUT_OF_MEMORY), *JOB, "--json")
    found = json.loads(out)["explanation"]

    assert code == 0, err
    assert found["phase"] == "eval"
    assert found["prediction"] is None
    assert "bf16prof simulate --eval-batch-size N" in found["why_not_predicted"]


@pytest.mark.parametrize(
    ("total", "gpu"), [("79.11", "h100-80gb"), ("139.81", "h200-141gb"), ("23.64", "23.64GiB"), ("50.00", "50GiB"), ("0.01", "h100-80gb")]
)
def test_the_gpu_is_the_one_with_the_memory_of_the_message(total: str, gpu: str, main: Main, tmp_path: Path) -> None:
    code, out, err = main("explain", *written(tmp_path, OUT_OF_MEMORY.replace("23.50", total)), *JOB, "--json")

    assert code == 0, err
    assert json.loads(out)["explanation"]["judged_on"] == gpu


def test_a_prediction_below_what_is_proved_is_an_error_and_said(main: Main, tmp_path: Path) -> None:
    code, out, _ = main("explain", *written(tmp_path, BACKWARD + OUT_OF_MEMORY.replace("19.00", "70.00").replace("23.50", "79.11")), *JOB)

    assert code == 0
    assert "below: the message proves >= 72.00 GiB" in out


def test_a_log_without_a_message_says_what_it_proves(main: Main, tmp_path: Path) -> None:
    code, out, err = main("explain", *written(tmp_path, ENDS_IN_INIT))

    assert code == 0
    assert "No out-of-memory message there" in out
    assert ">= 6.50 GiB" in out
    assert "nothing is said of training" in err


def test_a_log_without_a_message_stands_beside_its_prediction(main: Main, tmp_path: Path) -> None:
    code, out, _ = main("explain", *written(tmp_path, ENDS_IN_INIT), *JOB)

    assert code == 0
    assert "estimate - import" in out
    assert "consistent" in out


@pytest.mark.parametrize("text", ["hello", ""])
def test_a_file_of_which_nothing_is_understood_is_refused(text: str, main: Main, tmp_path: Path) -> None:
    assert "log0" in refused(main("explain", *written(tmp_path, text)))


def test_a_file_that_is_not_there_is_named(main: Main) -> None:
    assert "nowhere.log" in refused(main("explain", "nowhere.log"))


def test_a_wrong_flag_is_refused_before_anything_is_said(main: Main, tmp_path: Path) -> None:
    assert "unknown profile" in refused(
        main("explain", *written(tmp_path, OUT_OF_MEMORY), "-p", "nothing", "--gpus", "8", "--zero", "2", "--recipe", "fp32")
    )


def test_whatever_describes_a_job_to_import_describes_it_here() -> None:
    of_import, of_explain = (set(inspect.signature(command).parameters) for command in (import_, explain))

    assert of_import - of_explain == {"output_dir", "output", "figure", "force", "fail_over", "verbose"}
