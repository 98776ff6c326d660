"""What a lens and a sensor add: uneven light, tint, contrast, blur and noise."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter


def uneven_light(generator: Generator, size: int, strength: float) -> np.ndarray:
    """A smooth field of brightness factors around 1, float32 [size, size]."""
    coarse = generator.uniform(1 - strength, 1 + strength, (4, 4)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def develop(image: Image.Image, generator: Generator) -> Image.Image:
    """The photo that a camera would take of ``image`` (RGB, square); the size stays."""
    size = image.width
    if generator.uniform() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0.3, 0.9)))
    pixels = np.asarray(image).astype(np.float32)
    tint = generator.normal(1.0, 0.05, 3).astype(np.float32)
    contrast, exposure = generator.uniform(0.8, 1.15), generator.uniform(0.75, 1.15)
    pixels = ((pixels - 128) * contrast + 128) * (tint * exposure)
    pixels *= uneven_light(generator, size, 0.22)[:, :, None]
    sigma = generator.uniform(0.5, 3.0)
    # Grey noise: one value for all three channels.
    grain = generator.standard_normal((size, size, 1), dtype=np.float32) * sigma
    pixels += grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
