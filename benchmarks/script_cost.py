"""What it costs a script to be measured: its own step times with our probes and without, in turn,
and whether it behaves the same.

The script times its steps itself, keeps a file and leaves with a code of its own. Its times are
those of the processor: one rank on one thread waits for nobody, and what else runs on the machine
does not count. `measure` and `attach` watch its first steps closely, time the next ten, and then
look no more; each has a line.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from timing import say

from bf16prof.measuring.cache import CACHE_VARIABLE, cache_folder

TRAINING = """
import json, statistics, sys, tempfile, time
import deepspeed, torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(layers)))
engine, _, _, _ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(),
    config={
        "train_micro_batch_size_per_gpu": rows, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    },
)
times, losses = [], []

def steps(number):
    for _ in range(number):
        begin = time.process_time()
        loss = engine(torch.randn(rows, width, dtype=torch.bfloat16)).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        times.append(time.process_time() - begin)
    return times[-number:]
"""
"""A model of `layers` layers of that width, trained on so many rows."""

SCRIPT = f"""
width, rows, layers = 512, 256, 8
{TRAINING}
steps(60)
open("times.json", "w").write(json.dumps(times))
print("last loss", losses[-1], sum(losses))
sys.exit(5)
"""

WARMUP, TIMED = 3, 10
"""As `attach` has them where nothing is said."""
ROUNDS = 5


@dataclass(frozen=True)
class TimedScript:
    """One run: what it printed, its exit code, its files and the processor seconds of its steps."""

    printed: str
    code: int
    files: list[str]
    times: list[float]


def run(folder: Path, *words: str) -> TimedScript:
    """Run the script with python's arguments, on one gloo rank, in that folder."""
    folder.mkdir(parents=True)
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, *words, str(script)], cwd=folder, env=_one_rank(), capture_output=True, text=True, check=False)
    printed = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("[20"))  # DeepSpeed's log has the time in it
    if not (folder / "times.json").exists():
        sys.exit(done.stderr)
    return TimedScript(
        printed, done.returncode, sorted(path.name for path in folder.iterdir()), json.loads((folder / "times.json").read_text())
    )


def _one_rank() -> dict[str, str]:
    """The environment of one gloo rank on one thread."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    return env | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", CACHE_VARIABLE: str(cache_folder())}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


HOOKS = """
import gc, sys, tempfile, time
from pathlib import Path
import torch
from bf16prof.measuring.probes.cpu import CpuProbe
from bf16prof.measuring.results import GuestTask
from bf16prof.measuring.script.rank import GuestRank
from bf16prof.scripts.command import Script

class Idle(torch.nn.Module):
    def __init__(self, modules):
        super().__init__()
        self.module = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(modules))
        self.module.forward = lambda x: x
    def forward(self, x):
        return self.module(x)
    def backward(self, loss):
        torch.autograd.backward(loss)
    def step(self):
        pass
    def is_gradient_accumulation_boundary(self):
        return True

def seconds(engine):
    begin = time.process_time()
    for _ in range(STEPS):
        engine.backward(engine(one).sum())
        engine.step()
    return (time.process_time() - begin) / STEPS

STEPS, one = 2000, torch.ones(1, requires_grad=True)
engine = Idle(int(sys.argv[1]))
gc.freeze()
bare = seconds(engine)
rank = GuestRank(GuestTask(Script("idle.py"), 0, 2 * STEPS), Path(tempfile.mkdtemp()), CpuProbe())
with rank.watching():
    rank.adopted(engine)
    timed = seconds(engine)
    rank.listen_no_more()
    print(timed - bare, seconds(engine) - bare)
"""
"""Steps of an engine that does nothing, with so many modules: the processor time that our hooks add
to each. Python's garbage collection leaves out what torch has made when it was imported: one such
collection takes as long as a thousand steps of ours."""


def hooks(modules: int) -> tuple[float, float]:
    """Microseconds that the hooks take in a timed step, and in one after them."""
    env = {**os.environ, CACHE_VARIABLE: str(cache_folder())}
    done = subprocess.run([sys.executable, "-c", HOOKS, str(modules)], env=env, capture_output=True, text=True, check=True)
    timed, after = (1e6 * float(word) for word in done.stdout.split()[-2:])
    return timed, after


IN_TURN = f"""
import sys

import bf16prof
from bf16prof.measuring.probes.cpu import CpuProbe

width, rows, layers, rounds = map(int, sys.argv[1:])
{TRAINING}
def median(number):
    seconds = []
    for _ in range(number):
        begin = time.perf_counter()
        (own,) = steps(1)
        seconds.append((own, time.perf_counter() - begin))
    return [statistics.median(each) for each in zip(*seconds)]

def bare():
    for _ in range(2):
        for _ in range(4):
            probe.settle()
        steps(1)
    return median(20)

steps(20)
probe = CpuProbe()
print("rounds:")
for _ in range(rounds):
    before = bare()
    with bf16prof.watch(engine, tempfile.mkdtemp() + "/run", warmup=2, steps=21):
        steps(2)
        timed = median(20)
        steps(1)
    after = bare()
    print(*before, *timed, *after)
"""
"""Twenty steps that are timed, between twenty without us and twenty after us, again and again in
one process: of each the median, in seconds of the processor and of the clock. What else runs on the
machine is in neighbours alike. The counting allocator is there always.

Memory settles in the warm-up, so the others pause in the same way: on a machine that does other
work, pauses alone were seen to move the next twenty steps of 3 ms by 0.4 ms each."""

IN_TURN_ROUNDS = 15
SIZES = ((64, 16, 2), (64, 16, 8), (256, 64, 8), (512, 256, 8))
"""Width, rows and layers of models with short steps and longer ones."""


def in_turn(width: int, rows: int, layers: int) -> list[tuple[float, float, float]]:
    """For the processor's time and for the clock's: a step without us, what a timed step takes
    more, and half the distance of the quartiles of that."""
    words = [str(each) for each in (width, rows, layers, IN_TURN_ROUNDS)]
    done = subprocess.run([sys.executable, "-c", IN_TURN, *words], env=_one_rank(), capture_output=True, text=True, check=True)
    lines = done.stdout.partition("rounds:")[2].splitlines()
    rounds = [[float(word) for word in line.split()] for line in lines if line and not line.startswith("[20")]
    found = []
    for clock in (0, 1):
        bare = statistics.median((each[clock] + each[4 + clock]) / 2 for each in rounds)
        more = [each[2 + clock] - (each[clock] + each[4 + clock]) / 2 for each in rounds]
        low, middle, high = statistics.quantiles(more, n=4)
        found.append((bare, middle, (high - low) / 2))
    return found


def main() -> None:
    """Print both ratios, what is different, and what the hooks take by themselves."""
    for modules in (10, 10_000):
        timed, after = hooks(modules)
        say(f"our hooks alone, {modules:,} modules: a timed step, one after them", f"{timed:7.0f} us {after:7.0f} us")
    for sizes in SIZES:
        for clock, (bare, more, spread) in zip(("processor", "clock"), in_turn(*sizes), strict=True):
            what = f"a step of {1e3 * bare:.1f} ms by the {clock}, in turn in one process: timed"
            say(what, f"+ {1e6 * more:5.0f} us +- {1e6 * spread:.0f}  ratio {1 + more / bare:6.3f}")
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for number in range(ROUNDS):
            watched = run(Path(folder) / f"watched{number}", "-m", "bf16prof.attach", "-d", str(Path(folder) / f"run{number}"))
            alone = run(Path(folder) / f"alone{number}")
            pairs.append((watched, alone))
    for name, steps in (("timed steps", slice(WARMUP, WARMUP + TIMED)), ("steps after them", slice(WARMUP + TIMED, None))):
        both = [tuple(statistics.median(each.times[steps]) for each in pair) for pair in pairs]
        own, bare = (statistics.median(column) for column in zip(*both, strict=True))
        quotient = statistics.median(watched / alone for watched, alone in both)
        say(f"a script that is measured, beside itself alone: {name}", f"{1e3 * own:7.2f} ms {1e3 * bare:7.2f} ms  ratio {quotient:6.3f}")
    same = all((w.printed, w.code, w.files) == (a.printed, a.code, a.files) for w, a in pairs)
    say("its output, exit code and files", "the same" if same else f"DIFFERENT: {pairs}")


if __name__ == "__main__":
    main()
