#!/usr/bin/env python
"""The command ``earlyexit plan`` as a script."""

import sys
from functools import partial

from earlyexit_command import run

main = partial(run, "plan", "python tools/plan_exits.py")

if __name__ == "__main__":
    sys.exit(main())
