"""The model is built inside zero.Init, which partitions each parameter as soon as it is there;
activations are recomputed."""

import deepspeed
import torch
from tiny import SEQUENCE, VOCABULARY, TinyModel, config
from torch.utils.checkpoint import checkpoint


class Recomputing(TinyModel):
    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        logits = self.head(x)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


deepspeed.init_distributed()
settings = config(3)
with deepspeed.zero.Init(config_dict_or_path=settings):
    model = Recomputing()
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
for _ in range(10):
    batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=engine.device)
    loss = engine(batch, labels=batch)
    engine.backward(loss)
    engine.step()
