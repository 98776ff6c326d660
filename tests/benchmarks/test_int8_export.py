import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.int8_export import average_precision, main, quantised
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.pipeline.export import WRITERS
from tests.deploy.conftest import build_model, build_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for place, photo in enumerate(build_photos(6)):
        Image.fromarray(photo).save(folder / f"{place}.jpg", quality=95)
    return sorted(folder.iterdir())


def convolutions_in_float(parts) -> list[str]:
    ((_, segment),) = parts.segments
    made = segment.model
    rounded = {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
    return [node.name for node in made.graph.node if node.op_type == "Conv" and node.input[0] not in rounded]


def test_all_convolutions_are_quantised_but_those_that_are_named(photos, tmp_path):
    model = build_model()
    with torch.no_grad():
        everything, without_head = (quantised(model, photos, "QUInt8", part) for part in ([], ["head"]))
    assert convolutions_in_float(everything) == []
    left = convolutions_in_float(without_head)
    assert left and all("head" in name for name in left)
    WRITERS["onnx"](everything, tmp_path / "int8.onnx")
    found = Predictor(tmp_path / "int8.onnx")(np.array(Image.open(photos[0])))
    assert found.exit_name == "full" and np.isfinite(found.boxes).all()


def test_average_precision_of_the_answers_themselves_is_one(photos, tmp_path):
    class Known:
        classes = ("cat",)

        def __call__(self, image):
            found = {"class_names": ["cat"], "scores": [0.9], "boxes": np.array([[2.0, 3.0, 22.0, 33.0]])}
            return type("Found", (), found)

    rows = [{"id": place, "file_name": path.name, "width": 96, "height": 96} for place, path in enumerate(photos)]
    box = {"category_id": 17, "bbox": [2, 3, 20, 30], "area": 600, "iscrowd": 0}
    truth = [{"id": place + 1, "image_id": place, **box} for place in range(len(photos))]
    listed = {
        "images": rows,
        "annotations": truth,
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(listed))
    assert average_precision(Known(), photos[0].parent, str(tmp_path / "truth.json")) == (1.0, 1.0)


def test_the_script_writes_a_file_that_runs(photos, tmp_path, capsys):
    build_model(exit_layers=(8,)).save(tmp_path / "model.pth")
    out = tmp_path / "int8.onnx"
    assert main([str(tmp_path / "model.pth"), "--out", str(out), "--photos", str(photos[0].parent)]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(out) and Predictor(out).exit_names[-1] == "full"
