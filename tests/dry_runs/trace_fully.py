"""A dry run in this process with nothing left out: `python trace_fully.py TASK WHAT`, WHAT naming what is not to be left out.

`answers`: no answer is remembered. `ranks`: DeepSpeed's own loops over all ranks run. `steps`: all steps are run, none is repeated.
Prints the record.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bf16prof.documents import document
from bf16prof.runs import read
from bf16prof.simulate import dryrun, memo, micro_steps, ranks, recording
from bf16prof.simulate.task import Task

what = sys.argv[2].split(",")
if "answers" in what:
    memo.Memo.question = lambda *_: None  # type: ignore[method-assign]
if "ranks" in what:
    ranks.KNOWN.update({key: set() for key in ranks.KNOWN})
if "steps" in what:
    recording.MOST_REPEATS = 0
if "micro-steps" in what:
    micro_steps.MicroSteps.body = lambda *_: None  # type: ignore[method-assign]
record, _ = dryrun.dry_run(read(Path(sys.argv[1]), Task))
sys.stdout.write("\n" + json.dumps(document([record])) + "\n")
sys.stdout.flush()
os._exit(0)
