"""Remembered answers are those that PyTorch's fake tensors give; DeepSpeed's loops over ranks and
what stands for them agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bf16prof.dry_run.memo import Memo
from bf16prof.dry_run.ranks import KNOWN, digest

aten = torch.ops.aten


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode()


def tensor(mode: FakeTensorMode, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> FakeTensor:
    with mode:
        made = torch.empty(shape, dtype=dtype, device=device)
    assert isinstance(made, FakeTensor)
    return made


CALLS: dict[str, Callable[[FakeTensor, FakeTensor], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "product": lambda x, y: (aten.mm.default, (x, y), {}),
    "view": lambda x, _: (aten.view.default, (x, [2, 12]), {}),
    "transpose": lambda x, _: (aten.t.default, (x,), {}),
    "slice": lambda x, _: (aten.slice.Tensor, (x, 1, 1, 5, 2), {}),
    "slice to the end": lambda x, _: (aten.slice.Tensor, (x, 0, 2, 9223372036854775807), {}),
    "slice from the end": lambda x, _: (aten.slice.Tensor, (x, 0, -3), {}),
    "split": lambda x, _: (aten.split.Tensor, (x, 2, 1), {}),
    "in place": lambda x, _: (aten.add_.Tensor, (x, x), {}),
    "other dtype": lambda x, _: (aten._to_copy.default, (x,), {"dtype": torch.bfloat16}),
    "other device": lambda x, _: (aten._to_copy.default, (x,), {"device": torch.device("cpu", 0)}),
    "new": lambda *_: (aten.empty.memory_format, ([3, 5],), {"dtype": torch.bfloat16, "device": torch.device("cpu", 0)}),
    "several": lambda x, _: (aten.native_layer_norm.default, (x, [6], None, None, 1e-5), {}),
    "expand": lambda x, _: (aten.expand.default, (x, [7, 4, 6]), {}),
    "view of other dtype": lambda x, _: (aten.view.dtype, (x, torch.bfloat16), {}),
}


def metadata(out: Any) -> Any:
    if isinstance(out, FakeTensor):
        return out.shape, out.stride(), out.storage_offset(), out.dtype, out.fake_device, out.untyped_storage().nbytes(), out.requires_grad
    return [metadata(each) for each in out] if isinstance(out, tuple | list) else out


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_given_again_is_the_one_that_fake_tensors_give(mode: FakeTensorMode, name: str) -> None:
    memo = Memo()
    learned = memo.question(aten.mm.default, (tensor(mode, 2, 2), tensor(mode, 2, 2)), {})
    assert learned is not None
    with mode:
        memo.learn(learned, aten.mm.default(*learned.tensors))  # what a fake tensor looks like
    for shift in (0, 3):
        flat, y = tensor(mode, 40), tensor(mode, 6, 5)
        x: Any = flat[shift : shift + 24].view(4, 6)
        func, args, kwargs = CALLS[name](x, y)
        question = memo.question(func, args, kwargs)
        assert question is not None
        with mode:
            expected = func(*args, **kwargs)
        if memo.recall(question) is None:
            memo.learn(question, expected)
        known = memo.recall(question)

        assert known is not None
        out, fresh, _ = known
        assert metadata(out) == metadata(expected)
        outputs = out if isinstance(out, list | tuple) else [out]
        in_x = [each.untyped_storage()._cdata == flat.untyped_storage()._cdata for each in outputs]
        assert [any(each is made for made in fresh) for each in outputs] == [not shared for shared in in_x]
        if name == "in place":
            assert out is x


def test_what_depends_on_values_is_asked_every_time(mode: FakeTensorMode) -> None:
    memo, x = Memo(), tensor(mode, 4)

    assert memo.question(aten.nonzero.default, (x,), {}) is None
    assert memo.question(aten.resize_.default, (x, [8]), {}) is None
    assert memo.question(aten.mul.Tensor, (x, torch.tensor(2.0)), {}) is None  # a real tensor, whose value may be remembered elsewhere


def test_equal_numbers_of_other_types_are_other_questions(mode: FakeTensorMode) -> None:
    memo, x = Memo(), tensor(mode, 4, dtype=torch.int64)

    keys = {memo.question(aten.mul.Scalar, (x, scalar), {}).key for scalar in (1, 1.0, True)}  # type: ignore[union-attr]

    assert len(keys) == 3


def test_the_installed_deepspeeds_loops_over_ranks_are_known() -> None:
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters

    sources = (inspect.getsource(partition_parameters), inspect.getsource(coalesced_collectives))
    for header, digests in KNOWN.items():
        assert any(digest(source, header) in digests for source in sources), header


def test_a_digest_sees_code_and_no_comments() -> None:
    source = "def f(\n    a,\n):\n    # why\n    return a\n\n\ndef g():\n    return 1\n"

    assert digest(source, "def f(") == digest(source.replace("# why", "# because"), "def f(")
    assert digest(source, "def f(") == digest(source.replace("return 1", "return 2"), "def f(")
    assert digest(source, "def f(") != digest(source.replace("return a", "return b"), "def f(")
    assert digest(source, "def h(") == ""


def test_a_larger_storage_and_scratch_are_remembered(mode: FakeTensorMode) -> None:
    memo = Memo()
    question = memo.question(aten.mm.default, (tensor(mode, 4, 6), tensor(mode, 6, 4)), {})
    assert question is not None
    with mode:
        out = aten.mm.default(*question.tensors)
    out.untyped_storage().resize_(1000)
    memo.learn(question, out, scratch=77)
    known = memo.recall(question)
    assert known is not None
    assert known[0].shape == (4, 4)
    assert known[0].untyped_storage().nbytes() == 1000
    assert known[2] == 77
