"""Which texts of a configuration are read at all: those under keys that can decide memory, and none
that lets somebody in.

All others are taken out where a file is read, so that nothing after that - a rank, a record, a run,
a report - has them: paths, names of people and projects, tokens. `TAKEN_OUT` stands in their place,
so that nothing else takes it unnoticed: lists keep their length, and who reads a number there says
that it is none. Numbers stay whatever they are called (`pad_token_id`), and so do the keys of
tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WORDS = "token|auth|authorization|secret|password|passwd|passphrase|credentials?|webhook|cookie|bearer|license_?key|session_id"
_KEYS = "(?:api|access|private|secret|auth|account|signing|encryption|ssh|hub|wandb)[_-]?key"

KEY = re.compile(
    rf"(?:^|[_.\-])(?:{_WORDS}|{_KEYS}|apikey|dsn)s?(?:$|[_.\-])|(?<=[a-z])(?:Token|Secret|Password|Key|Webhook)$", re.IGNORECASE
)
"""Names of keys whose text is a secret: `hub_token`, `use_auth_token`, `api_key`,
`slack_webhook_url`, `accessToken`."""

VALUE = re.compile(
    r"://|^(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|eyJ)[\w\-.]{8,}|^Bearer |-----BEGIN |^[0-9a-fA-F]{32,}$"
)
"""Addresses, which may carry a password or be one, and tokens of known forms or of 32 hexadecimal
digits."""

_DECIDING = """
act activation activations afn aggregation apply architecture architectures aspect attention backbone backend block blocks combination
decoder device distribution dtype embedding embeddings encoder family features fn fuse func function gating impl implementation initializer
kernel kind language languages layer layers level loss method mlp mode modules norm normalization nvme op padding pattern policy pool pooler
pooling position proj reduction resi router scaling scheme selection stage strategy type types upsampler
"""
DECIDING = re.compile(rf"(?:^|[_.\-])(?:{'|'.join(_DECIDING.split())})(?:$|[_.\-])", re.IGNORECASE)
"""Words in keys whose text can decide what is computed or kept. They are those of every text in the
configuration classes of transformers 5.24 that does so (tests/unit/test_secrets.py has the list),
of DeepSpeed's JSON, and of their like."""

ANYWHERE = frozenset(("auto", "none", "null", "all", "default", "true", "false"))
"""Texts that stand for a value under any key."""
NUMBER = re.compile(r"[-+]?(?:\d{1,15}\.?\d{0,15}|\.\d{1,15})(?:[eE][-+]?\d{1,3})?")
LONGEST = 1024
LABEL_NUMBERS = "label2id"
"""A table whose keys are somebody's words. How many there are, `id2label` says."""

TAKEN_OUT = "(a text, taken out)"


def without_secrets(value: Any, key: str = "") -> Any:
    """The same nested tables and lists with only such texts in them as may decide memory."""
    if isinstance(value, Mapping):
        return {name: without_secrets(item, str(name)) for name, item in value.items() if name != LABEL_NUMBERS}
    if isinstance(value, list):
        return [without_secrets(item, key) for item in value]
    return value if not isinstance(value, str) or may_stay(key, value) else TAKEN_OUT


def dropped(value: Any) -> Any:
    """The same without what was taken out. DeepSpeed checks the texts of its JSON, and has a
    default for each."""
    if isinstance(value, Mapping):
        return {name: dropped(item) for name, item in value.items() if item != TAKEN_OUT}
    return [dropped(item) for item in value if item != TAKEN_OUT] if isinstance(value, list) else value


def may_stay(key: str, value: str) -> bool:
    """Whether a text under that key can decide memory, and lets nobody in."""
    if value == TAKEN_OUT or value.lower() in ANYWHERE or NUMBER.fullmatch(value):
        return True
    return bool(DECIDING.search(key)) and len(value) <= LONGEST and not is_secret(key, value)


def is_secret(key: str, value: object) -> bool:
    """Whether a text under that key is to be taken out."""
    return isinstance(value, str) and bool(KEY.search(key) or VALUE.search(value))


def command_without_secrets(arguments: list[str]) -> tuple[str, ...]:
    """A command line without such texts: after the sign of `--set monitor.api_key=...`, and
    addresses with a password in them."""
    return tuple(map(_argument, arguments))


def _argument(argument: str) -> str:
    key, sign, value = argument.partition("=")
    if sign and is_secret(key, value.strip("\"'")):
        return f"{key}={TAKEN_OUT}"
    return TAKEN_OUT if re.search(r"://[^/\s]*@", argument) else argument
