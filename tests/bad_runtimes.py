"""Runtimes that misbehave, for the tests of isolation."""

from __future__ import annotations

import os
import time
from typing import Any


def forever(*_: Any) -> None:
    """Never answers."""
    time.sleep(3600)


def crash(*_: Any) -> None:
    """Dies as a segmentation fault in a runtime would."""
    os.abort()
