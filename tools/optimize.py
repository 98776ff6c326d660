#!/usr/bin/env python
"""The command ``earlyexit optimize`` as a script."""

from functools import partial

from earlyexit_command import run

main = partial(run, "optimize", "python tools/optimize.py")

if __name__ == "__main__":
    raise SystemExit(main())
