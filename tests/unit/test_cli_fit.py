"""`--fail-unless-fits` and `--zero-init`: what CI asks, and how ZeRO-3 builds the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import Main, main, refused

__all__ = ["main"]

ESTIMATE = ("estimate", "-p", "llama3-8b", "--zero", "3", "--gpus", "8", "--recipe", "bf16-full", "--sequence-length", "256")
FITS = (*ESTIMATE, "--gpu", "h100-80gb", "--zero-init", "-q")


def test_what_fits_passes(main: Main) -> None:
    code, out, err = main(*FITS, "--fail-unless-fits", "--json")

    assert (code, err) == (0, "")
    assert [record["verdict"] for record in json.loads(out)["records"]] == ["fits"]


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_what_does_not_leaves_with_4_and_the_answer_is_there_all_the_same(more: tuple[str, ...], main: Main, tmp_path: Path) -> None:
    code, out, err = main(*ESTIMATE, "--gpu", "l4-24gb", "--gpus", "1", "--fail-unless-fits", "-o", tmp_path / "a.csv", *more)

    assert code == 4
    assert "does not fit" in out
    assert (tmp_path / "a.csv").read_text().count("does not fit") >= 1
    assert err.splitlines()[0].startswith("bf16prof: --fail-unless-fits: 1 of 1 cases do not; zero3-w1-bf16-full")


def test_tight_is_not_fits(main: Main) -> None:
    asked = (*ESTIMATE, "--gpu", "h100-80gb", "--sequence-length", "8192", "--batch-size", "3", "--no-activation-checkpointing", "-q")
    code, out, err = main(*asked, "--json")

    assert (code, err) == (0, "")
    assert json.loads(out)["records"][0]["verdict"] != "fits"
    assert main(*asked, "--fail-unless-fits")[0] == 4


def test_a_plan_needs_one_that_fits_on_each_number_of_gpus(main: Main) -> None:
    plan = ("plan", "--no-verify", "-p", "gpt2-xl", "--gpu", "l4-24gb", "--recipe", "bf16-full", "--zero", "2", "--offload", "none", "-q")

    assert main(*plan, "--gpus", "4", "--fail-unless-fits")[0] == 0
    code, out, err = main(*plan, "--gpus", "1,4", "--micro-batch-size", "64", "--no-activation-checkpointing", "--fail-unless-fits")
    assert code == 4
    assert "nothing fits" in out
    assert "--fail-unless-fits: nothing fits on 1, 4 GPUs" in err


def test_a_cpu_has_nothing_to_fit(main: Main) -> None:
    assert "only a GPU has a limit to fit" in refused(main("estimate", "-p", "cpu-demo", "--device", "cpu", "--fail-unless-fits"))


def test_verify_and_no_verify_exclude_each_other(main: Main) -> None:
    assert "exclude each other" in refused(main("plan", "-p", "gpt2-xl", "--gpus", "1", "--zero", "2", "--verify", "2", "--no-verify"))


def test_only_init_is_named_with_the_way_out(main: Main) -> None:
    code, out, _ = main(*ESTIMATE, "--gpu", "l4-24gb", "--gpus", "32", "--recipe", "fp32", "--no-zero-init", "--activation-checkpointing")

    assert code == 0
    assert re.search(r"only init does not fit: init 29\.9\d GiB; inside deepspeed\.zero\.Init [\d.]+ GiB \(--zero-init\)", out)


def test_a_flag_says_how_zero3_builds_the_model(main: Main) -> None:
    whole, inside = (json.loads(main(*ESTIMATE, flag, "--json")[1])["records"][0] for flag in ("--no-zero-init", "--zero-init"))

    assert (whole["workload"]["zero_init"], inside["workload"]["zero_init"]) == (False, True)
    assert whole["phases"]["init"]["peak_bytes"] > 2 * inside["phases"]["init"]["peak_bytes"]
