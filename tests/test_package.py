"""Public names are imported on first use, and torchvision knows the builders."""

import subprocess
import sys

import pytest

import earlyexit_ssd

# Each folder is the first import in a child process, which shares the imports that do not need torchvision.
IMPORT_EACH_FOLDER_FIRST = """
import gc, os, pkgutil, sys
import earlyexit_ssd
assert not {"torch", "numpy"} & set(sys.modules)
gc.disable()  # for speed
import albumentations, matplotlib.pyplot, pycocotools.coco, scipy.stats, torch._dynamo, torch.onnx.symbolic_opset11
assert "torchvision" not in sys.modules
for folder in [module.name for module in pkgutil.iter_modules(earlyexit_ssd.__path__) if module.ispkg]:
    child = os.fork()
    if not child:
        __import__(f"earlyexit_ssd.{folder}")
        if folder == "modeling":  # the routing of a model file loads with it alone
            router = earlyexit_ssd.modeling.EarlyExitSSDLite.from_pretrained("chair").router
            assert router.policy == "max_foreground"
        import torchvision
        torchvision.models.get_model_builder("earlyexit_ssdlite320_mobilenet_v3_large")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, folder
    print(folder)
"""


def test_every_public_name_exists():
    for name in earlyexit_ssd.__all__:
        assert getattr(earlyexit_ssd, name) is not None and name in dir(earlyexit_ssd)
    with pytest.raises(AttributeError, match="has no attribute 'ExitRooter'"):
        _ = earlyexit_ssd.ExitRooter


def test_builders_are_registered_whichever_folder_is_imported_first():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_FOLDER_FIRST], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert {"data", "modeling", "pipeline"} < set(result.stdout.split())
