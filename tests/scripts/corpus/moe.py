"""A mixture of experts of DeepSpeed's, its parameters in groups of their own."""

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from tiny import SEQUENCE, VOCABULARY, config
from torch import nn

HIDDEN = 32


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        expert = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))
        self.moe = MoE(hidden_size=HIDDEN, expert=expert, num_experts=4, ep_size=1, k=1, min_capacity=4)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids, labels):
        x, auxiliary, _ = self.moe(self.embedding(input_ids))
        logits = self.head(x)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) + 0.01 * auxiliary


deepspeed.init_distributed()
model = Mixture()
groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "parameters"})
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=config(2))
for _ in range(10):
    batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=engine.device)
    loss = engine(batch, labels=batch)
    engine.backward(loss)
    engine.step()
