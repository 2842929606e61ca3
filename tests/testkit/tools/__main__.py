"""`python -m testkit.tools [NAME ...]`: build these programs, or all, before anything with a time limit asks."""

from __future__ import annotations

import sys

from testkit.tools import TOOLS, ToolError, ensure, source

if __name__ == "__main__":
    wanted = sys.argv[1:] or list(TOOLS)
    try:
        for name, path in ensure(wanted).items():
            print(f"{name}\t{path}")
        if "kueue" in wanted:
            source("kueue")  # its manifests are read from its source
    except ToolError as error:
        sys.exit(str(error))
