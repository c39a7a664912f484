"""Parameters in two groups, with and without weight decay."""

import deepspeed
import torch
from tiny import SEQUENCE, VOCABULARY, TinyModel, config

model = TinyModel()
groups = [
    {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
    {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
]
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=config(2))
for _ in range(10):
    batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=engine.device)
    loss = engine(batch, labels=batch)
    engine.backward(loss)
    engine.step()
