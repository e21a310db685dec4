"""Passes on what the loop is doing, to the watchdog and to the record of times."""

import dataclasses

from nfnet_flax.telemetry.ledger import Category, Ledger
from nfnet_flax.training.watchdog import Phase, Watchdog


@dataclasses.dataclass(frozen=True)
class Activity:
    """The watchdog and the record of times of one run."""

    watchdog: Watchdog
    ledger: Ledger

    def enter(self, phase: Phase, step: int, category: Category | None = None) -> None:
        """From now on the loop does this; to be called for each step or batch.

        Args:
          phase: what it does.
          step: at which step.
          category: what its time counts as; None: as the phase.
        """
        self.watchdog.enter(phase, step)
        self.ledger.enter(category or phase, step - 1 if phase in ("input", "step") else step)
