"""An S3 service without conditional put (rclone): all of the contract that needs none holds, and what needs one is refused."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from dtr.errors import ConditionalPutUnsupported, NotFound, StoreUnavailable
from dtr.store import Store, open_store
from tests.cloud_servers import RcloneServer
from tests.contract.store_contract import LARGE_BYTES, MANIFEST, ObjectContract


@pytest.fixture(autouse=True)
def credentials(rclone: RcloneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def unconditional(rclone: RcloneServer) -> Store:
    """One store, and so one client, for the folders of all tests."""
    return open_store(rclone.url("jobs"))


class TestUnconditionalS3(ObjectContract):
    conditional = False

    @pytest.fixture
    def store(self, unconditional: Store) -> Store:
        return unconditional.child(secrets.token_hex(4))

    def test_a_folder_is_no_object(self, store: Store, impatient: None) -> None:
        """Here an object is a file, so to delete a folder is an error of the service: passed on, and nothing is lost."""
        store.put("folder/object", b"1")
        for read in (store.get, store.size):
            with pytest.raises(NotFound):
                read("folder")
        with pytest.raises(StoreUnavailable, match="HTTP 500"):
            store.delete("folder")
        assert store.get("folder/object") == b"1"

    def test_what_needs_a_condition_is_refused(self, store: Store, large: Path) -> None:
        """Each says so and has no effect, the probe included; and it is asked again next time, since a service may be mended."""
        store.put(MANIFEST, b"commit")
        for write in (
            store.probe,
            lambda: store.put(MANIFEST, b"abort", if_absent=True),
            lambda: store.put_file(MANIFEST, large, 1),
            lambda: store.put_file(MANIFEST, large, LARGE_BYTES),
            store.probe,
        ):
            with pytest.raises(ConditionalPutUnsupported, match="If-None-Match"):
                write()
        assert store.get(MANIFEST) == b"commit"
        assert list(store.list()) == [MANIFEST]
        assert store.abort_uploads() == 0
