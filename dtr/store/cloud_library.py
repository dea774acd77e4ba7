"""obstore, the library behind the cloud stores: imported when it is needed, and usable after a fork.

Its threads belong to the process that made the first request, and after ``os.fork`` each request would wait for them for ever (seen
with obstore 0.12). So a process that may be such a child loads a copy of the extension of its own: a file of another inode is another
library to the loader, with threads of its own. That takes 0.1 s, once.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final

from dtr.errors import ConfigError, ForkedProcess

__all__ = ["MISSING", "is_installed", "library"]

MISSING: Final = "gs:// and az:// stores need the package obstore: pip install 'dtr[cloud]'"
_NAME, _EXTENSION = "obstore", "obstore._obstore"

_loaded: dict[int, Any] = {}  # process -> library; a parent's is kept, so that nothing of it is torn down in the child
_locks: dict[int, threading.Lock] = {}  # by process: a lock that was held during the fork would stay held


def is_installed() -> bool:
    """Whether ``library`` will find it; does not import it."""
    return importlib.util.find_spec(_NAME) is not None


def library() -> Any:
    """The module obstore for this process; ConfigError says what to install where it is missing."""
    process = os.getpid()
    with _locks.setdefault(process, threading.Lock()):
        if process not in _loaded:
            _loaded[process] = _load()
        return _loaded[process]


def _load() -> Any:
    if not is_installed():
        raise ConfigError(MISSING, field="store")
    if _NAME not in sys.modules and not _loaded:
        return _imported()
    with _copied() as extension, _set_aside():  # somebody had it before us, perhaps before a fork
        _import_extension(extension)
        return _imported()


def _imported() -> Any:
    import obstore
    import obstore.store

    return obstore


@contextlib.contextmanager
def _copied() -> Iterator[str]:
    """The path of a copy of the extension, in memory."""
    found = importlib.util.find_spec(_EXTENSION)
    if found is None or not found.origin:
        raise ConfigError(MISSING, field="store")
    with open(found.origin, "rb") as original:
        copy = os.memfd_create("dtr-obstore")
        try:
            size_bytes, done = os.fstat(original.fileno()).st_size, 0
            while done < size_bytes:
                done += os.sendfile(copy, original.fileno(), done, size_bytes - done)
            yield f"/proc/{os.getpid()}/fd/{copy}"  # a path that no ancestor used: the loader knows a library by its path, too
        finally:
            os.close(copy)


@contextlib.contextmanager
def _set_aside() -> Iterator[None]:
    """Take what others imported out of ``sys.modules``, and put it back at the end: theirs stays theirs."""
    theirs = _take_out()
    try:
        yield
    finally:
        _take_out()
        sys.modules.update(theirs)


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]
    return {name: sys.modules.pop(name) for name in names}


def _import_extension(path: str) -> None:
    loader = importlib.machinery.ExtensionFileLoader(_EXTENSION, path)
    spec = importlib.util.spec_from_file_location(_EXTENSION, path, loader=loader)
    if spec is None:
        raise ForkedProcess(f"a copy of obstore for this process could not be loaded from {path}; start processes by spawn, not by fork")
    try:
        module = sys.modules[_EXTENSION] = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as exc:
        raise ForkedProcess(f"obstore does not work after a fork, and a copy of it could not be loaded: {exc}; use spawn") from exc
