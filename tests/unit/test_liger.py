"""Liger's kernels as people ask for them, and where there are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused
from hugging_face import config
from jobs import profile

from bf16prof.errors import InputError
from bf16prof.models.modules import build_trained

__all__ = ["main"]


def test_they_run_on_gpus_only(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    for command in ("estimate", "simulate"):
        assert "Liger's kernels (workload.liger) are Triton's" in refused(main(command, file, "--liger", "loss", "--device", "cpu"))
    assert "workload.liger: input should be 'none', 'loss' or 'all', got 'some'" in refused(main("estimate", file, "--liger", "some"))


def test_a_model_that_has_none_is_named() -> None:
    with pytest.raises(InputError, match="Liger-Kernel has no kernels for 'opt'"):
        build_trained(profile(model__hf_config=config("opt"), workload__liger="all"))
    with pytest.raises(InputError, match="Liger-Kernel has no kernels for 'PostLnTransformer'"):
        build_trained(profile(workload__liger="all"))


@pytest.fixture
def llama_is_mended() -> Iterator[None]:
    """Liger replaces classes and functions of transformers' module, too: for whoever builds a llama
    next in this process."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


@pytest.mark.usefixtures("llama_is_mended")
def test_the_loss_alone_leaves_every_other_module_as_it_is() -> None:
    def built(liger: str) -> dict[str, str]:
        model = build_trained(profile(model__hf_config=config("llama"), workload__liger=liger))
        return {name: str(getattr(module.forward, "__module__", "")) for name, module in model.named_modules()}

    plain, loss, everything = built("none"), built("loss"), built("all")

    assert {name for name in plain if plain[name] != loss[name]} == {""}
    assert loss[""].startswith("liger_kernel.")
    assert {name for name in plain if plain[name] != everything[name]} > {"", "model.norm", "model.layers.0.mlp"}


def test_a_loss_in_tiles_is_the_loss_and_so_are_its_gradients() -> None:
    import torch

    tokens = torch.randint(101, (2, 16), generator=torch.Generator().manual_seed(0))

    def trained(**keys: Any) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model: Any = build_trained(profile(model__hf_config=config("llama"), **keys))
        outputs = model(tokens, labels=tokens)
        outputs.loss.backward()
        assert (getattr(outputs, "logits", None) is None) == bool(keys)
        return outputs.loss.item(), {name: each.grad for name, each in model.named_parameters()}

    plain, gradients = trained()
    tiled, in_tiles = trained(workload__fused_loss="tiled", workload__fused_loss_tiles=3)

    assert tiled == pytest.approx(plain, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(in_tiles[name], gradient, rtol=1e-4, atol=1e-7)


def test_one_fused_loss_of_those_that_there_are(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    assert "expected one of liger, tiled" in refused(main("simulate", file, "--fused-loss", "fast"))
    assert "--fused-loss cce: what the package index has" in refused(main("simulate", file, "--fused-loss", "cce"))
    assert "two fused losses" in refused(main("simulate", file, "--fused-loss", "tiled", "--liger", "loss"))
    assert "models of transformers" in refused(main("simulate", "cpu-demo", "--fused-loss", "tiled"))
    assert "(--fused-loss tiled) is left to the dry run" in refused(main("estimate", file, "--fused-loss", "tiled", "--gpus", "2"))
    assert "are Triton's" in refused(main("simulate", file, "--fused-loss", "liger", "--device", "cpu"))
