"""What obstore raises, as dtr's own errors that say what to do: a pure function and its tables.

obstore gives an answer's status, code and text only inside its message, so they are read from there; a query string in it may be a
signature, and is never shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from dtr.errors import AlreadyExists, ConfigError, DtrError, IntegrityError, InvalidInput, NotFound, StoreRefused, StoreUnavailable
from dtr.store.cloud_location import CREDENTIALS, Service
from dtr.store.retrying import Failure

__all__ = ["masked", "translate"]

_NEEDED: Final[dict[str, dict[str, str]]] = {
    "gs": {
        "put": "storage.objects.create, and storage.objects.delete to replace",
        "put_parts": "storage.objects.create and storage.multipartUploads.create",
        "copy": "storage.objects.get and storage.objects.create",
        "get": "storage.objects.get",
        "head": "storage.objects.get",
        "list": "storage.objects.list",
        "delete": "storage.objects.delete",
    },
    "az": {
        "put": "'write' on blobs (role Storage Blob Data Contributor, or sp=cw in a SAS)",
        "put_parts": "'write' on blobs (role Storage Blob Data Contributor, or sp=cw in a SAS)",
        "copy": "'read' and 'write' on blobs (role Storage Blob Data Contributor, or sp=rcw in a SAS)",
        "get": "'read' on blobs (role Storage Blob Data Reader, or sp=r in a SAS)",
        "head": "'read' on blobs (role Storage Blob Data Reader, or sp=r in a SAS)",
        "list": "'list' on the container (role Storage Blob Data Reader, or sp=l in a SAS)",
        "delete": "'delete' on blobs (role Storage Blob Data Contributor, or sp=d in a SAS)",
    },
}
_NO_BUCKET: Final = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled"}
_EXPIRED: Final = ("time frame", "expired", "Expired", "Lifetime validation failed")
_WRONG_CREDENTIALS: Final = {
    "AuthenticationFailed", "AuthorizationFailure", "InvalidAuthenticationInfo", "SignatureDoesNotMatch", "InvalidSecurity",
    "AuthenticationRequired", "NoAuthenticationInformation", "InvalidToken",
}  # fmt: skip
_EXPIRED_CODES: Final = {"ExpiredToken", "TokenExpired", "RequestTimeTooSkewed"}
_DAMAGED: Final = {"BadDigest", "Md5Mismatch", "Crc64Mismatch", "IncompleteBody", "InvalidDigest"}
_QUERY: Final = re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>,)]+")
_USER: Final = re.compile(r"(https?://)[^\s/@\"'<>]+@")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What one message of obstore tells. ``status`` 0: there was no answer; ``kind`` then says how far the request came."""

    status: int
    code: str
    kind: str
    line: str
    token: bool

    @property
    def words(self) -> str:
        return f"{self.code} {self.line}".strip()


def masked(text: str) -> str:
    """Without what stands in URLs behind a question mark or before an @."""
    return _USER.sub(r"\1***@", _QUERY.sub(r"\1?***", text))


def translate(exc: BaseException, *, operation: str, key: str, url: str, service: Service) -> Failure:
    """Map an error of obstore met by ``operation`` on ``key``; what it raises for wrong options becomes a ConfigError."""
    what = f"cannot {operation.replace('_', ' ')} {key} in {url}" if key else f"cannot {operation.replace('_', ' ')} in {url}"
    said = _read(exc)
    facts: dict[str, Any] = {"operation": operation, "key": key, "status": said.status, "code": said.code, "unknown": False}
    if said.token:
        return _without_token(what, said, facts, service)
    if said.status == 0 and said.kind:
        return _without_answer(what, said, facts)
    if said.status in {408, 429} or said.status >= 500:
        return _busy(what, said, facts)
    return _refused(type(exc).__name__, what, said, facts, service)


def _read(exc: BaseException) -> _Said:
    text = str(exc)
    first = text.partition("Debug source:")[0]
    debug = text[len(first) :]
    status = re.search(r"status code: (\d{3})", first)
    code = re.search(r"<Code>\s*(\w+)\s*</Code>", first) or re.search(r"\(code: (\w+)\)", first)
    found = code[1] if code else ""
    kind = re.search(r"\bkind: (Connect|Request|Timeout|Interrupted|Decode|Unknown)\b", debug)
    number = int(status[1]) if status else int(found) if found.isdigit() else _status_of(type(exc).__name__)
    if "StartTooLarge" in debug:
        number = 416
    return _Said(
        status=number, code="" if found.isdigit() else found, kind=kind[1] if kind else "", line=_line(first, debug),
        token="Error performing token request" in first or "TokenRequest" in debug,
    )  # fmt: skip


def _status_of(name: str) -> int:
    return {"FileNotFoundError": 404, "PermissionDeniedError": 403, "UnauthenticatedError": 401, "PreconditionError": 412}.get(name, 0)


def _line(first: str, debug: str) -> str:
    """The service's own words, or why there were none, on one line."""
    answer = re.search(r"<Message>(.*?)</Message>", first, re.DOTALL) or re.search(r'"message"\s*:\s*"([^"]*)"', first)
    if answer:
        said = answer[1].split("\nRequestId")[0]
        details = re.search(r"<(?:Details|AuthenticationErrorDetail)>(.*?)</", first, re.DOTALL)
        said += f" {details[1]}" if details else ""
    else:
        said = _cause(debug) or first.rpartition(" - ")[2].removeprefix("Server returned non-2xx status code: ")
    return masked(" ".join(said.split()).rstrip(":"))[:300]


def _cause(debug: str) -> str:
    """What the innermost library said of a request without an answer."""
    system = re.search(r'message: "([^"]+)"', debug) or re.search(r'\berror: "([^"]+)"', debug)
    certificate = re.search(r"InvalidCertificate\(\s*([\w ]+)", debug)
    if certificate:
        return f"the certificate is not valid ({certificate[1]})"
    if "IncompleteMessage" in debug:
        return "the connection was closed before the answer came"
    return system[1] if system else "timed out" if re.search(r"\bkind: Timeout\b", debug) else ""


def _without_token(what: str, said: _Said, facts: dict[str, Any], service: Service) -> Failure:
    """The service was not even asked: what gives out credentials did not."""
    if said.status == 429 or said.status >= 500:
        return Failure(error=StoreUnavailable(f"{what}: no credentials for the moment: {said.line}", **facts), retry=True)
    advice = f"set {CREDENTIALS[service]}"
    return Failure(error=StoreRefused(f"{what}: no usable credentials ({said.line}); {advice}", **facts))


def _without_answer(what: str, said: _Said, facts: dict[str, Any]) -> Failure:
    """No answer came: not sent at all, or nobody knows."""
    if "certificate" in said.line:
        return Failure(error=StoreRefused(f"{what}: no trusted TLS connection: {said.line}", **facts))
    unknown = said.kind != "Connect"
    return Failure(error=StoreUnavailable(f"{what}: {said.line}", **{**facts, "unknown": unknown}), retry=True, unknown=unknown)


def _busy(what: str, said: _Said, facts: dict[str, Any]) -> Failure:
    message = f"{what}: {said.words} (HTTP {said.status})"
    if said.status == 501:
        return Failure(error=StoreRefused(f"{message}: this service does not know the request", **facts))
    unknown = said.status not in {429, 503}  # a server that asks to slow down has done nothing
    return Failure(error=StoreUnavailable(message, **{**facts, "unknown": unknown}), retry=True, unknown=unknown)


def _refused(name: str, what: str, said: _Said, facts: dict[str, Any], service: Service) -> Failure:
    """The service answered, and not with success; or obstore refused by itself."""
    operation, key = facts["operation"], facts["key"]
    if name == "AlreadyExistsError" or said.status == 412:
        return Failure(error=AlreadyExists(f"{what}: it exists already", key=key, maybe_ours=False))
    if said.code in _NO_BUCKET or (said.status == 404 and operation in {"put", "put_parts", "list"}):
        kind = "bucket" if service == "gs" else "container"
        return Failure(error=StoreRefused(f"{what}: there is no such {kind}; create it, or correct the URL", **facts))
    if said.status == 404 and operation == "copy":
        return Failure(error=StoreUnavailable(f"{what}: its temporary object was removed by another process", **facts))
    if said.status == 404:
        return Failure(error=NotFound(f"{what}: no such object", key=key))
    if said.status in {401, 403} or said.code in _EXPIRED_CODES:
        return Failure(error=StoreRefused(f"{what}: {_denied(operation, said, service)}", **facts))
    if said.status == 409:  # another write of this key is under way
        return Failure(error=StoreUnavailable(f"{what}: {said.words}", **facts), retry=True)
    if said.code in _DAMAGED:
        return Failure(error=IntegrityError(f"{what}: the bytes were damaged on the way ({said.code})", **facts), retry=True)
    return _odd(name, what, said, facts)


def _denied(operation: str, said: _Said, service: Service) -> str:
    if said.code in _EXPIRED_CODES or any(word in said.line for word in _EXPIRED):
        return f"the credentials have expired, or this machine's clock is wrong; renew them ({said.code or said.line})"
    if said.status == 401 or said.code in _WRONG_CREDENTIALS:
        return f"the credentials are not accepted ({said.code or said.line}); check {CREDENTIALS[service]}"
    return f"access denied; the credentials need {_NEEDED[service].get(operation, operation)} ({said.words})"


def _odd(name: str, what: str, said: _Said, facts: dict[str, Any]) -> Failure:
    if said.status:
        return Failure(error=StoreRefused(f"{what}: {said.words} (HTTP {said.status})", **facts))
    if name == "InvalidPathError":
        return Failure(error=InvalidInput(f"{what}: {said.line}", **facts))
    error: DtrError = (
        ConfigError(f"{what}: {said.line}", **facts) if name != "GenericError" else StoreRefused(f"{what}: {said.line}", **facts)
    )
    return Failure(error=error)
