"""The local stack: a Redis, an uploader and Flower on this machine, for those who have none."""

from dtr.stack.home import Home, Record, Running
from dtr.stack.server import listening
from dtr.stack.stack import Down, Stack, Up

__all__ = ["Down", "Home", "Record", "Running", "Stack", "Up", "listening"]
