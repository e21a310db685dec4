"""What a log step adds to the metrics that the devices computed: speed, times, clipping by layer, slow processes."""

import functools
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from nfnet_flax.models import build_model
from nfnet_flax.models.flops import training_flops
from nfnet_flax.optim import AGC
from nfnet_flax.optim.agc import num_units
from nfnet_flax.optim.agc_statistics import split_ratios, statistics_of
from nfnet_flax.parallel.processes import current
from nfnet_flax.telemetry import layers
from nfnet_flax.telemetry.ledger import Category, Ledger
from nfnet_flax.telemetry.peaks import peak_of
from nfnet_flax.telemetry.stragglers import Stragglers
from nfnet_flax.training import layout
from nfnet_flax.training.metrics import MetricsLog, NoMetrics
from nfnet_flax.training.progress import Progress
from nfnet_flax.training.setup import Setup

_TIMES: dict[str, Category] = {
    "time/step_s": "step",
    "time/data_wait_s": "input",
    "time/save_s": "save",
    "time/evaluation_s": "evaluation",
    "time/compile_s": "compile",
}
"""Metric -> category of the ledger; seconds since the last log step."""
_LOWEST = 1e-10
"""Smaller ratios of gradient to parameter norm are shown as this, as histograms have a logarithmic scale."""


class LogStep:
    """Completes the metrics of the log steps of a run; in processes other than the first, it only tells its times."""

    def __init__(
        self,
        setup: Setup,
        log: MetricsLog | NoMetrics,
        ledger: Ledger,
        progress: Progress,
        workdir: Path,
        step: int,
    ) -> None:
        """Opens the record of the layers; `step` is that from which the run continues."""
        processes = current()
        self._setup, self._log, self._ledger = setup, log, ledger
        self._is_first = processes.is_first
        self._stragglers = Stragglers(processes)
        self._totals = ledger.totals()
        self._ended_s = time.perf_counter()
        clipping = setup.recipe.optim.clipping
        self._ratio = clipping.ratio if isinstance(clipping, AGC) else None
        self._sizes: dict[str, int] = {}
        if not self._is_first:
            return
        self._speed = _Speed(setup)
        progress.say(self._speed.note)
        self._watch = layers.ClippingWatch()
        if isinstance(clipping, AGC):
            trained = [name for name in setup.structure.shapes if name not in setup.optimizer.frozen]
            clipped = clipping.clipped(list(setup.structure.shapes))
            self._sizes = {name: num_units(setup.structure.shapes[name].shape) for name in trained if name in clipped}
        self._layers = layers.LayerLog(workdir / layout.AGC, resume_step=step) if self._sizes else None

    def data_wait_s(self) -> float:
        """Seconds that the loop has waited for batches since the last log step."""
        return self._ledger.totals()["input"] - self._totals["input"]

    def metrics(self, step: int, images_per_s: float, ratios: np.ndarray | None) -> dict[str, float]:
        """Further metrics of a log step.

        Args:
          step: the step.
          images_per_s: images of all devices per second since the last log step, without evaluations and the like.
          ratios: ratios of gradient to parameter norm of all units, as the step measured them.
        """
        self._ledger.record("interval", step)
        now, totals = time.perf_counter(), self._ledger.totals()
        spent = {name: totals[category] - self._totals[category] for name, category in _TIMES.items()}
        whole_s, self._totals, self._ended_s = now - self._ended_s, totals, now
        self._stragglers.share(spent["time/data_wait_s"], whole_s)
        if not self._is_first:
            return {}
        found = spent | self._speed.metrics(images_per_s) | _device_memory() | self._stragglers.metrics(step)
        if ratios is not None and self._ratio is not None:
            found |= self._of_clipping(step, ratios, self._ratio)
        return found

    def _of_clipping(self, step: int, ratios: np.ndarray, ratio: float) -> dict[str, float]:
        by_layer = split_ratios(ratios, self._sizes)
        found = statistics_of(by_layer, ratio)
        recipe = self._setup.recipe
        self._watch.notice(step, found.total.clipped_fraction, ratio)
        every = recipe.telemetry.layers_every_steps
        if self._layers is not None and layers.is_due(step, self._setup.num_steps, recipe.log_every_steps, every):
            self._layers.write(step, found.layers)
            of_many = {f"agc_ratio/{name}": np.log10(np.maximum(values, _LOWEST)) for name, values in by_layer.items()}
            self._log.write_histograms(step, {name: values for name, values in of_many.items() if len(values) > 1})
        return {"agc/median_ratio": found.total.median_ratio, "agc/largest_ratio": found.total.largest_ratio}

    def flush(self) -> None:
        """Hands everything to the operating system; to be called before a checkpoint is saved."""
        if self._is_first and self._layers is not None:
            self._layers.flush()


class _Speed:
    """Converts images per second."""

    def __init__(self, setup: Setup) -> None:
        recipe = setup.recipe
        self._recipe = recipe
        self._num_devices = setup.mesh.size
        device = setup.mesh.devices.flat[0]
        peak = peak_of(device.device_kind, recipe.model.compute_dtype)
        kind = device.device_kind
        self.note = (
            f"peak speed of {kind!r}: {peak.flops_per_s / 1e12:.3g} TFLOP/s ({peak.source})"
            if peak
            else (f"peak speed of {kind!r}: not known, so throughput/share_of_peak is not reported")
        )
        """What is said at the start of a run."""
        # The cores of a host are one CPU, however many devices they are divided into.
        num_peaks = jax.process_count() if device.platform == "cpu" else self._num_devices
        self._peak = None if peak is None else peak.flops_per_s * num_peaks

    @functools.cached_property
    def _flops_of_image(self) -> int:
        # At the first log step, while devices compute, as tracing a network takes up to seconds.
        recipe = self._recipe
        model = nnx.eval_shape(lambda: build_model(recipe.model, num_classes=recipe.num_classes, rngs=nnx.Rngs(0)))
        return training_flops(model, recipe.data.image_size)

    def metrics(self, images_per_s: float) -> dict[str, float]:
        flops_per_s = images_per_s * self._flops_of_image
        found = {
            "throughput/images_per_s": images_per_s,
            "throughput/images_per_s_per_device": images_per_s / self._num_devices,
            "throughput/model_tflops_per_s_per_device": flops_per_s / self._num_devices / 1e12,
        }
        return found if self._peak is None else found | {"throughput/share_of_peak": flops_per_s / self._peak}


def _device_memory() -> dict[str, float]:
    """The largest memory that any device of this process has needed so far, where the devices report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {"memory/device_gib": max(peaks) / 2**30} if peaks else {}
