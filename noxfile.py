"""The tests with the oldest and the newest torchvision that is supported: ``pip install nox && nox``."""

import nox

nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize("torchvision", ["0.21.0", "0.29.2"])
def tests(session: nox.Session, torchvision: str) -> None:
    """pip chooses the torch that belongs to this torchvision."""
    session.install("-e", ".[dev]", f"torchvision=={torchvision}")
    session.run("python", "-c", "import torch, torchvision; print(torch.__version__, torchvision.__version__)")
    session.run("pytest", *session.posargs)
