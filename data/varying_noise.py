"""Noise that makes some examples of a dataset harder than others."""

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import require


def with_varying_noise(content: Content, most: float) -> Content:
    """clip(x + s z, 0, 1) of each image x in [0, 1], with z normal for each pixel and one s for the image, uniform in
    [0, most]; both drawn once, by the place of the image in its split. With `most` 0 the content itself.

    How hard an example is varies with s alone, evenly from what it was to what `most` makes of it: what a network that
    spends more on harder examples is measured on. Clipped, since encoders of spikes and 8-bit images read values as
    fractions of the brightest; so noise on a black background is half of a normal one. Images of 8 bits stay such.
    """
    require(most >= 0, f"noise_up_to={most} must be at least 0")
    if most == 0:
        return content
    splits = []
    for number, arrays in enumerate((content.train, content.test)):
        inputs = arrays["inputs"]
        whole = 255 if inputs.dtype == np.uint8 else 1
        rng = np.random.default_rng([0, number])
        deviation = rng.uniform(0, most, (len(inputs), *(1,) * (inputs.ndim - 1))).astype(np.float32)
        noisy = np.clip(inputs / np.float32(whole) + deviation * rng.standard_normal(inputs.shape, np.float32), 0, 1)
        noisy = np.round(noisy * whole).astype(np.uint8) if whole == 255 else noisy.astype(inputs.dtype)
        splits.append({**arrays, "inputs": noisy})
    return Content(content.kind, *splits, content.info)
