"""The training engine: a plain loop, hooks around it, and batches of photos or of cached taps."""

from earlyexit_ssd.engine.hooks import read_log
from earlyexit_ssd.engine.loop import Hook, Trainer

__all__ = ["Hook", "Trainer", "read_log"]
