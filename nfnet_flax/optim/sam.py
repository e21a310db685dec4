"""Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412), as the published NFNet-F6 was trained with."""

import dataclasses

import jax
import jax.numpy as jnp

from nfnet_flax.config import check_types, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAMConfig:
    """Sharpness-aware minimization: the gradient is computed at parameters that were moved a short way uphill."""

    rho: float = 0.05
    """Length of the step uphill, as an L2 norm over all parameters that are trained."""
    fraction: float = 0.2
    """Share of each microbatch (its first rows) from which the direction uphill is computed; a fifth takes 20 to 40%
    more time than a step without SAM. In the fast mode the rows of several microbatches are computed together. With
    `execution.reproducible` they are not, so few rows in each take more time than that on an accelerator."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.rho > 0, "optim.sam.rho", self.rho, "must be positive; sam None turns it off")
        require(0 < self.fraction <= 1, "optim.sam.fraction", self.fraction, "must lie in (0, 1]")


def ascend(
    params: dict[str, jax.Array], gradient: dict[str, jax.Array], norm: jax.Array, *, rho: float
) -> dict[str, jax.Array]:
    """Parameters moved by `rho` along the gradient, whose L2 norm is `norm` (equation 2). Parameters without a gradient
    do not change."""
    scale = rho / jnp.maximum(norm, 1e-12)
    return params | {name: params[name] + scale * value for name, value in gradient.items()}
