"""Write docs/against-gpus.md and its figure: every public measurement of a real GPU that we know,
beside its prediction, worst first.

Runs every row in the dry run (about ten minutes on two cores); the figure needs Chromium. Usage:
`make against-gpus`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent
sys.path += [str(DOCS.parent / "tests" / "unit"), str(DOCS)]

import numpy as np  # noqa: E402
import plotly.graph_objects as go  # noqa: E402
from make_pictures import page_picture  # noqa: E402
from measured_on_gpus import KERNELS, STEPS, kernels, simulated_kernels, simulated_steps  # noqa: E402

from bf16prof.dry_run.runner import Options, simulate  # noqa: E402
from bf16prof.imports.published import Published, PublishedRun, all_published  # noqa: E402
from bf16prof.profiles.beside import pairs  # noqa: E402
from bf16prof.records import MemoryRecord  # noqa: E402
from bf16prof.vocabulary import Phase  # noqa: E402

PAGE, FIGURE = DOCS / "against-gpus.md", DOCS / "against-gpus.png"
KIND = {"kernel": "single kernels", "step": "whole steps, plain PyTorch", "published": "DeepSpeed jobs"}
AS_PRINTED = "as printed"


@dataclass(frozen=True)
class ComparedRow:
    """A measurement, its prediction in bytes, and what a reader must know of the difference.
    `half`: what rounding leaves open."""

    kind: str
    what: str
    gpu: str
    measured: float
    predicted: float
    half: float
    why: str = ""

    @property
    def error(self) -> float:
        """Signed and relative."""
        return (self.predicted - self.measured) / self.measured

    @property
    def is_as_printed(self) -> bool:
        """Whether the prediction would have been printed as the measurement was."""
        return abs(self.predicted - self.measured) <= self.half


def kernel_rows() -> Iterator[ComparedRow]:
    """The rows of Liger-Kernel's benchmark. Its digits are those of a float32 number of MiB."""
    peaks = simulated_kernels(slow=True)
    for kernel in kernels():
        table, peak = kernel.table, peaks[kernel.label]
        what = "{kernel}, {implementation}, {mode}, {variable} = {x:,}".format(**table)
        half = float(np.spacing(np.float32(kernel.peak_mib))) * 2**19 + 1
        yield ComparedRow("kernel", what, table["gpu"].removeprefix("NVIDIA "), kernel.peak_mib * 2**20, peak, half, kernel.why)


def step_rows() -> Iterator[ComparedRow]:
    """Whole steps."""
    for step, peak in zip(STEPS["steps"], simulated_steps(), strict=True):
        words = [key for key in ("checkpointing", "autocast") if step.get(key)] + [step[key] for key in ("attention",) if key in step]
        also = step.get("also_alive_bytes", 0)
        why = f"{also:,} bytes counted with it: {step['what']}" if also else ""
        yield ComparedRow("step", f"{step['model']}, {', '.join(words)}", "RTX A6000", float(step["peak_gb"]) * 1e9, peak + also, 5e6, why)


def published_rows() -> Iterator[ComparedRow]:
    """The published DeepSpeed jobs, in the dry run."""
    for expandable in (False, True):
        runs = [(found, run) for found in all_published() if found.expandable_segments is expandable for run in found.runs]
        records = simulate([run.dry_job for _, run in runs], options=Options(expandable_segments=expandable))
        for (found, run), dry in zip(runs, records, strict=True):
            yield from _published(found, run, dry)


def _published(found: Published, run: PublishedRun, dry: MemoryRecord) -> Iterator[ComparedRow]:
    case = run.record.case
    what = f"`published:{found.name}` {case.recipe}, ZeRO-{case.zero_stage} on {case.world_size}{', ' * bool(run.what)}{run.what}"
    why = "; ".join([*(f"open: {text}" for text in found.open), *found.notes])
    for quantity in ("allocated_bytes", "peak_allocated_bytes", "run_peak_allocated_bytes", "device_bytes"):
        measured, predicted = getattr(run.record, quantity), getattr(dry, quantity)
        low = run.at_least.get(quantity)
        if (measured or low) and predicted:
            name = quantity.removesuffix("_bytes").replace("_", " ") + (" (a lower bound)" if low else "")
            yield ComparedRow(
                "published", f"{what}: {name}", found.gpu.name, measured or low or 0, predicted, run.record.rounding.get(quantity, 0), why
            )
    init = run.record.phases.get(Phase.INIT)
    if init and init.peak_bytes:
        predicted = dry.phases[Phase.INIT].peak_bytes or 0
        half = run.record.rounding.get("phases.init.peak_bytes", 0)
        yield ComparedRow("published", f"{what}: init peak", found.gpu.name, init.peak_bytes, predicted, half, why)


def table(rows: Iterable[ComparedRow]) -> list[str]:
    """Markdown, worst first."""
    lines = ["| what | GPU | measured | predicted | error | what explains it, or is not known |", "|---|---|---:|---:|---:|---|"]
    for row in sorted(rows, key=lambda row: (row.is_as_printed, -abs(row.error))):
        error = AS_PRINTED if row.is_as_printed else f"{row.predicted - row.measured:+,.0f} B ({row.error:+.3%})"
        lines.append(f"| {row.what} | {row.gpu} | {row.measured / 2**30:.4f} | {row.predicted / 2**30:.4f} | {error} | {row.why} |")
    return lines


def figure(rows: Sequence[ComparedRow], target: Path) -> None:
    """Predicted against measured, both logarithmic, with the line on which they are equal."""
    plot = go.Figure()
    ends = [min(row.measured for row in rows) / 2**30 / 2, max(row.measured for row in rows) / 2**30 * 2]
    plot.add_scatter(x=ends, y=ends, mode="lines", line={"color": "#999", "dash": "dot"}, name="equal")
    for kind, name in KIND.items():
        some = [row for row in rows if row.kind == kind]
        xy = {"x": [row.measured / 2**30 for row in some], "y": [row.predicted / 2**30 for row in some]}
        plot.add_scatter(**xy, mode="markers", name=f"{name} ({len(some)})", marker={"size": 9, "opacity": 0.75})
    plot.update_layout(
        template="plotly_white",
        margin={"t": 20, "r": 20, "l": 80, "b": 60}, width=900, height=620, font={"size": 14}, legend={"x": 0.02, "y": 0.98},
        xaxis={"type": "log", "title": "measured on a GPU, GiB"}, yaxis={"type": "log", "title": "predicted without one, GiB"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        plot.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        page_picture(page, target, "930,780")


def summary(rows: Sequence[ComparedRow]) -> str:
    """One sentence for the README."""
    exact = [row for row in rows if row.is_as_printed]
    kernel = [row for row in rows if row.kind == "kernel"]
    good = [row for row in kernel if row.is_as_printed]
    return (
        f"{len(exact)} of {len(rows)} public measurements of real GPUs come out of the dry run as printed, "
        f"among them {len(good)} of {len(kernel)} rows of single kernels to every printed digit"
    )


def page(rows: Sequence[ComparedRow]) -> str:
    """The whole page."""
    parts = [HEAD.format(summary=summary(rows), kernels=KERNELS["source"], steps=STEPS["source"])]
    for kind, name in KIND.items():
        parts += ["", f"## {name[0].upper()}{name[1:]}", "", TEXTS[kind], "", *table(row for row in rows if row.kind == kind)]
    parts += ["", BESIDE, "", *_pairs()]
    return "\n".join(parts) + "\n"


def _pairs() -> list[str]:
    head = "| GPU | generation | ranks | process | allocated | reserved beyond | beside the allocator | source |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---|"]
    for pair in sorted(pairs(), key=lambda pair: (pair.generation, pair.beside_bytes)):
        numbers = f"{pair.process_gib:.2f} GiB | {pair.allocated_gib:.2f} GiB | {pair.unallocated_mib:,.2f} MiB"
        beside = f"{pair.beside_bytes / 2**20:,.0f} MiB"
        lines.append(f"| {pair.gpu} | {pair.generation} | {pair.ranks} | {numbers} | **{beside}** | {pair.source} |")
    return lines


HEAD = """# Against real GPUs

Written by `docs/make_against_gpus.py`; do not edit. {summary}. Nothing here was fitted. A prediction is *as printed* where it lies
in the interval that the printed digits leave open. Worst first; sizes in GiB.

![Predicted against measured](against-gpus.png)

Sources: {kernels}. {steps}. The DeepSpeed jobs name theirs: `bf16prof published list`.

**What no row has confirmed:** scratch memory of attention kernels in training, reserved memory, and several GPUs of one job at a time.
Hopper's cuBLAS workspaces of 32 MiB, one for each of two threads, are confirmed: `fused_moe` and `fused_linear_jsd` on H100 would be
32 or 64 MiB off without them."""

TEXTS = {
    "kernel": """Each row is rebuilt as its benchmark runs it: module, shapes, dtype, what else is alive, the timing that comes first
and the blocks it leaves in the allocator. `bf16prof/check/kernels.py` holds the programs, `tests/commands/test_real_gpus.py` compares them.
These rows have found two faults of the dry run, both mended: autograd adds a second gradient in place where nobody else holds the first
(the JSD rows), and reductions over many rows write parts to global memory, up to 112 MiB on an A100 (the RMS norm rows of Liger).""",
    "step": """Llama on one A6000, plain PyTorch (`bf16prof/check/steps.py`).""",
    "published": """In the dry run of the installed DeepSpeed; what its source leaves open was assumed as the run's file says
(`bf16prof/imports/published/*.toml`).""",
}

BESIDE = """## Beside the allocator

What a process holds of a GPU outside PyTorch's allocator: the CUDA context, and NCCL's buffers where there are several ranks. From public
pairs: an out-of-memory message says what the process holds in all, what PyTorch allocated of it, and what it reserved beyond; the rest is
beside the allocator. `bf16prof` assumes the highest of a generation, and says the range; of Hopper no message was found that
is not about vLLM, so that it takes the highest of all others. The only pair with NCCL (V100, 16 ranks) is context and buffers together."""


def main() -> None:
    """Write the page and the figure, and print the sentence for the README."""
    rows = [*kernel_rows(), *step_rows(), *published_rows()]
    figure(rows, FIGURE)
    PAGE.write_text(page(rows), encoding="utf-8")
    sys.stdout.write(summary(rows) + "\n")


if __name__ == "__main__":
    main()
