#!/usr/bin/env python
"""The former name of tools/predict.py."""

from functools import partial

from earlyexit_command import run

main = partial(run, "predict", "python tools/demo.py")

if __name__ == "__main__":
    raise SystemExit(main())
