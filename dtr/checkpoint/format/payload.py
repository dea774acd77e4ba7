"""One rank's part as bytes: a safetensors file whose metadata holds the tree, so that it is readable without dtr.

:mod:`dtr.checkpoint.format.structure` places a state, :mod:`dtr.checkpoint.restoring.fetch` reads one.
"""

from __future__ import annotations

from typing import Final

__all__ = ["TREE"]

TREE: Final = "dtr_tree"  # the name of the tree in the file's metadata
