"""Learning rate schedules: each begins with a linear warm-up; a frozen configuration describes the part after it.

To add a schedule, derive a frozen dataclass from `Schedule`.
"""

import abc
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import optax

from nfnet_flax.config import require
from nfnet_flax.open_config import OpenConfig, declare_kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """Lengths of a run and its parts, in steps."""

    warmup_steps: int
    """Length of the linear warm-up; the run may end within it."""
    num_steps: int
    """Length of the whole run."""
    steps_per_epoch: float
    """Length of one pass over the training set; in general not a whole number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(OpenConfig, abc.ABC):
    """Base class of a recipe's `optim.schedule`."""

    @abc.abstractmethod
    def after_warmup(self, peak: float, run: RunLength) -> optax.Schedule:
        """The learning rate after the warm-up, as a function of the step (a float32 scalar).

        Args:
          peak: learning rate at the end of the warm-up.
          run: lengths of the run and its parts. Steps are counted from the beginning of the run; the values of the
            function for the steps of the warm-up are not used.
        """

    def learning_rate(self, peak: float, run: RunLength) -> optax.Schedule:
        """Linear from 0 to `peak` over the warm-up, then `after_warmup`; steps are counted from 0."""
        after = self.after_warmup(peak, run)

        def schedule(step: jax.typing.ArrayLike) -> jax.Array:
            step = jnp.asarray(step, jnp.float32)
            return jnp.where(step < run.warmup_steps, peak * (step / max(run.warmup_steps, 1)), after(step))

        return schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from the peak, at the end of the warm-up, to `final_learning_rate` at the last step."""

    final_learning_rate: float = 0.0
    """Learning rate at the end of the run, whatever the batch size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_final(self.final_learning_rate)

    def after_warmup(self, peak: float, run: RunLength) -> optax.Schedule:
        # Not Optax's schedule, which divides in another order, so that its last bits differ from the published ones.
        def schedule(step: jax.typing.ArrayLike) -> jax.Array:
            progress = jnp.clip((step - run.warmup_steps) / max(run.num_steps - run.warmup_steps, 1), 0.0, 1.0)
            cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            return self.final_learning_rate + (peak - self.final_learning_rate) * cosine

        return schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak learning rate until the end of the run."""

    def after_warmup(self, peak: float, run: RunLength) -> optax.Schedule:
        del run
        return optax.schedules.constant_schedule(peak)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from the peak, at the end of the warm-up, to `final_learning_rate` at the last step."""

    final_learning_rate: float = 0.0
    """Learning rate at the end of the run, whatever the batch size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_final(self.final_learning_rate)

    def after_warmup(self, peak: float, run: RunLength) -> optax.Schedule:
        begin, end = run.warmup_steps, max(run.num_steps, run.warmup_steps + 1)
        return optax.schedules.linear_schedule(peak, self.final_learning_rate, end - begin, transition_begin=begin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Schedule):
    """A learning rate that is multiplied by `factor` at given epochs."""

    at_epochs: tuple[float, ...]
    """Epochs at which the learning rate changes, counted from the beginning of the run, in increasing order."""
    factor: float = 0.1
    """Factor by which the learning rate is multiplied at each of these epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.factor >= 0, "optim.schedule.factor", self.factor, "must not be negative")
        is_increasing = all(before < after for before, after in itertools.pairwise((0.0, *self.at_epochs)))
        require(is_increasing, "optim.schedule.at_epochs", self.at_epochs, "must be positive and increase")

    def after_warmup(self, peak: float, run: RunLength) -> optax.Schedule:
        factors: dict[int, float] = {}
        for epoch in self.at_epochs:
            step = round(epoch * run.steps_per_epoch)
            factors[step] = factors.get(step, 1.0) * self.factor
        return optax.schedules.piecewise_constant_schedule(peak, factors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialDecay(Schedule):
    """A learning rate that is multiplied by `factor` at regular intervals (arXiv 1905.11946, section 5.2)."""

    factor: float = 0.97
    """Factor by which the learning rate is multiplied each time."""
    every_epochs: float = 2.4
    """Interval in epochs, counted from the beginning of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.factor <= 1, "optim.schedule.factor", self.factor, "must lie in (0, 1]")
        require(self.every_epochs > 0, "optim.schedule.every_epochs", self.every_epochs, "must be positive")

    def after_warmup(self, peak: float, run: RunLength) -> optax.Schedule:
        steps = self.every_epochs * run.steps_per_epoch
        return optax.schedules.exponential_decay(peak, steps, self.factor, staircase=True)

    def learning_rate(self, peak: float, run: RunLength) -> optax.Schedule:
        relative = super().learning_rate(1.0, run)
        # The peak is multiplied last, as in earlier versions: compilers round `peak * (step / steps)` differently.
        return lambda step: peak * relative(step)


declare_kinds(Schedule, Cosine, Constant, Linear, Steps, ExponentialDecay)


def _require_final(final_learning_rate: float) -> None:
    require(final_learning_rate >= 0, "optim.schedule.final_learning_rate", final_learning_rate, "must not be negative")
