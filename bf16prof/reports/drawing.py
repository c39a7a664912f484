"""Draws one figure with kaleido: JSON on stdin, the picture on stdout. A process of its own, so that a browser that hangs can be ended."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Read what to draw, and write it."""
    import kaleido

    asked = json.load(sys.stdin)
    drawn = kaleido.calc_fig_sync(asked["figure"], opts=asked["opts"], kopts={"mathjax": False})  # MathJax would come from the network
    sys.stdout.buffer.write(drawn)


if __name__ == "__main__":
    main()
