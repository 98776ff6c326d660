#!/usr/bin/env python
"""The command ``earlyexit train`` as a script."""

from functools import partial

from earlyexit_command import run

main = partial(run, "train", "python tools/train_net.py")

if __name__ == "__main__":
    raise SystemExit(main())
