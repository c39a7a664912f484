"""Dry runs with every supported release of DeepSpeed, and with other releases of PyTorch and
transformers (`make versions`).

Each release is installed alone, without what it requires, into a folder below `build/versions`, and
put before the others. The same jobs are dry-run with each: stages 0 to 3, BF16_Optimizer,
`zero.Init`, both offloads, and a Hugging Face model. Writes `docs/versions.md`.

    python benchmarks/versions.py                     everything in `versions.toml`
    python benchmarks/versions.py torch-2.14.1=DIR    also with a package that lies in that folder
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bf16prof.cases import Job, Selection, expand
from bf16prof.engine.versions import supported
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import Device, Offload

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "versions"
PAGE = ROOT / "docs" / "versions.md"
BESIDE = {
    "transformers-4": ["huggingface_hub<1.0", "tokenizers<=0.22.2", "requests", "urllib3", "charset_normalizer", "idna", "certifi"],
    "transformers-5.0": ["huggingface_hub<2.0", "tokenizers<=0.22.2", "httpx", "httpcore", "h11", "anyio", "sniffio", "idna", "certifi"],
}
"""What releases of transformers refuse to be imported without, in a form that the newest no longer
takes."""

LLAMA = str(ROOT / "tests" / "data" / "hf-llama.json")
CPU_DEMO = "cpu-demo"


def jobs() -> dict[str, Job]:
    """What is run, by the head of its column."""
    found = {f"ZeRO-{stage}": _job(CPU_DEMO, stage) for stage in range(4)}
    found["BF16_Optimizer"] = _job(CPU_DEMO, 1, settings={"deepspeed.data_types.grad_accum_dtype": "fp32"})
    found["zero.Init"] = _job(CPU_DEMO, 3, settings={"workload.zero_init": True})
    found["offload, ZeRO-2"] = _job(CPU_DEMO, 2, Offload.OPTIMIZER)
    found["offload, ZeRO-3"] = _job(CPU_DEMO, 3, Offload.OPTIMIZER)
    found["Hugging Face"] = _job(CPU_DEMO, 2, settings={"model": {"hf_config": LLAMA}, "workload.sequence_length": 32})
    return found


def _job(name: str, stage: int, offload: Offload | None = None, settings: Mapping[str, Any] | None = None) -> Job:
    profile = load_profile(name, [Override(key, value, "versions") for key, value in (settings or {}).items()]).profile
    return expand(Selection(profile, [stage], [2], ["bf16-fp32-master"], Device.GPU, find_gpu("h100-80gb"), offload))[0]


def releases() -> Iterator[tuple[str, str]]:
    """Package and release of every row."""
    for package in ("deepspeed", "transformers"):
        for release in supported()[package].tested:
            yield package, release


def folder(package: str, release: str) -> Path:
    """Where a release is, installed if it has to be."""
    path = BUILD / f"{package}-{release}"
    if not path.exists():
        beside = next((names for start, names in BESIDE.items() if f"{package}-{release}".startswith(start)), [])
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(path)]
        environment = {**os.environ, "DS_BUILD_OPS": "0", "PIP_CONSTRAINT": ""}
        subprocess.run([*command, f"{package}=={release}", *beside], env=environment, check=True)
    return path


def row(paths: list[Path]) -> dict[str, str]:
    """What each job gave, in a process that finds packages in these folders first."""
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    done = subprocess.run(
        [sys.executable, __file__, "--one"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"": done.stderr.strip().splitlines()[-1]}


def one() -> None:
    """Run the jobs here, and print for each its bytes between steps and at the peak, or why there
    are none."""
    from bf16prof.dry_run.runner import DryRunFailed, DryRunRefused, simulate

    wanted = jobs()
    reasons: Mapping[int, str] = {}
    try:
        records: Mapping[int, MemoryRecord] = dict(enumerate(simulate(list(wanted.values()))))
    except (DryRunFailed, DryRunRefused) as error:
        records, reasons = error.records, error.reasons
    except Exception as error:  # noqa: BLE001 - the row says whatever it is
        records, reasons = {}, dict(enumerate([str(error)] * len(wanted)))
    said = {
        name: f"{record.allocated_bytes:,} / {record.run_peak_allocated_bytes:,}"
        if (record := records.get(index))
        else f"failed: {reasons.get(index, 'no record')}"
        for index, name in enumerate(wanted)
    }
    sys.stdout.write(json.dumps(said))


def page(rows: dict[str, dict[str, str]]) -> str:
    """`docs/versions.md`."""
    heads = list(jobs())
    lines = [
        "# Which releases the dry run was tried with",
        "",
        "Written by `make versions`; do not edit. Bytes between steps and at the whole run's peak of the preset `cpu-demo` on two H100",
        "(the last column: a small Llama). Releases may differ in what they allocate; a failure says why. What is not here is not known:",
        "a record says so. What is known not to work is refused.",
        "",
        f"| release | {' | '.join(heads)} |",
        "|" + "---|" * (1 + len(heads)),
        *(f"| {name} | {' | '.join(found.get(head, found.get('', '-')) for head in heads)} |" for name, found in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every release, and write the page after each."""
    rows: dict[str, dict[str, str]] = {}
    given = {name: paths.split(os.pathsep) for name, _, paths in (argument.partition("=") for argument in sys.argv[1:])}
    for name in [*(f"{package}-{release}" for package, release in releases()), *given]:
        paths = [Path(each) for each in given[name]] if name in given else [folder(*name.split("-", 1))]
        rows[name] = row(paths)
        failed = sum(not said[:1].isdigit() for said in rows[name].values())
        sys.stderr.write(f"{name}: {len(rows[name]) - failed} of {len(rows[name])} work\n")
        PAGE.write_text(page(rows), encoding="utf-8")
    sys.stdout.write(page(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one()
    else:
        main()
