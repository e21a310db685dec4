"""Normalizer-free image classifiers in JAX, trained so that a run can be stopped and resumed to the last bit."""

import importlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfnet_flax import data as data
    from nfnet_flax import models as models
    from nfnet_flax import optim as optim
    from nfnet_flax import recipe as recipe
    from nfnet_flax import runtime as runtime
    from nfnet_flax import weights as weights
    from nfnet_flax.models import list_models as list_models
    from nfnet_flax.models.folding import fold as fold
    from nfnet_flax.recipe_file import load_recipe as load_recipe
    from nfnet_flax.training.loop import train as train
    from nfnet_flax.training.reading import Run as Run
    from nfnet_flax.training.reading import evaluate as evaluate
    from nfnet_flax.weights import create_model as create_model
    from nfnet_flax.weights import load_model as load_model

__version__ = "0.1.0"
IMPORTED_AT_S = time.perf_counter()
"""When the process imported the package: for the command `nfnet`, its start."""

# Resolved on first use: importing the package must not load what the caller does not need (Grain, TensorFlow).
_EXPORTS = {
    "Run": "nfnet_flax.training.reading",
    "create_model": "nfnet_flax.weights",
    "fold": "nfnet_flax.models.folding",
    "list_models": "nfnet_flax.models",
    "load_model": "nfnet_flax.weights",
    "load_recipe": "nfnet_flax.recipe_file",
    "train": "nfnet_flax.training.loop",
    "evaluate": "nfnet_flax.training.reading",
}
_MODULES = ("data", "models", "optim", "recipe", "runtime", "weights")
__all__ = [
    *("Run", "create_model", "evaluate", "fold", "list_models", "load_model", "load_recipe", "train"),
    *("data", "models", "optim", "recipe", "runtime", "weights"),
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"nfnet_flax.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'nfnet_flax' has no attribute {name!r}")
