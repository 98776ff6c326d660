"""The main jobs, put together from all other packages."""

from earlyexit_ssd.pipeline.evaluate import evaluate_model
from earlyexit_ssd.pipeline.train import train

__all__ = ["evaluate_model", "train"]
