"""A rendered data set of indoor scenes with chairs, for a first run without any download."""

from earlyexit_ssd.data.synthetic.dataset import ensure_synthetic
from earlyexit_ssd.data.synthetic.scene import render_scene

__all__ = ["ensure_synthetic", "render_scene"]
