"""Requests to a cloud through obstore: made by the process that asks, with explicit timeouts.

obstore's own retries are off (``retrying``), save for the pieces of a large object, which nobody else can see.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

from dtr.clock import Clock
from dtr.errors import ConfigError
from dtr.store import retrying
from dtr.store.cloud_errors import masked, translate
from dtr.store.cloud_library import library
from dtr.store.cloud_location import CloudLocation
from dtr.store.retrying import Failure

__all__ = ["Act", "Answer", "CloudRequests"]

_CONNECT_TIMEOUT_S: Final = 5
_REQUEST_TIMEOUT_S: Final = 60  # for all of one request, and none moves more than 16 MiB
_PIECE_TIMEOUT_S: Final = 120
_PIECE_RETRIES: Final = 4
_PIECES_WITHIN_S: Final = 280  # no retry of a piece starts later: its signature would be too old

Answer = TypeVar("Answer")
Act = Callable[[Any, Any], Answer]  # gets the module obstore and one of its stores


class CloudRequests:
    """Sends requests for one store and its children; what was found out about the service is theirs in common.

    ``probed``: it honours put-if-absent; ``reached``: it answered once, so the bucket is there.
    """

    def __init__(self, base: CloudLocation, *, clock: Clock) -> None:
        self.base = base
        self.clock = clock
        self.probed = False
        self.reached = False
        self._made: dict[tuple[int, bool], Any] = {}  # those of a parent are kept: to drop one could wake its dead threads

    def close(self) -> None:
        for pieces in (False, True):
            self._made.pop((os.getpid(), pieces), None)

    def call(
        self,
        operation: str,
        at: CloudLocation,
        key: str,
        act: Act[Answer],
        *,
        conditional: bool = False,
        pieces: bool = False,
        before_retry: Callable[[], None] | None = None,
    ) -> Answer:
        """What ``act`` returns, called again where that helps.

        ``conditional``: not again once it may have had its effect. ``pieces``: obstore itself repeats, piece by piece.
        ``before_retry`` may raise to give up.
        """
        answer, _ = retrying.send(
            lambda: act(library(), self._client(pieces=pieces)),
            lambda exc: self._failure(exc, operation, key, at),
            clock=self.clock,
            conditional=conditional,
            again=not pieces,
            before_retry=before_retry,
        )
        self.reached = True
        return answer

    @staticmethod
    def _failure(exc: Exception, operation: str, key: str, at: CloudLocation) -> Failure:
        if not isinstance(exc, (library().exceptions.BaseError, FileNotFoundError)):
            raise exc
        failure = translate(exc, operation=operation, key=key, url=at.url, service=at.service)
        exc.args = (masked(str(exc)),)  # it is shown with a traceback, and its URL may hold a signature
        return failure

    def _client(self, *, pieces: bool) -> Any:
        """This process's store of obstore."""
        which = (os.getpid(), pieces)
        made = self._made.get(which)
        if made is None:
            made = self._made[which] = self._connect(pieces=pieces)
        return made

    def _connect(self, *, pieces: bool) -> Any:
        base, stores = self.base, library().store
        options: dict[str, Any] = {
            "client_options": {
                "allow_http": (base.endpoint or "").startswith("http://"),
                "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
                "timeout": timedelta(seconds=_PIECE_TIMEOUT_S if pieces else _REQUEST_TIMEOUT_S),
            },
            "retry_config": {
                "max_retries": _PIECE_RETRIES if pieces else 0,
                "retry_timeout": timedelta(seconds=_PIECES_WITHIN_S),
                "backoff": {
                    "init_backoff": timedelta(seconds=retrying.FIRST_PAUSE_S),
                    "max_backoff": timedelta(seconds=retrying.LONGEST_PAUSE_S),
                    "base": 2,
                },
            },
        }
        named = {"base_url" if base.service == "gs" else "endpoint": base.endpoint, "account_name": base.account}
        options |= {name: value for name, value in named.items() if value}
        try:
            return (stores.GCSStore if base.service == "gs" else stores.AzureStore)(base.bucket, **options)
        except Exception as exc:
            said = " ".join(masked(str(exc)).partition("Debug source:")[0].split())
            with contextlib.suppress(AttributeError):
                exc.args = (said,)
            advice = "; add account=NAME to the URL, or set AZURE_STORAGE_ACCOUNT_NAME" if "Account must be" in said else ""
            raise ConfigError(f"store {base.url}: {said}{advice}", field="store") from exc
