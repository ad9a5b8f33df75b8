"""Imported first by the server that ranks are forked from: what libraries print there and in ranks is not the result."""

from __future__ import annotations

import os

os.dup2(2, 1)
