"""A table for the start of a run: how the parameters of a network are updated, after the recipe's parameter groups."""

import dataclasses
import math
from collections.abc import Mapping

import jax

from nfnet_flax.optim.optimizer import OptimConfig, first_epochs, learning_rate_factors
from nfnet_flax.optim.param_groups import assign

_HEADINGS = ("learning rate", "weight decay", "clipped", "arrays", "parameters", "such as")


@dataclasses.dataclass(frozen=True)
class _Treatment:
    """How a parameter is updated."""

    learning_rate: float
    """Factor on the learning rate; 0: frozen."""
    weight_decay: float
    is_clipped: bool
    from_epoch: float = 0.0
    """Epoch from which it is trained."""

    @property
    def words(self) -> tuple[str, str, str]:
        """Learning rate, weight decay and clipping as the table shows them."""
        if self.learning_rate == 0:
            return "frozen", "-", "-"
        later = f" from epoch {self.from_epoch:g}" if self.from_epoch else ""
        return f"x {self.learning_rate:.3g}{later}", f"{self.weight_decay:.3g}", "yes" if self.is_clipped else "no"


_FROZEN = _Treatment(0.0, 0.0, is_clipped=False)


def groups_table(config: OptimConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """One line for each way in which parameters are updated, lowest learning rate first; or a single line for one way.

    Args:
      config: optimizer configuration of the run.
      shapes: name -> shape of each of the network's parameters.

    Raises:
      ConfigError: a pattern matches no parameter, no pattern matches a parameter, or all parameters are frozen.
    """
    names = list(shapes)
    factors = learning_rate_factors(config, names)
    epochs = first_epochs(config, names)
    decay = assign("optim.weight_decay_groups", config.weight_decay_groups, names)
    clipped = frozenset() if config.clipping is None else config.clipping.clipped(names)
    members: dict[_Treatment, list[str]] = {}
    for name in names:
        treatment = _Treatment(factors[name], config.weight_decay * decay[name], name in clipped, epochs[name])
        members.setdefault(treatment if factors[name] else _FROZEN, []).append(name)

    def count(group: list[str]) -> int:
        return sum(math.prod(shapes[name].shape) for name in group)

    if len(members) == 1:
        ((rate, weight_decay, is_clipped),) = (treatment.words for treatment in members)
        arrays = f"{len(names)} arrays, {count(names):,} parameters"
        return f"all {arrays}: learning rate {rate}, weight decay {weight_decay}, clipped: {is_clipped}"
    rows = [_HEADINGS]
    for treatment in sorted(members, key=lambda treatment: treatment.learning_rate):
        group = members[treatment]
        rows.append((*treatment.words, str(len(group)), f"{count(group):,}", group[0]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ["parameters, by how they are updated:"]
    for row in rows:
        *numbers, example = (word.rjust(width) for word, width in zip(row, widths, strict=True))
        lines.append("  ".join(["", *numbers, example.strip()]))
    return "\n".join(lines)
