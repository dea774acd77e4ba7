"""Slots in shared memory: reserved, filled at the speed of memory, read by uploaders, given back."""
