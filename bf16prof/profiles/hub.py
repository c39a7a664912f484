"""A model by its id on the Hugging Face Hub: the `config.json` in the local cache, else the preset
that describes the same model.

Nothing here asks the network unless the user says so (`--download`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bf16prof.errors import InputError, install_hint
from bf16prof.profiles.names import did_you_mean, matches, nearest, shown
from bf16prof.profiles.shipped import preset_ids

CONFIG = "config.json"


@dataclass(frozen=True)
class Configuration:
    """Where a Hugging Face configuration is: in a file, or in a preset, and then what to tell the
    user of it."""

    path: Path | None = None
    preset: str = ""
    note: str = ""


def configuration(given: str, *, download: bool = False) -> Configuration:
    """The configuration of a file, of the `config.json` of a folder, or of a model id.

    Raises `InputError` for what is none of them, or for an id that neither the cache nor a preset
    has.
    """
    path = Path(given)
    if _is(path.is_dir):
        return _of_file(path / CONFIG, of_folder=True)
    if is_there(given) or path.suffix == ".json" or not is_hub_id(given):
        return _of_file(path)
    return _of_id(given, download=download)


def is_there(given: str) -> bool:
    """Whether a text is the path of something."""
    return _is(Path(given).exists)


def is_cached(given: str) -> bool:
    """Whether a text is the id of a model whose configuration lies in the local cache."""
    return is_hub_id(given) and _cached(given) is not None


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a model's id: ORGANISATION/NAME, or the bare name of one of
    the first models."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
    return re.fullmatch(rf"(?:{part}/)?{part}", text) is not None and "--" not in text and ".." not in text


def _of_file(path: Path, *, of_folder: bool = False) -> Configuration:
    if of_folder and not _is(path.exists):
        raise InputError(f"the folder {path.parent} has no {CONFIG}")
    return Configuration(path)


def _of_id(model_id: str, *, download: bool) -> Configuration:
    path = _downloaded(model_id) if download else _cached(model_id)
    if path is not None:
        return Configuration(path)
    ids = preset_ids()
    where = f"not in the local Hugging Face cache{'' if _has_hub() else ', which only huggingface_hub can read'}"
    if presets := matches(model_id, ids):
        return Configuration(preset=presets[0], note=f"{model_id} is {where}: the preset {presets[0]} describes the same model")
    near = did_you_mean(nearest(model_id, {each: (each,) for known in ids.values() for each in known[:2]}))
    ways = f"--download fetches its {CONFIG}" if _has_hub() else install_hint("hf")
    raise InputError(f"{shown(model_id)} is no file, and {where}", hint=f"{near} {ways}".strip())


def _has_hub() -> bool:
    return find_spec("huggingface_hub") is not None


def _cached(model_id: str) -> Path | None:
    """The configuration in the cache; `None` where it is not there, or where huggingface_hub, whose
    cache it is, is not installed."""
    if not _has_hub():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, CONFIG, cache_dir=_cache())
    return Path(found) if isinstance(found, str) else None


def _downloaded(model_id: str) -> Path:
    """The configuration from the Hub, which from now on is in the cache."""
    if not _has_hub():
        raise InputError("--download needs huggingface_hub, which is not installed", hint=install_hint("hf"))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model_id, CONFIG, cache_dir=_cache()))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"--download {model_id}: {type(error).__name__}: {' '.join(lines)[:200]}") from error


def _cache() -> str | None:
    """The cache that the environment names now: huggingface_hub asks only once, when it is
    imported."""
    home = os.environ.get("HF_HOME")
    return os.environ.get("HF_HUB_CACHE") or (str(Path(home) / "hub") if home else None)


def _is(question: Callable[[], bool]) -> bool:
    """The answer of a path; no for a text that can be none."""
    try:
        return bool(question())
    except (OSError, ValueError):
        return False
