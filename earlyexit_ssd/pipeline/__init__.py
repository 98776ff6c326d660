"""The jobs of the commands: train, calibrate, evaluate, optimize, export and doctor."""

from earlyexit_ssd.pipeline.evaluate import evaluate_model
from earlyexit_ssd.pipeline.train import train

__all__ = ["evaluate_model", "train"]
