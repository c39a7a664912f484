"""mutmut with tests that are collected once (`make mutants`): a mutant costs a fork and the tests
up to the first that fails.

mutmut's fork server imports the tests; then pytest collects them anew for every mutant, and runs
them in no order. Here it keeps what has been collected, has imported what tests import late, and
runs the quickest first. No test has run before a fork, so that no mutant finds a cache that the
code without it has filled.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from _pytest.config import _prepareconfig
from mutmut import __main__ as mutmut
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd
from mutmut.workers import isolation

EXAMPLES = 20
"""Of hypothesis, for each property: a mutant that lives has met all of them."""
WALL_S = 300
"""Seconds after which a mutant that waits is ended."""
LONG_S = 3.0
"""A test that takes longer with a mutable copy of the code is not asked: each mutant that lives
would pay for it."""

LATE = (
    "bitsandbytes", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3", "optimi", "pandas", "peft",
    "torchao.quantization", "transformers.trainer_callback",
)  # fmt: skip
"""What tests import late."""


class CollectedOnce(PytestRunner):  # type: ignore[misc]
    """Runs tests of a session that has been collected before the process was forked."""

    session: pytest.Session | None = None

    def warm_up(self) -> None:
        """Collect, in the process that will be forked."""
        with change_cwd("mutants"):
            config = _prepareconfig(
                ["--rootdir=.", "--tb=no", "--assert=plain", *self._pytest_add_cli_args, *self._pytest_add_cli_args_test_selection]
            )
            config._do_configure()
            self.session = pytest.Session.from_config(config)
            config.hook.pytest_sessionstart(session=self.session)
            config.hook.pytest_collection(session=self.session)
        for item in self.session.items:
            _with_fewer_examples(item)
        with warnings.catch_warnings(action="ignore"):
            for name in LATE:
                importlib.import_module(name)
        gc.collect()
        gc.freeze()

    def execute_pytest(self, params: list[str], **keywords: Any) -> int:
        """Which tests reach a function is asked without what earlier tests have left in caches."""
        return int(super().execute_pytest(params, **{**keywords, "plugins": [*keywords.get("plugins", []), WithoutMemory()]}))

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        """0 where all pass, 1 as soon as one fails, pytest's own code where there is no test."""
        if self.session is None:
            self.warm_up()  # a run of its own: that of the code without a mutant, for which everything else is as for one
            sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        assert self.session is not None
        wanted, times = set(tests), state().duration_by_test
        modules = {test.partition("::")[0] for test in wanted}
        items = [
            i for i in self.session.items if not wanted or i.nodeid in wanted or (_shares(i) and i.nodeid.partition("::")[0] in modules)
        ]
        items = [item for item in items if times.get(item.nodeid, 0.0) <= LONG_S]
        if not items:
            return pytest.ExitCode.NO_TESTS_COLLECTED
        items.sort(key=lambda item: times.get(item.nodeid, 0.0))
        os.chdir("mutants")
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:
                return 1
        return 0


class WithoutMemory:
    """A plugin of pytest that empties the package's caches before every test."""

    def pytest_runtest_logstart(self) -> None:
        """A test begins."""
        for module in [module for name, module in sys.modules.items() if name.startswith("bf16prof")]:
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


def _shares(item: pytest.Item) -> bool:
    """Whether a test reads what a fixture made once for its module: the first test of it is said to
    have reached all that."""
    fixtures = getattr(item, "_fixtureinfo", None)
    return fixtures is not None and any(each.scope == "module" for made in fixtures.name2fixturedefs.values() for each in made)


def _with_fewer_examples(item: pytest.Item) -> None:
    import hypothesis  # not before pytest has, which rewrites its assertions

    name = "_hypothesis_internal_use_settings"
    function = getattr(item, "obj", None)
    if (own := getattr(function, name, None)) is not None and own.max_examples > EXAMPLES:
        setattr(function, name, hypothesis.settings(own, max_examples=EXAMPLES))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
    isolation.PytestRunner = CollectedOnce
    register = isolation.register_timeout
    # The limit of CPU time decides, which a busy machine does not shorten; this one ends those that
    # sleep.
    isolation.register_timeout = lambda pid, timeout_s: register(pid, WALL_S + timeout_s)
    mutmut.cli()
