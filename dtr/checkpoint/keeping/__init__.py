"""Checkpoints that are there already: listed, kept or let go, pinned, exported, compared, indexed anew."""
