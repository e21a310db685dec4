"""State dicts of PyTorch trainers, whose wrappers add prefixes to the names of a network."""

from collections.abc import Mapping
from typing import Any

from nfnet_flax.config import ConfigError

_OUTER = ("module.", "model.", "ema_model.", "ema.", "state_dict.")
"""Prefixes of all names, added by DataParallel and DDP, by trainers that store the network in such an attribute, by
moving averages, and by flattened checkpoints."""
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names added by `torch.compile`, FSDP and activation checkpointing, which may also wrap single layers."""
_AVERAGE_COUNT = "n_averaged"
"""Name of a counter that `torch.optim.swa_utils.AveragedModel` stores in addition to the network."""


def unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names that the network itself gives them.

    Prefixes such as `module.` or `model._orig_mod.` are removed if all names have them.

    Raises:
      ConfigError: there are dicts instead of tensors: a whole checkpoint, of which one part is the state dict.
    """
    if nested := [name for name, value in tensors.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"the state dict holds other dicts, under {', '.join(map(repr, nested))}: "
            f"give only the one with the weights, such as checkpoint[{nested[0]!r}]"
        )
    plain = {_without_inner(name): value for name, value in tensors.items() if name != _AVERAGE_COUNT}
    while prefix := next((prefix for prefix in _OUTER if plain and all(n.startswith(prefix) for n in plain)), ""):
        plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def _without_inner(name: str) -> str:
    for wrapper in _ANYWHERE:
        name = name.replace(wrapper, "")
    return name
