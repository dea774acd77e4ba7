"""A cloud behind a proxy that a test makes misbehave, told apart only where the two services' requests differ."""

from __future__ import annotations

from dataclasses import dataclass

from dtr.store import Store
from tests.cloud_servers import AzuriteServer, FakeGcsServer
from tests.s3_faults import FaultyS3


@dataclass(frozen=True)
class Cloud:
    """``store`` goes through ``faulty``, ``direct`` past it, to the same folder."""

    server: AzuriteServer | FakeGcsServer
    faulty: FaultyS3
    store: Store
    direct: Store

    @property
    def is_azure(self) -> bool:
        return isinstance(self.server, AzuriteServer)

    @property
    def piece(self) -> str:
        """What only the request that sends one piece of a large object has in its query."""
        return "comp=block&" if self.is_azure else "partNumber="

    @property
    def completion(self) -> tuple[str, str]:
        """Method and query of the request that ends a large object's upload."""
        return ("PUT", "comp=blocklist") if self.is_azure else ("POST", "uploadId=")

    def path(self, name: str) -> str:
        """What is in the path of requests for an object, and not in those for its temporary one."""
        return f"/{name}" if self.is_azure else f"%2F{name}"

    @property
    def open_uploads(self) -> int:
        """Uploads that the service still keeps; Azure's have no list."""
        return 0 if isinstance(self.server, AzuriteServer) else len(self.server.gateway.uploads)
