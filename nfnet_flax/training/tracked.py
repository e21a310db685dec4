"""The trackers of a run: what they get of its recipe, and where in the run's folder they write."""

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path

from nfnet_flax.recipe import Recipe
from nfnet_flax.telemetry.flat_recipe import flat
from nfnet_flax.telemetry.tracking import Tracking, tracking
from nfnet_flax.training import layout
from nfnet_flax.training.lease import LeaseLost
from nfnet_flax.training.metrics import read_rows


def tracked(recipe: Recipe, workdir: Path, *, is_first: bool) -> AbstractContextManager[Tracking]:
    """The trackers of a recipe; none in processes other than the first. Leaving the context ends them."""
    plain = dataclasses.replace(recipe.telemetry, trackers=())  # an address may hold a password
    return tracking(
        recipe.telemetry.trackers if is_first else (),
        name=recipe.name,
        recipe=flat(dataclasses.replace(recipe, telemetry=plain)),
        folder=workdir / layout.TRACKER_FILES,
        record=workdir / layout.TRACKERS,
        read_rows=lambda: read_rows(workdir / layout.METRICS),
        silent_after=LeaseLost,
    )
