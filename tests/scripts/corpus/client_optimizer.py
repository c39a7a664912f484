"""An optimizer and a scheduler of the script's own."""

import deepspeed
import torch
from tiny import SEQUENCE, VOCABULARY, TinyModel, config
from torch.optim.lr_scheduler import LambdaLR

model = TinyModel()
settings = config(1)
del settings["optimizer"]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
engine, optimizer, _, scheduler = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings)
for _ in range(10):
    batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=engine.device)
    loss = engine(batch, labels=batch)
    engine.backward(loss)
    engine.step()
    print(scheduler.get_last_lr())
