"""A plain DeepSpeed script as people have it: its own arguments, `loss.backward()` where asked, and
a line per step."""

import argparse
import os

import deepspeed
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--plain", action="store_true")
parser.add_argument("--watch", default="")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--launched", action="store_true", help="by what gives each rank its number, as DeepSpeed's launcher does")
parser.add_argument("--local_rank", type=int, default=-1)
arguments = parser.parse_args()
assert arguments.local_rank == (int(os.environ["LOCAL_RANK"]) if arguments.launched else -1)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
config = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": arguments.stage, "reduce_bucket_size": 10000},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)


def evaluate() -> None:
    """An evaluation on a larger batch, whose outputs are kept until it is over."""
    engine.eval()
    with torch.inference_mode():
        kept = [engine(torch.randn(64, 64).bfloat16()) for _ in range(2)]
    engine.train()
    assert len(kept) == 2


def train() -> None:
    """Some steps."""
    for step in range(arguments.steps):
        batch = torch.randn(2, 64).bfloat16()
        outputs = engine(batch)
        loss = outputs.float().pow(2).mean()
        if arguments.plain:
            loss.backward()
        else:
            engine.backward(loss)
        engine.step()
        print(f"rank {os.environ['RANK']} step {step} loss {loss.item():.4f}", flush=True)
        if arguments.evaluate:
            evaluate()


if arguments.watch:
    import bf16prof

    with bf16prof.watch(engine, arguments.watch):
        train()
else:
    train()
