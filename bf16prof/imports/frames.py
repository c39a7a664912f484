"""Where in training a Python traceback was: the outermost of its frames that belongs to a phase.

Outermost, because backward runs forward again under activation checkpointing, and init steps the
optimizer once to make its states.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bf16prof.vocabulary import Phase

_HEADER = "Traceback (most recent call last)"
_FRAMES = (
    re.compile(r'File "([^"\n]{1,400})", line \d{1,9}(?:, in (\S{1,120}))?'),
    re.compile(r"File (\S{1,400}\.py):\d{1,9}, in (?:\w{1,80}\.)*(\w{1,120})\("),  # IPython 8
    re.compile(r"(\S{1,400}\.py) in (\w{1,120})\("),  # IPython before
    re.compile(r"│ +(\S{1,400}\.py):\d{1,9} in (\w{1,120})"),  # rich
)
"""How a frame names its file and its function: Python's own traceback, and what draws it anew."""

FRAME_MARKS = ("traceback (most recent call last)", "file ", ".py in ", "│", "->", "❱")
"""One of them is in every line of a traceback but those of code that follow one."""

_MARKED = re.compile(r"^[\s│]*(?:-+>|❱) ?\d{1,9}[\s│]+(\S.*?)\s*│?$")
"""The line of code that a notebook or rich points at."""

_FUNCTIONS: tuple[tuple[Phase, re.Pattern[str]], ...] = (
    (
        Phase.INIT,
        re.compile(
            r"^(?:initialize|from_pretrained|from_config|_from_config|_load_pretrained_model|load_model|_prepare_deepspeed|deepspeed_init|"
            r"initialize_optimizer_states|_configure_(?:distributed_model|optimizer|zero_optimizer|bf16_optimizer|fp16_optimizer)|"
            r"_move_model_to_device|broadcast_init_sharding_info|_broadcast_model|get_peft_model|create_optimizer\w*)$"
        ),
    ),
    (Phase.EVAL, re.compile(r"^(?:_?evaluate|evaluation_loop|prediction_loop|prediction_step|validation_step)$")),
    (
        Phase.BACKWARD,
        re.compile(r"^(?:backward|run_backward|_engine_run_backward|_exec_backward_pass|unpack_hook|_do_optimizer_backward)$"),
    ),
    (Phase.STEP, re.compile(r"^(?:step|_take_model_step|_optimizer_step|_exec_optimizer_step|optimizer_step|unscale_and_clip_grads)$")),
    (Phase.FORWARD, re.compile(r"^(?:forward|compute_loss|_exec_forward_pass|_call_impl|_wrapped_call_impl)$")),
)
"""Functions of DeepSpeed, torch, transformers and accelerate, by the phase that they are."""

_CODE: tuple[tuple[Phase, re.Pattern[str]], ...] = (
    (
        Phase.INIT,
        re.compile(
            r"\b(?:deepspeed\.initialize|deepspeed\.zero\.Init|\w+\.from_pretrained|accelerator\.prepare|"
            r"(?:model|module|net|self\.model|self\.module)\.(?:to|cuda|half|bfloat16|float))\("
        ),
    ),
    (Phase.BACKWARD, re.compile(r"\.backward\(")),
    (Phase.STEP, re.compile(r"\b(?:optimizer|optim|opt|engine|model_engine|model|scaler)\.step\(")),
    (Phase.FORWARD, re.compile(r"(?:=|return|\bloss\b).*\b(?:model|engine|model_engine|self\.model|net)\(")),
)
"""Lines of code in a user's script, by the phase that they begin."""

_EVIDENCE = {
    Phase.INIT: "the model or the engine was being built",
    Phase.FORWARD: "forward of the model",
    Phase.BACKWARD: "loss.backward",
    Phase.STEP: "optimizer.step",
    Phase.EVAL: "an evaluation",
}


@dataclass(frozen=True)
class SaidPhase:
    """A phase, and what says it."""

    phase: Phase | None = None
    evidence: str = ""


class Frames:
    """The frames of the last traceback of one rank, read line by line."""

    def __init__(self) -> None:
        self._first: SaidPhase | None = None
        self.code_follows = False
        """The next line is the code of a frame."""

    def line(self, text: str) -> bool:
        """Whether a line belongs to a traceback."""
        if _HEADER in text:
            self._first = None
            return True
        found = next((f for form in _FRAMES if (f := form.search(text))), None)
        if found is not None:
            self.code_follows = True
            self._note(_of_function(found[2] or "", found[1]), found[2] or "")
            return True
        marked = _MARKED.match(text)
        if marked is None and not self.code_follows:
            return False
        self.code_follows = False
        code = marked[1] if marked else text.strip()
        self._note(_matching(_CODE, code), code)
        return True

    def place(self) -> SaidPhase:
        """The phase of the outermost frame that has one."""
        return self._first or SaidPhase()

    def _note(self, phase: Phase | None, text: str) -> None:
        if self._first is None and phase is not None:
            self._first = SaidPhase(phase, f"the traceback: {_EVIDENCE[phase]}, `{text.strip()[:80]}`")


def _of_function(name: str, path: str) -> Phase | None:
    """The phase of a function. What is called `step` or `initialize` counts in the files of
    libraries only: scripts call anything so."""
    if name == "__init__" and re.search(r"deepspeed/runtime/(?:engine|zero/|bf16|fp16)", path.replace("\\", "/")):
        return Phase.INIT
    if name in ("step", "initialize", "load_model", "_apply", "to", "cuda") and not re.search(
        r"site-packages|dist-packages|deepspeed|torch", path
    ):
        return None
    if name in ("to", "cuda", "_apply") and "nn/modules/module" in path.replace("\\", "/"):
        return Phase.INIT
    return _matching(_FUNCTIONS, name)


def _matching(table: tuple[tuple[Phase, re.Pattern[str]], ...], text: str) -> Phase | None:
    return next((phase for phase, pattern in table if pattern.search(text)), None)
