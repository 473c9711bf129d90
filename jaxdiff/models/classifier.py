"""The noise-aware classifier: the U-Net's way down and middle (`unet.Trunk`), then attention pooling."""

from typing import Any

import flax.linen as nn
import jax

from jaxdiff.models.parts import AttentionPool
from jaxdiff.models.unet import Part, Trunk

Array = jax.Array


class Classifier(Trunk):
    """What a noisy image is of: (x [B, *space, C] at unit scale, logsnr [] or [B, 1, ..., 1]) -> logits, float32 [B, classes].

    Its parameters are for images of one size. A condition is not read; `train` turns on dropout. Raises ValueError where a size
    does not divide. Source: Dhariwal and Nichol 2021 (ADM), section 4 and table 12, with the parts `ADMBlock` and `ADMBlockDown`;
    the default ones are Ho et al.'s.
    """

    pool: Part = AttentionPool

    @nn.compact
    def __call__(self, x: Array, logsnr: Array, cond: Any = None, train: bool = False) -> Array:
        embedding = self.hear(x, logsnr, None, 0, 0)
        h = self.middle(self.descend(x, logsnr, embedding, train)[-1], embedding, train)
        return self.inline(self.pool(self.classes, self.heads, self.dtype))(h)


def features(model: nn.Module, params: Any, x: Array, logsnr: Array) -> tuple[Array, Array]:
    """(what the logits are a linear map of, float32 [B, channels]; the logits, float32 [B, classes])."""
    logits, kept = model.apply(params, x, logsnr, mutable="intermediates")
    return kept["intermediates"]["features"][0], logits
