"""Masking and rejection of credentials in URLs, for messages, records and logs."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from nrgpt_jax.errors import UserError

_HIDDEN = "***"
_SECRET = (
    r"token|access[-_]?token|id[-_]?token|auth|authorization|signature|sig|secret|password|passwd|"
    r"pwd|pass|credentials?|api[-_]?key|access[-_]?key|account[-_]?key|secret[-_]?key|"
    r"awsaccesskeyid|googleaccessid|x-amz-[a-z-]+|x-goog-[a-z-]+"
)
_PATTERNS = (
    # user:password@; the password may contain a slash; a port is no password
    re.compile(r"(?P<before>://[^/\s@:]*:(?!\d+(?:[/\s]|$)))[^@\s]+(?P<after>@)"),
    re.compile(r"(?P<before>https?://)[^/\s@:]+(?P<after>@)"),  # a token in place of a user
    re.compile(rf"(?P<before>[?&;#](?:{_SECRET})=)[^&;#,\s'\"]+(?P<after>)", re.IGNORECASE),
)


def masked(text: str) -> str:
    """Return the text with the credentials in its URLs replaced by `***`."""
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<before>{_HIDDEN}\g<after>", text)
    return text


def check_no_credentials(config: Mapping[str, Any]) -> None:
    """Raise UserError if a field contains credentials: a run records all fields."""
    for field, text in _texts(config):
        if masked(text) != text:
            raise UserError(
                f"{field}={masked(text)} holds credentials, which a run would record; give them by "
                "environment variables or the login of the store"
            )


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (Mapping, ConfigDict)):
        for field, inner in value.items():
            yield from _texts(inner, f"{name}.{field}" if name else str(field))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, name)
