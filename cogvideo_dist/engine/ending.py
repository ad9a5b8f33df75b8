"""How a run ends before its end."""

from __future__ import annotations


class Stopped(Exception):
    """A run was asked to stop, and has: its last step is saved, and the same command goes on from there."""


class Rewind(Exception):
    """A run goes back to its newest checkpoint, in the same processes; why."""


class NoProgress(Exception):
    """A job was restarted several times and has not come to a new checkpoint."""


class OutOfMemory(RuntimeError):
    """A device's memory does not hold the run; the message says what would."""
