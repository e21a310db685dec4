"""How gradients are clipped before the optimization method uses them: one frozen configuration for each way.

To add a way of clipping, derive a frozen dataclass from `Clipping`.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nfnet_flax.config import require
from nfnet_flax.open_config import OpenConfig, declare_kinds
from nfnet_flax.optim.agc import AdaptiveGradClipState, adaptive_grad_clip, unit_ratios
from nfnet_flax.optim.param_groups import ParamGroup, assign, require_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipping(OpenConfig, abc.ABC):
    """Base class of a recipe's `optim.clipping`."""

    @property
    def is_divisible(self) -> bool:
        """Whether a device can be given a part of each kernel, some of its input channels, and its update is then that
        part of the whole update. If not, which is the default, every device has whole kernels and makes the whole
        update."""
        return False

    @abc.abstractmethod
    def transformation(self, names: Sequence[str]) -> optax.GradientTransformationExtraArgs:
        """An Optax transformation of gradients, `{name: array}`.

        Its update may use numbers that the step has already computed. They are passed as keyword arguments:
        `unit_norms`, see `adaptive_grad_clip`; and `global_norm`, the L2 norm over all gradients that are passed to the
        update.

        Args:
          names: names of all parameters of the network. Parameters that are not trained are not passed to the
            transformation.

        Raises:
          ConfigError: the numbers do not fit the network.
        """

    def clipped(self, names: Sequence[str]) -> frozenset[str]:
        """Names of the parameters whose gradients may be clipped; `names` are those of all parameters of the
        network."""
        return frozenset(names)

    def metrics(self, state: Any) -> dict[str, jax.Array]:
        """Metrics that are read from the transformation's state after an update: name -> scalar."""
        del state
        return {}

    def unit_ratios(
        self,
        names: Sequence[str],
        gradient: Mapping[str, jax.Array],
        params: Mapping[str, jax.Array],
        unit_norms: Mapping[str, tuple[jax.Array, jax.Array] | None],
    ) -> dict[str, jax.Array]:
        """What is shown of each unit, if the gradient is clipped by units: name of a parameter -> the ratio of its
        gradient's norm to its own, (units,); by default nothing.

        Args:
          names: names of all parameters of the network.
          gradient: before clipping.
          params: the parameters.
          unit_norms: as for `adaptive_grad_clip`.
        """
        del names, gradient, params, unit_norms
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AGC(Clipping):
    """Adaptive gradient clipping: limits a unit's gradient by the norm of its parameters (arXiv 2102.06171, equation
    3).

    The metric `agc/clipped_fraction` is the share of units whose gradient was scaled down.
    """

    is_divisible = True

    ratio: float = 0.01
    """Largest norm of a unit's gradient, as a share of the norm of its parameters: lambda in the paper. The published
    0.01 is for batch 4096; smaller batches need a larger value."""
    eps: float = 1e-3
    """Lower bound of the norm of a unit's parameters, without which units that start at zero would never change."""
    groups: tuple[ParamGroup, ...] = dataclasses.field(
        default=(ParamGroup("head.kernel", 0.0), ParamGroup("*", 1.0)), repr=False
    )
    """Patterns of parameter names, each with 1 (the gradient is clipped) or 0 (it is not); the first pattern that
    matches a name counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ratio > 0, "optim.clipping.ratio", self.ratio, "must be positive; clipping None turns it off")
        require(self.eps > 0, "optim.clipping.eps", self.eps, "must be positive")
        require_flags("optim.clipping.groups", self.groups, "use 1 (clip) or 0 (exempt)")

    def transformation(self, names: Sequence[str]) -> optax.GradientTransformationExtraArgs:
        clipped = self.clipped(names)
        return adaptive_grad_clip(
            self.ratio, eps=self.eps, mask=lambda params: {name: name in clipped for name in params}
        )

    def clipped(self, names: Sequence[str]) -> frozenset[str]:
        flags = assign("optim.clipping.groups", self.groups, names)
        return frozenset(name for name, flag in flags.items() if flag)

    def metrics(self, state: AdaptiveGradClipState) -> dict[str, jax.Array]:
        return {"agc/clipped_fraction": state.clipped_fraction}

    def unit_ratios(
        self,
        names: Sequence[str],
        gradient: Mapping[str, jax.Array],
        params: Mapping[str, jax.Array],
        unit_norms: Mapping[str, tuple[jax.Array, jax.Array] | None],
    ) -> dict[str, jax.Array]:
        return unit_ratios(gradient, params, unit_norms, self.clipped(names), eps=self.eps)


class GlobalNormState(NamedTuple):
    """A measurement of the last update; it does not influence the next one."""

    was_clipped: jax.Array
    """float32: 1 if the gradient was scaled down, else 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalNorm(Clipping):
    """Scales the whole gradient down if its norm exceeds a limit (arXiv 1211.5063).

    The metric `global_norm/clipped` is 1 if the gradient was scaled down, else 0.
    """

    is_divisible = True

    max_norm: float = 1.0
    """Largest allowed L2 norm over the gradients of all parameters that are trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_norm > 0, "optim.clipping.max_norm", self.max_norm, "must be positive; clipping None turns it off"
        )

    def transformation(self, names: Sequence[str]) -> optax.GradientTransformationExtraArgs:
        # Not `optax.clip_by_global_norm`, which needs a pass over all gradients for the norm that the step already
        # knows.
        del names

        def init(params: optax.Params) -> GlobalNormState:
            del params
            return GlobalNormState(jnp.zeros((), jnp.float32))

        def update(
            updates: optax.Updates,
            state: GlobalNormState,
            params: optax.Params | None = None,
            *,
            global_norm: jax.Array | None = None,
            **extra_args: Any,
        ) -> tuple[optax.Updates, GlobalNormState]:
            del state, params, extra_args  # the last are for other transformations of a chain
            norm = optax.tree.norm(updates) if global_norm is None else global_norm
            is_too_large = norm > self.max_norm
            factor = jnp.where(is_too_large, self.max_norm / norm, 1.0)
            scaled = jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), updates)
            return scaled, GlobalNormState(is_too_large.astype(jnp.float32))

        return optax.GradientTransformationExtraArgs(init, update)

    def metrics(self, state: GlobalNormState) -> dict[str, jax.Array]:
        return {"global_norm/clipped": state.was_clipped}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipValue(Clipping):
    """Limits each element of the gradient to [-max_abs, max_abs]."""

    is_divisible = True

    max_abs: float = 0.01
    """Largest allowed absolute value of an element."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_abs > 0, "optim.clipping.max_abs", self.max_abs, "must be positive; clipping None turns it off"
        )

    def transformation(self, names: Sequence[str]) -> optax.GradientTransformationExtraArgs:
        del names
        return optax.with_extra_args_support(optax.clip(self.max_abs))


declare_kinds(Clipping, AGC, GlobalNorm, ClipValue)
