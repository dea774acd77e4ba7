"""S3 services that cannot hold checkpoints, and what somebody has to mend: found, said clearly, never worked around in silence."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from awscrt.checksums import crc64nvme

from dtr.errors import ConditionalPutUnsupported, ConfigError, NotFound, StoreRefused
from dtr.store import Store, open_store
from tests.contract.store_contract import LARGE_BYTES
from tests.s3_faults import FaultyS3
from tests.servers import SeaweedServer

pytestmark = pytest.mark.usefixtures("s3_credentials")

# --- services that cannot do it ---


@pytest.mark.parametrize("fault", ["ignore_conditions", "no_conditions"])
def test_a_service_without_conditional_put_is_refused(
    seaweed: SeaweedServer, faulty: FaultyS3, prefix: str, large: Path, fault: str
) -> None:
    """Ignored or not implemented: probe, put and put_file say so instead of overwriting; nothing of the probe stays."""
    store = open_store(seaweed.url(prefix, endpoint=faulty.endpoint))
    faulty.plan(fault, times=99)
    store.put("k", b"first")
    for write in (store.probe, lambda: store.put("k", b"second", if_absent=True), lambda: store.put_file("k", large, LARGE_BYTES)):
        with pytest.raises(ConditionalPutUnsupported):
            write()
    assert store.get("k") == b"first"
    found = seaweed.client().list_objects_v2(Bucket=seaweed.bucket, Prefix=prefix)
    assert [entry["Key"] for entry in found["Contents"]] == [f"{prefix}/k"]


def test_a_probe_under_bad_conditions(seaweed: SeaweedServer, faulty: FaultyS3, prefix: str, impatient: None) -> None:
    """A busy moment or a lost answer does not make a good service look bad, and the answer is asked for once."""
    store = open_store(seaweed.url(prefix, endpoint=faulty.endpoint))
    for fault in ("500", "drop_reply"):
        faulty.plan(fault, method="PUT")
    store.probe()
    faulty.requests.clear()
    store.probe()
    store.child("a").probe()
    store.put("k", b"", if_absent=True)
    assert faulty.requests == [f"PUT /{seaweed.bucket}/{prefix}/k"]


def test_a_service_without_our_checksum(
    seaweed: SeaweedServer, faulty: FaultyS3, prefix: str, large: Path, direct: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """It is found by the probe: payloads are signed instead, small and large, and a warning says so once."""
    store = open_store(seaweed.url(prefix, endpoint=faulty.endpoint))
    faulty.plan("no_checksums", times=99)
    store.put("k", b"1", if_absent=True)
    store.put_file("part", large, LARGE_BYTES)
    assert direct.get("part") == large.read_bytes()
    assert direct.get("k") == b"1"
    assert sum("refuses CRC64NVME" in record.message for record in caplog.records) == 1


def test_checksums_can_be_turned_off(seaweed: SeaweedServer, prefix: str, large: Path, direct: Store) -> None:
    """checksum=none in the URL: no header of ours, also in the store's own URL."""
    store = open_store(seaweed.url(prefix) + "&checksum=none")
    store.put_file("part", large, LARGE_BYTES)
    assert direct.get("part") == large.read_bytes()
    assert "checksum=none" in store.url


def test_the_service_keeps_our_checksum(store: Store, seaweed: SeaweedServer, prefix: str, large: Path) -> None:
    """The CRC64NVME of the whole object is stored with it, combined from its parts, so that others can verify it."""
    for size_bytes in (1000, LARGE_BYTES):
        store.put_file(f"part-{size_bytes}", large, size_bytes)
        found = seaweed.client().head_object(Bucket=seaweed.bucket, Key=f"{prefix}/part-{size_bytes}", ChecksumMode="ENABLED")
        expected = crc64nvme(large.read_bytes()[:size_bytes]).to_bytes(8, "big")
        assert found["ChecksumCRC64NVME"] == base64.b64encode(expected).decode()


# --- what somebody has to mend ---


def test_no_such_bucket(seaweed: SeaweedServer) -> None:
    """Each read of a bucket that does not exist says so, and not that an object is missing."""
    for read in (lambda s: s.get("k"), lambda s: s.size("k"), lambda s: list(s.list())):
        with pytest.raises(StoreRefused, match="no such bucket") as caught:
            read(open_store(seaweed.url("x").replace(seaweed.bucket, "absent-bucket")))
        assert not isinstance(caught.value, NotFound)


@pytest.mark.parametrize(
    ("verb", "method", "permission"),
    [
        (lambda s: s.put("k", b""), "PUT", "s3:PutObject"),
        (lambda s: s.get("k"), "GET", "s3:GetObject"),
        (lambda s: list(s.list()), "GET", "s3:ListBucket"),
        (lambda s: s.delete("k"), "DELETE", "s3:DeleteObject"),
        (lambda s: s.abort_uploads(), "GET", "s3:ListBucketMultipartUploads"),
    ],
)
def test_a_missing_permission_is_named(
    store: Store, faulty: FaultyS3, verb: Callable[[Store], object], method: str, permission: str
) -> None:
    """Access denied is not retried, and says what to allow."""
    faulty.requests.clear()
    faulty.plan("403", times=99, method=method)
    with pytest.raises(StoreRefused, match=f"{permission} "):
        verb(store)
    assert len(faulty.requests) == 1


def test_wrong_credentials(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong secret, unknown key, none at all: three answers, none of which shows a secret."""
    cases: list[tuple[dict[str, str | None], str]] = [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret-value"}, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "unknown-key-value"}, "AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no usable credentials"),
    ]
    for environment, expected in cases:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.delenv(name) if value is None else patch.setenv(name, value)
            with pytest.raises(StoreRefused, match=expected) as caught:
                open_store(seaweed.url("x")).put("k", b"")
            for secret in (*filter(None, environment.values()), seaweed.secret_key):
                assert secret not in str(caught.value)


@pytest.mark.parametrize(("fault", "text"), [("expired", "have expired"), ("region", "another region")])
def test_expired_credentials_and_wrong_region(store: Store, faulty: FaultyS3, fault: str, text: str) -> None:
    """Both are refused with what to do."""
    faulty.plan(fault, times=99)
    with pytest.raises(StoreRefused, match=text):
        store.get("k")


def test_a_profile_that_does_not_exist(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What boto3 says about its own configuration is a ConfigError."""
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(ConfigError, match="no-such-profile"):
        open_store(seaweed.url("x")).get("k")
