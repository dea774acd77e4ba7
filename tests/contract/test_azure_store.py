"""The store contract on Azure Blob Storage (azurite), and what only that service can break."""

from __future__ import annotations

import secrets
import traceback
from pathlib import Path

import pytest

from dtr.errors import ConfigError, StoreRefused, StoreUnavailable
from dtr.store import Store, cloud, open_store, pieces
from dtr.store.cloud import CloudStore
from tests.cloud_servers import AzuriteServer
from tests.contract.store_contract import StoreContract

pytestmark = pytest.mark.usefixtures("azure_credentials")


@pytest.fixture(scope="module")
def container(azurite: AzuriteServer) -> Store:
    """One store, and so one client, for the folders of all tests."""
    return open_store(azurite.url("jobs"))


class TestAzureStore(StoreContract):
    @pytest.fixture
    def store(self, container: Store) -> Store:
        return container.child(secrets.token_hex(4))


def test_the_account_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the URL nor in the environment: said with what to do."""
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match="account=NAME"):
        open_store("az://container/x").get("k")


def test_the_account_may_be_in_the_environment(azurite: AzuriteServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Azure's own tools have it."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", azurite.account)
    store = open_store(f"az://{azurite.container}/{secrets.token_hex(4)}?endpoint={azurite.endpoint}")
    store.put("k", b"1")
    assert store.get("k") == b"1"


def test_a_signature_in_a_request_is_never_shown(azurite: AzuriteServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared access signature travels in the query, and libraries print URLs: neither message nor traceback has it."""
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2021-08-06&sr=c&sp=r&se=2020-01-01T00%3A00%3A00Z&sig=hunter2hunter2%3D")
    for url in (azurite.url("x"), azurite.url("x", endpoint="http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setattr("dtr.store.retrying.ATTEMPTS", 1)
            with pytest.raises(StoreUnavailable) as caught:
                open_store(url).get("k")
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_wrong_and_expired_credentials(azurite: AzuriteServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key and a signature of yesterday are refused with what to check."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    with pytest.raises(StoreRefused, match="AZURE_STORAGE_ACCOUNT_KEY") as caught:
        open_store(azurite.url("x")).put("k", b"")
    assert "d3Jvbmc" not in "".join(traceback.format_exception(caught.value))


# --- a copy that takes its time ---


TWO_BYTES = (1 << 20) + 12_345


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that goes up in two pieces."""
    monkeypatch.setattr(pieces, "_SMALLEST_BYTES", 1 << 20)
    path = tmp_path / "two"
    path.write_bytes(secrets.token_bytes(TWO_BYTES))
    return path


class SlowlyCopied(CloudStore):
    """Azure may answer before a copy is done: until then the object is empty."""

    looks = 0

    def _stored_bytes(self, key: str) -> int:
        self.looks += 1
        return 0 if self.looks < 4 else super()._stored_bytes(key)


def test_a_copy_that_is_not_done_at_once_is_waited_for(container: Store, two: Path) -> None:
    """Its source stays until the object is whole, and nothing of it after that."""
    assert isinstance(container, CloudStore)
    store = SlowlyCopied(container.child(secrets.token_hex(4))._at)
    store.put_file("part", two, TWO_BYTES)
    assert store.looks >= 4
    assert store.get("part") == two.read_bytes()
    assert store.abort_uploads() == 0


def test_a_copy_that_never_ends_is_unknown(container: Store, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time: unknown, and the source stays, for the service may still need it."""
    assert isinstance(container, CloudStore)
    monkeypatch.setattr(cloud, "_COPY_WITHIN_S", 0.2)
    store = SlowlyCopied(container.child(secrets.token_hex(4))._at)
    store.looks = -1_000_000
    with pytest.raises(StoreUnavailable, match="not finished copying") as caught:
        store.put_file("part", two, TWO_BYTES)
    assert caught.value.unknown is True
    assert store.abort_uploads() == 1
