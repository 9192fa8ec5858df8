"""Pictures made of noise that decode and shrink like photographs, for measuring where there are none."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

# (width, height) in pixels: of ImageNet's training photographs, most are 500 pixels wide or high.
SIZES = ((500, 375), (500, 333), (375, 500), (500, 400), (333, 500), (640, 480), (500, 500), (800, 600))


def photo_like(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8: noise whose amplitude falls with the frequency as in photographs, and some edges.

    Amplitudes that fall as 1/f are what natural scenes have (Field 1987, "Relations between the statistics of natural
    images and the response properties of cortical cells").
    """
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    f[0, 0] = np.inf
    common, *own = (np.fft.irfft2(_spectrum(f, rng), (height, width)) for _ in range(4))
    planes = np.stack([common + 0.3 * plane for plane in own], axis=-1)
    y, x = np.mgrid[:height, :width]
    for _ in range(8):
        cx, cy, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.05, 0.3) * min(width, height)
        inside = np.hypot(x - cx, y - cy) < radius
        planes[inside] += rng.normal(0, planes.std(), 3)
    scaled = 127 + 50 * (planes - planes.mean()) / planes.std()
    return np.clip(scaled, 0, 255).astype(np.uint8)


def _spectrum(f: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.normal(size=f.shape) + 1j * rng.normal(size=f.shape)) / f


def jpeg_of(pixels: np.ndarray, **options: object) -> bytes:
    """A JPEG file of (H, W, 3) or (H, W) uint8. options: Pillow's, such as ``quality`` and ``subsampling``."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()
