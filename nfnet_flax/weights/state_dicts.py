"""State dicts of PyTorch as trainers leave them: under the names that wrappers gave to a network's own."""

from collections.abc import Mapping
from typing import Any

from nfnet_flax.config import ConfigError

_OUTER = ("module.", "model.", "ema_model.", "ema.", "state_dict.")
"""Before all names: of DataParallel and DDP, of trainers that keep the network under such a name, of averages, of
flattened checkpoints."""
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Of `torch.compile`, FSDP and activation checkpointing, which may wrap single layers, too."""
_AVERAGE_COUNT = "n_averaged"
"""What `torch.optim.swa_utils.AveragedModel` keeps beside the network."""


def unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names that the network itself gives them.

    Prefixes such as `module.`, `model._orig_mod.` are taken off where all names have them.

    Raises:
      ConfigError: it holds dicts instead of tensors: a whole checkpoint, of which one part is the state dict.
    """
    if nested := [name for name, value in tensors.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"the state dict holds other dicts, under {', '.join(map(repr, nested))}: "
            f"give the one with the weights alone, such as checkpoint[{nested[0]!r}]"
        )
    plain = {_without_inner(name): value for name, value in tensors.items() if name != _AVERAGE_COUNT}
    while prefix := next((prefix for prefix in _OUTER if plain and all(n.startswith(prefix) for n in plain)), ""):
        plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def _without_inner(name: str) -> str:
    for wrapper in _ANYWHERE:
        name = name.replace(wrapper, "")
    return name
