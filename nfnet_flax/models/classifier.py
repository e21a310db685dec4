"""What every network shares: features, pool, dropout, dense head, and the statistics of its signal."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import check_types, require
from nfnet_flax.models import layers
from nfnet_flax.models.layers import AnyRngs, ComputeDtype, Dense

HEAD_NORMAL = nnx.initializers.normal(0.01)


class Classifier(nnx.Module):
    """Stem, residual blocks, a last transformation, mean pool, dropout, dense head.

    Call it in training mode (`model.train()`, the state after construction) or evaluation mode (`model.eval()`). A
    family sets `stages` (lists of blocks that map `(x, keys)` to `(y, residual branch)`), calls `_add_head`, and says
    what comes before and after the blocks in `_stem` and `_final`.
    """

    stages: nnx.List
    config: Any

    def _add_head(
        self,
        num_features: int,
        num_classes: int,
        *,
        kernel_init: nnx.Initializer,
        drop_rate: float,
        compute_dtype: ComputeDtype,
        rngs: AnyRngs,
    ) -> None:
        self.head = Dense(num_features, num_classes, kernel_init=kernel_init, compute_dtype=compute_dtype, rngs=rngs)
        self.num_features = num_features
        self.num_classes = num_classes
        self.num_blocks = sum(len(stage) for stage in self.stages)
        self.drop_rate = drop_rate
        self.compute_dtype: ComputeDtype = compute_dtype
        self.deterministic = False

    def _stem(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _final(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Pooled features before dropout.

        Args:
          images: (N, H, W, 3) normalised images.
          keys: (N,) PRNG keys, one per example (`example_keys`); needed in training mode with stochastic depth.

        Returns:
          (N, num_features) float32 (float64 under float64 compute).
        """
        x = self._stem(images.astype(layers.DTYPES[self.compute_dtype]))
        for stage in self.stages:
            for block in stage:
                x, _ = block(x, keys)
        x = self._final(x)
        return jnp.mean(x, axis=(1, 2), dtype=layers.statistics_dtype(x.dtype))

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Class logits.

        Args:
          images: (N, H, W, 3) normalised images.
          keys: (N,) PRNG keys, one per example; needed in training mode with dropout or stochastic depth.

        Returns:
          (N, num_classes) float32 (float64 under float64 compute).

        Raises:
          ValueError: keys are needed and missing.
        """
        pooled = self.features(images, keys)
        if self.drop_rate > 0 and not self.deterministic:
            pooled = layers.dropout(pooled, self.drop_rate, layers.layer_keys(keys, self.num_blocks))
        logits = self.head(pooled)
        return logits.astype(layers.statistics_dtype(logits.dtype))

    def signal_statistics(self, images: jax.Array, keys: jax.Array | None = None) -> dict[str, jax.Array]:
        """How the signal grows with depth (the "signal propagation plot" of arXiv 2101.08692, section 3).

        Args:
          images: (N, H, W, 3) normalised images.
          keys: as for a call.

        Returns:
          float32 arrays over depth: `avg_sq_mean` and `avg_var` (num_blocks + 1,), the squared mean and the variance of
          each channel averaged over the channels, after the stem and after each block; `res_avg_var` (num_blocks,), the
          same variance of each block's residual branch, before stochastic depth and skip gain.
        """
        x = self._stem(images.astype(layers.DTYPES[self.compute_dtype]))
        outputs, branches = [x], []
        for stage in self.stages:
            for block in stage:
                x, branch = block(x, keys)
                outputs.append(x)
                branches.append(branch)
        wide = layers.statistics_dtype(x.dtype)
        outputs, branches = ([x.astype(wide) for x in tensors] for tensors in (outputs, branches))
        return {
            "avg_sq_mean": jnp.stack([jnp.mean(jnp.square(jnp.mean(x, axis=(0, 1, 2)))) for x in outputs]),
            "avg_var": jnp.stack([jnp.mean(jnp.var(x, axis=(0, 1, 2))) for x in outputs]),
            "res_avg_var": jnp.stack([jnp.mean(jnp.var(x, axis=(0, 1, 2))) for x in branches]),
        }


def check_network(config: Any) -> None:
    """Checks the types of a network's configuration, and the fields that several families have.

    Raises:
      ConfigError: a value is invalid; names the field, the value and the remedy.
    """
    check_types(config)
    for name in ("widths", "depths"):
        values = getattr(config, name)
        require(len(values) == 4, f"model.{name}", values, "give one number for each of the 4 stages")
        require(min(values) >= 1, f"model.{name}", values, "every stage needs at least one")
    for name in ("drop_rate", "stochdepth_rate"):
        rate = getattr(config, name, 0.0)
        require(0 <= rate < 1, f"model.{name}", rate, "must lie in [0, 1)")
    for name in ("expansion", "se_ratio", "group_width", "train_image_size", "test_image_size"):
        value = getattr(config, name, None)
        require(value is None or value > 0, f"model.{name}", value, "must be positive")
