"""What is recorded about a run besides its metrics."""

import dataclasses

from nfnet_flax.config import check_types, require
from nfnet_flax.telemetry.trackers import Tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What is recorded about a run besides its metrics. Updates do not depend on it."""

    layers_every_steps: int | None = None
    """What adaptive gradient clipping does in each layer is written to `agc.jsonl`, and for TensorBoard as histograms,
    each time the step is a multiple of this and of `log_every_steps`; None: about 200 times in the whole run."""
    trackers: tuple[Tracker, ...] = ()
    """Other places that show the metrics while the run trains, such as `WandbTracker()` and `MlflowTracker()` of
    `nfnet_flax.telemetry.trackers`."""
    images: bool = True
    """Whether TensorBoard shows pictures: the first training images with their labels, and of each evaluation the
    confusion matrix and the held-out images that are predicted wrong with the highest probability."""

    def __post_init__(self) -> None:
        check_types(self)
        steps = self.layers_every_steps
        require(steps is None or steps >= 1, "telemetry.layers_every_steps", steps, "must be at least 1, or None")
