"""Records on a terminal, or in a pipe: the estimate grid, plans, the breakdown of one record, the
reconciliation, the summary of a run.

Every function prints on the `Console` it is given; `make_console` makes one that keeps to NO_COLOR,
FORCE_COLOR and COLUMNS.
"""

from bf16prof.reports.console.answer import answer
from bf16prof.reports.console.asked import asked, settings_table
from bf16prof.reports.console.breakdown import breakdown, notes
from bf16prof.reports.console.changes import changes_view
from bf16prof.reports.console.explanation import explanation_view
from bf16prof.reports.console.grid import RefusalLike, estimate_grid, grid_width, refusals
from bf16prof.reports.console.layout import in_text, make_console
from bf16prof.reports.console.losses import learning
from bf16prof.reports.console.outcome import outcome
from bf16prof.reports.console.peak import holders
from bf16prof.reports.console.plan import plan_sizes, plan_view
from bf16prof.reports.console.reconciliation import reconciliation
from bf16prof.reports.console.run import failures, run_summary

__all__ = [
    "RefusalLike",
    "answer",
    "asked",
    "breakdown",
    "changes_view",
    "estimate_grid",
    "explanation_view",
    "failures",
    "grid_width",
    "holders",
    "in_text",
    "learning",
    "make_console",
    "notes",
    "outcome",
    "plan_sizes",
    "plan_view",
    "reconciliation",
    "refusals",
    "run_summary",
    "settings_table",
]
