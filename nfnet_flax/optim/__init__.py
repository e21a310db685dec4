"""The optimizer of a run: clipping, methods, schedules and parameter groups, as frozen configurations."""

from nfnet_flax.optim.agc import adaptive_grad_clip
from nfnet_flax.optim.agc_statistics import AGCStatistics, ClippedUnits, agc_statistics
from nfnet_flax.optim.clipping import AGC, Clipping, ClipValue, GlobalNorm
from nfnet_flax.optim.groups_table import groups_table
from nfnet_flax.optim.methods import LAMB, SGD, Adafactor, AdamW, Lion, Method, Muon, RAdam, RMSProp
from nfnet_flax.optim.optimizer import OptimConfig, Optimizer, make_optimizer, make_schedule
from nfnet_flax.optim.param_groups import ParamGroup, assign, layer_decay
from nfnet_flax.optim.sam import SAMConfig
from nfnet_flax.optim.schedules import Constant, Cosine, ExponentialDecay, Linear, RunLength, Schedule, Steps

__all__ = [
    "AGC",
    "LAMB",
    "SGD",
    "AGCStatistics",
    "Adafactor",
    "AdamW",
    "ClipValue",
    "ClippedUnits",
    "Clipping",
    "Constant",
    "Cosine",
    "ExponentialDecay",
    "GlobalNorm",
    "Linear",
    "Lion",
    "Method",
    "Muon",
    "OptimConfig",
    "Optimizer",
    "ParamGroup",
    "RAdam",
    "RMSProp",
    "RunLength",
    "SAMConfig",
    "Schedule",
    "Steps",
    "adaptive_grad_clip",
    "agc_statistics",
    "assign",
    "groups_table",
    "layer_decay",
    "make_optimizer",
    "make_schedule",
]
