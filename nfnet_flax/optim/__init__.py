"""Adaptive gradient clipping and the published optimizer, as Optax transformations."""

from nfnet_flax.optim.agc import adaptive_grad_clip
from nfnet_flax.optim.optimizer import (
    ExponentialDecayConfig,
    OptimConfig,
    Optimizer,
    RMSPropConfig,
    learning_rate_schedule,
    make_optimizer,
    make_schedule,
)
from nfnet_flax.optim.param_groups import ParamGroup, assign
from nfnet_flax.optim.sam import SAMConfig

__all__ = [
    "ExponentialDecayConfig",
    "OptimConfig",
    "Optimizer",
    "ParamGroup",
    "RMSPropConfig",
    "SAMConfig",
    "adaptive_grad_clip",
    "assign",
    "learning_rate_schedule",
    "make_optimizer",
    "make_schedule",
]
