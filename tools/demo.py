#!/usr/bin/env python
"""The command ``earlyexit demo`` as a script."""

import sys
from functools import partial

from earlyexit_command import run

main = partial(run, "demo", "python tools/demo.py")

if __name__ == "__main__":
    sys.exit(main())
