"""Requests to S3 through boto3: made lazily and once per process, sent with explicit timeouts, boto3's own retries off (``retrying``)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Final

from dtr.clock import Clock
from dtr.errors import ConfigError, StoreRefused
from dtr.store import retrying
from dtr.store.retrying import Failure
from dtr.store.s3_errors import translate
from dtr.store.s3_location import S3Location

__all__ = ["Body", "Requests"]

_CONNECT_TIMEOUT_S: Final = 5
_READ_TIMEOUT_S: Final = 30  # without a single byte, either way
_SEND_BYTES: Final = 1 << 20  # at a time: http.client's 16 KiB cost a quarter of the processor time; passes within that timeout


class Body:
    """Memory as the file that boto3 wants, not copied. A read gives ``at_least`` so much, whatever it was asked for."""

    def __init__(self, content: memoryview, *, at_least: int = 0) -> None:
        self._content, self._at, self._at_least = content, 0, at_least

    def read(self, size: int = -1) -> memoryview:
        start = self._at
        self._at = len(self._content) if size < 0 else min(len(self._content), start + max(size, self._at_least))
        return self._content[start : self._at]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._content))[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def __len__(self) -> int:
        return len(self._content)

    def __bool__(self) -> bool:
        return True


class Requests:
    """Sends requests for one store and its children; what was found out about the service is theirs in common.

    ``probed``: it honours put-if-absent; ``reached``: it answered once, so the bucket is there.
    """

    def __init__(self, base: S3Location, *, clock: Clock) -> None:
        self.base = base
        self.probed = False
        self.reached = False
        self._checksums = base.checksum == "crc64nvme"
        self._clock = clock
        self._made: tuple[int, Any] | None = None

    @property
    def checksums(self) -> bool:
        """Whether payloads carry a CRC64NVME; without, they are signed where the connection is not encrypted."""
        return self._checksums

    @checksums.setter
    def checksums(self, on: bool) -> None:
        self._checksums = on
        self.close()

    def close(self) -> None:
        made, self._made = self._made, None
        if made and made[0] == os.getpid():
            made[1].close()

    def send(
        self,
        operation: str,
        at: S3Location,
        key: str,
        *,
        conditional: bool = False,
        content: memoryview | None = None,
        read: bool = False,
        before_retry: Callable[[], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Send one request, again where that helps, and return the answer with the number of ``Attempts``.

        ``read``: adds the object's bytes as ``Content``.
        ``conditional``: not to be sent again once it may have had its effect. ``before_retry`` may raise to give up.
        """
        answer, attempts = retrying.send(
            lambda: self._once(operation, at, key, content=content, read=read, options=options),
            lambda exc: self._failure(exc, operation, key, at),
            clock=self._clock,
            conditional=conditional,
            before_retry=before_retry,
        )
        self.reached = True
        return {**answer, "Attempts": attempts}

    def _once(
        self, operation: str, at: S3Location, key: str, *, content: memoryview | None, read: bool, options: dict[str, Any]
    ) -> dict[str, Any]:
        import botocore.exceptions
        import urllib3.exceptions

        call = getattr(self._client(), re.sub(r"(?<=[a-z])([A-Z])", r"_\1", operation).lower())
        if key:
            options = {**options, "Key": at.key(key)}
        if content is not None:
            # Whoever signs a payload reads it into a buffer of the size that was asked for.
            options = {**options, "Body": Body(content, at_least=_SEND_BYTES if self.checksums else 0)}
        answer: dict[str, Any] = call(Bucket=at.bucket, **options)
        if read:
            body = answer.pop("Body")
            try:
                answer["Content"] = body.read()  # checks the length that the header declared
            except urllib3.exceptions.HTTPError as exc:  # botocore translates some of them
                raise botocore.exceptions.ResponseStreamingError(error=exc) from exc
            finally:
                body.close()
        return answer

    @staticmethod
    def _failure(exc: Exception, operation: str, key: str, at: S3Location) -> Failure:
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(exc, RecursionError):  # botocore follows a redirect without a region for ever
            return Failure(error=StoreRefused(f"cannot {operation} in {at.url}: it redirects in circles; correct endpoint= or region="))
        if not isinstance(exc, BotoCoreError | ClientError):
            raise exc
        return translate(exc, operation=operation, key=key, url=at.url)

    def _client(self) -> Any:
        """This process's client; one that was made before a fork is left to the parent."""
        made = self._made
        if made is None or made[0] != os.getpid():
            made = self._made = (os.getpid(), self._connect())
        return made[1]

    def _connect(self) -> Any:
        import boto3.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        plain = (self.base.endpoint or "").startswith("http://")
        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            max_pool_connections=16,
            tcp_keepalive=True,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if self.base.endpoint else "auto", "payload_signing_enabled": plain and not self.checksums},
        )
        try:
            session = boto3.session.Session()  # the default one is not made for threads
            region = self.base.region or session.region_name or "us-east-1"
            return session.client("s3", endpoint_url=self.base.endpoint, region_name=region, config=config)
        except (BotoCoreError, ValueError) as exc:
            raise ConfigError(f"store {self.base.url}: {exc}", field="store") from exc
