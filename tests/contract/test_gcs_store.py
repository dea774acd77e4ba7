"""The store contract on Google Cloud Storage (fake-gcs-server), and what only that service can break."""

from __future__ import annotations

import secrets
import traceback
from pathlib import Path

import pytest

from dtr.errors import ConditionalPutUnsupported, ConfigError, StoreRefused
from dtr.store import Store, open_store
from tests.cloud_servers import FakeGcsServer
from tests.contract.store_contract import LARGE_BYTES, StoreContract

pytestmark = pytest.mark.usefixtures("google_credentials")


@pytest.fixture(scope="module")
def gcs_bucket(fake_gcs: FakeGcsServer) -> Store:
    """One store, and so one client, for the folders of all tests."""
    return open_store(fake_gcs.url("jobs"))


class TestGcsStore(StoreContract):
    @pytest.fixture
    def store(self, gcs_bucket: Store, fake_gcs: FakeGcsServer) -> Store:
        return gcs_bucket.child(secrets.token_hex(4))

    def test_no_multipart_is_left(self, store: Store, fake_gcs: FakeGcsServer, large: Path) -> None:
        """Neither a finished nor a cancelled transfer leaves an upload open at the service."""

        def cancel(done: int) -> None:
            raise KeyboardInterrupt

        store.put_file("part", large, LARGE_BYTES)
        with pytest.raises(KeyboardInterrupt):
            store.put_file("other", large, LARGE_BYTES, progress=cancel)
        assert fake_gcs.gateway.uploads == {}


def test_a_service_without_conditional_put_is_refused(fake_gcs: FakeGcsServer, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that ignores the precondition: probe, put and put_file say so instead of overwriting."""
    monkeypatch.setattr(fake_gcs.gateway, "honours_conditions", False)
    store = open_store(fake_gcs.url(secrets.token_hex(4)))
    store.put("k", b"first")
    for write in (store.probe, lambda: store.put("k", b"second", if_absent=True), lambda: store.put_file("k", large, LARGE_BYTES)):
        with pytest.raises(ConditionalPutUnsupported):
            write()
    assert store.get("k") == b"first"
    assert list(store.list()) == ["k"]


def test_wrong_credentials(fake_gcs: FakeGcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the service does not accept: what to set, and not the token."""
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "hunter2")
    with pytest.raises(StoreRefused, match="GOOGLE_APPLICATION_CREDENTIALS") as caught:
        open_store(fake_gcs.url("x")).put("k", b"")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_key_file_that_is_none(fake_gcs: FakeGcsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None) -> None:
    """Missing, of another form, or damaged: a ConfigError, at the first use."""
    path = tmp_path / "key.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(ConfigError):
        open_store(fake_gcs.url("x")).get("k")
