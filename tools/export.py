#!/usr/bin/env python
"""The command ``earlyexit export`` as a script."""

from functools import partial

from earlyexit_command import run

main = partial(run, "export", "python tools/export.py")

if __name__ == "__main__":
    raise SystemExit(main())
