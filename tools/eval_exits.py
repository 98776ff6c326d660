#!/usr/bin/env python
"""The command ``earlyexit evaluate`` as a script."""

from functools import partial

from earlyexit_command import run

main = partial(run, "evaluate", "python tools/eval_exits.py")

if __name__ == "__main__":
    raise SystemExit(main())
