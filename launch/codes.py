"""Exit codes of commands. Without imports of weight, since a rank's supervisor is to be light."""

from __future__ import annotations

FAILED = 1
"""Any error of the user's input that has no code of its own; a fault of the program."""

DATA = 65
"""Too much of the data cannot be used."""

NON_FINITE = 70
"""Loss or gradients are not finite, or a device's memory does not hold the run."""

UNSAVED = 74
"""Checkpoints cannot be written."""

STOPPED = 75
"""Stopped as asked, and saved."""

TRANSIENT = 76
"""The storage does not answer, or workers, ranks or nodes die or hang: the same command may well succeed later."""

REFUSED = 78
"""The configuration or checkpoint cannot be run, or ranks differ."""

NO_PROGRESS = 93
"""Restarts that get nowhere."""

INTERRUPTED = 130
"""Ctrl-C."""

LEAVE_NOW = 143
"""Told twice to end."""
