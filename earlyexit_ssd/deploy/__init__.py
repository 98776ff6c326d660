"""Run an exported detector: numpy and ONNX Runtime or OpenVINO; PyTorch is not imported."""

from earlyexit_ssd.deploy.predictor import Detections, Predictor

__all__ = ["Detections", "Predictor"]
