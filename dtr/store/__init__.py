"""Where checkpoints are kept: ``open_store`` maps a URL to its backend, ``base.Store`` is the contract of all of them."""

from __future__ import annotations

import difflib
import os
import re
from typing import Final
from urllib.parse import parse_qsl, unquote, unquote_to_bytes, urlsplit

from dtr.errors import ConfigError, InvalidInput
from dtr.store.base import Store
from dtr.store.cloud_location import CREDENTIALS, CloudLocation

__all__ = ["Store", "open_store"]

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_KNOWN: Final = (
    "a folder like /mnt/checkpoints, file:///mnt/checkpoints, s3://BUCKET/PREFIX[?endpoint=https://HOST&region=REGION], "
    "gs://BUCKET/PREFIX, or az://CONTAINER/PREFIX?account=NAME"
)
_SECRETS: Final = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", **CREDENTIALS}
_OPTIONS: Final = {"s3": ("endpoint", "region", "checksum"), "gs": ("endpoint",), "az": ("account", "endpoint")}
_OTHER_NAMES: Final = {
    "gcs": "gs",
    "azure": "az",
    "abfs": "az",
    "abfss": "az",
    "adl": "az",
    "wasb": "az",
    "wasbs": "az",
    "s3a": "s3",
    "s3n": "s3",
}


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at ``url``: a folder (absolute, relative or ``~``), ``file:///FOLDER``, or a bucket.

    ``s3://BUCKET/PREFIX`` takes ``endpoint=`` (any S3-compatible service), ``region=`` and ``checksum=crc64nvme|none`` as query.
    ``gs://BUCKET/PREFIX`` (Google Cloud Storage) takes ``endpoint=``, ``az://CONTAINER/PREFIX`` (Azure Blob Storage) ``account=`` and
    ``endpoint=``; both need ``pip install 'dtr[cloud]'``. Credentials come from where each cloud's tools look for them, never from
    the URL. Touches neither store nor network; raises ConfigError for what is no store.
    """
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise _wrong(f"got {text!r}")
    found = _SCHEME.match(text)
    if found is None:
        if re.match(r"(file|s3|gs|az|https?|gcs|azure|abfss?):", text):
            raise _wrong(f"got {_masked(text)!r}, whose scheme lacks '//'")
        return _folder(os.path.expanduser(text), text)
    parts, scheme = urlsplit(text), found[1].lower()
    if "@" in parts.netloc or (scheme != "file" and ":" in parts.netloc):
        hint = f"; set {_SECRETS[scheme]}" if scheme in _SECRETS else ""
        raise _wrong(f"got {_masked(text)!r}: credentials do not belong into a URL{hint}")
    if scheme == "file":
        return _file(text)
    if scheme in _OPTIONS:
        return _bucket(scheme, text)
    other = _OTHER_NAMES.get(scheme)
    raise _wrong(f"got the unknown scheme {scheme!r}" + (f" (write {other}://)" if other else ""))


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"store must be {_KNOWN}; {what}", field="store")


def _masked(url: str) -> str:
    """Without the query, and without the rest either if that may hold credentials."""
    scheme, slashes, rest = re.fullmatch(r"([^:]*:)(/*)(.*)", url.partition("?")[0], re.DOTALL).groups()  # type: ignore[union-attr]
    secret = "@" in rest or ":" in rest
    return f"{scheme}{slashes}***" if secret else f"{scheme}{slashes}{rest}"[:200]


def _folder(path: str, given: str) -> Store:
    from dtr.store.local import LocalStore

    if os.path.exists(path) and not os.path.isdir(path):
        raise _wrong(f"got {given!r}, which is a file")
    return LocalStore(path)


def _file(url: str) -> Store:
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise _wrong(f"got {_masked(url)!r}: a file URL has three slashes and an absolute path")
    if parts.query or parts.fragment:
        raise _wrong(f"got {_masked(url)!r}: write '?' as %3F and '#' as %23 in a file URL, or give the plain path")
    return _folder(os.fsdecode(unquote_to_bytes(parts.path)), url)


def _bucket(scheme: str, url: str) -> Store:
    parts = urlsplit(url)
    if parts.fragment:
        raise _wrong(f"got {_masked(url)!r}: a bucket's URL has no '#'")
    options = _options(scheme, parts.query)
    try:
        return (_s3 if scheme == "s3" else _cloud)(scheme, parts.netloc, unquote(parts.path).strip("/"), options)
    except InvalidInput as exc:
        raise _wrong(exc.message) from exc


def _options(scheme: str, query: str) -> dict[str, str]:
    allowed, options = _OPTIONS[scheme], dict[str, str]()
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            raise _wrong(f"got the unknown option {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        if name in options or not value:
            raise _wrong(f"got {name!r} " + ("twice" if name in options else "without a value"))
        options[name] = value
    return options


def _s3(_: str, bucket: str, prefix: str, options: dict[str, str]) -> Store:
    from dtr.store.s3 import S3Store
    from dtr.store.s3_location import S3Location

    return S3Store(S3Location.parse(bucket=bucket, prefix=prefix, **options))


def _cloud(scheme: str, bucket: str, prefix: str, options: dict[str, str]) -> Store:
    from dtr.store.cloud import CloudStore
    from dtr.store.cloud_library import MISSING, is_installed

    location = CloudLocation.parse(service="gs" if scheme == "gs" else "az", bucket=bucket, prefix=prefix, **options)
    if not is_installed():
        raise ConfigError(MISSING, field="store")
    return CloudStore(location)
