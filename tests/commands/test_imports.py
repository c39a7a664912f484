"""What is imported when, and in which direction: heavy libraries late, and packages only from the
floors below."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import bf16prof

PACKAGE = Path(bf16prof.__file__).parent
TRAINING = {"torch", "deepspeed", "transformers", "tokenizers", "numpy"}
DRAWING = {"pandas", "plotly", "jinja2"}

FLOORS: list[set[str]] = [
    {"errors", "locks", "parallelism", "processes", "rounding", "scratch", "started_by", "summaries", "vocabulary"},
    {"control_groups", "records", "step_records", "documents", "files", "memory_kills"},
    {
        "bounds",
        "profiles",
        "kernels",
        "reductions",
        "allocator",
        "verdict",
        "reconcile",
        "runs",
        "claims",
        "reports",
        "plans",
        "explanations",
    },
    {"models", "cases", "imports"},
    {"engine", "closed_form", "quality", "signatures"},
    {"scripts", "whereabouts"},
    {"dry_run", "measuring", "planning", "tracing"},
    {"commands", "check", "outcome"},
    {"app", "api", "attach"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
"""Parts of the package from the ground up. A part imports from its own floor or from below."""

STRANGERS = [
    ("closed_form", "measuring"),
    ("closed_form", "dry_run"),
    ("reports", "measuring"),
    ("reports", "dry_run"),
    ("reports", "closed_form"),
    ("dry_run", "measuring"),
    ("measuring", "dry_run"),
    ("measuring", "closed_form"),
    ("engine", "closed_form"),
    ("engine", "quality"),
    ("closed_form", "quality"),
    ("profiles", "reports"),
    ("profiles", "runs"),
    ("reconcile", "reports"),
    ("reconcile", "runs"),
    ("runs", "reports"),
    ("models", "cases"),
    ("planning", "dry_run"),
    ("planning", "measuring"),
    ("planning", "reports"),
    ("closed_form", "tracing"),
    ("planning", "tracing"),
    ("measuring", "tracing"),
    ("dry_run", "tracing"),
    ("signatures", "closed_form"),
    ("engine", "signatures"),
]
"""Parts that could see each other by their floors and must not."""


def after(program: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running a program."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}), file=sys.stderr)"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def running(*arguments: str) -> str:
    """A program that runs the command line and survives its exit."""
    return (
        f"sys.argv = ['bf16prof', *{arguments!r}]\nfrom bf16prof.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("estimate", "--help"),
        ("measure", "--help"),
        ("estimate", "-p", "gpt2-xl"),
        ("estimate", "-p", "gpt2-xl", "--json"),
        ("plan", "--no-verify", "-p", "gpt2-xl", "--zero", "2", "--recipe", "bf16-full", "--offload", "none", "--write", os.devnull),
        ("profiles", "list"),
        ("profiles", "show", "llama3-8b", "--resolved"),
        ("recipes", "list"),
        ("recipes", "show", "bf16-full"),
        ("import", "--help"),
    ],
    ids=" ".join,
)
def test_commands_that_only_compute_load_no_heavy_library(arguments: tuple[str, ...]) -> None:
    loaded = after(running(*arguments))

    assert "bf16prof" in loaded
    assert not loaded & (TRAINING | DRAWING), loaded & (TRAINING | DRAWING)


def test_a_deepspeed_json_is_read_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enabled": true}, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}')

    loaded = after(running("estimate", "--ds-config", str(path)))

    assert not loaded & (TRAINING | DRAWING)


def test_a_hugging_face_configuration_has_its_closed_form_without_torch_and_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-6}')

    one = "--recipe", "bf16-full", "--zero", "2", "--gpus", "2"  # a grid would record a pass for each precision
    loaded = after(running("estimate", "--hf-config", str(tmp_path / "config.json"), *one, "--json"))

    assert not loaded & (TRAINING | DRAWING | {"safetensors"})


@pytest.mark.parametrize("table", ["hf_config = { model_type = 'llama' }", "factory = 'this:that'"])
def test_a_profile_of_another_model_is_shown_without_torch_and_without_its_code(table: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(f"[workload]\nsequence_length = 5\n[model]\n{table}\n")

    loaded = after(running("profiles", "show", str(path), "--resolved"))

    assert not loaded & (TRAINING | DRAWING | {"this"})


def test_a_report_is_drawn_without_torch(tmp_path: Path) -> None:
    import report_fixtures as fixtures

    from bf16prof import runs

    whole = fixtures.run()
    runs.save(runs.Run(tmp_path, whole.manifest, whole.records))

    loaded = after(running("report", str(tmp_path)))

    assert not loaded & TRAINING
    assert (tmp_path / "report.html").is_file()


def test_help_loads_neither_the_closed_form_nor_the_reports() -> None:
    program = (
        running("--help") + "\nassert not [m for m in sys.modules if m.startswith(('bf16prof.closed_form.', 'bf16prof.reports.html'))]"
    )

    after(program)


BLOCK = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "deepspeed", "transformers", "tokenizers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def modules(part: str) -> list[str]:
    """The dotted names of the modules of a part."""
    path = PACKAGE / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return [".".join(("bf16prof", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__") for file in files]


@pytest.mark.parametrize(
    "part",
    [
        "closed_form",
        "planning",
        "plans",
        "reports",
        "imports",
        "profiles",
        "records",
        "documents",
        "reconcile",
        "runs",
        "cases",
        "models/shapes",
        "commands",
    ],
)
def test_a_part_imports_without_torch_and_deepspeed(part: str) -> None:
    names = modules(part)
    assert names

    loaded = after(BLOCK + "\n".join(f"import {name}" for name in names))

    assert not loaded & {"torch", "deepspeed"}


@pytest.mark.parametrize(
    "arguments",
    [("estimate", "-p", "gpt2-xl", "-o", "FOLDER/x.html", "-o", "FOLDER/x.csv", "-o", "FOLDER/x.md"), ("doctor",)],
    ids=lambda a: a[0],
)
def test_commands_work_where_torch_and_deepspeed_are_not_installed(arguments: tuple[str, ...], tmp_path: Path) -> None:
    after(BLOCK + running(*(a.replace("FOLDER", str(tmp_path)) for a in arguments)))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of bf16prof's own in a file, wherever it stands, those
    for type checkers only left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for node in ast.walk(guard)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            name = node.module or ""
            yield from ((node.lineno, f"bf16prof.{alias.name}") for alias in node.names) if name == "bf16prof" else [(node.lineno, name)]


def edges() -> Iterator[tuple[str, str, str]]:
    """Every import from one part of the package to another: from, to, and where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        part = relative.parts[0].removesuffix(".py")
        for line, name in imports(path):
            if name.startswith("bf16prof."):
                target = name.split(".")[1]
                if target not in (part, "__version__") and part != "__init__":
                    yield part, target, f"{relative}:{line}"


def test_no_two_classes_have_one_name() -> None:
    """Of those that other modules may use. Whoever reads `Plan` in a traceback or in a search finds
    one."""
    root = Path(__file__).parents[2]
    paths = [path for folder in (PACKAGE, root / "benchmarks", root / "docs") for path in folder.rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]

    assert sorted(name for name, count in Counter(names).items() if count > 1) == []


def test_every_part_has_a_floor() -> None:
    parts = {
        path.stem for path in PACKAGE.iterdir() if (path.suffix == ".py" or (path / "__init__.py").is_file()) and path.stem != "__init__"
    }

    assert parts <= set().union(*FLOORS)


def test_imports_go_downwards() -> None:
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}

    upwards = [f"{where}: {part} imports {target}" for part, target, where in edges() if floor[target] > floor[part]]

    assert upwards == []


def test_parts_that_must_not_know_each_other_do_not() -> None:
    found = [f"{where}: {part} imports {target}" for part, target, where in edges() if (part, target) in STRANGERS]

    assert found == []


def test_the_graph_has_the_edges_that_the_house_is_built_on() -> None:
    """So that an empty graph does not pass the tests above."""
    graph = {(part, target) for part, target, _ in edges()}

    assert {
        ("commands", "closed_form"),
        ("commands", "measuring"),
        ("measuring", "engine"),
        ("engine", "profiles"),
        ("reports", "records"),
    } <= graph
