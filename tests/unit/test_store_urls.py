"""From a URL to a store: what is meant, and what is wrong, said without showing a secret."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dtr.errors import ConfigError
from dtr.store import open_store


@pytest.mark.parametrize("form", ["{path}", "file://{path}", "file://localhost{path}", "FILE://{path}", "{path}/", "{path}/./x/.."])
def test_ways_to_name_a_folder(tmp_path: Path, form: str) -> None:
    """All of them are the same folder, which need not exist and is not made by opening it."""
    folder = tmp_path / "store"
    store = open_store(form.format(path=folder))
    assert store.url == f"file://{folder}"
    assert not folder.exists()


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is fixed at the moment of opening; ``~`` is the home folder; a Path is a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store = open_store("checkpoints")
    monkeypatch.chdir("/")
    assert store.url == f"file://{tmp_path}/checkpoints"
    assert open_store("~/x").url == f"file://{tmp_path}/home/x"
    assert open_store(tmp_path / "y").url == f"file://{tmp_path}/y"


def test_odd_characters_in_a_path(tmp_path: Path) -> None:
    """A plain path is literal; a URL is percent-encoded; the store's own URL leads back."""
    for name in ("a b", "ünï", "100%25", "a#b?c", "a:b"):
        folder = tmp_path / name
        assert open_store(open_store(str(folder)).url).url == open_store(str(folder)).url
    assert open_store(f"file://{tmp_path}/a%20b").url == open_store(f"{tmp_path}/a b").url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a%20b", "s3://bucket/a%20b"),
        (
            "s3://bucket/a?endpoint=http://127.0.0.1:9000/&region=eu-central-1",
            "s3://bucket/a?endpoint=http://127.0.0.1:9000&region=eu-central-1",
        ),
        ("s3://bucket?endpoint=https%3A%2F%2Fminio.example.com", "s3://bucket?endpoint=https://minio.example.com"),
        ("s3://bucket?checksum=none", "s3://bucket?checksum=none"),
        ("s3://bucket?checksum=crc64nvme", "s3://bucket"),
        ("gs://bucket", "gs://bucket"),
        ("GS://my-bucket_1.example.com/a/b/", "gs://my-bucket_1.example.com/a/b"),
        ("gs://bucket/a%20b?endpoint=http://127.0.0.1:4443/", "gs://bucket/a%20b?endpoint=http://127.0.0.1:4443"),
        ("az://container/a?account=name1", "az://container/a?account=name1"),
        (
            "az://container?endpoint=http://127.0.0.1:10000/devstoreaccount1&account=devstoreaccount1",
            "az://container?account=devstoreaccount1&endpoint=http://127.0.0.1:10000/devstoreaccount1",
        ),
    ],
)
def test_buckets(url: str, expected: str) -> None:
    """Bucket, folder and options; the store's URL is the plainest form, and opens the same."""
    assert open_store(url).url == expected
    assert open_store(expected).url == expected


BAD = [
    ("", "store must be"),
    ("   ", "store must be"),
    ("a\0b", "store must be"),
    (None, "store must be"),
    (7, "store must be"),
    (b"bytes", "store must be"),
    ("http://example.com/x", "unknown scheme 'http'"),
    ("gcs://bucket/x", "write gs://"),
    ("azure://container/x", "write az://"),
    ("s3a://bucket/x", "write s3://"),
    ("redis://localhost", "unknown scheme 'redis'"),
    ("s3:bucket/x", "lacks '//'"),
    ("s3:/bucket/x", "lacks '//'"),
    ("file:/tmp/x", "lacks '//'"),
    ("file://host/x", "three slashes"),
    ("file://relative", "three slashes"),
    ("file:///a?b", "%3F"),
    ("file:///a#b", "%23"),
    ("s3://", "BUCKET"),
    ("s3:///x", "BUCKET"),
    ("s3://a_/x", "BUCKET"),
    ("s3://ab", "BUCKET"),
    ("s3://bu cket", "BUCKET"),
    ("s3://bucket/../x", "prefix"),
    ("s3://bucket/a//b", "prefix"),
    ("s3://bucket/a#b", "no '#'"),
    ("s3://bucket?endpoint=127.0.0.1:9000", "http:// or https://"),
    ("s3://bucket?endpoint=minio.local", "http:// or https://"),
    ("s3://bucket?endpoint=ftp://x", "http:// or https://"),
    ("s3://bucket?endpoint=http://", "http:// or https://"),
    ("s3://bucket?endpoint=http://h:99999", "port"),
    ("s3://bucket?endpoint=http://h:x", "port"),
    ("s3://bucket?endpoint=", "without a value"),
    ("s3://bucket?endpoint", "without a value"),
    ("s3://bucket?region=eu&region=us", "twice"),
    ("s3://bucket?region=eu central", "region"),
    ("s3://bucket?checksum=md5", "crc64nvme or none"),
    ("s3://bucket?endpiont=http://h", "did you mean 'endpoint'"),
    ("s3://bucket?x=1", "unknown option 'x'"),
    ("gs:bucket/x", "lacks '//'"),
    ("gs://", "BUCKET"),
    ("gs://Upper", "BUCKET"),
    ("gs://b", "BUCKET"),
    ("gs://a..b", "BUCKET"),
    ("gs://bucket/../x", "prefix"),
    ("gs://bucket#x", "no '#'"),
    ("gs://bucket?endpoint=127.0.0.1:4443", "http:// or https://"),
    ("gs://bucket?region=eu", "unknown option 'region'"),
    ("gs://bucket?account=a1b", "unknown option 'account'"),
    ("az://", "CONTAINER"),
    ("az://a_b", "CONTAINER"),
    ("az://a--b", "CONTAINER"),
    ("az://container?account=Upper", "storage account"),
    ("az://container?account=a.b", "storage account"),
    ("az://container?acount=abc", "did you mean 'account'"),
    ("az://container?endpoint=name.blob.core.windows.net", "http:// or https://"),
]


@pytest.mark.parametrize(("url", "said"), BAD)
def test_bad_urls(url: str, said: str) -> None:
    """Each is a ConfigError (exit 3) that says what is wrong and what would be right."""
    with pytest.raises(ConfigError, match=said) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAKEY:hunter2@bucket/x",
        "s3://AKIAKEY:hun/ter2@bucket/x",
        "s3://hunter2@bucket",
        "s3://bucket?endpoint=http://AKIAKEY:hunter2@host",
        "s3://bucket?endpoint=hunter2@host",
        "s3://bucket?secret=hunter2",
        "s3://bucket?region=eu&secret_access_key=hunter2",
        "http://user:hunter2@host/x",
        "s3:AKIAKEY:hunter2@bucket",
        "s3://AKIAKEY:hunter2",
        "file://user:hunter2@host/x",
        "gs://hunter2@bucket/x",
        "az://account:hunter2@container",
        "az://container?account=abc&sig=hunter2",
        "az://container?endpoint=https://h/?sig=hunter2",
        "gs://bucket?endpoint=https://h/%3Ftoken=hunter2",
    ],
)
def test_no_secret_is_shown(url: str) -> None:
    """Credentials in a URL are refused, and neither message nor repr has them."""
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    for text in (str(caught.value), repr(caught.value), repr(caught.value.facts)):
        assert "hun" not in text
        assert "ter2" not in text


def test_a_file_is_no_store(tmp_path: Path) -> None:
    """A store is a folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        open_store(tmp_path / "file")


def test_a_local_store_loads_no_cloud_library() -> None:
    """A trainer with a folder store does not pay for boto3."""
    code = (
        "import sys; from dtr.store import open_store; s = open_store('/tmp/x'); list(s.list());"
        "assert not {'boto3', 'botocore', 'awscrt'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_opening_a_bucket_loads_no_cloud_library() -> None:
    """The library comes with the first request, so that a setting can be checked at no cost."""
    code = (
        "import sys; from dtr.store import open_store;"
        "[open_store(url) for url in ('s3://bucket', 'gs://bucket', 'az://container?account=abc')];"
        "assert not {'boto3', 'botocore', 'awscrt', 'obstore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("url", ["gs://bucket/x", "az://container/x?account=abc"])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Where obstore is not installed: what to install; a folder and S3 still open."""
    monkeypatch.setattr("dtr.store.cloud_library._NAME", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'dtr\[cloud\]'"):
        open_store(url)
    assert open_store("s3://bucket").url == "s3://bucket"
