"""The address of a service that a store's URL names: checked before anything is sent, shown without secrets."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from dtr.errors import ConfigError

__all__ = ["check_endpoint"]


def check_endpoint(text: str, *, credentials: str) -> str:
    """A plain ``http://`` or ``https://`` address, returned without a final slash; ConfigError says what is wrong with any other.

    ``credentials`` names where secrets belong instead of here.
    """
    parts = urlsplit(text)
    shown = re.sub(r"^.*@", "***@", text)[:100]
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise _wrong(f"endpoint must begin with http:// or https:// and name a host, got {shown!r}")
    if "@" in parts.netloc:
        raise _wrong(f"endpoint must not hold credentials, got {shown!r}; set {credentials}")
    try:
        parts.port  # noqa: B018 - the property checks it
    except ValueError as exc:
        raise _wrong(f"endpoint's port must be a number up to 65535, got {shown!r}") from exc
    if parts.query or parts.fragment:
        raise _wrong(
            f"endpoint must be a plain address, got {urlsplit(shown)._replace(query='', fragment='').geturl()!r} and more behind it"
        )
    return text.rstrip("/")


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"store: {what}", field="store")
