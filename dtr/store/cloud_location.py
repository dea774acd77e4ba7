"""Where a cloud store is: Google Cloud Storage (``gs``) or Azure Blob Storage (``az``), its bucket or container, and the folder in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, Self
from urllib.parse import quote, urlencode

from dtr.errors import ConfigError
from dtr.store.base import check_prefix
from dtr.store.endpoint import check_endpoint

__all__ = ["CREDENTIALS", "CloudLocation", "Service"]

Service = Literal["gs", "az"]

CREDENTIALS: Final[dict[str, str]] = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (or run where a service account is attached)",
    "az": "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
}
_BUCKET: Final = re.compile(r"(?=.{3,222}$)[a-z0-9][a-z0-9_-]{0,61}[a-z0-9](\.[a-z0-9][a-z0-9_-]{0,61}[a-z0-9])*", re.ASCII)
_CONTAINER: Final = re.compile(r"(?=.{3,63}$)[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_ACCOUNT: Final = re.compile(r"[a-z0-9]{3,24}", re.ASCII)


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"store: {what}", field="store")


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudLocation:
    """A bucket (Azure: a container of ``account``), the folder in it ("" for all of it), and an address other than the service's own."""

    service: Service
    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    account: str | None = None

    @classmethod
    def parse(cls, *, service: Service, bucket: str, prefix: str = "", endpoint: str | None = None, account: str | None = None) -> Self:
        """Check each part; ConfigError names the wrong one."""
        if service == "gs" and not _BUCKET.fullmatch(bucket):
            raise _wrong("a gs URL is gs://BUCKET/PREFIX, and a bucket has 3 to 63 characters of a-z 0-9 - _ (more with dots)")
        if service == "az" and not _CONTAINER.fullmatch(bucket):
            raise _wrong("an az URL is az://CONTAINER/PREFIX, and a container has 3 to 63 characters of a-z 0-9 and single '-'")
        if account is not None and not _ACCOUNT.fullmatch(account):
            raise _wrong(f"account must be the name of a storage account, 3 to 24 characters of a-z 0-9, got {account[:60]!r}")
        return cls(
            service=service,
            bucket=bucket,
            prefix=check_prefix(prefix),
            endpoint=None if endpoint is None else check_endpoint(endpoint, credentials=CREDENTIALS[service]),
            account=account,
        )

    @property
    def url(self) -> str:
        """The URL that parses to this location; credentials are never part of it."""
        options = {"account": self.account, "endpoint": self.endpoint}
        query = urlencode({name: value for name, value in options.items() if value}, safe=":/")
        return f"{self.service}://{self.bucket}" + (f"/{quote(self.prefix)}" if self.prefix else "") + (f"?{query}" if query else "")

    def key(self, name: str) -> str:
        """The bucket's key for a key of this store."""
        return f"{self.prefix}/{name}" if self.prefix else name
