"""Two models with an engine each, trained in turn."""

import deepspeed
import torch
from tiny import SEQUENCE, VOCABULARY, TinyModel, config

generator, critic = TinyModel(), TinyModel(hidden=16, layers=1)
first, _, _, _ = deepspeed.initialize(model=generator, model_parameters=generator.parameters(), config=config(2))
second, _, _, _ = deepspeed.initialize(model=critic, model_parameters=critic.parameters(), config=config(1))
for _ in range(10):
    batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=first.device)
    for engine in (first, second):
        loss = engine(batch, labels=batch)
        engine.backward(loss)
        engine.step()
