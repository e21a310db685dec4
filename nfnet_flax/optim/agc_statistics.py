"""What adaptive gradient clipping does, layer by layer, from the ratios of gradient to parameter norm of its units."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.optim.agc import AdaptiveGradClipState


@dataclasses.dataclass(frozen=True)
class ClippedUnits:
    """How the gradients of some units compare with their parameters, before clipping (arXiv 2102.06171, section 3)."""

    clipped_fraction: float
    """Share of the units whose gradient was scaled down."""
    median_ratio: float
    """Median over the units of the gradient's norm as a share of the norm of the unit's parameters."""
    largest_ratio: float
    """Largest of these ratios."""


@dataclasses.dataclass(frozen=True)
class AGCStatistics:
    """What adaptive gradient clipping did in one update."""

    total: ClippedUnits
    """All units of the parameters that are clipped."""
    layers: dict[str, ClippedUnits]
    """Name of each parameter that is clipped -> its units."""


def clipped_units(ratios: np.ndarray, clipping: float) -> ClippedUnits:
    """Summarizes the ratios of some units, (units,), of which there is at least one; `clipping` is lambda."""
    return ClippedUnits(
        clipped_fraction=float(np.mean(ratios > np.float32(clipping))),
        median_ratio=float(np.median(ratios)),
        largest_ratio=float(np.max(ratios)),
    )


def statistics_of(ratios: Mapping[str, np.ndarray], clipping: float) -> AGCStatistics:
    """Summarizes the ratios of all units: name of a parameter -> (units,); `clipping` is lambda."""
    layers = {name: clipped_units(values, clipping) for name, values in ratios.items()}
    return AGCStatistics(total=clipped_units(np.concatenate(list(ratios.values())), clipping), layers=layers)


def agc_statistics(state: Any) -> AGCStatistics:
    """What `adaptive_grad_clip(..., keeps_ratios=True)` did in the last update, in any Optax optimizer.

    This waits for the update, so call it at the steps that are logged.

    Args:
      state: state of the optimizer, in which that of the clipping is found; before the first update all ratios are 0.

    Raises:
      ConfigError: the state holds no ratios, those of several clippings, or every parameter is exempt.
    """
    found = list(_states_in(state))
    remedy = "put adaptive_grad_clip(..., keeps_ratios=True) into the optimizer, once"
    if len(found) != 1:
        raise ConfigError(f"state: holds the ratios of {len(found)} adaptive gradient clippings: {remedy}")
    leaves, _ = jax.tree_util.tree_flatten_with_path(found[0].unit_ratios)
    if not leaves:
        raise ConfigError("state: every parameter is exempt from clipping, so there are no ratios")
    ratios = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    assert found[0].clipping is not None
    return statistics_of(ratios, float(found[0].clipping))


def _states_in(state: Any) -> Iterator[AdaptiveGradClipState]:
    if isinstance(state, AdaptiveGradClipState):
        if state.unit_ratios is not None:
            yield state
        return
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, AdaptiveGradClipState))
    yield from (node for node in leaves if isinstance(node, AdaptiveGradClipState) and node.unit_ratios is not None)


def split_ratios(vector: np.ndarray, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Cuts the ratios of all units, (units,), into those of each parameter.

    Args:
      vector: the ratios of one parameter after the other, in the order of their names.
      sizes: name of each parameter that is clipped -> its number of units; the result has this order.
    """
    names = sorted(sizes)
    ends = np.cumsum([sizes[name] for name in names])
    assert len(vector) == (ends[-1] if names else 0), (len(vector), math.fsum(sizes.values()))
    parts = dict(zip(names, np.split(vector, ends[:-1]), strict=True))
    return {name: parts[name] for name in sizes}
