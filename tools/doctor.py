#!/usr/bin/env python
"""The command ``earlyexit doctor`` as a script."""

from functools import partial

from earlyexit_command import run

main = partial(run, "doctor", "python tools/doctor.py")

if __name__ == "__main__":
    raise SystemExit(main())
