"""Secrets: what is known or looks like one, so that it is kept out of everything that is shown, logged or stored.

In: a text that is about to be written. Out: the same text with every secret in it replaced, by the name of its
environment variable where it comes from one, else by ``***``.
Always: what is known to be secret (the environment's keys, tokens and passwords) and what looks like it (passwords in
addresses, bearer tokens, signed queries, keys of known forms) go alike. A recipe is not redacted, which would make it
another recipe: `secret_fields` finds what has to be refused. Nothing but the standard library is needed, for this is
part of every error message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"

_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:KEY|KEY_ID|APIKEY|SECRET|TOKEN|PASSWORD|PGPASSWORD|PASSWD|PASSPHRASE|CREDENTIALS|WEBHOOK(?:_URL)?)$"
)
_FEWEST_CHARACTERS = 6
"""Of a variable's value. A shorter one would blank half of what is said, and protects nothing."""

_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"), HIDDEN),
    # postgresql://user:password@host, where the password may hold / and @; a port before a path is none.
    (re.compile(r"(://[^\s/:@]*:)(?!\d{1,5}/)[^\s\"'<>]+@"), rf"\1{HIDDEN}@"),
    (
        re.compile(
            r"([?&](?:X-Amz-(?:Signature|Credential|Security-Token)|signature|sig|key|api_key|token|access_token|password)=)"
            r"[^&\s\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(hooks\.slack\.com/services/)[^\s\"'<>]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer\s+)[\w+/=.~-]{12,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # password=..., "api_key": "...", Authorization: Basic ...; not $NAME, which is a reference.
    (
        re.compile(
            r"((?:password|passwd|passphrase|secret|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?|authorization"
            r"|[_.-]token|\btoken(?=[\"']?\s*=|[\"']\s*:))[\"']?\s*[=:]\s*[\"']?(?:(?:Basic|Bearer)\s+)?)"
            r"(?!\$|Basic\b|Bearer\b)[^\s\"',;&<>*\[]{6,}",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # Amazon, Hugging Face, OpenAI and its like, GitHub, GitLab, Slack, JSON Web Tokens.
    (
        re.compile(
            r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsur]_[A-Za-z0-9]{20,}"
            r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
        ),
        HIDDEN,
    ),
)


def redacted(text: str) -> str:
    """`text` without any secret; the same object where there is none to be seen."""
    # The longest first: one secret may contain another.
    for value, name in sorted(_known().items(), key=lambda known: -len(known[0])):
        text = text.replace(value, f"[{name}]")
    for shape, shown in _SHAPES:
        text = shape.sub(shown, text)
    return text


def secret_fields(values: Mapping[str, Any]) -> Iterator[str]:
    """Names of the fields, of nested or dotted `values`, that hold a secret or what looks like one."""
    for field, value in _leaves(values):
        assignment = f"{field.rpartition('.')[2]}={value}"
        if redacted(assignment) != assignment:
            yield redacted(field)


def _known() -> dict[str, str]:
    """Secret values of the environment, with the names of their variables."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        secrets = [value] if _SECRET_VARIABLE.search(name) else []
        if "://" in value and "@" in value:
            secrets += _passwords(value)
        for secret in secrets:
            if len(secret.strip()) >= _FEWEST_CHARACTERS:
                found |= dict.fromkeys((secret, secret.strip(), quote(secret, safe="")), name)
    return found


def _passwords(address: str) -> Iterator[str]:
    try:
        password = urlsplit(address).password
    except ValueError:
        return
    if password:
        yield from (password, unquote(password))


def _leaves(values: Any, field: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(value, f"{field}.{name}" if field else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value, field)
    elif isinstance(values, str):
        yield field, values
