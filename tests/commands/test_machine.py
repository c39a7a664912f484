"""What is recorded of a machine, and what `bf16prof doctor` says of it: complete ones, bare ones
and broken ones."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import typer
from jobs import write_profile
from typer.testing import CliRunner

from bf16prof.cases import Selection, expand
from bf16prof.commands.doctor import doctor
from bf16prof.engine.versions import version_tuple
from bf16prof.errors import InputError, Refused
from bf16prof.locks import held
from bf16prof.measuring import machine
from bf16prof.measuring.accelerator import TorchAnswer, TorchGpu, require_dtypes, require_memory
from bf16prof.measuring.cache import BUILD_LOCK, cache_folder
from bf16prof.measuring.checks import checks, verdict
from bf16prof.measuring.findings import Check, State
from bf16prof.profiles.load import load_profile
from bf16prof.vocabulary import Device

CHECKS = "bf16prof.measuring.checks"
TRAIN = ("torch", "deepspeed")


def named(found: list[Check], name: str) -> Check:
    """The one check of that name."""
    return next(check for check in found if check.name == name)


def fake_torch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Let other interpreters import this torch instead of the installed one."""
    (folder / "torch.py").write_text(body, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def with_gpus(*gpus: tuple[str, int, int]) -> str:
    """A torch that reports these GPUs (name, bytes, major compute capability)."""
    return f"""
from types import SimpleNamespace as N
version = N(cuda="12.8")
gpus = [N(name=n, total_memory=m, major=c, minor=0) for n, m, c in {gpus!r}]
cuda = N(is_available=lambda: True, device_count=lambda: len(gpus), get_device_properties=lambda i: gpus[i])
"""


def test_only_allowed_variables_are_recorded() -> None:
    secrets = {"HF_TOKEN": "1", "AWS_SECRET_ACCESS_KEY": "2", "WANDB_API_KEY": "3", "HOME": "/home/x", "NCCL_SOCKET_IFNAME": "eth0"}
    secrets |= {"BF16PROF_API_KEY": "4", "BF16PROF_token": "5", "MASTER_ADDR": "10.0.0.1", "http_proxy": "http://u:p@h"}
    wanted = {"CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "2", "BF16PROF_PROFILE": "gpt2-xl", "SLURM_JOB_ID": "7"}

    assert machine.environment({**secrets, **wanted}) == wanted
    assert not any(word in name for name in machine.ALLOWED_ENVIRONMENT for word in ("TOKEN_", "KEY", "SECRET", "PASS"))


def test_the_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("SOME_TOKEN", "hunter2")

    assert machine.environment()["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "hunter2" not in str(machine.environment())


def test_hardware_and_versions_are_strings_and_import_nothing_heavy() -> None:
    code = (
        "import json, sys; from bf16prof.measuring.machine import hardware, versions;"
        "import bf16prof.commands.doctor, bf16prof.measuring.checks; print(json.dumps(hardware() | versions()));"
        "assert not {'torch', 'deepspeed', 'transformers', 'tokenizers', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    described = json.loads(done.stdout)
    assert all(isinstance(value, str) and value for value in described.values())
    assert described["torch"] == metadata.version("torch")
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(described["memory_bytes"]) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert int(described["cores"]) == len(os.sched_getaffinity(0))


def test_versions_compare_by_their_leading_numbers() -> None:
    assert version_tuple("2.13.0+cpu") == (2, 13, 0)
    assert version_tuple("0.18.3") > version_tuple("0.18.2+abc.1")
    assert version_tuple("0.9.5") < version_tuple("0.18.0rc1")
    assert version_tuple("unknown") == ()


def test_a_machine_without_torch_and_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = machine.package_version
    monkeypatch.setattr(f"{CHECKS}.package_version", lambda name: None if name in TRAIN else installed(name))

    found = checks()

    for name in TRAIN:
        assert named(found, name).status is State.MISSING
        assert named(found, name).hint == "pip install 'bf16prof[train]'"
    assert "not possible here (torch and deepspeed missing)" in verdict(found)
    assert "estimate, plan and report work" in verdict(found)


def test_an_old_deepspeed_is_named_with_the_version_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CHECKS}.package_version", {"deepspeed": "0.16.9", "torch": "2.7.0"}.get)
    monkeypatch.setattr(f"{CHECKS}.ask_torch", lambda: TorchAnswer(None, ()))

    found = checks()

    check = named(found, "deepspeed")
    assert (check.status, check.hint) == (State.WARNING, "pip install 'deepspeed>=0.18.3'")
    assert "may not work" in verdict(found)


def test_gpus_are_what_torch_says_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(tmp_path, monkeypatch, with_gpus(("NVIDIA H100 80GB HBM3", 81082 * 2**20, 9), ("NVIDIA A100-SXM4-40GB", 40536 * 2**20, 8)))

    found = checks()

    assert named(found, "GPU") == Check("GPU", State.OK, "NVIDIA H100 80GB HBM3 (79.2 GiB), NVIDIA A100-SXM4-40GB (39.6 GiB)")
    assert "(CUDA 12.8)" in named(found, "torch").detail
    assert verdict(found) == "Measuring works here, on GPU and on CPU."


def test_a_torch_that_is_asked_ends_with_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(tmp_path, monkeypatch, "import os, signal; os.write(2, f'{os.getpid()}\\n'.encode()); signal.pause()")
    program = (
        "import subprocess, sys\nfrom bf16prof.measuring import accelerator\nrun = subprocess.run\n"
        "subprocess.run = lambda *a, **k: run(*a, **{**k, 'capture_output': False, 'stdout': sys.stderr, 'stderr': sys.stdout})\n"
        "accelerator.ask_torch()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asker:
        assert asker.stdout is not None
        asked = psutil.Process(int(asker.stdout.readline()))
        asker.kill()

    with contextlib.suppress(psutil.NoSuchProcess):
        asked.wait(30)
    assert not asked.is_running() or asked.status() == psutil.STATUS_ZOMBIE


def test_what_the_system_does_not_tell_is_a_warning_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_says() -> Check:
        raise PermissionError(errno.EACCES, "Permission denied", "/proc/net/dev")

    monkeypatch.setattr(f"{CHECKS}.ask_torch", lambda: TorchAnswer(None, ()))
    monkeypatch.setattr(f"{CHECKS}.network", nobody_says)
    monkeypatch.setattr(f"{CHECKS}.can_list", lambda: False)
    found = checks()

    assert named(found, "network").detail == "cannot tell: /proc/net/dev: Permission denied"
    assert named(found, "/proc").status is State.MISSING


def test_a_gpu_without_bf16_tensor_cores_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(tmp_path, monkeypatch, with_gpus(("Tesla V100-SXM2-32GB", 2**35, 7)))

    assert "no bf16 tensor cores" in named(checks(), "GPU").hint


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
        ("import time; time.sleep(60)", "no answer"),
    ],
)
def test_a_torch_that_does_not_work_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, problem: str) -> None:
    fake_torch(tmp_path, monkeypatch, body)
    monkeypatch.setattr("bf16prof.measuring.accelerator.TIMEOUT_S", 60.0 if "sleep" not in body else 0.5)

    found = checks()

    assert named(found, "torch").status is State.WARNING
    assert problem in named(found, "torch").detail
    assert "may not work" in verdict(found)


def test_compiler_and_ninja_are_looked_for_where_the_build_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CHECKS}.ask_torch", lambda: TorchAnswer(None, ()))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "none"))

    bare = checks()
    assert named(bare, "C++ compiler").hint == "apt-get install g++"
    assert named(bare, "ninja").hint == "pip install ninja"

    tool = tmp_path / "my compiler"
    tool.write_text("#!/bin/sh\necho 'my compiler 1.2'\n", encoding="utf-8")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", f"'{tool}' -O2")
    assert named(checks(), "C++ compiler") == Check("C++ compiler", State.OK, "my compiler 1.2")

    scripts = tmp_path / "venv bin"
    scripts.mkdir()
    tool.rename(scripts / "ninja")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(scripts))
    inactive = checks()
    assert named(inactive, "ninja").hint == f"export PATH='{scripts}':$PATH"
    assert named(inactive, "C++ compiler").status is State.MISSING


def test_the_extension_cache_must_be_writable_and_unlocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CHECKS}.ask_torch", lambda: TorchAnswer(None, ()))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new" / "cache"))
    assert named(checks(), "extension cache").status is State.OK
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"

    folder = cache_folder()
    assert folder.parent == tmp_path / "new" / "cache"
    folder.mkdir(parents=True)
    (folder / BUILD_LOCK).touch()
    assert named(checks(), "extension cache").status is State.OK, "one that a killed build has left"
    with held(folder / BUILD_LOCK):
        assert "a build is going on" in named(checks(), "extension cache").detail

    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    assert "cannot be written" in named(checks(), "extension cache").detail


def test_little_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CHECKS}.ask_torch", lambda: TorchAnswer(None, ()))
    monkeypatch.setattr(f"{CHECKS}.SHM_BYTES", 2**60)

    assert "--shm-size" in named(checks(), "shared memory").hint


@pytest.fixture
def app() -> typer.Typer:
    """An application of one command."""
    application = typer.Typer()
    application.command()(doctor)
    return application


def test_doctor_prints_a_line_for_each_check_and_a_conclusion(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, [], env={"COLUMNS": "200"})

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name in ("Python", "torch", "deepspeed", "GPU", "NVML", "C++ compiler", "ninja", "nvcc", "tokenizers", "disk", "extension cache"):
        assert sum(f" {name} " in line for line in lines if line.split()[:1] in (["ok"], ["missing"], ["warning"])) == 1
    assert lines[-1].startswith("Measuring")


def test_doctor_as_json_is_one_document(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--json"])

    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert set(document) == {"schema_version", "records", "checks"}
    assert document["records"] == []
    assert {check["status"] for check in document["checks"]} <= {"ok", "missing", "warning"}
    assert all("\n" not in check["detail"] + check["hint"] for check in document["checks"])


def test_hostile_names_are_inert(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CHECKS}.ask_torch", lambda: TorchAnswer(None, (TorchGpu("[/red]\x1b[31mGPU\n\u202eX", 2**30, (9, 0)),)))

    result = CliRunner().invoke(app, [], env={"COLUMNS": "200"})

    assert result.exit_code == 0
    assert "[/red]\\x1b[31mGPU\\n" in result.stdout
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout


def test_fp16_is_left_out_where_the_cpu_has_none(tmp_path: Path) -> None:
    profile = load_profile(str(write_profile(tmp_path / "p.toml"))).profile
    jobs = expand(Selection(profile, [1], [2], ["fp16-fp32-master", "bf16-full"], Device.CPU))
    without = TorchAnswer(None, (), fp16=False)

    left, refused = require_dtypes(jobs, without)

    assert [job.case.recipe for job in left] == ["bf16-full"]
    assert [refusal.case.recipe for refusal in refused] == ["fp16-fp32-master"]
    assert require_dtypes(jobs, TorchAnswer(None, ())) == (jobs, [])
    with pytest.raises(Refused, match="no fp16 on this CPU"):
        require_dtypes(jobs[:1], without)


def test_more_ranks_than_the_machine_can_hold_are_refused() -> None:
    require_memory(1)
    with pytest.raises(InputError, match="1000000 ranks take 195312 GiB"):
        require_memory(1_000_000)
