"""What can go wrong, as one tree, and the exit code that each branch means::

    Bf16profError            1   a fault of ours
    ├── InputError           2   what the user said cannot be used
    │   └── Refused          2   DeepSpeed itself would reject (or silently spoil) this case
    ├── RunFailed            3   ranks crashed, ran out of memory or out of time
    └── Unmet                4   an answer that the user asked not to accept
        ├── ToleranceExceeded  4   a prediction is further off than `--fail-over` allows
        └── DoesNotFit         4   `--fail-unless-fits`, and not every case fits

The command line catches `Bf16profError` once, prints the message and the hint on one line each, and
leaves with the code.
"""

SIGNALLED = 128
"""What is added to the number of a signal to make an exit code of it: 130 for Ctrl-C, 143 for
SIGTERM, 129 for SIGHUP."""


def install_hint(extra: str) -> str:
    """How to install what an optional part needs: an extra, as `train`, `hf`, `peft` or
    `megatron`."""
    return f"pip install 'bf16prof[{extra}]'"


class Bf16profError(Exception):
    """Base of all errors that bf16prof raises on purpose.

    `message` is one line for a person; `hint`, where there is one, says what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(Bf16profError):
    """A flag, a profile or a result file that cannot be used; the message names it and the
    field."""

    exit_code = 2


class Refused(InputError):
    """A case that no DeepSpeed engine can run as described; the hint names recipes that would
    work."""


class RunFailed(Bf16profError):
    """A measurement that did not finish: a rank crashed, was killed, ran out of memory or out of
    time."""

    exit_code = 3


class Unmet(Bf16profError):
    """There is an answer, and it is not what the user demanded."""

    exit_code = 4


class ToleranceExceeded(Unmet):
    """A prediction misses the measurement by more than the tolerance the user set."""


class DoesNotFit(Unmet):
    """A job that has to fit its GPU is tight, does not fit, or cannot be judged."""
