"""A library that others import wherever it is installed, for features that are not used here, is hidden from them.

diffusers and PEFT import bitsandbytes only to know its kinds of layers, and with it comes torch's compiler: two seconds
at the start of every process, and a line in its log about a kernel that could not be loaded.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

_NAME = "bitsandbytes"


def hide_bitsandbytes() -> None:
    """Let nobody import or find it from now on, unless it is there already. Must run before diffusers is imported."""
    sys.modules.setdefault(_NAME, None)  # type: ignore[arg-type] # None is Python's mark of what shall not be found


def import_bitsandbytes() -> Any:
    """Return the library, hidden or not. Raises ImportError where it is not installed."""
    if sys.modules.get(_NAME, sys) is None:
        del sys.modules[_NAME]
    return import_module(_NAME)
