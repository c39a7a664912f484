"""Models of published runs as the libraries of their time ran them: what they keep, and that they
compute the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bf16prof.check import opt, vit
from bf16prof.imports.published import find_published


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What autograd saves, each storage once."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(saved.values())


def test_attention_of_opt_in_2023_computes_the_same_and_keeps_one_more_matrix_of_scores() -> None:
    """As today's `eager_attention_forward`, which adds the mask and no more."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]

    def now() -> Tensor:
        return ((query @ key.mT + mask).softmax(dim=-1) @ value).transpose(1, 2).contiguous()

    def then() -> Tensor:
        return opt.attention(nn.Module(), query, key, value, mask)[0]

    assert torch.equal(now(), then())
    assert kept_bytes(then) - kept_bytes(now) - 4 == 2 * 3 * 5 * 5 * 4, "and the least number, one of 4 bytes"


def test_the_loss_of_opt_in_2023_is_over_all_tokens_but_the_first() -> None:
    logits, labels = torch.randn(2, 6, 11, requires_grad=True), torch.randint(0, 11, (2, 6))

    each = [functional.cross_entropy(logits[row, :-1], labels[row, 1:]) for row in range(2)]
    assert torch.allclose(opt.loss(logits, labels, 11), torch.stack(each).mean())


def test_the_vision_transformer_has_the_parameters_that_timm_prints() -> None:
    """timm, results/model_metadata-in1k.csv and README: vit_gigantic_patch14_224 has 1,844.44
    million."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in vit.make().parameters())

    assert round(parameters / 1e6, 2) == 1844.44
    images, classes = torch.zeros(1, 3, vit.IMAGE, vit.IMAGE), torch.zeros(1, dtype=torch.int64)
    loss, logits = vit.VisionTransformer(width=32, depth=2, heads=4, wide=48)(images, classes)
    assert (loss.shape, logits.shape) == ((), (1, vit.CLASSES))


def test_published_runs_name_what_they_set() -> None:
    """Issue 1302: its table, and settings that no two rows share but for the two that it prints
    alike."""
    runs = find_published("issue-1302").runs
    table = {
        (zero.contiguous_gradients, zero.overlap_comm, zero.reduce_scatter, zero.reduce_bucket_size): round(
            (run.record.run_peak_allocated_bytes or 0) / 2**20
        )
        for run in runs
        for zero in [run.job.profile.deepspeed.zero_optimization]
    }

    assert table == {
        (True, True, True, 500_000_000): 21152, (True, True, False, 500_000_000): 21152, (True, False, True, 500_000_000): 20198,
        (True, True, True, 100_000_000): 19625, (True, True, True, 10_000_000): 19284, (False, True, True, 500_000_000): 19247,
        (False, False, True, 10_000_000): 19247,
    }  # fmt: skip
    single = find_published("opt-1.3b-single").runs[0]
    assert single.dry_job != single.job
    assert single.dry_job.case.recipe == single.job.case.recipe
