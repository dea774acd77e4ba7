"""What a network or a service does to the cloud stores, on both: sent again, or said; never lost, never twice, never left behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtr.errors import AlreadyExists, NotFound, StoreRefused, StoreUnavailable
from dtr.store import Store, cloud_requests, open_store, pieces
from tests.cloud_servers import AzuriteServer, FakeGcsServer
from tests.contract.clouds import Cloud
from tests.contract.store_contract import MANIFEST, Cancelled
from tests.s3_faults import FaultyS3
from tests.servers import free_port

PIECE_BYTES = 1 << 20
THREE_BYTES = 2 * PIECE_BYTES + 12_345
_SERVERS = {"az": ("azurite", "azure_credentials"), "gs": ("fake_gcs", "google_credentials")}


@pytest.fixture(scope="module", params=["az", "gs"])
def behind(request: pytest.FixtureRequest) -> Iterator[tuple[AzuriteServer | FakeGcsServer, FaultyS3, Store, Store]]:
    """One proxy and two clients per service, for all tests."""
    server = request.getfixturevalue(_SERVERS[request.param][0])
    with FaultyS3(server if isinstance(server, AzuriteServer) else server.gateway) as faulty:
        yield server, faulty, open_store(server.url("jobs", endpoint=faulty.endpoint)), open_store(server.url("jobs"))


@pytest.fixture
def cloud(
    behind: tuple[AzuriteServer | FakeGcsServer, FaultyS3, Store, Store], request: pytest.FixtureRequest, impatient_cloud: None
) -> Cloud:
    """A folder of its own in a store that has passed its probe."""
    server, faulty, through, past = behind
    request.getfixturevalue(_SERVERS["az" if isinstance(server, AzuriteServer) else "gs"][1])
    folder = secrets.token_hex(4)
    made = Cloud(server=server, faulty=faulty, store=through.child(folder), direct=past.child(folder))
    faulty.forget()
    made.store.probe()
    faulty.forget()
    return made


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that goes up in three pieces."""
    monkeypatch.setattr(pieces, "_SMALLEST_BYTES", PIECE_BYTES)
    path = tmp_path / "three"
    path.write_bytes(os.urandom(THREE_BYTES))
    return path


# --- what passes by itself ---


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "drop_reply"])
def test_plain_requests_are_sent_again(cloud: Cloud, fault: str) -> None:
    """Two failures in a row of each request that may be repeated: it succeeds, and the failures were met."""
    cloud.direct.put("k", b"old")
    steps: list[tuple[Callable[[], object], object]] = [
        (lambda: cloud.store.put("k", b"content"), None),
        (lambda: cloud.store.get("k"), b"content"),
        (lambda: cloud.store.get_range("k", 1, 3), b"on"),
        (lambda: cloud.store.size("k"), 7),
        (lambda: list(cloud.store.list()), ["k"]),
        (lambda: cloud.store.delete("k"), None),
    ]
    for call, expected in steps:
        cloud.faulty.met.clear()
        cloud.faulty.plan(fault, times=2)
        assert call() == expected
        assert cloud.faulty.met == [fault, fault]
    assert list(cloud.direct.list()) == []


@pytest.mark.parametrize(("fault", "where"), [("503", "piece"), ("reset", "piece"), ("drop_reply", "piece"), ("drop_reply", "completion")])
def test_a_large_upload_survives_bursts(cloud: Cloud, three: Path, fault: str, where: str) -> None:
    """Failing pieces are sent again, only they, and the object is whole; also when the answer to their completion is lost."""
    method, path = ("PUT", cloud.piece) if where == "piece" else cloud.completion
    cloud.faulty.plan(fault, times=2, method=method, path=path)
    cloud.store.put_file("part", three, THREE_BYTES)
    assert cloud.direct.get("part") == three.read_bytes()
    assert fault in cloud.faulty.met
    assert cloud.faulty.count(cloud.piece) <= 3 + 2
    assert (cloud.direct.abort_uploads(), cloud.open_uploads) == (0, 0)


def test_a_hang_ends(cloud: Cloud, three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is never answered is given up after its time and sent again, in mid-upload as well."""
    for name, method, path, call in (
        ("_PIECE_TIMEOUT_S", "PUT", cloud.piece, lambda: cloud.store.put_file("part", three, THREE_BYTES)),
        ("_REQUEST_TIMEOUT_S", "GET", "", lambda: cloud.store.read_into("part", bytearray(THREE_BYTES))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cloud_requests, name, 2)
            cloud.store.close()  # the next client has that time
            cloud.faulty.plan("hang", method=method, path=path)
            call()
            cloud.store.close()
    cloud.faulty.released.set()
    cloud.faulty.released.clear()
    assert cloud.faulty.met == ["hang", "hang"]
    assert cloud.store.get("part") == three.read_bytes()


def test_a_truncated_answer_is_read_again(cloud: Cloud, three: Path) -> None:
    """An answer that ends early never passes for the object."""
    cloud.direct.put_file("part", three, THREE_BYTES)
    cloud.faulty.plan("truncate", times=2, method="GET")
    buffer = bytearray(THREE_BYTES)
    assert cloud.store.read_into("part", buffer) == THREE_BYTES
    assert buffer == three.read_bytes()
    assert cloud.faulty.met == ["truncate"] * 2


def test_it_gives_up(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    """A service that stays busy: StoreUnavailable with the reason, each attempt logged before."""
    cloud.faulty.plan("503", times=99)
    with pytest.raises(StoreUnavailable, match="SlowDown") as caught:
        cloud.store.get("k")
    assert (caught.value.status, caught.value.unknown) == (503, False)
    assert sum("failed, again in" in record.message for record in caplog.records) == 4


def test_a_large_upload_gives_up(cloud: Cloud, three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that takes no pieces: the error is sure that nothing came of it, and nothing is left."""
    monkeypatch.setattr(cloud_requests, "_PIECE_RETRIES", 1)
    cloud.store.close()
    cloud.faulty.plan("500", times=99, method="PUT", path=cloud.piece)
    with pytest.raises(StoreUnavailable) as caught:
        cloud.store.put_file("part", three, THREE_BYTES)
    cloud.store.close()
    assert caught.value.unknown is False
    assert (list(cloud.direct.list()), cloud.direct.abort_uploads(), cloud.open_uploads) == ([], 0, 0)


def test_a_cancel_is_heeded_between_attempts(cloud: Cloud, three: Path) -> None:
    """While the service fails, the caller is asked before each new attempt of a small object."""
    asked: list[int] = []

    def cancel(done: int) -> None:
        asked.append(done)
        if cloud.faulty.met:
            raise Cancelled

    cloud.faulty.plan("503", times=99, method="PUT")
    with pytest.raises(Cancelled):
        cloud.store.put_file("part", three, 1000, progress=cancel)
    assert len(asked) == 2
    assert list(cloud.direct.list()) == []


def test_nobody_listens(cloud: Cloud) -> None:
    """A dead endpoint: StoreUnavailable, sure that nothing was done."""
    with pytest.raises(StoreUnavailable, match="refused") as caught:
        open_store(cloud.server.url("x", endpoint=f"http://127.0.0.1:{free_port()}")).put("k", b"")
    assert caught.value.unknown is False


# --- decisions ---


@pytest.mark.parametrize("fault", ["drop_reply", "500", "reset"])
def test_an_unknown_decision_is_not_sent_again(cloud: Cloud, fault: str) -> None:
    """A conditional put whose answer was lost: unknown after one send; the caller reads and compares."""
    cloud.faulty.plan(fault, method="PUT")
    with pytest.raises(StoreUnavailable) as caught:
        cloud.store.put(MANIFEST, b"commit", if_absent=True)
    assert caught.value.unknown is True
    assert cloud.faulty.count("PUT") == 1
    done = fault == "drop_reply"
    assert list(cloud.direct.list()) == ([MANIFEST] if done else [])
    if done:
        with pytest.raises(AlreadyExists):
            cloud.store.put(MANIFEST, b"commit", if_absent=True)
    else:
        cloud.store.put(MANIFEST, b"commit", if_absent=True)
    assert cloud.direct.get(MANIFEST) == b"commit"


@pytest.mark.parametrize("fault", ["503", "429"])
def test_a_throttled_decision_is_sent_again(cloud: Cloud, fault: str) -> None:
    """A service that asked to slow down has done nothing."""
    cloud.faulty.plan(fault, times=3, method="PUT")
    cloud.store.put(MANIFEST, b"commit", if_absent=True)
    assert cloud.direct.get(MANIFEST) == b"commit"


def test_a_copy_whose_answer_was_lost(cloud: Cloud, three: Path) -> None:
    """The object may be there: unknown; the next attempt meets it and sends nothing; what stays is found and removed."""
    cloud.faulty.plan("drop_reply", method="PUT", path=cloud.path("final"))
    with pytest.raises(StoreUnavailable) as caught:
        cloud.store.put_file("final", three, THREE_BYTES)
    assert caught.value.unknown is True
    assert cloud.direct.get("final") == three.read_bytes()
    cloud.faulty.requests.clear()
    with pytest.raises(AlreadyExists):
        cloud.store.put_file("final", three, THREE_BYTES)
    assert cloud.faulty.count(cloud.piece) == 0
    assert list(cloud.direct.list()) == ["final"]
    assert cloud.direct.abort_uploads(older_than_s=3600) == 0
    assert cloud.direct.abort_uploads("final") == 1
    assert cloud.direct.abort_uploads() == 0


def test_a_copy_that_loses_leaves_nothing(cloud: Cloud, three: Path) -> None:
    """Another writer was quicker while our pieces went up: AlreadyExists, and its bytes stay."""
    seen: list[int] = []

    def be_quicker(done: int) -> None:
        if not seen:
            cloud.direct.put("part", b"quicker")
        seen.append(done)

    with pytest.raises(AlreadyExists):
        cloud.store.put_file("part", three, THREE_BYTES, progress=be_quicker)
    assert cloud.direct.get("part") == b"quicker"
    assert (cloud.direct.abort_uploads(), cloud.open_uploads) == (0, 0)


_PUT = """
import sys
import threading
from dtr.store import open_store, pieces
pieces._SMALLEST_BYTES = int(sys.argv[4])
open_store(sys.argv[1]).put_file("runs/1/part", sys.argv[2], int(sys.argv[3]))
"""


@pytest.mark.parametrize(("where", "there"), [("before_copy", False), ("after_copy", True)])
def test_a_writer_that_dies(cloud: Cloud, three: Path, where: str, there: bool) -> None:
    """Around the moment of truth: the object is whole or absent, and its temporary one is found under its key and folder alone."""
    environment = {**os.environ, "DTR_FAILPOINT": f"store.cloud.{where}=kill", "DTR_TESTING": "1"}
    command = [sys.executable, "-c", _PUT, cloud.direct.url, str(three), str(THREE_BYTES), str(PIECE_BYTES)]
    child = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert list(cloud.direct.list()) == (["runs/1/part"] if there else [])
    assert not there or cloud.direct.get("runs/1/part") == three.read_bytes()
    assert cloud.direct.abort_uploads("runs/1/other") == cloud.direct.abort_uploads("runs/2") == 0
    assert cloud.direct.abort_uploads("runs/1/part" if there else "runs/1") == 1
    if not there:
        cloud.direct.put_file("runs/1/part", three, THREE_BYTES)


# --- what somebody has to mend ---


@pytest.mark.parametrize(
    ("verb", "permissions"),
    [
        (lambda s, _: s.put("k", b""), ("write", "storage.objects.create")),
        (lambda s, _: s.get("k"), ("read", "storage.objects.get")),
        (lambda s, _: s.size("k"), ("read", "storage.objects.get")),
        (lambda s, _: list(s.list()), ("list", "storage.objects.list")),
        (lambda s, _: s.delete("k"), ("delete", "storage.objects.delete")),
        (lambda s, three: s.put_file("k", three, THREE_BYTES, if_absent=False), ("write", "storage.multipartUploads.create")),
    ],
)
def test_a_missing_permission_is_named(
    cloud: Cloud, three: Path, verb: Callable[[Store, Path], object], permissions: tuple[str, str]
) -> None:
    """Access denied is not retried, and says what to allow."""
    cloud.faulty.plan("403", times=99)
    with pytest.raises(StoreRefused, match=permissions[0 if cloud.is_azure else 1]):
        verb(cloud.store, three)


def test_expired_credentials(cloud: Cloud) -> None:
    """Said as such, with what to do."""
    cloud.faulty.plan("expired", times=99)
    with pytest.raises(StoreRefused, match="expired"):
        cloud.store.get("k")


def test_no_such_bucket(cloud: Cloud, three: Path) -> None:
    """Each verb says that the bucket is missing, and not that an object is."""
    for verb in (
        lambda s: s.get("k"),
        lambda s: s.size("k"),
        lambda s: list(s.list()),
        lambda s: s.put("k", b""),
        lambda s: s.put_file("k", three, THREE_BYTES, if_absent=False),
        lambda s: s.probe(),
    ):
        with pytest.raises(StoreRefused, match="no such (bucket|container)") as caught:
            verb(open_store(cloud.server.url("x").replace("://dtr-test/", "://absent-bucket/")))
        assert not isinstance(caught.value, NotFound)


_USE = """
import os, sys, threading
from pathlib import Path
from dtr.store import open_store, pieces
from tests.waiting import eventually

def connections():
    return [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and os.readlink(path).startswith("socket:")]

pieces._SMALLEST_BYTES = int(sys.argv[4])
store = open_store(sys.argv[1])
store.probe()
store.close()
eventually(lambda: len(connections()) <= 2, what="the runtime's own sockets alone")
store.put_file("part", sys.argv[2], int(sys.argv[3]))
store.read_into("part", bytearray(int(sys.argv[3])))
assert len(connections()) > 2
store.close()
eventually(lambda: len(connections()) <= 2, what="the connections to close")
assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("dtr-")]
"""


def test_nothing_stays_behind(cloud: Cloud, three: Path) -> None:
    """Threads and connections of transfers end with them and with close()."""
    command = [sys.executable, "-c", _USE, cloud.direct.url, str(three), str(THREE_BYTES), str(PIECE_BYTES)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
