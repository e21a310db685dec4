"""Parameters that are trained only from a later step on, as if their optimizer began at that step."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

Value = TypeVar("Value")


def begun(values: Mapping[str, jax.Array], starts: Mapping[str, int], step: jax.Array) -> dict[str, jax.Array]:
    """Values by name of a parameter, with zeros for each parameter that is not trained yet at a step.

    Args:
      values: name -> array.
      starts: name -> first step of its training; those that are not named are trained from the start.
      step: the step, counted from 0.
    """
    return {
        name: jnp.where(step >= starts[name], value, jnp.zeros_like(value)) if name in starts else value
        for name, value in values.items()
    }


def in_turn(
    make: Callable[[optax.Schedule], optax.GradientTransformation],
    schedule: optax.Schedule,
    starts: Mapping[str, int],
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the parameters of each start, with a state of its own that does not change before.

    So a method that counts its steps, such as Adam, which corrects its averages for their short memory, begins to count
    where the parameters begin to move. The update takes `step`, counted from 0, as a keyword argument.

    Args:
      make: makes the transformation from a learning rate, a function of the number of its updates.
      schedule: learning rate of the run as a function of the step.
      starts: name -> first step of its training; those that are not named are trained from the start.
    """
    moves = {start: make(_from(schedule, start)) for start in sorted({0, *starts.values()})}

    def part(values: dict[str, Value], start: int) -> dict[str, Value]:
        return {name: value for name, value in values.items() if starts.get(name, 0) == start}

    def init(params: optax.Params) -> optax.OptState:
        return tuple(move.init(part(params, start)) for start, move in moves.items())

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        step: jax.Array,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        assert params is not None
        moved: dict[str, jax.Array] = {}
        states: list[optax.OptState] = []
        for (start, move), held in zip(moves.items(), state, strict=True):
            found, new = move.update(part(updates, start), held, part(params, start))
            if start > 0:
                is_on = step >= start
                # Added to any number, -0 leaves its bits; 0 would change those of -0.
                found = {name: jnp.where(is_on, value, -jnp.zeros_like(value)) for name, value in found.items()}
                new = jax.tree.map(lambda now, before, on=is_on: jnp.where(on, now, before), new, held)
            moved |= found
            states.append(new)
        return {name: moved[name] for name in updates}, tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _from(schedule: optax.Schedule, start: int) -> optax.Schedule:
    return schedule if start == 0 else lambda count: schedule(count + start)


def start_steps(epochs: Mapping[str, float], steps_per_epoch: float, frozen: Collection[str]) -> dict[str, int]:
    """Name of each parameter that is trained only from a later step on -> that step, counted from 0.

    Args:
      epochs: name -> epoch from which it is trained.
      steps_per_epoch: length of an epoch in steps.
      frozen: names of parameters that are never trained.
    """
    steps = {name: round(epoch * steps_per_epoch) for name, epoch in epochs.items() if name not in frozen}
    return {name: step for name, step in steps.items() if step > 0}
