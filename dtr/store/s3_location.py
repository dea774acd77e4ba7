"""Where in S3 a store is, as parsed from its URL; every part is checked before anything is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, Self
from urllib.parse import quote, urlencode

from dtr.errors import ConfigError
from dtr.store.base import check_prefix
from dtr.store.endpoint import check_endpoint

__all__ = ["S3Location"]

_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", re.ASCII)
_REGION: Final = re.compile(r"[A-Za-z0-9-]{1,40}", re.ASCII)

Checksum = Literal["crc64nvme", "none"]


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"store: {what}", field="store")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Location:
    """A bucket, the folder in it ("" for all of it), and how to reach it. ``endpoint`` None is AWS."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    checksum: Checksum = "crc64nvme"

    @classmethod
    def parse(
        cls, *, bucket: str, prefix: str = "", endpoint: str | None = None, region: str | None = None, checksum: str = "crc64nvme"
    ) -> Self:
        """Check each part; ConfigError names the wrong one."""
        if not _BUCKET.fullmatch(bucket):
            raise _wrong("an s3 URL is s3://BUCKET/PREFIX, and a bucket has 3 to 63 characters of a-z 0-9 . -")
        if region is not None and not _REGION.fullmatch(region):
            raise _wrong(f"region must be like eu-central-1, got {region[:60]!r}")
        if checksum not in {"crc64nvme", "none"}:
            raise _wrong(f"checksum must be crc64nvme or none, got {checksum[:60]!r}")
        return cls(
            bucket=bucket,
            prefix=check_prefix(prefix),
            endpoint=None if endpoint is None else check_endpoint(endpoint, credentials="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
            region=region,
            checksum="none" if checksum == "none" else "crc64nvme",
        )

    @property
    def url(self) -> str:
        """The URL that parses to this location; credentials are never part of it."""
        options = {"endpoint": self.endpoint, "region": self.region, "checksum": None if self.checksum == "crc64nvme" else "none"}
        query = urlencode({name: value for name, value in options.items() if value}, safe=":/")
        return f"s3://{self.bucket}" + (f"/{quote(self.prefix)}" if self.prefix else "") + (f"?{query}" if query else "")

    def key(self, name: str) -> str:
        """The bucket's key for a key of this store."""
        return f"{self.prefix}/{name}" if self.prefix else name
