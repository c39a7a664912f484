"""`python -m bf16prof.check`: hold predictions against this machine's GPU, within some minutes; one
table and one archive.

Every case is `bf16prof measure --simulate` in a process of its own; the single kernels are those of
`bf16prof.check.kernels`, on the GPU and on a simulated one. What fails or finds no time is a row
that says so; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINUTES = 8.0
TABLE, ARCHIVE = "table.md", "gpu-check.tar.gz"
QUANTITIES = ("allocated_bytes", "peak_allocated_bytes", "run_peak_allocated_bytes", "reserved_bytes", "device_bytes")
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
FIRST = ("--warmup", "1", "--steps", "2", "--num-gpus", "1")
RECIPES = "bf16-fp32-master,bf16-full,bf16-full-autocast"


@dataclass(frozen=True)
class CheckRun:
    """One call of `bf16prof measure`."""

    name: str
    words: tuple[str, ...]
    environment: dict[str, str]


def cases(*, cpu: bool) -> list[CheckRun]:
    """What is measured, the most telling first."""
    kernel = ("--set", "optimizer.torch_adam=true", "--set", "optimizer.fused=true")
    small = ("--profile", "cpu-demo" if cpu else "gpu-check", *kernel)
    one = ("--sequence-length", "64") if cpu else ()
    recipes = "bf16-fp32-master" if cpu else RECIPES
    found = [CheckRun(f"ZeRO-{stage}", (*small, *one, "--zero", stage, "--recipe", recipes), {}) for stage in "0123"]
    found.append(CheckRun("offload", (*small, *one, "--zero", "3", "--recipe", "bf16-fp32-master", "--offload", "optimizer"), {}))
    if cpu:
        return [*found, CheckRun("Hugging Face", (*_tiny(), *kernel, "--zero", "2", "--recipe", "bf16-fp32-master"), {})]
    large = [("llama3.2-1b", "bf16-fp32-master"), ("llama2-7b", "bf16-full")]
    for model, recipe in large:
        for flag in ("--activation-checkpointing", "--no-activation-checkpointing"):
            words = (*_large(model), *kernel, "--sequence-length", "1024", flag, "--zero", "2", "--recipe", recipe)
            found.append(CheckRun(f"{model} {flag.removeprefix('--')}", words, {}))
    expandable = (*_large("llama3.2-1b"), *kernel, "--sequence-length", "1024", "--zero", "2", "--recipe", "bf16-fp32-master")
    found.append(CheckRun("expandable segments", expandable, EXPANDABLE))
    return found


def _large(model: str) -> tuple[str, ...]:
    if model != "llama2-7b":
        return ("--profile", model)
    sizes = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 11008, "max_sequence_length": 4096}
    return (
        "--profile",
        "llama3-8b",
        *(word for key, value in sizes.items() for word in ("--set", f"model.{key}={value}")),
        "--set",
        "model.vocab_size=32000",
    )


def _tiny() -> tuple[str, ...]:
    Path("tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    return ("--hf-config", "tiny.json", "--sequence-length", "32")


TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One row of the table."""

    case: str
    quantity: str
    measured: int | str
    predicted: int | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        """As text."""
        if not isinstance(self.measured, int):
            return self.case, self.quantity, self.measured, "", ""
        guess = "" if self.predicted is None else f"{self.predicted:,}"
        error = "" if self.predicted is None or not self.measured else f"{(self.predicted - self.measured) / self.measured:+.4%}"
        return self.case, self.quantity, f"{self.measured:,}", guess, error


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds, at least one."""
        return max(1.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether there is none."""
        return time.monotonic() >= self._end


def measured(case: CheckRun, clock: Clock) -> Iterator[Compared]:
    """Run a case; its rows, prediction by the dry run."""
    folder = Path("runs") / case.name.replace(" ", "-")
    command = [sys.executable, "-m", "bf16prof", "measure", *case.words, *FIRST, "--simulate", "--json", "--force", "-d", str(folder)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **case.environment}, timeout=clock.left, check=False
        )
    except subprocess.TimeoutExpired:
        yield Compared(case.name, "-", "no time left")
        return
    (folder.with_suffix(".log")).write_text(run.stderr, encoding="utf-8")
    try:
        document = json.loads(run.stdout)
    except json.JSONDecodeError:
        yield Compared(case.name, "-", f"failed: {_last(run.stderr)}")
        return
    rows = list(_rows(case.name, document))
    yield from rows or [Compared(case.name, "-", f"failed: {_last(run.stderr)}")]
    if run.returncode and rows:
        yield Compared(case.name, "-", f"some cases failed: {_last(run.stderr)}")


def _rows(name: str, document: dict[str, Any]) -> Iterator[Compared]:
    for each in document.get("comparisons", ()):
        real, dry = each["values"].get("measure"), each["values"].get("simulate", each["values"].get("estimate"))
        if real is not None and each["quantity"] in QUANTITIES:
            label = f"zero{each['case']['zero_stage']} {each['case']['recipe']}"
            yield Compared(f"{name}: {label}", each["quantity"].removesuffix("_bytes"), int(real), None if dry is None else int(dry))
    for record in document.get("records", ()):
        if record.get("source") == "measure" and record.get("step_time_s"):
            label = f"{name}: zero{record['case']['zero_stage']} {record['case']['recipe']}"
            yield Compared(label, "step time (ms)", f"{1000 * record['step_time_s']:.1f}")


def kernels(clock: Clock) -> Iterator[Compared]:
    """The benchmark's rows on this GPU against the same on a simulated one."""
    command = [sys.executable, "-m", "bf16prof.check.cuda"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=clock.left, check=False)
        yield from (
            Compared(row["row"], "peak", row["measured"], row["predicted"]) for row in json.loads(run.stdout.strip().splitlines()[-1])
        )
    except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError):
        yield Compared("kernels", "-", "no time left or failed")


def cost(clock: Clock) -> Iterator[Compared]:
    """What measuring costs in time."""
    command = [sys.executable, "-m", "bf16prof.check.cost"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=clock.left, check=False)
        times = json.loads(run.stdout.strip().splitlines()[-1])
        share = times["with"] / times["without"] - 1
        yield Compared(
            "cost of measuring",
            "step time without and with probes (ms)",
            f"{times['without'] * 1e3:.2f}, {times['with'] * 1e3:.2f} ({share:+.1%})",
        )
    except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError):
        yield Compared("cost of measuring", "-", "no time left or failed")


def _last(text: str) -> str:
    """Why it failed: what the program said last, and not its hint after that; else the last
    line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("bf16prof: ")] or lines
    return said[-1][:160] if said else "no output"


def write(lines: Sequence[Compared], target: Path) -> None:
    """The table as Markdown."""
    rows = [("case", "quantity", "measured", "predicted", "error"), ("---", "---", "---:", "---:", "---:"), *(line.cells for line in lines)]
    target.write_text("".join(f"| {' | '.join(cells)} |\n" for cells in rows), encoding="utf-8")


def optimizer_kernel() -> str:
    """Which optimizer runs here."""
    return "torch.optim.AdamW (fused kernel); DeepSpeed's own is not used, so that no compiler is needed"


def main() -> None:
    """Check this machine."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="small models on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after so many minutes")
    asked = parser.parse_args()
    if asked.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"
    clock = Clock(asked.minutes)
    subprocess.run([sys.executable, "-m", "bf16prof", "doctor"], check=False)
    sys.stdout.write(f"optimizer: {optimizer_kernel()}\n")
    lines: list[Compared] = []
    for case in cases(cpu=asked.cpu):
        found = [Compared(case.name, "-", "no time left")] if clock.is_over else list(measured(case, clock))
        lines += found
        sys.stdout.write("".join(f"  {' | '.join(line.cells)}\n" for line in found))
        sys.stdout.flush()
        write(lines, Path(TABLE))
    if not asked.cpu and not clock.is_over:
        lines += [*kernels(clock), *cost(clock)]
        write(lines, Path(TABLE))
    with tarfile.open(ARCHIVE, "w:gz") as archive:
        for path in (TABLE, "runs"):
            if Path(path).exists():
                archive.add(path)
    sys.stdout.write(f"wrote {Path(TABLE).resolve()} ({len(lines)} rows) and {Path(ARCHIVE).resolve()}\n")


if __name__ == "__main__":
    main()
