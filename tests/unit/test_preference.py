"""Preference optimization: its loss against TRL's formula, its batches, the reference's
configuration, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import Main, main, refused
from hugging_face import config
from jobs import job, profile
from torch import Tensor

from bf16prof.engine.batch import batch_spec
from bf16prof.engine.config import deepspeed_config
from bf16prof.engine.preference import BETA, preference_loss, reference_config
from bf16prof.measuring.batches import make_batches
from bf16prof.models.modules import build_trained
from bf16prof.profiles.schema import Profile
from bf16prof.vocabulary import Offload

__all__ = ["main"]


def paired(dpo: str = "reference", **more: Any) -> Profile:
    return profile(
        model__hf_config=config("llama"), workload__sequence_length=10, workload__micro_batch_size=2, workload__data="synthetic",
        workload__dpo=dpo, **more,
    )  # fmt: skip


@pytest.mark.parametrize("dpo", ["reference", "precomputed"])
def test_both_answers_of_each_pair_are_rows_of_a_batch(dpo: str) -> None:
    this = job(paired(dpo))
    batch = make_batches(this, 0, "cpu", shifted=False)()

    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {name: spec.shape for name, spec in batch_spec(this).items()}
    assert batch["input_ids"].shape == (4, 10)
    assert not batch["attention_mask"].all(), "answers differ in length, so there is padding"
    assert not batch["completion_mask"][:, 0].any(), "a question is no answer"
    assert ("reference_chosen" in batch) == (dpo == "precomputed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_the_paper(dtype: torch.dtype) -> None:
    """Rafailov et al. 2023 (arXiv 2305.18290), equation 7, written out for one pair of one token
    each."""
    torch.manual_seed(0)
    logits, theirs = torch.randn(2, 2, 5).to(dtype), torch.randn(2, 2, 5).to(dtype)
    batch = {"input_ids": torch.tensor([[0, 1], [0, 3]]), "attention_mask": torch.ones(2, 2), "completion_mask": torch.tensor([[0, 1]] * 2)}

    def answering(with_: Tensor) -> Any:
        return lambda **_: SimpleNamespace(logits=with_)

    loss, _ = preference_loss(answering(logits), answering(theirs), batch)

    def log_probability(of: Tensor, row: int, token: int) -> float:
        return float(of[row, 0, token].double() - of[row, 0].double().logsumexp(0))

    ratios = [log_probability(logits, row, token) - log_probability(theirs, row, token) for row, token in ((0, 1), (1, 3))]
    expected = -math.log(1 / (1 + math.exp(-BETA * (ratios[0] - ratios[1]))))
    assert float(loss) == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 1e-2)


def test_a_reference_is_cut_at_stage_3_only_and_trains_nothing() -> None:
    third = deepspeed_config(job(paired(), 3, offload=Offload.OPTIMIZER))
    second = deepspeed_config(job(paired(), 2))

    assert "offload_optimizer" in third["zero_optimization"]
    assert reference_config(third)["zero_optimization"]["stage"] == 3
    assert not {"optimizer", "scheduler"} & reference_config(third).keys()
    assert "offload_optimizer" not in reference_config(third)["zero_optimization"]
    assert reference_config(second)["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize(("more", "expected"), [
    (("--liger", "loss"), "--dpo with Liger's kernels is not modelled"),
    (("--eval-batch-size", "2"), "--dpo with an evaluation is not modelled"),
    (("--packed-sequences", "2"), "--dpo with --packed-sequences is not modelled"),
])  # fmt: skip
def test_what_is_not_modelled_together_is_one_line(more: tuple[str, ...], expected: str, main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    assert expected in refused(main("simulate", file, "--dpo", "reference", *more))
    assert "models of transformers" in refused(main("simulate", "cpu-demo", "--dpo", "reference"))
    assert expected.replace("--dpo", "--reward") in refused(main("simulate", file, "--reward", *more))
    assert "--reward with --dpo" in refused(main("simulate", file, "--reward", "--dpo", "reference"))
    assert "input should be 'none', 'reference' or 'precomputed'" in refused(main("simulate", file, "--dpo", "policy"))


def test_the_closed_form_leaves_it_to_the_dry_run_in_one_line(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    assert "(--dpo) is left to the dry run" in refused(main("estimate", file, "--dpo", "reference", "--gpus", "2"))
    assert "(--reward) is left to the dry run" in refused(main("estimate", file, "--reward", "--gpus", "2"))


@pytest.mark.filterwarnings("ignore")  # of torchao and others, which PEFT imports
def test_dropout_is_off_in_the_adapter_as_well() -> None:
    """TRL puts the adapter on and then turns dropout off in all of it (trl/trainer/dpo_trainer.py,
    reward_trainer.py)."""
    lora = {"r": 2, "lora_dropout": 0.5, "target_modules": "all-linear"}
    rates = {
        dpo: {module.p for module in build_trained(paired(dpo, peft=lora)).modules() if isinstance(module, torch.nn.Dropout)}
        for dpo in ("none", "reference")
    }

    assert 0.5 in rates["none"]
    assert not any(rates["reference"])
