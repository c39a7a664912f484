"""How long a dry run takes: the published example beside `import deepspeed`, 65 billion parameters
on 512 ranks, 512 ranks beside 4."""

from __future__ import annotations

import resource

from timing import bf16prof, python, ratio, say, seconds

EXAMPLE = ("simulate", "--profile", "deepspeed-bf16-example", "--zero", "3", "--recipe", "bf16-full-autocast", "--json")
BIG = tuple(
    word
    for value in (
        "hidden_size=8192", "num_layers=80", "num_heads=64", "max_sequence_length=2048", "vocab_size=50257",
    )
    for word in ("--set", f"model.{value}")
)  # fmt: skip


def main() -> None:
    """Print all benchmarks."""
    ours = bf16prof(*EXAMPLE, "--gpus", "4")
    ratio("`bf16prof simulate`, published example, beside `import deepspeed`", ours, python("import deepspeed"))
    ratio("the same on 512 ranks beside 4", bf16prof(*EXAMPLE, "--gpus", "512"), ours, rounds=5)
    time = seconds(bf16prof(*EXAMPLE, *BIG, "--sequence-length", "2048", "--gpus", "512"))
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    say("65 billion parameters on 512 ranks", f"{time:7.3f} s, {most / 2**30:.2f} GiB at most in one process")


if __name__ == "__main__":
    main()
