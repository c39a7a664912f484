"""What a configuration holds that is nobody's business: names of keys and forms of values that let somebody in.

Such a text is taken out where a file is read, so that nothing after that - a rank, a record, a run, a report - has it. None of them decides
memory: numbers stay whatever they are called (`pad_token_id`, `num_key_value_heads`).
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
"""Names of keys whose text is a secret: `hub_token`, `use_auth_token`, `api_key`, `slack_webhook_url`, `accessToken`."""

VALUE = re.compile(
    r"://|^(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|eyJ)[\w\-.]{8,}|^Bearer |-----BEGIN |^[0-9a-fA-F]{32,}$"
)
"""Addresses, which may carry a password or be one, and tokens of known forms or of 32 hexadecimal digits."""

TAKEN_OUT = "(taken out)"


def without_secrets(value: Any, key: str = "") -> Any:
    """The same nested tables and lists without such texts."""
    if isinstance(value, Mapping):
        return {name: without_secrets(item, str(name)) for name, item in value.items() if not is_secret(str(name), item)}
    if isinstance(value, list):
        return [without_secrets(item, key) for item in value if not is_secret(key, item)]
    return value


def is_secret(key: str, value: object) -> bool:
    """Whether a text under that key is to be taken out."""
    return isinstance(value, str) and bool(KEY.search(key) or VALUE.search(value))


def command_without_secrets(arguments: list[str]) -> tuple[str, ...]:
    """A command line without such texts: after the sign of `--set monitor.api_key=...`, and addresses with a password in them."""
    return tuple(map(_argument, arguments))


def _argument(argument: str) -> str:
    key, sign, value = argument.partition("=")
    if sign and is_secret(key, value.strip("\"'")):
        return f"{key}={TAKEN_OUT}"
    return TAKEN_OUT if re.search(r"://[^/\s]*@", argument) else argument
