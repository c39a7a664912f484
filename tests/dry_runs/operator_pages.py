"""What the census found, as the table that the dry run reads and as pages of the documentation; and
CUDA's registry as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SCRATCH = "some scratch memory of its kernel is not counted"


@dataclass
class Operator:
    """All calls of one operator below the samples."""

    calls: int = 0
    wrong: int = 0
    wrong_when_asked: int = 0
    worst: Any = None

    @property
    def state(self) -> str:
        if not self.wrong:
            return "exact"
        if self.worst[0] is None:
            return "refused"
        return "listed" if self.wrong_when_asked else "asked"


@dataclass
class Findings:
    """Operators by name; samples that differ, each with its readings; samples that could not
    run."""

    entries: int = 0
    samples: int = 0
    operators: dict[str, Operator] = field(default_factory=dict)
    kept: list[tuple[str, Sequence[int], Sequence[int]]] = field(default_factory=list)
    peaks: list[tuple[str, Sequence[int], Sequence[int]]] = field(default_factory=list)
    unreached: dict[str, str] = field(default_factory=dict)

    def of_state(self, state: str) -> list[str]:
        return sorted(name for name, operator in self.operators.items() if operator.state == state)


def findings(rows: Iterable[dict[str, Any]]) -> Findings:
    """The census of all rows added up."""
    found = Findings()
    for row in rows:
        found.entries += 1
        if "error" in row:
            found.unreached[row["name"]] = row["error"]
        for name, counts in row["operators"].items():
            _add(found.operators.setdefault(name.removeprefix("aten."), Operator()), counts)
        for sample in row["samples"]:
            found.samples += 1
            if "error" in sample:
                found.unreached.setdefault(row["name"], sample["error"])
            elif sample["real"] != sample["dry"]:
                keeps = sample["real"][::2] != sample["dry"][::2]
                (found.kept if keeps else found.peaks).append((row["name"], sample["real"], sample["dry"]))
    return found


def _add(operator: Operator, counts: dict[str, Any]) -> None:
    operator.calls += counts["calls"]
    operator.wrong += counts["wrong"]
    operator.wrong_when_asked += counts["wrong when asked"]
    if counts["wrong when asked"] or operator.worst is None:
        operator.worst = counts["worst"] or operator.worst


def cpu_table(found: Findings, torch_version: str) -> str:
    """`cpu-operators.toml`."""
    lines = [
        "# Written by `make operators`: what the census of PyTorch's operators found on a CPU.",
        "#",
        "# exact    shapes and our formulas say all that the operator keeps and allocates",
        "# refused  some calls have results that depend on values: there the dry run stops; the others are exact",
        "# asked    they do not, and the kernel itself says it when the dry run has it run once",
        "# listed   something is missing: a record says that the operator's memory is a lower bound, and why",
        f'torch = "{torch_version.partition("+")[0]}"',
    ]
    for state in ("exact", "refused", "asked"):
        lines += [f"{state} = [", *(f'    "{name}",' for name in found.of_state(state)), "]"]
    lines += ["", "[listed]", *(f'"{name}" = "{SCRATCH}"' for name in found.of_state("listed"))]
    return "\n".join(lines) + "\n"


def cpu_page(found: Findings, torch_version: str) -> str:
    """`docs/operators.md`."""
    counts = {state: len(found.of_state(state)) for state in ("exact", "refused", "asked", "listed")}
    equal = found.samples - len(found.kept) - len(found.peaks)
    lines = [
        "# What PyTorch's operators keep and allocate on a CPU",
        "",
        "Written by `make operators`; do not edit. It runs the samples of PyTorch's own database of operators and modules",
        "(`torch.testing._internal.common_methods_invocations.op_db`, `common_modules.module_db`), forward and backward, in fp32 and bf16,",
        "on real CPU tensors under the counting allocator, and in the dry run.",
        "",
        f"PyTorch {torch_version.partition('+')[0]}: {found.entries} entries, {found.samples} samples,",
        f"{len(found.operators)} operators below them.",
        "",
        "| state | operators | what the dry run does |",
        "|---|---|---|",
        f"| exact | {counts['exact']} | shapes and formulas say all bytes |",
        f"| refused | {counts['refused']} | as exact; it stops where a result depends on values, which it does not have |",
        f"| asked | {counts['asked']} | runs the kernel once on tensors of the same layout, and takes what it counts |",
        f"| listed | {counts['listed']} | a note in the record: the operator's memory is a lower bound |",
        "",
        'An operator that is in none of them is "not seen"; a record says so too. On CUDA see `cuda-operators.md`.',
        "",
        "## Listed operators",
        "",
        "The worst call, in bytes: outputs and scratch memory.",
        "",
        "| operator | calls | wrong | counted | dry run |",
        "|---|---|---|---|---|",
    ]
    for name in found.of_state("listed"):
        each = found.operators[name]
        said, really, asked = each.worst or (None, None, None)
        lines.append(f"| `{name}` | {each.calls} | {each.wrong_when_asked} | {_pair(really)} | {_pair(asked or said)} |")
    lines += [
        "",
        "Refused: " + ", ".join(f"`{name}`" for name in found.of_state("refused")) + ".",
        "",
        "## Samples that differ",
        "",
        f"{equal} of {found.samples} samples ran on both sides and agree in every byte, or could not run in one of them (below).",
        f"Kept bytes differ in {len(found.kept)}, peaks alone in {len(found.peaks)}.",
        "Each entry's worst sample, as kept and peak of forward, kept and peak of the gradient.",
        "",
        "| entry | counted | dry run |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | {_row(real)} | {_row(dry)} |" for name, real, dry in _worst([*found.kept, *found.peaks])]
    lines += [
        "",
        "Two causes are known. A number that multiplies a tensor is kept as a tensor of 8 bytes, which no dispatch mode sees. And autograd",
        "takes other formulas for tensors of a subclass (`areAnyTensorSubclassLike`), which make one more copy for a moment.",
        "",
        "## Entries with a sample that could not run",
        "",
        "| entry | why |",
        "|---|---|",
        *(f"| `{name}` | {why.replace('|', ' ')[:110]} |" for name, why in sorted(found.unreached.items())),
    ]
    return "\n".join(lines) + "\n"


def _pair(bytes_: Any) -> str:
    return "-" if bytes_ is None else f"{bytes_[0]:,} + {bytes_[1]:,}"


def _row(reading: Sequence[int]) -> str:
    return ", ".join(f"{each:,}" for each in reading)


def _worst(rows: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    by_name: dict[str, tuple[str, Sequence[int], Sequence[int]]] = {}
    for row in rows:
        if row[0] not in by_name or _off(row) > _off(by_name[row[0]]):
            by_name[row[0]] = row
    return sorted(by_name.values(), key=lambda row: (-_off(row), row[0]))


def _off(row: tuple[str, Sequence[int], Sequence[int]]) -> float:
    return max(abs(a - b) / max(a, 1) for a, b in zip(row[1], row[2], strict=True))


def cuda_section() -> str:
    """The table of families in `docs/cuda-operators.md`."""
    from bf16prof.profiles.shipped import shipped_table

    table = shipped_table("cuda-operators.toml", "bf16prof.dry_run.hardware")
    lines = ["| operators | state | source | confirmed by | left out |", "|---|---|---|---|---|"]
    for name, family in table["families"].items():
        members = [f"every operator that PyTorch tags `{tag}`" for tag, of in table["tags"].items() if of == name]
        members += [f"`{each}`" for each in table["operators"].get(name, [])]
        cells = [family["state"], *(family.get(key, "") for key in ("source", "confirmed_by", "reason"))]
        lines.append(f"| {', '.join(members)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
