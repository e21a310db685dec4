"""Ordered lists of patterns with values, which assign a value to every parameter by its name."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable

from nfnet_flax.config import ConfigError, Pattern, check_types, require

_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """A shell-style pattern of parameter names, and the value of the parameters that match it."""

    pattern: Pattern
    """Shell-style pattern of names, such as `*.bias`."""
    value: float
    """Value of these parameters."""

    def __post_init__(self) -> None:
        check_types(self)


def require_flags(field: str, groups: tuple[ParamGroup, ...], remedy: str) -> None:
    """Raises `ConfigError` unless the value of every group is 0 or 1."""
    for group in groups:
        require(group.value in (0, 1), field, group, remedy)


def assign(field: str, groups: tuple[ParamGroup, ...], names: Iterable[str]) -> dict[str, float]:
    """Name of each parameter -> value of the first group whose pattern matches it.

    Args:
      field: name of the recipe's field, for the message of an error.
      groups: groups, which are tried in order.
      names: names of all parameters.

    Raises:
      ConfigError: no pattern matches a parameter, or a pattern matches no parameter.
    """
    names = list(names)
    for group in groups:
        if not any(fnmatch.fnmatchcase(name, group.pattern) for name in names):
            raise ConfigError(f"{field}: pattern {group.pattern!r} matches no parameter; names look like {names[0]!r}")
    values = {}
    for name in names:
        match = next((group for group in groups if fnmatch.fnmatchcase(name, group.pattern)), None)
        if match is None:
            raise ConfigError(f"{field}: parameter {name!r} is in no group; end the list with the pattern '*'")
        values[name] = match.value
    return values


def layer_decay(decay: float, names: Iterable[str]) -> tuple[ParamGroup, ...]:
    """Factors on the learning rate that decrease from the head to the stem, for fine-tuning.

    Layers after the last block (a final convolution, the head) have the factor 1, the last block `decay`, the block
    before it `decay ** 2`, and so on through all stages; the stem's exponent is one more than that of the first block.
    ELECTRA (arXiv 2003.10555) and BEiT (arXiv 2106.08254) are fine-tuned in this way.

    Args:
      decay: ratio of the factors of neighbouring blocks, in (0, 1].
      names: names of the network's parameters; those of blocks begin with `stages.STAGE.BLOCK.`.

    Returns:
      Groups as `OptimConfig.learning_rate_groups` takes them.

    Raises:
      ConfigError: no parameter has such a name.
    """
    names = list(names)
    found = {(int(match[1]), int(match[2])) for name in names if (match := _BLOCK.match(name))}
    remedy = "the network has no parameters of blocks, such as 'stages.0.0.conv0.kernel': give 1"
    require(bool(found), "optim.layer_decay", decay, remedy)
    blocks = [f"stages.{stage}.{block}.*" for stage, block in sorted(found)]
    parts = ["stem*", *blocks] if any(name.startswith("stem") for name in names) else blocks
    falling = [ParamGroup(pattern, decay ** (len(parts) - index)) for index, pattern in enumerate(parts)]
    return (*falling, ParamGroup("*", 1.0))
