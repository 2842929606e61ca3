"""Binaries that the tests start, built from Go modules that are pinned beside this file.

Each folder is one Go module whose go.mod and go.sum say exactly what is built; `catalog` says which program comes from
which; `gobuild` builds what is asked for, once per machine, into the cache. Nothing here starts a program it has built.
"""

from testkit.tools.catalog import CLUSTER, CONTROL_PLANE, NODE, TOOLS
from testkit.tools.gobuild import ToolError, binary, ensure, source

__all__ = ["CLUSTER", "CONTROL_PLANE", "NODE", "TOOLS", "ToolError", "binary", "ensure", "source"]
