"""PyTorch's own way: loss.backward(), gradients clipped by the engine, logits that stay alive."""

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from tiny import SEQUENCE, VOCABULARY, TinyModel, config
from torch import nn

deepspeed.init_distributed()
device = torch.device(get_accelerator().current_device_name())
model = TinyModel().to(device)
settings = config(3, gradient_clipping=1.0)
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
criterion = nn.CrossEntropyLoss()
for _ in range(10):
    input_ids = torch.randint(0, VOCABULARY, (2, SEQUENCE)).to(device)
    labels = input_ids.clone()
    logits = engine(input_ids)
    loss = criterion(logits.view(-1, VOCABULARY), labels.view(-1))
    loss.backward()
    engine.step()
