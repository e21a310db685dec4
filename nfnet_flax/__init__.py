"""Normalizer-free image classifiers in JAX, trained so that a run can be stopped and resumed to the last bit."""

import importlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfnet_flax import data as data
    from nfnet_flax import models as models
    from nfnet_flax import objectives as objectives
    from nfnet_flax import optim as optim
    from nfnet_flax import prediction as prediction
    from nfnet_flax import recipe as recipe
    from nfnet_flax import runtime as runtime
    from nfnet_flax import weights as weights
    from nfnet_flax.config import ConfigError as ConfigError
    from nfnet_flax.data.config import DataConfig as DataConfig
    from nfnet_flax.data.label_sets import LabelSet as LabelSet
    from nfnet_flax.data.random_access import ArraySource as ArraySource
    from nfnet_flax.data.random_access import SourceConfig as SourceConfig
    from nfnet_flax.data.transforms import preprocess as preprocess
    from nfnet_flax.export import export_model as export_model
    from nfnet_flax.models import Classifier as Classifier
    from nfnet_flax.models import ExecutionConfig as ExecutionConfig
    from nfnet_flax.models import ModelConfig as ModelConfig
    from nfnet_flax.models import list_models as list_models
    from nfnet_flax.models import model_config as model_config
    from nfnet_flax.models.folding import fold as fold
    from nfnet_flax.objectives import Metric as Metric
    from nfnet_flax.objectives import Objective as Objective
    from nfnet_flax.optim import OptimConfig as OptimConfig
    from nfnet_flax.own_code import load_code as load_code
    from nfnet_flax.prediction import Prediction as Prediction
    from nfnet_flax.prediction import Predictor as Predictor
    from nfnet_flax.prediction import load_predictor as load_predictor
    from nfnet_flax.recipe import CheckpointConfig as CheckpointConfig
    from nfnet_flax.recipe import Recipe as Recipe
    from nfnet_flax.recipe_file import load_recipe as load_recipe
    from nfnet_flax.training.evaluating import evaluate as evaluate
    from nfnet_flax.training.evaluating import evaluate_weights as evaluate_weights
    from nfnet_flax.training.loop import TrainResult as TrainResult
    from nfnet_flax.training.loop import train as train
    from nfnet_flax.training.reading import Run as Run
    from nfnet_flax.training.reading import export_weights as export_weights
    from nfnet_flax.weights import create_model as create_model
    from nfnet_flax.weights import load_model as load_model

__version__ = "0.1.0"
IMPORTED_AT_S = time.perf_counter()
"""Time of `time.perf_counter` when the process imported the package; the command `nfnet` takes it for its start."""
IMPORTED_NS = time.time_ns()
"""The same time in nanoseconds since 1970: files that are newer than this are not those that the process loaded."""

# Resolved on first use: importing the package must not load what the caller does not need (Grain, TensorFlow).
_MODULE_OF = {
    "ArraySource": "nfnet_flax.data.random_access",
    "CheckpointConfig": "nfnet_flax.recipe",
    "Classifier": "nfnet_flax.models",
    "ConfigError": "nfnet_flax.config",
    "DataConfig": "nfnet_flax.data.config",
    "ExecutionConfig": "nfnet_flax.models",
    "LabelSet": "nfnet_flax.data.label_sets",
    "Metric": "nfnet_flax.objectives",
    "ModelConfig": "nfnet_flax.models",
    "Objective": "nfnet_flax.objectives",
    "OptimConfig": "nfnet_flax.optim",
    "Prediction": "nfnet_flax.prediction",
    "Predictor": "nfnet_flax.prediction",
    "Recipe": "nfnet_flax.recipe",
    "Run": "nfnet_flax.training.reading",
    "SourceConfig": "nfnet_flax.data.random_access",
    "TrainResult": "nfnet_flax.training.loop",
    "create_model": "nfnet_flax.weights",
    "evaluate": "nfnet_flax.training.evaluating",
    "evaluate_weights": "nfnet_flax.training.evaluating",
    "export_model": "nfnet_flax.export",
    "export_weights": "nfnet_flax.training.reading",
    "fold": "nfnet_flax.models.folding",
    "list_models": "nfnet_flax.models",
    "load_code": "nfnet_flax.own_code",
    "load_model": "nfnet_flax.weights",
    "load_predictor": "nfnet_flax.prediction",
    "load_recipe": "nfnet_flax.recipe_file",
    "model_config": "nfnet_flax.models",
    "preprocess": "nfnet_flax.data.transforms",
    "train": "nfnet_flax.training.loop",
}
_MODULES = ("data", "models", "objectives", "optim", "prediction", "recipe", "runtime", "weights")
__all__ = [
    "ArraySource",
    "CheckpointConfig",
    "Classifier",
    "ConfigError",
    "DataConfig",
    "ExecutionConfig",
    "LabelSet",
    "Metric",
    "ModelConfig",
    "Objective",
    "OptimConfig",
    "Prediction",
    "Predictor",
    "Recipe",
    "Run",
    "SourceConfig",
    "TrainResult",
    "create_model",
    "data",
    "evaluate",
    "evaluate_weights",
    "export_model",
    "export_weights",
    "fold",
    "list_models",
    "load_code",
    "load_model",
    "load_predictor",
    "load_recipe",
    "model_config",
    "models",
    "objectives",
    "optim",
    "prediction",
    "preprocess",
    "recipe",
    "runtime",
    "train",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"nfnet_flax.{name}")
    if name in _MODULE_OF:
        return vars(importlib.import_module(_MODULE_OF[name]))[name]
    raise AttributeError(f"module 'nfnet_flax' has no attribute {name!r}")
