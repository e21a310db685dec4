"""Adaptive gradient clipping and the published optimizer, as Optax transformations."""

from nfnet_flax.optim.agc import adaptive_grad_clip
from nfnet_flax.optim.optimizer import OptimConfig, learning_rate_schedule, make_optimizer
from nfnet_flax.optim.param_groups import ParamGroup, assign

__all__ = ["OptimConfig", "ParamGroup", "adaptive_grad_clip", "assign", "learning_rate_schedule", "make_optimizer"]
