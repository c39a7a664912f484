"""DeepSpeed makes the loader of a dataset; two micro-steps."""

import deepspeed
import torch
from tiny import TinyModel, Tokens, config


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


model = TinyModel()
engine, _, loader, _ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), training_data=Tokens(), collate_fn=collate, config=config(2, accumulation=2)
)
for _ in range(4):
    for batch in loader:
        batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
