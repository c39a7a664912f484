"""What scripts do besides: environment, loaders with workers, progress bars, evaluation,
checkpoints, collectives, counters of memory."""

import argparse
import os
import time

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tiny import VOCABULARY, TinyModel, Tokens, config
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

try:
    import wandb
except ImportError:
    wandb = None


def evaluate(engine, loader):
    engine.eval()
    total = 0.0
    with torch.no_grad():
        for batch in loader:
            batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
            total += engine(**batch).item()
            break
    engine.train()
    return total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", default="checkpoints")
    args = parser.parse_args()
    local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
        assert torch.cuda.get_device_properties(device).total_memory > 0
    else:
        device = torch.device("cpu")
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = TinyModel()
    engine, optimizer, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(2))
    sampler = DistributedSampler(Tokens(), shuffle=True)
    loader = DataLoader(Tokens(), batch_size=2, sampler=sampler, num_workers=2, pin_memory=True, drop_last=True)
    seen, started = 0, time.time()
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in tqdm(loader, disable=dist.get_rank() != 0):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            loss = engine(**batch)
            if not torch.isfinite(loss):
                raise FloatingPointError(loss)
            engine.backward(loss)
            engine.step()
            seen += int((batch["input_ids"] < VOCABULARY).sum())
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if batch["input_ids"].device.type == "cuda":
                assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() > 0
        print(f"epoch {epoch}: {mean.item() / dist.get_world_size():.3f}, evaluation {evaluate(engine, loader):.3f}, {seen} tokens")
        engine.save_checkpoint(args.output, tag=f"epoch{epoch}")
        dist.barrier()
    if wandb is not None and os.environ.get("WANDB_MODE") == "online":
        wandb.log({"seconds": time.time() - started})
    print(get_accelerator().device_name(), "done")


if __name__ == "__main__":
    main()
