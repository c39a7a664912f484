"""What is said of releases: tried, not tried, too old, known not to work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bf16prof.dry_run import versions
from bf16prof.dry_run.hardware.devices import cpu_kernels
from bf16prof.dry_run.ledger import Ledger
from bf16prof.dry_run.shims import _packed_sequences
from bf16prof.dry_run.tracker import HOST, Tracker
from bf16prof.engine.versions import Support, supported
from bf16prof.errors import InputError


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Support("0.18.3", ("0.18.3", "0.19.8"), {"0.19.5": "it loses gradients", "0.20": "the world ended"})
    monkeypatch.setattr(versions, "supported", lambda: {"deepspeed": row})


def test_releases_that_were_tried_need_no_words() -> None:
    for package, support in supported().items():
        assert support.tested
        for release in (*support.tested, f"{support.newest}+cpu"):
            assert versions.check({package: release}) == ()


def test_releases_that_were_not_tried_are_named() -> None:
    newest = supported()["deepspeed"].newest
    later = f"DeepSpeed 0.99.0 is later than {newest}, the last that this dry run was tested with"
    between = "PyTorch 2.12.1+cu130 is not among the releases that this dry run was tested with"
    assert versions.check({"deepspeed": "0.99.0"}) == (later,)
    assert versions.check({"torch": "2.12.1+cu130"}) == (between,)


@pytest.mark.parametrize("package", ["deepspeed", "torch", "transformers"])
def test_what_is_too_old_is_refused(package: str) -> None:
    with pytest.raises(InputError, match=r"0\.1 is installed; the dry run needs"):
        versions.check({package: "0.1"})


@pytest.mark.parametrize(("version", "reason"), [("0.19.5", "it loses gradients"), ("0.20.3", "the world ended")])
@pytest.mark.usefixtures("broken")
def test_what_is_known_not_to_work_is_refused_with_the_reason(version: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"does not work with DeepSpeed {version}: {reason}"):
        versions.check({"deepspeed": version})


# ---- Transformers before and after 5


def before_5(positions: torch.Tensor) -> Any:
    """Always indices (transformers 4.57, masking_utils.py)."""
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def since_5(positions: torch.Tensor) -> Any:
    """`None` for one sequence a row (transformers 5.0)."""
    indices = before_5(positions)
    return None if (indices[:, -1] == 0).all() else indices


@pytest.fixture
def dry() -> Iterator[None]:
    with FakeTensorMode(), Tracker(Ledger(), HOST, cpu_kernels()):
        yield


@pytest.mark.usefixtures("dry")
def test_the_installed_version_says_whether_a_mask_is_built() -> None:
    positions = torch.empty(2, 7, dtype=torch.int64)
    assert _packed_sequences(since_5, positions) is None
    indices = _packed_sequences(before_5, positions)
    assert indices.shape == (2, 7)
    assert indices.dtype is torch.int64
