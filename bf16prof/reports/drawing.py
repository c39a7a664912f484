"""Draws one figure with kaleido: JSON on stdin, the picture on stdout. A process of its own, so
that a browser that hangs can be ended."""

from __future__ import annotations

import json
import os
import signal
import sys

from bf16prof.processes import die_with_parent, kill_session


def main() -> None:
    """Read what to draw, and write it."""
    signal.signal(signal.SIGTERM, lambda *_: kill_session(os.getpid()))  # the browser, too
    die_with_parent(signal.SIGTERM)
    import kaleido

    asked = json.load(sys.stdin)
    drawn = kaleido.calc_fig_sync(asked["figure"], opts=asked["opts"], kopts={"mathjax": False})  # MathJax would come from the network
    sys.stdout.buffer.write(drawn)


if __name__ == "__main__":
    main()
