"""Which host this is: whoever sees the same staging folder is the same host, containers included."""

from __future__ import annotations

import os
import re
import secrets
import socket

from dtr.errors import ConfigError

__all__ = ["host_id", "keep_host_id", "make_staging"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")


def make_staging(staging: str) -> str:
    """Create the staging folder for this user alone; raises ConfigError if it cannot be used."""
    try:
        os.makedirs(staging, mode=0o700, exist_ok=True)
        if not os.access(staging, os.W_OK | os.X_OK):
            raise PermissionError(13, "not writable", staging)
    except OSError as exc:
        raise ConfigError(
            f"staging: the folder {staging} cannot be used: {exc.strerror}; set DTR_STAGING to another", setting="staging"
        ) from exc
    return staging


def host_id(staging: str) -> str:
    """The id in ``STAGING/.host-id``: ``HOSTNAME-8hex``, made by whoever comes first and the same for all who see the folder."""
    path = os.path.join(make_staging(staging), ".host-id")
    for _ in range(3):
        try:
            with open(path, encoding="ascii") as file:
                found = file.read().strip()
        except FileNotFoundError:
            _create(path)
            continue
        if not _ID.fullmatch(found):
            raise ConfigError(f"staging: {path} does not hold a host id, got {found[:40]!r}; remove the file", setting="staging")
        return found
    raise ConfigError(f"staging: {path} keeps disappearing", setting="staging")


def keep_host_id(staging: str, host: str) -> None:
    """Put back the id of a folder that was emptied while its users live on; without effect if the folder has an id."""
    _create(os.path.join(make_staging(staging), ".host-id"), host)


def _create(path: str, host: str | None = None) -> None:
    name = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().split(".")[0]).strip("-")[:40] or "host"
    temporary = f"{path}.{os.getpid()}.{secrets.token_hex(4)}"
    with open(temporary, "x", encoding="ascii") as file:
        file.write(f"{host or f'{name}-{secrets.token_hex(4)}'}\n")
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass  # somebody was first: theirs is the id
    finally:
        os.unlink(temporary)
