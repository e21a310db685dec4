"""Ordered (pattern -> value) lists that give every parameter a value by its name."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable

from nfnet_flax.config import ConfigError, check_types, require

_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """Parameters whose name matches a shell-style pattern, such as `*.bias`, and their value."""

    pattern: str
    value: float

    def __post_init__(self) -> None:
        check_types(self)


def require_flags(field: str, groups: tuple[ParamGroup, ...], remedy: str) -> None:
    """Raises `ConfigError` unless the value of every group is 0 or 1."""
    for group in groups:
        require(group.value in (0, 1), field, group, remedy)


def assign(field: str, groups: tuple[ParamGroup, ...], names: Iterable[str]) -> dict[str, float]:
    """The value of the first group that matches, for every name.

    Args:
      field: of the recipe, for the message of an error.
      groups: tried in order.
      names: of all parameters.

    Raises:
      ConfigError: a parameter is in no group, or a pattern matches no parameter at all.
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
    """Factors on the learning rate that fall from the head to the stem, as for fine-tuning.

    All behind the last block (a final convolution, the head) has 1, the last block `decay`, the block before it
    `decay ** 2`, and so on through all stages; the stem has one power more than the first block. So ELECTRA (arXiv
    2003.10555) and BEiT (arXiv 2106.08254) are fine-tuned.

    Args:
      decay: ratio of the factors of neighbouring blocks, in (0, 1].
      names: of the network's parameters, of which blocks have names that begin with `stages.STAGE.BLOCK.`.

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
