"""Saves that store only what the last commit lacks."""
