"""What is exported is tested by what runs it, too."""

from tests.deploy.conftest import folder, model, onnx_file, photos, staged_folder

__all__ = ["folder", "model", "onnx_file", "photos", "staged_folder"]
