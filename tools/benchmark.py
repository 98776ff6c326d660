#!/usr/bin/env python
"""The command ``earlyexit benchmark`` as a script."""

from functools import partial

from earlyexit_command import run

main = partial(run, "benchmark", "python tools/benchmark.py")

if __name__ == "__main__":
    raise SystemExit(main())
