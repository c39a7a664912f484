"""`python -m bf16prof.measuring.dying COMMAND...`: a command in the place of this process, which
gets SIGTERM when its parent dies."""

from __future__ import annotations

import os
import signal
import sys

from bf16prof.processes import PARENT_VARIABLE, die_with_parent

if __name__ == "__main__":
    die_with_parent(signal.SIGTERM)
    del os.environ[PARENT_VARIABLE]  # srun would hand it on to processes that have another parent
    os.execvp(sys.argv[1], sys.argv[1:])
