#!/usr/bin/env python
"""The command ``earlyexit calibrate`` as a script."""

from functools import partial

from earlyexit_command import run

main = partial(run, "calibrate", "python tools/calibrate.py")

if __name__ == "__main__":
    raise SystemExit(main())
