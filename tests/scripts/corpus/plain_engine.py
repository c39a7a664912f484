"""The loop of DeepSpeed's documentation: engine, engine.backward, engine.step."""

import argparse

import deepspeed
import torch
from tiny import SEQUENCE, VOCABULARY, TinyModel, config

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--stage", type=int, default=2)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

model = TinyModel()
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(args.stage))
for step in range(args.steps):
    batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=engine.device)
    loss = engine(batch, labels=batch)
    engine.backward(loss)
    engine.step()
    print(f"step {step}: {loss.item():.3f}")
