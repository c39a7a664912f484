"""The counting allocator, each time in a fresh process, against sequences of allocations whose
bytes anybody can add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(280)

PROLOGUE = """
import json, threading
import torch
from bf16prof.measuring.probes.cpu import CpuProbe
before = torch.ones(1000)
probe = CpuProbe()
seen = []
def note():
    seen.append([probe.allocated_bytes(), probe.take_phase_peak(), probe.run_peak_bytes()])
"""


def readings(body: str, **variables: str) -> list[Any]:
    """Run the body after the prologue; what it noted: [allocated, peak since the last note, peak of
    the run] each."""
    script = PROLOGUE + body + "\nprint(json.dumps(seen))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **variables}, timeout=250
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_tensor_counts_its_bytes_and_nothing_else_does() -> None:
    sizes = {"float32": 4, "bfloat16": 2, "int64": 8, "bool": 1, "float64": 8, "complex64": 8}
    body = "\n".join(f"{dtype} = torch.zeros(7, 11, dtype=torch.{dtype}); note()" for dtype in sizes)
    totals = [77 * sum(list(sizes.values())[: n + 1]) for n in range(len(sizes))]

    assert readings(f"note()\n{body}") == [[0, 0, 0], *([total] * 3 for total in totals)]


def test_views_share_and_copies_do_not() -> None:
    body = """
a = torch.empty(100, 10); note()
views = [a.t(), a[3:], a.view(-1), a.detach(), a.expand(1, 100, 10)]; note()
copy = a[:50].clone(); note()
del a; note()
del views; note()
del copy; note()
"""
    assert [row[0] for row in readings(body)] == [4000, 4000, 6000, 6000, 2000, 0]


def test_peaks_are_the_highest_since_the_last_reading_and_of_the_run() -> None:
    body = """
a = torch.empty(1000); b = torch.empty(500); del b; note()
c = torch.empty(100); note()
a = a.clone(); note()
del a, c; note()
note()
"""
    assert readings(body) == [[4000, 6000, 6000], [4400, 4400, 6000], [4400, 8400, 8400], [0, 4400, 8400], [0, 0, 8400]]


def test_frees_and_allocations_of_other_threads_count() -> None:
    body = """
held = [torch.empty(1000, dtype=torch.bfloat16) for _ in range(4)]; note()
def work():
    held.pop()
    held.append(torch.empty(3000, dtype=torch.int8))
    held.pop(0)
thread = threading.Thread(target=work); thread.start(); thread.join(); note()
threads = [threading.Thread(target=lambda: [torch.empty(64) for _ in range(500)]) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
held.clear(); note()
"""
    rows = readings(body)

    assert rows[0] == [8000, 8000, 8000]
    assert rows[1] == [7000, 9000, 9000]
    assert rows[2][0] == 0
    assert rows[2][1] <= 7000 + 8 * 500 * 256


def test_gradients_of_autograds_own_threads_count() -> None:
    body = """
w = torch.empty(30, 20, requires_grad=True); note()
torch.nn.functional.linear(torch.empty(5, 20), w).sum().backward(); note()
w.grad = None; note()
"""
    rows = readings(body)

    assert [row[0] for row in rows] == [2400, 4800, 2400]
    assert rows[1][1] >= 4800 + 5 * 30 * 4, "while the gradient was made, the output's gradient or the output was alive"


def test_storages_that_grow_and_shrink() -> None:
    body = """
a = torch.empty(1000); note()
a.untyped_storage().resize_(0); note()
a.untyped_storage().resize_(8000); note()
a.data = torch.empty(0); note()
"""
    assert [row[0] for row in readings(body)] == [4000, 0, 8000, 0]


def test_what_was_there_before_the_probe_never_counts() -> None:
    """Not even negatively, when it is freed."""
    assert readings("note(); del before; note(); x = torch.empty(2); note()") == [[0, 0, 0], [0, 0, 0], [8, 8, 8]]


def test_a_second_probe_counts_the_same_bytes_once() -> None:
    assert readings("a = torch.empty(10); other = CpuProbe(); b = torch.empty(10); note()") == [[80, 80, 80]]


def test_the_limit_is_an_out_of_memory_error_that_says_how_much_was_asked_for() -> None:
    body = """
a = torch.empty(2000, dtype=torch.int8)
try:
    torch.empty(501)
except torch.OutOfMemoryError as error:
    seen.append(str(error).splitlines()[0])
note()
exactly = torch.empty(500); note()
"""
    message, refused, filled = readings(body, BF16PROF_CPU_MEMORY_LIMIT="4000")

    assert "Tried to allocate 2004 bytes with 2000 allocated of a limit of 4000" in message
    assert refused == [2000, 2000, 2000], "what was refused is in no peak"
    assert filled == [4000, 4000, 4000]


def test_settling_changes_nothing_that_is_settled() -> None:
    assert readings("a = torch.empty(250); probe.settle(); note()") == [[1000, 1000, 1000]]


def test_a_cpu_has_no_cache_and_no_workspaces() -> None:
    assert readings("seen += [probe.reserved_bytes(), probe.retries(), probe.free_workspaces(), probe.device_type]") == [
        None,
        None,
        0,
        "cpu",
    ]
