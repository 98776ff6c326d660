"""The training engine: a loop with hooks, and loaders of photos or of cached taps."""

from earlyexit_ssd.engine.loop import Hook, Trainer, read_log

__all__ = ["Hook", "Trainer", "read_log"]
