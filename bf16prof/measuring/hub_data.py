"""Text of a dataset of the Hugging Face Hub, through `datasets` and its local cache. The network is
asked only where the user said so.

The published run trains on `hf:wikitext:wikitext-103-raw-v1`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from bf16prof.errors import InputError, install_hint

LARGEST_BYTES = 64 * 2**20
"""So much of the train split is read, from its beginning: more than any short job sees, and every
rank holds it."""

_SPLIT = "train"


@dataclass(frozen=True)
class Dataset:
    """A dataset by its id (or a local folder) and the name of its configuration, empty where it has
    one only."""

    id: str
    configuration: str = ""

    @classmethod
    def named(cls, text: str) -> Dataset:
        """`NAME` or `NAME:CONFIG`."""
        name, _, configuration = text.partition(":")
        return cls(name, configuration)

    def __str__(self) -> str:
        return f"hf:{self.id}" + (f":{self.configuration}" if self.configuration else "")

    def require(self, *, download: bool) -> None:
        """Raise `InputError` unless the text can be read on this machine; `download` fetches what
        is missing."""
        if find_spec("datasets") is None:
            raise InputError(f"data {self} needs the datasets library", hint=install_hint("data"))
        self._column(self._load(offline=not download))

    def documents(self) -> list[bytes]:
        """The rows of its column of text, up to `LARGEST_BYTES` in all, each a document that is not
        empty."""
        found = self._load(offline=True)
        column = self._column(found)
        rows = (row[column] for row in found.select_columns([column]))  # one by one: the whole column may be a gigabyte
        return list(_first(text.encode() for text in rows if text))

    def _load(self, *, offline: bool) -> Any:
        """Its train split. Raises `InputError`, which says how to get it, where the cache does not
        have it."""
        before = os.environ.get("HF_DATASETS_OFFLINE"), os.environ.get("HF_HUB_OFFLINE")
        if offline:
            os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            import datasets

            datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline  # read once, when it was imported
            datasets.disable_progress_bars()
            return datasets.load_dataset(self.id, self.configuration or None, split=_SPLIT)
        except (OSError, ValueError, RuntimeError) as error:  # its own errors are of these
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            hint = "bf16prof measure --download fetches it" if offline else "the name is NAME:CONFIG, as on the Hub"
            where = " in the local cache" if offline else ""
            raise InputError(f"data {self}: no such dataset{where}: {why[:200]}", hint=hint) from error
        finally:
            for name, value in zip(("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"), before, strict=True):
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def _column(self, found: Any) -> str:
        """The column of text: `text` if it has one, else the first of strings."""
        strings = [name for name, feature in found.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")]
        if not strings:
            raise InputError(f"data {self}: no column of text; it has {', '.join(found.features)}")
        return "text" if "text" in strings else strings[0]


def _first(documents: Iterator[bytes]) -> Iterator[bytes]:
    left = LARGEST_BYTES
    for document in documents:
        if left <= 0:
            return
        yield document[:left]
        left -= len(document)
