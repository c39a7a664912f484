"""A user's own script on real ranks: measured, reconciled with its dry run, and untouched, whoever
has started it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import LIMIT_S, bf16prof, environment, read_json

from bf16prof.measuring.cache import CACHE_VARIABLE, cache_folder
from bf16prof.runs import Status, load
from bf16prof.vocabulary import Source

pytestmark = pytest.mark.timeout(600)

SCRIPTS = Path(__file__).with_name("scripts")
PLAIN, RUDE = SCRIPTS / "plain.py", SCRIPTS / "rude.py"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
HERE = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def python(*arguments: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run python as a user would, with the extensions that are compiled already."""
    env = environment(**HERE, **{CACHE_VARIABLE: str(cache_folder())}, **more)
    words = [sys.executable, *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def own_lines(text: str) -> list[str]:
    """What a script printed, without what DeepSpeed says when it is imported."""
    return [line for line in text.splitlines() if not line.startswith("[20")]


def test_a_script_is_measured_and_its_dry_run_is_exact(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("--", str(PLAIN), "--steps=5", "--evaluate", "--launched")
    done = bf16prof("measure", "--simulate", "--json", "--num-gpus", "2", "-d", str(folder), *words, env=HERE)

    assert done.code == 0, done.stderr
    found = {record["source"]: record for record in done.document["records"]}
    measured, dry = found["measure"], found["simulate"]
    assert measured["case"] == dry["case"]
    assert (measured["case"]["profile"], measured["case"]["zero_stage"], measured["case"]["world_size"]) == ("plain.py", 2, 2)
    assert measured["allocated_bytes"] == dry["allocated_bytes"] == sum(measured["components"].values())
    assert measured["components"].get("other", 0) == 0
    assert measured["phases"] == dry["phases"]
    assert measured["phases"]["eval"]["peak_bytes"] > measured["phases"]["forward"]["peak_bytes"]
    assert not any("eval" in step["phases"] for step in measured["steps"])
    assert len(measured["steps"]) == 5
    assert all(step["loss"] > 0 for step in measured["steps"])
    assert [rank["rank"] for rank in measured["ranks"]] == [0, 1]
    names = {item["name"] for item in measured["items"]}
    lines = PLAIN.read_text(encoding="utf-8").splitlines()
    set_at = {
        name: next(n for n, line in enumerate(lines, 1) if line.strip().startswith(f"{name} = ")) for name in ("batch", "outputs", "loss")
    }
    assert {f"{name} (plain.py:{number}) kept by the training loop" for name, number in set_at.items()} <= names


def steady(folder: Path) -> tuple[Any, ...]:
    """What `report` makes of the ranks in a folder."""
    assert bf16prof("report", str(folder), "--quiet").code == 0
    run = load(folder)
    assert run.manifest.status is Status.FINISHED
    (record,) = (record for record in run.records if record.source is Source.MEASURE)
    # not the peak: gloo's threads let go of a finished collective's tensors a little later in one
    # run than in another
    return record.allocated_bytes, record.components, [step.loss for step in record.steps]


def test_ranks_of_another_launcher_are_joined(tmp_path: Path) -> None:
    """attach, and `watch` from within the script, see the same."""
    attached = python(*TWO, "-m", "bf16prof.attach", "-d", "attached", PLAIN, "--steps", "5", cwd=tmp_path)
    watched = python(*TWO, PLAIN, "--steps", "5", "--watch", "watched", cwd=tmp_path)

    assert (attached.returncode, watched.returncode) == (0, 0), attached.stderr + watched.stderr
    # not by lines: two ranks that print at once may share one
    lines = [sorted(re.findall(r"rank \d step \d loss \d\.\d{4}", done.stdout)) for done in (attached, watched)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 10
    assert steady(tmp_path / "attached") == steady(tmp_path / "watched")
    assert (tmp_path / "attached" / "report.html").is_file()

    again = python("-m", "bf16prof.attach", "-d", "attached", PLAIN, cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert again.returncode == 2
    assert "rank1.json exists" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(("how", "code", "said"), [("raise", 1, "rude.py raised KeyError"), ("leave", 5, "rude.py left by os._exit(5)")])
def test_a_script_behaves_as_it_does_without_us(tmp_path: Path, how: str, code: int, said: str) -> None:
    alone, with_us = tmp_path / "alone", tmp_path / "with us"
    alone.mkdir()
    with_us.mkdir()
    bare = python(RUDE, how, cwd=alone)
    done = python("-m", "bf16prof.attach", "-d", "run", RUDE, how, cwd=with_us)

    assert done.returncode == bare.returncode == code
    assert own_lines(done.stdout) == own_lines(bare.stdout)
    assert bare.stderr.splitlines()[-4:] == done.stderr.splitlines()[-4:]
    assert (with_us / "elsewhere" / "made.txt").read_text() == "made"
    result = read_json(with_us / "run" / "script" / "rank0.json")
    assert result["status"] == "failed"
    assert result["message"].startswith(said)
