"""What scripts do with values, devices and models besides training, each with what has to come of
it."""

import pickle
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from tiny import SEQUENCE, VOCABULARY, TinyModel, config
from torch.utils.checkpoint import checkpoint


class Doubled(torch.autograd.Function):
    """Makes a tensor on the device of another in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.full((1,), 2.0, device=x.device, dtype=x.dtype)


class Model(TinyModel):
    def forward(self, input_ids, labels=None):
        return checkpoint(self.recomputed, input_ids, labels, use_reentrant=False)

    def recomputed(self, input_ids, labels):
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return Doubled.apply(super().forward(input_ids + 0 * positions, labels))


def agree(device):
    ranks = dist.get_world_size()
    total = torch.tensor([7, 9], device=device)
    dist.all_reduce(total)
    assert total.tolist() == [7 * ranks, 9 * ranks]
    longest = torch.tensor(5.0).to(device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    assert longest.item() == 5.0
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([3], device=device))
    assert max(int(length) for length in lengths) == 3
    numbers = torch.arange(4, device=device)
    assert numbers[numbers > 1].shape == (2,)
    numbers[0] = torch.randint(9, (), device=device)
    assert f"{numbers.sum():.0f}" != ""
    weight = torch.ones(1).to(device)
    assert (weight.device, (weight * lengths[0]).item()) == (device, 3)


def without_values():
    mask = torch.nn.Transformer.generate_square_subsequent_mask(3)
    assert mask[0].tolist() == [0.0, float("-inf"), float("-inf")]
    assert torch.full((), float("inf")).item() == float("inf")
    with torch.inference_mode():
        assert not torch.is_grad_enabled()
        with torch.inference_mode(mode=False):
            assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def prepare(path):
    torch.save({"rows": torch.arange(4), "name": "prepared"}, path)
    found = torch.load(path)
    assert found["rows"].tolist() == [0, 1, 2, 3]
    assert found["name"] == "prepared"
    assert not Path(path).exists()
    assert pickle.loads(pickle.dumps({"rows": torch.arange(4)}))["rows"].tolist() == [0, 1, 2, 3]


prepare("prepared.pt")
without_values()
model = Model()
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(2))
for _ in range(10):
    batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device=engine.device)
    engine.backward(engine(batch, labels=batch))
    engine.step()
    agree(engine.device)
    with torch.inference_mode():
        many = batch.repeat(64, 1)
        engine.module(many, labels=many)
