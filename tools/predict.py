#!/usr/bin/env python
"""The command ``earlyexit predict`` as a script."""

from functools import partial

from earlyexit_command import run

main = partial(run, "predict", "python tools/predict.py")

if __name__ == "__main__":
    raise SystemExit(main())
