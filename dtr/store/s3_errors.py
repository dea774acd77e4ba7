"""What boto3 raises, as dtr's own errors that say what to do: a pure function and its tables."""

from __future__ import annotations

from typing import Any, Final

from dtr.errors import AlreadyExists, ConfigError, IntegrityError, InvalidInput, NotFound, StoreRefused, StoreUnavailable
from dtr.store.retrying import Failure

__all__ = ["translate"]

_PERMISSION: Final = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListParts": "s3:ListMultipartUploadParts",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
}
_CREDENTIALS: Final = {
    "ExpiredToken": "the credentials have expired; renew them",
    "ExpiredTokenException": "the credentials have expired; renew them",
    "TokenRefreshRequired": "the credentials have expired; renew them",
    "RequestExpired": "the request was signed too long ago; check this machine's clock",
    "RequestTimeTooSkewed": "this machine's clock differs too much from the server's; set it",
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "AccountProblem": "the account cannot be used",
}
_REGION: Final = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "TemporaryRedirect"}
_THROTTLED: Final = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "BandwidthLimitExceeded"}
_DAMAGED: Final = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_NEVER_SENT: Final = {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "SSLError"}
_NO_CREDENTIALS: Final = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "SSOTokenLoadError",
    "UnauthorizedSSOTokenError", "LoginRefreshRequired", "MetadataRetrievalError",
}  # fmt: skip


def translate(exc: Exception, *, operation: str, key: str, url: str) -> Failure:
    """Map an error of boto3 (``ClientError``, or any other ``BotoCoreError``) met by ``operation`` on ``key``."""
    what = f"cannot {operation} {key} in {url}" if key else f"cannot {operation} in {url}"
    response = getattr(exc, "response", None)
    facts: dict[str, Any] = {"operation": operation, "key": key}
    if not isinstance(response, dict):
        return _without_answer(exc, what, facts)
    error = response.get("Error", {})
    metadata = response.get("ResponseMetadata", {})
    status, code = int(metadata.get("HTTPStatusCode", 0)), str(error.get("Code", ""))
    facts |= {"status": status, "code": code, "unknown": False}
    said = f"{code} {error.get('Message', '')}".strip()[:300]
    if status >= 500 or status == 429 or code in _THROTTLED:
        return _busy(status, code, f"{what}: {said} (HTTP {status})", facts)
    region = dict(metadata.get("HTTPHeaders", {})).get("x-amz-bucket-region")
    return _refused(what, said, facts, url=url, region=region)


def _without_answer(exc: Exception, what: str, facts: dict[str, Any]) -> Failure:
    """No answer came: not sent at all, or nobody knows."""
    names = {kind.__name__ for kind in type(exc).__mro__}
    if names & _NO_CREDENTIALS:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return Failure(error=StoreRefused(f"{what}: no usable credentials ({exc}); {advice}", **facts, unknown=False))
    if names & {"ParamValidationError", "InvalidEndpointConfigurationError", "UnknownEndpointError", "EndpointProviderError"}:
        return Failure(error=ConfigError(f"{what}: {exc}", **facts))
    if "SSLError" in names and any(word in str(exc) for word in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")):
        return Failure(error=StoreRefused(f"{what}: no trusted TLS connection: {_one_line(exc)}", **facts, unknown=False))
    unknown = not names & _NEVER_SENT
    retry = bool(names & {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError"})
    error = StoreUnavailable(f"{what}: {_one_line(exc)}", **facts, unknown=unknown)
    return Failure(error=error, retry=retry, unknown=unknown)


def _busy(status: int, code: str, message: str, facts: dict[str, Any]) -> Failure:
    if status == 501 or code == "NotImplemented":
        return Failure(error=StoreRefused(f"{message}: this service does not know the request", **facts))
    unknown = not (status in {429, 503} or code in _THROTTLED)  # a server that asks to slow down has done nothing
    return Failure(error=StoreUnavailable(message, **{**facts, "unknown": unknown}), retry=True, unknown=unknown)


def _refused(what: str, said: str, facts: dict[str, Any], *, url: str, region: str | None) -> Failure:
    """The service answered, and not with success."""
    operation, key, status, code = facts["operation"], facts["key"], facts["status"], facts["code"]
    if code == "NoSuchBucket":
        return Failure(error=StoreRefused(f"cannot {operation} in {url}: there is no such bucket; create it, or correct the URL", **facts))
    if code == "NoSuchUpload" and operation not in {"AbortMultipartUpload", "ListParts"}:
        return Failure(error=StoreUnavailable(f"{what}: the upload was aborted or completed by another process", **facts))
    if code == "NoSuchKey" or (status == 404 and operation in {"GetObject", "HeadObject", "AbortMultipartUpload", "ListParts"}):
        return Failure(error=NotFound(f"{what}: no such object", key=key))
    if status == 412:
        return Failure(error=AlreadyExists(f"{what}: it exists already", key=key, maybe_ours=False))
    if status == 409 or code == "RequestTimeout":  # another conditional write of this key is under way; our body came too slowly
        return Failure(error=StoreUnavailable(f"{what}: {said}", **facts), retry=True)
    if code in _CREDENTIALS:
        return Failure(error=StoreRefused(f"{what}: {_CREDENTIALS[code]} ({code})", **facts))
    if code in _REGION or status in {301, 307}:
        hint = f"set region={region} in the URL" if region else f"set the bucket's own region= in the URL ({said})"
        return Failure(error=StoreRefused(f"{what}: the bucket is in another region; {hint}", **facts))
    if status in {401, 403}:
        needed = _PERMISSION.get(operation, operation)
        return Failure(error=StoreRefused(f"{what}: access denied; the credentials need {needed} ({said})", **facts))
    if code in _DAMAGED:
        return Failure(error=IntegrityError(f"{what}: the bytes were damaged on the way ({said})", **facts), retry=True)
    if code in {"KeyTooLongError", "EntityTooLarge"}:
        return Failure(error=InvalidInput(f"{what}: {said}", **facts))
    return Failure(error=StoreRefused(f"{what}: {said} (HTTP {status})", **facts))


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300]
