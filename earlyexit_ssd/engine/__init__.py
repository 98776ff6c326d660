"""The training engine: a loop with hooks, and loaders of photos or of cached taps."""

from earlyexit_ssd.engine.hooks import read_log
from earlyexit_ssd.engine.loop import Hook, Trainer

__all__ = ["Hook", "Trainer", "read_log"]
