"""Mixup and CutMix: two examples in one, with the labels of both.

The partner of the example at position i of the global batch is the one at i XOR 1, its neighbour
in a pair. The order of examples is random, so it is a random other one; and where devices have an
even number of examples each, partners are on the same device. So the number of devices and of
processes changes nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from train.data.augment import MIX, stream


def mix(
    images: Float[Array, "b h w c"],
    targets: Float[Array, "b classes"],
    keys: Key[Array, " b"],
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Blends each image with its partner's, or puts a rectangle of that one's into it.

    Each example draws its own share lambda from Beta(alpha, alpha). With both kinds, each example
    takes one or the other with probability 1/2.

    Args:
      images: a batch that begins at an even position, of an even number of examples.
      targets: probabilities of the classes.
      keys: one an example.
      mixup: alpha of Mixup, 0 for none.
      cutmix: alpha of CutMix, 0 for none.

    Returns:
      The images, and the targets in proportion to the two images' parts in each.

    References:
      Zhang et al., mixup: Beyond Empirical Risk Minimization (ICLR 2018); Yun et al., CutMix
      (ICCV 2019), whose rectangle is cut off at the border and lambda made to fit what is left.
    """
    if not (mixup or cutmix):
        return images, targets
    height, width = images.shape[1:3]
    shape = height, width

    def own_weights(key: Key[Array, ""]) -> Float[Array, "h w"]:
        """How much of each pixel is the example's own."""
        choice_key, blend_key, cut_key = jax.random.split(key, 3)
        if not cutmix:
            return _blend(blend_key, shape, mixup)
        if not mixup:
            return _cut(cut_key, shape, cutmix)
        blend, cut = _blend(blend_key, shape, mixup), _cut(cut_key, shape, cutmix)
        return jnp.where(jax.random.bernoulli(choice_key), blend, cut)

    weights = jax.vmap(own_weights)(stream(keys, MIX))
    own = weights[..., None].astype(images.dtype)
    share = weights.mean((1, 2))[:, None]
    return (
        own * images + (1 - own) * partners(images),
        share * targets + (1 - share) * partners(targets),
    )


def partners(batch: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Each example's partner, in its place."""
    pairs = batch.reshape(batch.shape[0] // 2, 2, *batch.shape[1:])
    return pairs[:, ::-1].reshape(batch.shape)


def _blend(key: Key[Array, ""], shape: tuple[int, int], alpha: float) -> Float[Array, "h w"]:
    return jnp.broadcast_to(jax.random.beta(key, alpha, alpha), shape)


def _cut(key: Key[Array, ""], shape: tuple[int, int], alpha: float) -> Float[Array, "h w"]:
    share_key, place_key = jax.random.split(key)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    middle = jax.random.uniform(place_key, (2,))

    def inside(axis: int) -> Bool[Array, " n"]:
        pixels = jnp.arange(shape[axis]) + 0.5
        return jnp.abs(pixels - middle[axis] * shape[axis]) < side * shape[axis] / 2

    return 1.0 - (inside(0)[:, None] & inside(1)[None, :])
