"""Make the README's two pictures: the demo in a terminal (SVG) and its HTML report in a browser
(PNG).

Runs the demo itself; needs Chromium. Usage: `make pictures`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
COLUMNS = 80
PROMPT = "$ bf16prof measure cpu-demo --simulate\n"
WINDOW = "1280,1400"


def demo(folder: Path) -> str:
    """The demo's output, as a terminal of that width would show it."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    command = [
        sys.executable,
        "-m",
        "bf16prof",
        "measure",
        "cpu-demo",
        "--simulate",
        "-d",
        str(folder),
        "--quiet",
    ]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def terminal_picture(output: str, target: Path) -> None:
    """Draw what the terminal shows."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(PROMPT, "bold green"))
    console.print(Text.from_ansi(output))
    console.save_svg(str(target), title="bf16prof")


def page_picture(page: Path, target: Path, window: str = WINDOW) -> None:
    """A screenshot of the top of a page in headless Chromium."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={profile}", f"--window-size={window}", "--virtual-time-budget=4000",
            f"--screenshot={target}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Make both."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "cpu-demo"
        terminal_picture(demo(run), DOCS / "terminal.svg")
        page_picture(run / "report.html", DOCS / "report.png")


if __name__ == "__main__":
    main()
