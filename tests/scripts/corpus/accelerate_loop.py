"""A loop of accelerate's, which wraps the engine."""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from tiny import TinyModel, Tokens
from torch.utils.data import DataLoader

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=2, gradient_clipping=1.0)
accelerator = Accelerator(mixed_precision="bf16", deepspeed_plugin=plugin, gradient_accumulation_steps=2)
model = TinyModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(Tokens(), batch_size=2, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(3):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(accelerator.gather(loss.detach()).mean().item())
