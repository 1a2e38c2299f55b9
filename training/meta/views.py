"""Random views of images, made inside the step: two of each image, which no pipeline of one view an example gives."""

import math

import jax
import jax.numpy as jnp

TURN = math.pi / 12
ZOOM = 0.3  # of the logarithm of the size, which is a factor of 0.74 to 1.35
SHEAR = 0.2
SHIFT = 0.125  # of the side
CONTRAST = 0.4
ERASED = 0.3  # of the side: the longest edge of the rectangle


def views(images: jax.Array, key: jax.Array, strength: float = 1.0) -> jax.Array:
    """images [B, H, W, C] -> one view of each, same shape, each by a key of its own.

    An image is turned, zoomed, sheared and shifted about its middle, every amount uniform within +- strength times
    `TURN`, `ZOOM` (of the logarithm), `SHEAR`, `SHIFT`; multiplied by 1 +- strength `CONTRAST`; and a rectangle, whose
    edges are uniform up to strength `ERASED` of the sides, becomes 0. Strength 0 is the identity.

    BECLR's views are crops, colours, greys, blurs, flips and masked patches of photographs; letters have one channel,
    and mirrored or cropped far they are other letters. These are ours.
    """
    return jax.vmap(lambda image, key: _view(image, key, strength))(images, jax.random.split(key, len(images)))


def _view(image: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    size = jnp.array(image.shape[:2], jnp.float32)
    keys = jax.random.split(key, 4)
    turn, zoom, shear, contrast = strength * jax.random.uniform(keys[0], (4,), minval=-1.0)
    shift = strength * SHIFT * size * jax.random.uniform(keys[1], (2,), minval=-1.0)
    cos, sin = jnp.cos(TURN * turn), jnp.sin(TURN * turn)
    turned = jnp.array([[cos, -sin], [sin, cos]]) @ jnp.array([[1.0, 0.0], [SHEAR * shear, 1.0]])
    seen = warped(image, jnp.exp(-ZOOM * zoom) * turned, shift)
    edges = strength * ERASED * size * jax.random.uniform(keys[2], (2,))
    corner = (size - edges) * jax.random.uniform(keys[3], (2,))
    return (1 + CONTRAST * contrast) * erased(seen, corner, edges)


def warped(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """y[p] = x[matrix (p - middle) + middle - shift] for the places p of an image [H, W, C], bilinear, 0 outside."""
    sides = image.shape[:2]
    middle = (jnp.array(sides, jnp.float32) - 1) / 2
    places = jnp.stack(jnp.meshgrid(*(jnp.arange(side, dtype=jnp.float32) for side in sides), indexing="ij"), -1)
    origins = jnp.matmul(places - middle, matrix.T, precision="highest") + middle - shift
    coordinates = [origins[..., 0], origins[..., 1]]
    look_up = lambda plane: jax.scipy.ndimage.map_coordinates(plane, coordinates, order=1, mode="constant")
    return jax.vmap(look_up, -1, -1)(image)


def erased(image: jax.Array, corner: jax.Array, edges: jax.Array) -> jax.Array:
    """The image [H, W, C] with 0 in the places p with corner <= p < corner + edges on both axes."""
    inside = [
        (jnp.arange(side) >= corner[axis]) & (jnp.arange(side) < corner[axis] + edges[axis])
        for axis, side in enumerate(image.shape[:2])
    ]
    return jnp.where((inside[0][:, None] & inside[1][None])[..., None], 0.0, image)
