"""What obstore says, as dtr's errors: texts as version 0.12 writes them."""

from __future__ import annotations

import pytest

from dtr.errors import AlreadyExists, ConfigError, DtrError, IntegrityError, InvalidInput, NotFound, StoreRefused, StoreUnavailable
from dtr.store.cloud_errors import masked, translate


class GenericError(Exception):
    """Named as obstore's."""


class AlreadyExistsError(Exception):
    """Named as obstore's."""


class InvalidPathError(Exception):
    """Named as obstore's."""


class UnknownConfigurationKeyError(Exception):
    """Named as obstore's."""


def answered(status: int, body: str = "", operation: str = "PUT") -> str:
    return (
        f"Generic GCS error: Error performing {operation} https://host/b/k?sv=1&sig=hunter2 in 1ms - Server returned non-2xx status code: "
        f"{status} Words: {body}\n\nDebug source:\nGeneric {{ inner: Status {{ status: {status} }} }}"
    )


def coded(code: str, message: str = "Its words.\nRequestId:7") -> str:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


def unanswered(kind: str, cause: str) -> str:
    return (
        "Generic GCS error: Error performing GET https://host/b/k in 1ms - HTTP error: error sending request\n\n"
        f"Debug source:\nHttpError {{ kind: {kind}, source: reqwest::Error {{ kind: Request, source: {cause} }} }}"
    )


REFUSED = 'Os { code: 111, message: "Connection refused" }'
LATE = "not valid in the specified time frame"
DENIED = "Server returned non-2xx status code: 403 Forbidden: no"
TOKEN = (
    "Generic GCS error: Error performing token request: Error performing GET http://169.254.169.254/token?audience=x in 1ms - {}\n\n"
    "Debug source:\nTokenRequest"
)

CASES: list[tuple[Exception, str, type[DtrError], str, bool, bool]] = [
    # what obstore raised, operation, our error, what it says, again, unknown
    (GenericError(answered(503, coded("SlowDown"))), "put", StoreUnavailable, "SlowDown Its words. (HTTP 503)", True, False),
    (GenericError(answered(429)), "put", StoreUnavailable, "429 Words", True, False),
    (GenericError(answered(500, coded("InternalError"))), "put", StoreUnavailable, "InternalError", True, True),
    (GenericError(answered(408)), "put", StoreUnavailable, "HTTP 408", True, True),
    (GenericError(answered(501)), "put", StoreRefused, "does not know the request", False, False),
    (GenericError(answered(409, coded("OperationAborted"))), "put", StoreUnavailable, "OperationAborted", True, False),
    (GenericError(answered(404)), "put", StoreRefused, "no such bucket", False, False),
    (FileNotFoundError(answered(404, coded("NoSuchBucket"))), "get", StoreRefused, "no such bucket", False, False),
    (FileNotFoundError(answered(404, coded("NoSuchKey"))), "get", NotFound, "no such object", False, False),
    (FileNotFoundError(answered(404)), "copy", StoreUnavailable, "removed by another process", False, False),
    (AlreadyExistsError("Object at location k already exists"), "put", AlreadyExists, "exists already", False, False),
    (GenericError(answered(412)), "copy", AlreadyExists, "exists already", False, False),
    (GenericError(answered(401)), "get", StoreRefused, "GOOGLE_APPLICATION_CREDENTIALS", False, False),
    (GenericError(answered(403, coded("AccessDenied"))), "list", StoreRefused, "storage.objects.list", False, False),
    (GenericError(answered(400, coded("ExpiredToken"))), "get", StoreRefused, "have expired", False, False),
    (GenericError(answered(403, coded("AuthenticationFailed", LATE))), "get", StoreRefused, "expired", False, False),
    (GenericError(answered(400, coded("BadDigest"))), "put", IntegrityError, "damaged on the way", True, False),
    (GenericError(answered(418, coded("Teapot"))), "put", StoreRefused, "Teapot Its words. (HTTP 418)", False, False),
    (GenericError(answered(400, '{"error": {"message": "in JSON"}}')), "put", StoreRefused, "in JSON", False, False),
    (GenericError(unanswered("Connect", REFUSED)), "put", StoreUnavailable, "refused", True, False),
    (GenericError(unanswered("Connect", '"dns error", error: "failed to lookup address"')), "put", StoreUnavailable, "lookup", True, False),
    (GenericError(unanswered("Interrupted", "hyper::Error(IncompleteMessage)")), "put", StoreUnavailable, "closed before", True, True),
    (GenericError(unanswered("Timeout", "TimedOut")), "put", StoreUnavailable, "timed out", True, True),
    (GenericError(unanswered("Connect", "InvalidCertificate(UnknownIssuer)")), "put", StoreRefused, "UnknownIssuer", False, False),
    (GenericError(TOKEN.format(DENIED)), "put", StoreRefused, "no usable credentials", False, False),
    (GenericError(TOKEN.format("HTTP error: error sending request")), "put", StoreRefused, "no usable credentials", False, False),
    (GenericError(TOKEN.format("Server returned non-2xx status code: 503 Busy: ")), "put", StoreUnavailable, "for the moment", True, False),
    (InvalidPathError("Path has an empty segment"), "get", InvalidInput, "empty segment", False, False),
    (UnknownConfigurationKeyError("Configuration key: 'x' is not valid"), "get", ConfigError, "not valid", False, False),
    (GenericError("something else"), "get", StoreRefused, "something else", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("raised", "operation", "kind", "said", "again", "unknown"), CASES)
def test_each_is_told_apart(raised: Exception, operation: str, kind: type[DtrError], said: str, again: bool, unknown: bool) -> None:
    """Its class, its words, whether to send again, and whether it may have had its effect; on one line, without a signature."""
    failure = translate(raised, operation=operation, key="k", url="gs://b", service="gs")
    assert type(failure.error) is kind
    assert said in str(failure.error)
    assert (failure.retry, failure.unknown) == (again, unknown)
    assert failure.error.facts.get("unknown", False) is unknown
    assert "hunter2" not in repr(failure.error) + str(failure.error.facts)
    assert "\n" not in str(failure.error)


def test_the_end_of_an_object_is_a_range_error() -> None:
    """obstore's own refusal has the status that a service's would have."""
    text = "Generic Azure error: Wanted range starting at 10, but object was only 10 bytes long\n\nDebug source:\nStartTooLarge {}"
    assert translate(GenericError(text), operation="get", key="k", url="az://c", service="az").error.facts["status"] == 416


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://a.b/c?sig=x%3D&se=1 in 2ms", "GET https://a.b/c?*** in 2ms"),
        ('Some("https://a.b/c?sig=x",)', 'Some("https://a.b/c?***",)'),
        ("http://user:secret@host/x", "http://***@host/x"),
        ("no URL? none", "no URL? none"),
    ],
)
def test_masked(text: str, expected: str) -> None:
    """What may be a signature or a password goes, the rest stays."""
    assert masked(text) == expected
