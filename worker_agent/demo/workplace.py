"""The demo's folders and the environment of its processes: nothing of the user's own dtr is read or written.

Guarantee: what a demo starts can be told apart from everything else on the machine, by DTR_HOME in its environment or by the folder it
works in (a server may overwrite its environment with its title), so that nothing of it is left behind and nothing else is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dtr.checkpoint.staging.slots import FALLBACK, fallback
from dtr.config import Settings
from dtr.errors import ConfigError, Unavailable
from dtr.stack import processes
from dtr.stack.home import Lock
from dtr.stack.processes import ProcessId

__all__ = ["Workplace", "clean_environment", "free_port", "memory_base"]

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - folders in it are made by mkdtemp, for this user alone
_PREFIX: Final = "dtr-demo-"
_LOCK: Final = "lock"
_MEMORY: Final = "memory"
_STAGING: Final = "staging"
_STAYING: Final = (".host-id", FALLBACK)  # of a staging folder: whose it is and where its slots went if not here, for whoever comes next
_LAUNCHER_VARIABLES: Final = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
_ONE_THREAD: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def clean_environment(environ: Mapping[str, str], *, import_from: Path, installed: frozenset[Path]) -> dict[str, str]:
    """The environment without anything that would set up another dtr; a trainer gets one thread, since there are several of them.

    Args:
        environ: what this process was started with.
        import_from: the folder that holds the package, for children that run in another one.
        installed: folders in which Python looks anyway; to name one of them in PYTHONPATH could hide the standard library's modules.
    """
    env = {name: value for name, value in environ.items() if not name.startswith("DTR_") and name not in _LAUNCHER_VARIABLES}
    env.update(dict.fromkeys(_ONE_THREAD, "1"))
    if import_from not in installed:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(import_from), environ.get("PYTHONPATH", "")]))
    return env


def installed_packages() -> frozenset[Path]:
    """Where this Python has its installed packages."""
    return frozenset(Path(sysconfig.get_paths()[kind]) for kind in ("purelib", "platlib"))


def memory_base(needed_bytes: int, shared_free_bytes: int | None, fallback: Path) -> Path:
    """Where gradients and staged bytes go: shared memory if there is any and it has room, else the fallback on disk."""
    return SHARED_MEMORY if shared_free_bytes is not None and shared_free_bytes >= needed_bytes else fallback


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """The folders of one demo: ``folder`` for what may be kept, ``memory`` for what is only of use while it runs.

    ``lock`` is held while the demo lives, so that the next one can tell what a killed one has left behind.
    """

    folder: Path
    memory: Path
    lock: Lock | None = field(default=None, repr=False)

    @classmethod
    def create(cls, *, memory_bytes: int, disk_bytes: int) -> Workplace:
        """Make the folders.

        Args:
            memory_bytes: what trainers will need in memory.
            disk_bytes: what corpus, server and store will need on disk.

        Raises:
            Unavailable: the disk is too full.
            ConfigError: there is no folder for temporary files.
        """
        try:
            sweep(Path(tempfile.gettempdir()))
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        except OSError as exc:
            raise ConfigError(f"no temporary folder can be made ({exc}): set TMPDIR to a folder of yours") from exc
        lock = _lock(folder)
        try:
            free = shutil.disk_usage(folder).free
            if free < disk_bytes:
                raise Unavailable(
                    f"the demo needs about {disk_bytes / 1e6:,.0f} MB in {folder.parent}, and {free / 1e6:,.0f} MB are free: "
                    "set TMPDIR to a folder with room"
                )
            base = memory_base(memory_bytes, _free_bytes(SHARED_MEMORY), folder)
            place = cls(folder=folder, memory=Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base)), lock=lock)
            (folder / _MEMORY).symlink_to(place.memory)
            for made in (place.home, place.notes, place.consumed, place.store, place.gradients):
                made.mkdir()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return place

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    @property
    def consumed(self) -> Path:
        """The trainers' own logs of what they trained on."""
        return self.folder / "consumed"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def launcher_log(self) -> Path:
        return self.folder / "trainers.log"

    @property
    def own_log(self) -> Path:
        return self.folder / "demo.log"

    @property
    def staging(self) -> Path:
        return self.memory / _STAGING

    @property
    def gradients(self) -> Path:
        return self.memory / "gradients"

    def environment(self, base: Mapping[str, str], settings: Settings) -> dict[str, str]:
        """The environment for all that the demo starts."""
        chosen = {
            "DTR_HOME": str(self.home),
            **{
                f"DTR_{name.upper()}": str(value)
                for name, value in settings.as_dict().items()
                if value is not None and value != getattr(Settings(), name)
            },
        }
        return {**base, **chosen}

    def running(self) -> list[ProcessId]:
        """The processes of this demo that are alive, this one excepted."""
        return list(_processes_of(self.home, self.folder))

    def remains(self) -> list[str]:
        """The files that somebody should have removed, in memory and where slots went that found no room in it."""
        elsewhere = fallback(str(self.staging))
        folders = [self.memory, Path(elsewhere)] if elsewhere else [self.memory]
        staying = {self.staging / name for name in _STAYING}
        left = [path for folder in folders for path in folder.rglob("*") if not path.is_dir() and path not in staying]
        return sorted(str(path).removeprefix(f"{self.memory}/") for path in left)

    def clear(self, *, keep: bool) -> None:
        """End every process of the demo and remove the folders; ``keep`` leaves the one on disk."""
        for process in self.running():
            processes.send(process, signal.SIGKILL)
        _give_back(self.memory)
        if keep:
            for name in (_MEMORY, _LOCK):  # without a lock nobody takes it for a dead demo's
                (self.folder / name).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.lock is not None:
            self.lock.release()


def sweep(base: Path) -> None:
    """Remove what demos of this user left behind in ``base`` that were killed before they could."""
    for folder in base.glob(f"{_PREFIX}*"):
        lock = Lock(folder / _LOCK)
        if folder.lstat().st_uid == os.getuid() and (folder / _LOCK).exists() and lock.take():
            memory = (folder / _MEMORY).resolve()
            if memory.name.startswith(_PREFIX):
                _give_back(memory)
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def _give_back(memory: Path) -> None:
    """Remove the folder, and the one on disk where slots went that found no room in it; named after its host id, it is nobody else's."""
    if elsewhere := fallback(str(memory / _STAGING)):
        shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.rmtree(memory, ignore_errors=True)


def _lock(folder: Path) -> Lock:
    """The lock of a new demo, which nobody can find before it is held."""
    lock = Lock(folder / f"{_LOCK}.new")
    if not lock.take():
        raise ConfigError(f"{folder} is somebody else's: set TMPDIR to a folder of yours")
    (folder / f"{_LOCK}.new").rename(folder / _LOCK)
    return lock


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else None
    except OSError:
        return None


def _processes_of(home: Path, folder: Path) -> Iterator[ProcessId]:
    """Processes of this user that were started with this home, or work in the folder; those of others cannot be ours."""
    wanted = f"DTR_HOME={home}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            place = Path("/proc", entry)
            ours = Path(os.readlink(place / "cwd")).is_relative_to(folder) or wanted in (place / "environ").read_bytes().split(b"\0")
            if ours and (found := processes.identify(int(entry))) is not None:
                yield found
