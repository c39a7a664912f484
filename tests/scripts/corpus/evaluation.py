"""An evaluation after every update, on larger batches, whose logits are gathered; the engine says
that it is none of the micro-steps."""

import deepspeed
import torch
import torch.distributed as dist
from tiny import SEQUENCE, VOCABULARY, TinyModel, config


def evaluate(engine):
    engine.eval()
    kept = []
    with torch.no_grad():
        for _ in range(2):
            logits = engine(torch.randint(0, VOCABULARY, (8, SEQUENCE), device=engine.device))
            parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, logits)
            kept += parts
        wholes = torch.cat(kept)
    engine.train()
    return wholes.shape


model = TinyModel()
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(2, accumulation=2))
for step in range(10):
    for _ in range(2):
        batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=engine.device)
        loss = engine(batch, labels=batch)
        engine.backward(loss)
        engine.step()
    print(f"step {step}: {loss.item():.3f}, evaluated {evaluate(engine)}")
