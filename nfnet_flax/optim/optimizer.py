"""The optimizer of a run: clipping, a method, parameter groups and a learning rate; and the parameters' EMA.

The defaults are those published for NFNets: AGC, weight decay, Nesterov momentum, warm-up and cosine.
"""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from nfnet_flax.config import MAX_COUNT, ConfigError, check_types, require
from nfnet_flax.config_json import ADDED_LATER
from nfnet_flax.optim.clipping import AGC, Clipping
from nfnet_flax.optim.later import in_turn, start_steps
from nfnet_flax.optim.methods import SGD, Method
from nfnet_flax.optim.param_groups import ParamGroup, assign, layer_decay
from nfnet_flax.optim.sam import SAMConfig
from nfnet_flax.optim.schedules import Cosine, RunLength, Schedule

Value = TypeVar("Value")
_Arrays = Mapping[str, jax.Array]
_UnitNorms = Mapping[str, tuple[jax.Array, jax.Array] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters are updated. The defaults are published (arXiv 2102.06171, section 4 and appendix A)."""

    method: Method = dataclasses.field(default_factory=SGD)
    """Optimization method: how an update is computed from the gradient."""
    clipping: Clipping | None = dataclasses.field(default_factory=AGC)
    """How gradients are clipped before the method uses them; None: no clipping."""
    schedule: Schedule = dataclasses.field(default_factory=Cosine)
    """Learning rate after the warm-up."""
    learning_rate_per_256: float | None = 0.1
    """Peak learning rate for a batch of 256; the peak grows linearly with the batch size. Exactly one of this and
    `learning_rate` must be given; the other is None."""
    learning_rate: float | None = None
    """Peak learning rate, independent of the batch size; None if `learning_rate_per_256` is given."""
    warmup_epochs: float = 5.0
    """Length of the linear warm-up from 0, in epochs; it does not depend on the length of the run."""
    learning_rate_groups: tuple[ParamGroup, ...] = (ParamGroup("*", 1.0),)
    """Patterns of parameter names, each with a factor on the learning rate; the first pattern that matches a name
    counts. The factor 0 freezes a parameter: it does not change, and has no weight decay, gradient or momentum."""
    trained_from_epoch: tuple[ParamGroup, ...] = dataclasses.field(default=(), metadata=ADDED_LATER)
    """Patterns of parameter names, each with the epoch from which its parameters are trained; the first pattern that
    matches a name counts, and names of no pattern are trained from the start. Until then a parameter is frozen. With
    `head.*` at 0 and `*` at 2, the head is trained alone for two epochs."""
    layer_decay: float = 1.0
    """Further factor on the learning rate for each block between a parameter and the head, such as 0.75 for fine-tuning
    (`nfnet_flax.optim.layer_decay`)."""
    weight_decay: float = 2e-5
    """Coefficient of weight decay, `weight_decay * parameter`. With SGD and RMSProp this is added to the gradient after
    clipping; with the other methods it is decoupled, that is, multiplied by the learning rate only."""
    weight_decay_groups: tuple[ParamGroup, ...] = (
        ParamGroup("*.bias", 0.0),
        ParamGroup("*gain", 0.0),
        ParamGroup("*", 1.0),
    )
    """Patterns of parameter names, each with a factor on `weight_decay`; the first pattern that matches a name
    counts."""
    ema_decay: float = 0.99999
    """Decay rate of the moving average (EMA) of the parameters; at step t it is at most (1 + t) / (10 + t)."""
    sam: SAMConfig | None = None
    """Sharpness-aware minimization, as the published F6 was trained with; None: off."""

    moved_fields = MappingProxyType(
        {
            "momentum": ("method", "SGD"),
            "rmsprop": ("method", "RMSProp"),
            "clipping_eps": ("clipping", "AGC"),
            "clipping_groups": ("clipping", "AGC"),
            "final_learning_rate": ("schedule", "Cosine"),
            "exponential_decay": ("schedule", "ExponentialDecay"),
        }
    )
    """Field of earlier versions -> the field that replaces it, and the type that this must have. For messages."""

    def __post_init__(self) -> None:
        _refuse_number(self.clipping)
        check_types(self)
        for name, value in (
            ("learning_rate_per_256", self.learning_rate_per_256),
            ("learning_rate", self.learning_rate),
        ):
            require(value is None or value > 0, f"optim.{name}", value, "must be positive, or None")
        remedy = "give optim.learning_rate_per_256 or this, and None for the other"
        is_one = (self.learning_rate is None) != (self.learning_rate_per_256 is None)
        require(is_one, "optim.learning_rate", self.learning_rate, remedy)
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "must not be negative")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must not be negative")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "must lie in [0, 1)")
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "must lie in (0, 1]")
        for group in self.learning_rate_groups:
            require(group.value >= 0, "optim.learning_rate_groups", group, "must not be negative; 0 freezes")
        for group in self.trained_from_epoch:
            require(group.value >= 0, "optim.trained_from_epoch", group, "must not be negative")
        remedy = "needs all parameters from the start: leave it out, or leave optim.trained_from_epoch empty"
        require(self.sam is None or not self.trained_from_epoch, "optim.sam", self.sam, remedy)

    @property
    def is_divisible(self) -> bool:
        """Whether a device can update a share of each kernel by itself, see `Method.is_divisible`."""
        return self.method.is_divisible and (self.clipping is None or self.clipping.is_divisible)

    def peak_learning_rate(self, batch_size: int) -> float:
        """The learning rate at the end of the warm-up."""
        if self.learning_rate_per_256 is None:
            assert self.learning_rate is not None
            return self.learning_rate
        return self.learning_rate_per_256 * batch_size / 256


def _refuse_number(clipping: object) -> None:
    """Raises `ConfigError` for a number, which `clipping` was in earlier versions."""
    if isinstance(clipping, int | float):
        raise ConfigError(f"optim.clipping = {clipping!r}: give AGC(ratio={clipping!r})")


def make_schedule(config: OptimConfig, *, batch_size: int, steps_per_epoch: float, num_steps: int) -> optax.Schedule:
    """The learning rate of a run, as a function of the step counted from 0.

    The warm-up does not depend on `num_steps`: a run that is shorter than its warm-up does not reach the peak.

    Raises:
      ConfigError: the warm-up has more steps than can be counted.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    remedy = f"these are {warmup_steps:.3g} steps: give at most {MAX_COUNT:,} steps"
    require(warmup_steps <= MAX_COUNT, "optim.warmup_epochs", config.warmup_epochs, remedy)
    run = RunLength(warmup_steps=warmup_steps, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    return config.schedule.learning_rate(config.peak_learning_rate(batch_size), run)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The complete optimizer. `init` and `update` are the functions of an Optax transformation.

    They take `{name: array}` and ignore frozen parameters, which have no state and no update.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateExtraArgsFn
    schedule: optax.Schedule
    """The learning rate as a function of the step counted from 0, for the metrics."""
    ema_decay: float
    """Decay rate of the moving average of the parameters."""
    sam: SAMConfig | None
    """Sharpness-aware minimization; None: off."""
    frozen: frozenset[str]
    """Names of the parameters that are not trained."""
    starts: Mapping[str, int]
    """Name -> first step, counted from 0, at which it is trained; those that are not named are trained from the start.
    If there are any, `update` needs the keyword argument `step`."""
    is_divisible: bool
    """Whether a device can update a share of each kernel by itself, see `Method.is_divisible`."""
    metrics: Callable[[optax.OptState], dict[str, jax.Array]]
    """Function that reads metrics from the optimizer's state after an update."""
    unit_ratios: Callable[[_Arrays, _Arrays, _UnitNorms], dict[str, jax.Array]]
    """Function of the gradient, the parameters and the norms of their units, `Clipping.unit_ratios`."""


def learning_rate_factors(config: OptimConfig, names: Iterable[str]) -> dict[str, float]:
    """Name of each parameter -> factor on its learning rate; 0: frozen.

    Raises:
      ConfigError: a pattern matches no parameter, no pattern matches a parameter, or all parameters are frozen.
    """
    names = list(names)
    factors = assign("optim.learning_rate_groups", config.learning_rate_groups, names)
    if config.layer_decay != 1:
        layers = assign("optim.layer_decay", layer_decay(config.layer_decay, names), names)
        factors = {name: factor * layers[name] for name, factor in factors.items()}
    remedy = "freezes every parameter of the network: leave some to train"
    require(any(factors.values()), "optim.learning_rate_groups", config.learning_rate_groups, remedy)
    return factors


def first_epochs(config: OptimConfig, names: Iterable[str]) -> dict[str, float]:
    """Name of each parameter -> epoch from which it is trained.

    Raises:
      ConfigError: a pattern matches no parameter, or no parameter is trained from the start.
    """
    names = list(names)
    groups = config.trained_from_epoch
    if not groups:
        return dict.fromkeys(names, 0.0)
    last = () if any(group.pattern == "*" for group in groups) else (ParamGroup("*", 0.0),)
    epochs = assign("optim.trained_from_epoch", (*groups, *last), names)
    factors = learning_rate_factors(config, names)
    begins = any(factors[name] and epochs[name] == 0 for name in names)
    require(begins, "optim.trained_from_epoch", groups, "leaves nothing to train at first: give some parameters 0")
    return epochs


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, names: Iterable[str], *, steps_per_epoch: float | None = None
) -> Optimizer:
    """The optimizer: clipping, then the method, which includes weight decay and learning rate, then the groups'
    factors.

    Args:
      config: optimizer configuration.
      schedule: learning rate as a function of the step counted from 0.
      names: names of the network's parameters.
      steps_per_epoch: length of an epoch in steps, which `config.trained_from_epoch` needs.

    Raises:
      ConfigError: a pattern matches no parameter, no pattern matches a parameter, or all parameters are frozen.
    """
    names = list(names)
    factors = learning_rate_factors(config, names)
    frozen = frozenset(name for name, factor in factors.items() if factor == 0)
    epochs = first_epochs(config, names)
    remedy = "needs the length of an epoch: give make_optimizer(..., steps_per_epoch=...)"
    is_known = steps_per_epoch is not None or not any(epochs.values())
    require(is_known, "optim.trained_from_epoch", config.trained_from_epoch, remedy)
    starts = start_steps(epochs, steps_per_epoch or 1.0, frozen)
    decay = assign("optim.weight_decay_groups", config.weight_decay_groups, names)

    def add_decay(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        return {
            name: gradient + config.weight_decay * decay[name] * params[name] if decay[name] else gradient
            for name, gradient in updates.items()
        }

    def scale_by_group(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        del params
        return {name: update * factors[name] if factors[name] != 1 else update for name, update in updates.items()}

    clip = optax.identity() if config.clipping is None else config.clipping.transformation(names)

    def move(learning_rate: optax.Schedule) -> optax.GradientTransformation:
        moved = config.method.transformation(learning_rate, optax.stateless(add_decay), names)
        return optax.chain(moved, optax.stateless(scale_by_group)) if starts else moved

    parts = (in_turn(move, schedule, starts),) if starts else (move(schedule), optax.stateless(scale_by_group))
    whole = optax.with_extra_args_support(optax.chain(clip, *parts))

    def trained(values: dict[str, Value]) -> dict[str, Value]:
        return {name: value for name, value in values.items() if factors[name]}

    def init(params: optax.Params) -> optax.OptState:
        return whole.init(trained(params))

    @jax.named_scope("update")
    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return whole.update(trained(updates), state, trained(params), **extra_args)

    def metrics(state: optax.OptState) -> dict[str, jax.Array]:
        return {} if config.clipping is None else config.clipping.metrics(state[0])

    def ratios(gradient: _Arrays, params: _Arrays, unit_norms: _UnitNorms) -> dict[str, jax.Array]:
        return {} if config.clipping is None else config.clipping.unit_ratios(names, gradient, params, unit_norms)

    return Optimizer(
        init=init,
        update=update,
        schedule=schedule,
        ema_decay=config.ema_decay,
        sam=config.sam,
        frozen=frozen,
        starts=starts,
        is_divisible=config.is_divisible,
        metrics=metrics,
        unit_ratios=ratios,
    )


@jax.named_scope("ema")
def update_ema(
    ema: dict[str, jax.Array],
    params: dict[str, jax.Array],
    step: jax.Array,
    decay: float,
    frozen: Container[str] = (),
    starts: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Moving average after the update at `step` (counted from 0), with the published warm-up of its decay rate.

    Integers (BatchNorm's counts) are copied. The average of a frozen parameter is not changed, nor that of one before
    the first step at which it is trained (`starts`): it was equal to the parameter at the start, and a weighted mean of
    equal numbers may differ by a rounding error.
    """
    count = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1.0 + count) / (10.0 + count))

    def moved(name: str, value: jax.Array) -> jax.Array:
        if name in frozen:
            return ema[name]
        average = rate * ema[name] + (1.0 - rate) * value if jnp.issubdtype(value.dtype, jnp.floating) else value
        return jnp.where(step >= starts[name], average, ema[name]) if name in starts else average

    return {name: moved(name, value) for name, value in params.items()}
