"""A recipe as a flat table, as trackers of experiments show it."""

import dataclasses
from typing import Any

from nfnet_flax.open_config import type_name

Scalar = str | int | float | None
"""Value of a field; a bool is an int."""


def flat(config: Any, path: str = "") -> dict[str, Scalar]:
    """The fields of a configuration and its parts, by name, such as `optim.clipping.ratio`.

    The name of a part itself, `optim.clipping`, stands for its class. The values of a tuple are one text; parts in a
    tuple are numbered.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        found: dict[str, Scalar] = {path: type_name(type(config))} if path else {}
        for field in dataclasses.fields(config):
            found |= flat(getattr(config, field.name), f"{path}.{field.name}".lstrip("."))
        return found
    if isinstance(config, tuple):
        if not any(map(dataclasses.is_dataclass, config)):
            return {path: ", ".join(map(str, config))}
        return {
            name: value for index, part in enumerate(config) for name, value in flat(part, f"{path}.{index}").items()
        }
    return {path: config}
