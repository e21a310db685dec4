"""The published optimizer: AGC, weight decay, Nesterov momentum, warm-up and cosine; and the parameters' EMA.

EfficientNet's, RMSProp with a learning rate that falls in steps, is here for the baselines.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from nfnet_flax.config import MAX_COUNT, check_types, require
from nfnet_flax.optim.agc import adaptive_grad_clip
from nfnet_flax.optim.param_groups import ParamGroup, assign
from nfnet_flax.optim.sam import SAMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSPropConfig:
    """RMSProp as TensorFlow computes it (arXiv 1905.11946, section 5.2)."""

    decay: float = 0.9
    """Of the average of squared gradients, which starts at 1."""
    eps: float = 1e-3
    """Added to that average, under the root."""

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.decay < 1, "optim.rmsprop.decay", self.decay, "must lie in [0, 1)")
        require(self.eps > 0, "optim.rmsprop.eps", self.eps, "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialDecayConfig:
    """A learning rate that falls in equal ratios (arXiv 1905.11946, section 5.2)."""

    factor: float = 0.97
    """Ratio of one fall."""
    every_epochs: float = 2.4
    """Epochs between falls, counted from the beginning of the run."""

    def __post_init__(self) -> None:
        check_types(self)
        require(0 < self.factor <= 1, "optim.exponential_decay.factor", self.factor, "must lie in (0, 1]")
        require(self.every_epochs > 0, "optim.exponential_decay.every_epochs", self.every_epochs, "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Numbers of the optimizer (arXiv 2102.06171, section 4 and appendix A)."""

    learning_rate_per_256: float = 0.1
    """Peak learning rate for a batch of 256; it grows linearly with the batch size."""
    warmup_epochs: float = 5.0
    """Length of the linear warm-up from 0, whatever the length of the run."""
    final_learning_rate: float = 0.0
    """Where the cosine ends, whatever the batch size; without meaning, and so 0, with `exponential_decay`."""
    exponential_decay: ExponentialDecayConfig | None = None
    """In place of the cosine; None: cosine."""
    momentum: float = 0.9
    """Nesterov momentum; with `rmsprop`, plain momentum of the steps."""
    rmsprop: RMSPropConfig | None = None
    """Divides gradients by their running root mean square; None: momentum alone."""
    clipping: float | None = 0.01
    """AGC's lambda; None turns AGC off. The published 0.01 is for batch 4096: smaller batches want a larger one."""
    clipping_eps: float = 1e-3
    """Lower bound of a unit's parameter norm in AGC; not used where AGC is off."""
    clipping_groups: tuple[ParamGroup, ...] = (ParamGroup("head.kernel", 0.0), ParamGroup("*", 1.0))
    """1 clips a parameter, 0 exempts it; the first pattern that matches counts. Not used where AGC is off."""
    weight_decay: float = 2e-5
    """Coefficient of `weight_decay * parameter`, added after clipping."""
    weight_decay_groups: tuple[ParamGroup, ...] = (
        ParamGroup("*.bias", 0.0),
        ParamGroup("*gain", 0.0),
        ParamGroup("*", 1.0),
    )
    """Factor on `weight_decay`; the first pattern that matches counts."""
    ema_decay: float = 0.99999
    """Of the moving average of the parameters; at step t it is at most (1 + t) / (10 + t)."""
    sam: SAMConfig | None = None
    """Sharpness-aware minimization, as the published F6 was trained with; None: off."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("learning_rate_per_256", "clipping_eps"):
            require(getattr(self, name) > 0, f"optim.{name}", getattr(self, name), "must be positive")
        for name in ("warmup_epochs", "final_learning_rate", "weight_decay"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must not be negative")
        for name in ("momentum", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)")
        if self.clipping is not None:
            require(self.clipping > 0, "optim.clipping", self.clipping, "must be positive; None turns AGC off")
        require(
            self.exponential_decay is None or self.final_learning_rate == 0,
            "optim.final_learning_rate",
            self.final_learning_rate,
            "only a cosine ends there: give 0, or optim.exponential_decay = None",
        )
        for group in self.clipping_groups:
            require(group.value in (0, 1), "optim.clipping_groups", group, "use 1 (clip) or 0 (exempt)")


def learning_rate_schedule(peak: float, *, warmup_steps: int, num_steps: int, final: float = 0.0) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup_steps`, then half a cosine to `final` at `num_steps`; steps count from 0."""

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / max(num_steps - warmup_steps, 1), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, peak * (step / max(warmup_steps, 1)), final + (peak - final) * cosine)

    return schedule


def exponential_schedule(peak: float, *, warmup_steps: int, steps_per_fall: float, factor: float) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup_steps`; from then on `peak * factor ** floor(step / steps_per_fall)`."""

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        falls = jnp.floor(step / steps_per_fall)
        return peak * jnp.where(step < warmup_steps, step / max(warmup_steps, 1), factor**falls)

    return schedule


def make_schedule(config: OptimConfig, *, batch_size: int, steps_per_epoch: float, num_steps: int) -> optax.Schedule:
    """The learning rate of a run, as a function of the step counted from 0.

    The warm-up does not depend on `num_steps`: a run that ends within it ends below the peak.

    Raises:
      ConfigError: the warm-up has more steps than can be counted.
    """
    peak = config.learning_rate_per_256 * batch_size / 256
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    remedy = f"these are {warmup_steps:.3g} steps: give at most {MAX_COUNT:,} steps"
    require(warmup_steps <= MAX_COUNT, "optim.warmup_epochs", config.warmup_epochs, remedy)
    if config.exponential_decay is not None:
        decay = config.exponential_decay
        steps_per_fall = decay.every_epochs * steps_per_epoch
        return exponential_schedule(peak, warmup_steps=warmup_steps, steps_per_fall=steps_per_fall, factor=decay.factor)
    return learning_rate_schedule(
        peak, warmup_steps=warmup_steps, num_steps=num_steps, final=config.final_learning_rate
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """All that makes an update of a gradient. `init` and `update` are those of an Optax transformation."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateExtraArgsFn
    schedule: optax.Schedule
    """The learning rate of a step counted from 0, as the metrics show it."""
    ema_decay: float
    """Decay of the moving average of the parameters."""
    sam: SAMConfig | None
    """Sharpness-aware minimization; None: off."""


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, names: Iterable[str]) -> Optimizer:
    """Clip, decay, Nesterov momentum, learning rate: in this order, as published.

    With RMSProp, the last two change places, as in TensorFlow: clip, decay, RMSProp, learning rate, momentum.

    Args:
      config: the numbers.
      schedule: learning rate of a step counted from 0.
      names: of the network's parameters.

    Raises:
      ConfigError: a group of the configuration matches no parameter or leaves one out.
    """
    names = list(names)
    parts: list[optax.GradientTransformation] = []
    if config.clipping is not None:
        clipped = assign("optim.clipping_groups", config.clipping_groups, names)
        mask = {name: value == 1 for name, value in clipped.items()}
        parts.append(adaptive_grad_clip(config.clipping, eps=config.clipping_eps, mask=mask))
    decay = assign("optim.weight_decay_groups", config.weight_decay_groups, names)

    def add_decay(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        return {
            name: gradient + config.weight_decay * decay[name] * params[name] if decay[name] else gradient
            for name, gradient in updates.items()
        }

    parts.append(optax.stateless(add_decay))
    if config.rmsprop is None:
        parts += [optax.trace(decay=config.momentum, nesterov=True), optax.scale_by_learning_rate(schedule)]
    else:
        root_mean_square = optax.scale_by_rms(
            config.rmsprop.decay, config.rmsprop.eps, initial_scale=1.0, eps_in_sqrt=True
        )
        parts += [root_mean_square, optax.scale_by_learning_rate(schedule), optax.trace(decay=config.momentum)]
    init, update = optax.with_extra_args_support(optax.chain(*parts))  # without AGC, too, `unit_norms` may be given
    return Optimizer(init, update, schedule, config.ema_decay, config.sam)


def update_ema(
    ema: dict[str, jax.Array], params: dict[str, jax.Array], step: jax.Array, decay: float
) -> dict[str, jax.Array]:
    """Moving average after the update at `step` (counted from 0), with the published warm-up of its decay.

    Whole numbers (BatchNorm's counts) are copied.
    """
    count = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return {
        name: rate * ema[name] + (1.0 - rate) * value if jnp.issubdtype(value.dtype, jnp.floating) else value
        for name, value in params.items()
    }
