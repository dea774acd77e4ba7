"""A store in an S3 bucket: AWS, or any service with its interface that honours ``If-None-Match: *``.

Requests are sent by boto3 with its own retries off: a conditional write whose answer was lost must not be sent again before the
caller has looked (the second would meet the first's object and report a loss that was a win), and what is retried is logged.
Payloads are not signed but carry their CRC64NVME, which costs a tenth of SHA-256 and is kept by the server.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import logging
import mmap
import os
import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from dtr.clock import SYSTEM, Clock
from dtr.errors import (
    AlreadyExists,
    ConditionalPutUnsupported,
    ConfigError,
    DtrError,
    IntegrityError,
    InvalidInput,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)
from dtr.failpoints import failpoint
from dtr.store.base import RESERVED, Progress, Source, Store, as_bytes, check_key, check_prefix, check_range, check_size, is_key, open_source
from dtr.store.pieces import Piece, cut, move
from dtr.store.s3_errors import Failure, translate
from dtr.store.s3_location import S3Location
