"""Liger's kernels as people ask for them, and where there are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

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
    """Liger replaces classes and functions of transformers' module, too: for whoever builds a llama next in this process."""
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
