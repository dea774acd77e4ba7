"""What others take to put the same file into the same bucket, and the processor time it costs them.

Each with the size of parts, and the number of them at once, that are the quickest of nine combinations for it, each tried once before.
dtr has its default for all services: 16 MiB, four at once. boto3 and obstore do not sign the payload; boto3 computes no checksum either. A
peer that is not installed is left out; boto3 always is.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["Bucket", "Cost", "How", "Put", "measured", "peers", "quickest"]

_PART_MIB: Final = (8, 16, 32)
_AT_ONCE: Final = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Where the peers put it; the credentials are in the environment."""

    endpoint: str
    name: str
    region: str


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """In what a file is sent: parts of so many MiB, so many at once."""

    part_mib: int
    at_once: int


Put = Callable[[Path, str, How], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one transfer: seconds by the clock and of processor time."""

    wall_s: float
    cpu_s: float


def measured(put: Put, path: Path, key: str, how: How) -> Cost:
    """One transfer by a peer, its child processes included."""
    cpu, begin = _cpu_s(), time.perf_counter()
    put(path, key, how)
    return Cost(wall_s=time.perf_counter() - begin, cpu_s=_cpu_s() - cpu)


def quickest(put: Put, path: Path, key: str) -> How:
    """How a peer puts a file in the least time: each way once, after a first transfer that does not count."""
    ways = [How(part_mib=part_mib, at_once=at_once) for part_mib in _PART_MIB for at_once in _AT_ONCE]
    put(path, key, ways[0])
    return min(ways, key=lambda how: measured(put, path, key, how).wall_s)


def peers(bucket: Bucket) -> dict[str, Put]:
    """The clients that are installed, by name."""
    found = {"boto3": _boto3(bucket)}
    try:
        found["obstore"] = _obstore(bucket)
    except ImportError:
        print("bench.upload: obstore is not installed, and left out", file=sys.stderr)
    beside = Path(sys.executable).parent / "s5cmd"
    binary = str(beside) if beside.exists() else shutil.which("s5cmd")
    if binary is None:
        print("bench.upload: s5cmd is not installed, and left out", file=sys.stderr)
    else:
        found["s5cmd"] = _s5cmd(bucket, binary)
    return found


def _boto3(bucket: Bucket) -> Put:
    import boto3.session
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    config = Config(
        s3={"addressing_style": "path", "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        max_pool_connections=16,
    )
    client = boto3.session.Session().client("s3", endpoint_url=bucket.endpoint, region_name=bucket.region, config=config)

    def put(path: Path, key: str, how: How) -> None:
        part_bytes = how.part_mib << 20
        transfer = TransferConfig(multipart_threshold=part_bytes, multipart_chunksize=part_bytes, max_concurrency=how.at_once)
        client.upload_file(str(path), bucket.name, key, Config=transfer)

    return put


def _obstore(bucket: Bucket) -> Put:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        bucket.name,
        endpoint=bucket.endpoint,
        region=bucket.region,
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        unsigned_payload=True,
        client_options={"allow_http": True},
    )
    return lambda path, key, how: obstore.put(store, key, path, chunk_size=how.part_mib << 20, max_concurrency=how.at_once)


def _s5cmd(bucket: Bucket, binary: str) -> Put:
    def put(path: Path, key: str, how: How) -> None:
        subprocess.run(
            [
                binary, "--endpoint-url", bucket.endpoint, "cp", "--concurrency", f"{how.at_once}", "--part-size", f"{how.part_mib}",
                str(path), f"s3://{bucket.name}/{key}",
            ],
            check=True, stdout=subprocess.DEVNULL, env={**os.environ, "AWS_REGION": bucket.region},
        )  # fmt: skip

    return put


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
