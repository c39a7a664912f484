"""How `make docs` builds the documents with Sphinx: the pages beside this file, and a reference
that is read off the code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bf16prof

sys.path.insert(0, str(Path(__file__).parent))

project = "bf16prof"
author = "The bf16prof developers"
copyright = "2026, The bf16prof developers"
release = version = bf16prof.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"bf16prof {version}"
exclude_patterns = ["_build"]

# Docstrings and documents write `names` in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}


def setup(app: Any) -> None:
    """Write the pages that are read off the code before Sphinx reads them."""
    from make_reference import write

    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "reference"))
