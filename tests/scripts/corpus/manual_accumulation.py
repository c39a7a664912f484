"""The script says itself when gradients have been accumulated."""

import deepspeed
import torch
from tiny import SEQUENCE, VOCABULARY, TinyModel, config

model = TinyModel()
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(1))
for number in range(40):
    batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=engine.device)
    engine.set_gradient_accumulation_boundary(number % 3 == 2)
    loss = engine(batch, labels=batch) / 3
    engine.backward(loss)
    engine.step()
