"""Packaging of earlyexit_ssd."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
RUNTIME = ["numpy", "onnxruntime", "pillow", "tqdm"]

setup(
    name="earlyexit_ssd",
    version="0.1.0",
    description="Faster torchvision SSDLite detectors on CPUs: early exits, and a search for what to ship",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=find_packages(include=["earlyexit_ssd", "earlyexit_ssd.*"]),
    py_modules=["earlyexit_command"],
    entry_points={"console_scripts": ["earlyexit = earlyexit_command:main"]},
    package_data={
        "earlyexit_ssd": ["py.typed", "config/defaults.yaml", "report/page.[chj]*", "weights/*.pth", "weights/*.json"]
    },
    install_requires=[
        "torch",
        "torchvision>=0.21,<0.30",
        "numpy",
        "onnx>=1.21",  # refuses external weights outside the folder of a file
        "onnxruntime",
        "scipy",
        "pillow>=10.1",
        "pycocotools>=2.0.7",
        "fvcore",
        "albumentations>=2.0,<3",
        "opencv-python-headless",
        "pyyaml",
        "matplotlib>=3.6",
        "plotly>=6",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "runtime": RUNTIME,  # all that earlyexit_ssd.deploy needs, with pip install --no-deps (docs/deploy.md)
        "int8": ["nncf", "openvino"],  # 8 bits in OpenVINO
        "dev": ["nncf", "pytest", "pytest-xdist", "hypothesis", "playwright", "ruff"],
        "docs": ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27,<2"],
    },
)
