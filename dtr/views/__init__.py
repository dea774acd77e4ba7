"""Read models: what a job looks like to a person, as frozen values. Readers only read; what they mean is decided in pure functions.

The command line prints these values, and with ``--json`` they are its output, field by field.
"""
