"""Input that once ended in a traceback: refused where it is read, in one line that names what is
wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused
from hugging_face import config
from report_fixtures import run_folder

from bf16prof import scratch
from bf16prof.errors import InputError
from bf16prof.measuring.cache import CACHE_VARIABLE
from bf16prof.measuring.prepare import prepare_parts

__all__ = ["main", "run_folder"]

ESTIMATE = ("estimate", "--zero", "2", "--recipe", "bf16-full", "--gpus", "2")
HUGE = 2**40 - 2


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("params", [5, "abc", [], True])
def test_parameters_of_an_optimizer_that_are_no_object(main: Main, tmp_path: Path, params: object) -> None:
    file = written(tmp_path / "ds.json", {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": params}})

    assert "optimizer.params: expected an object" in refused(main("estimate", "--profile", "cpu-demo", "--ds-config", file, "--gpus", "2"))


@pytest.mark.parametrize(("model_type", "sizes"), [
    ("mistral", {"hidden_size": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ("llama", {"hidden_size": 2, "num_attention_heads": 4, "num_key_value_heads": 4}),
    ("phi", {"hidden_size": 48, "num_attention_heads": HUGE + 1, "max_position_embeddings": 0}),
    ("llama", {"head_dim": 0}),
])  # fmt: skip
def test_heads_of_no_width(main: Main, tmp_path: Path, model_type: str, sizes: dict[str, Any]) -> None:
    file = written(tmp_path / "config.json", {**config(model_type), **sizes})

    assert "model.hf_config" in refused(main(*ESTIMATE, "--hf-config", file))


@pytest.mark.parametrize("name", ["", ".", "..", "../model.safetensors", "a\0b", "x" * 300])
def test_names_in_an_index_that_are_no_files(main: Main, tmp_path: Path, name: str) -> None:
    written(tmp_path / "model.safetensors.index.json", {"weight_map": {"wte.weight": name}})
    profile = tmp_path / "p.toml"
    profile.write_text('[model]\nhf_config={model_type="x", vocab_size=5}\nsafetensors="model.safetensors.index.json"\n')

    refused(main(*ESTIMATE, "--profile", profile))


@pytest.mark.parametrize("profile", [
    {"workload": "x"}, {"model": []}, {"optimizer": 3}, {"deepspeed": None}, {"model": {"hf_config": json.loads("[" * 40 + "]" * 40)}},
    {"workload": {"seed": 2**63}},
])  # fmt: skip
def test_a_run_whose_profile_is_malformed(main: Main, run_folder: Path, profile: object) -> None:
    manifest = run_folder / "run.json"
    written(manifest, {**json.loads(manifest.read_text(encoding="utf-8")), "profile": profile})

    assert "run.json: " in refused(main("report", run_folder))


@pytest.mark.parametrize("sizes", [
    ("model.vocab_size=1099511627774",),
    ("model.num_layers=16383",),
    ("model.hidden_size=2", "model.vocab_size=1099511627774", "workload.micro_batch_size=1099511627774"),
])  # fmt: skip
def test_sizes_whose_product_nothing_can_hold(main: Main, sizes: tuple[str, ...]) -> None:
    sets = [word for value in ("model.num_heads=2", f"model.hidden_size={HUGE}", *sizes) for word in ("--set", value)]

    message = refused(main(*ESTIMATE, "--profile", "cpu-demo", "--sequence-length", "128", *sets))
    assert "are more than 2^63" in message


@pytest.mark.parametrize("number", [2**63, -(2**63), 10**30])
def test_numbers_that_64_bits_do_not_hold(main: Main, tmp_path: Path, number: int) -> None:
    configuration = written(tmp_path / "config.json", config("llama", something=number))
    deepspeed = written(tmp_path / "ds.json", {"bf16": {"enabled": True}, "something": {"else": [number]}})

    for words in (("--hf-config", configuration), ("--profile", "cpu-demo", "--ds-config", deepspeed)):
        assert "beyond 2^63" in refused(main("estimate", "--gpus", "2", *words))


@pytest.mark.parametrize("command", ["estimate --profile cpu-demo --gpus 2", "profiles list", "--help", "--version"])
def test_a_closed_stdout_is_one_line(command: str) -> None:
    line = f"exec {sys.executable} -m bf16prof {command} >&-"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, check=False, timeout=60)

    assert (done.returncode, done.stderr) == (2, "bf16prof: cannot write the output: Bad file descriptor\n")


def test_files_do_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """What is opened first gets the lowest number that is free, and a message would land in it."""
    log = tmp_path / "losses.csv"
    log.write_text("step,loss\n0,1.0\n1,0.5\n", encoding="utf-8")
    words = f"import {log} --zero 1 --gpus 2 --recipe bf16-full -d {tmp_path / 'run'} <&- 2>&-"
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} -m bf16prof {words}"], stdout=subprocess.DEVNULL, check=False, timeout=60)

    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    """A shell removes the folder that it is in: this process may be too large to be forked with a
    function of ours."""
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f"rmdir {gone} && exec {sys.executable} -m bf16prof {' '.join(ESTIMATE)} --profile cpu-demo"
    done = subprocess.run(["sh", "-c", line], cwd=gone, capture_output=True, text=True, check=False, timeout=60)

    assert "working directory is gone" in refused((done.returncode, done.stdout, done.stderr))


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(InputError, match="cannot write temporary files") as caught, scratch.temporary_folder():
        pass

    assert "TMPDIR" in caught.value.hint


@pytest.mark.parametrize("words", [("report", "x" * 300), ("report", "a/" * 3000), ("estimate", "y" * 300, "--gpus", "2")])
def test_a_path_that_the_system_does_not_take(words: tuple[str, ...], main: Main) -> None:
    """Not even whether it exists can be asked; so it is where a folder above it is another
    user's."""
    refused(main(*words))


def test_what_may_not_be_looked_at(main: Main, monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("bf16prof.measuring.script.join.joins", closed)

    assert f"cannot use {run_folder}: Permission denied" in refused(main("report", run_folder))


def test_without_proc_nothing_is_dry_run(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bf16prof.processes.can_list", lambda: False)
    words = ("--profile", "cpu-demo", "--zero", "1", "--gpus", "2", "--recipe", "bf16-full")

    assert "simulating needs /proc" in refused(main("simulate", *words))


def test_a_cache_of_extensions_that_is_read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.setattr(os, "access", lambda *_: False)

    with pytest.raises(InputError, match=r"cannot write the extension cache .* read-only") as caught:
        prepare_parts([], pytest.fail)
    assert CACHE_VARIABLE in caught.value.hint
