#!/usr/bin/env python
"""The command ``earlyexit export-weights`` as a script."""

import sys
from functools import partial

from earlyexit_command import run

main = partial(run, "export-weights", "python tools/export_weights.py")

if __name__ == "__main__":
    sys.exit(main())
