"""Writes TensorBoard's event files of a run, by CLU."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfnet_flax.messages import warn
from nfnet_flax.telemetry.about import About
from nfnet_flax.telemetry.overview import COMPARED_RUNS, MAIN_RUN, RUNS, by_run, layout_proto
from nfnet_flax.training import layout
from nfnet_flax.training.event_files import (
    about_files,
    check_folders,
    new_name,
    own_name,
    silence_tensorflow,
    suffix,
    wait_to_be_last,
)
from nfnet_flax.training.storage import storage_errors

Images = Mapping[str, np.ndarray]
"""Tag -> (H, W, 3) uint8."""
Texts = Mapping[str, str]
"""Tag -> text in Markdown."""
Histograms = Mapping[str, np.ndarray]
"""Tag -> values, of which the histogram is shown: (N,), of any type of real numbers."""


class EventWriter:
    """Writes to new event files, one in the folder itself and one in that of each of the `RUNS` of the overview.

    Raises (also by each method):
      StorageFailed: a file cannot be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        import tensorflow as tf

        self._folder = folder
        self._error: type[Exception] = tf.errors.OpError
        wait_to_be_last(folder, name)
        with self._writing():
            self._writers = {run: _new_writer(folder / run, suffix(name)) for run in RUNS}
        self._main = self._writers[MAIN_RUN]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with storage_errors(self._folder, OSError), storage_errors(self._folder, self._error):
            yield

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds values of a step, where the overview has places for them."""
        with self._writing():
            for run, values in by_run(scalars).items():
                self._writers[run].write_scalars(step, values)

    def write_images(self, step: int, images: Images) -> None:
        """Adds images of a step."""
        with self._writing():
            self._main.write_images(step, images)

    def write_texts(self, step: int, texts: Texts) -> None:
        """Adds texts of a step."""
        with self._writing():
            self._main.write_texts(step, texts)

    def write_histograms(self, step: int, histograms: Histograms) -> None:
        """Adds histograms of a step. Values that are not finite are left out, and what has no other ones, too."""
        # CLU lets TensorFlow compute each of them, which takes nine times as long as TensorBoard's function with NumPy.
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        summary = Summary()
        for tag, values in histograms.items():
            finite = np.asarray(values, np.float32)[np.isfinite(values)]
            if finite.size:
                summary.value.extend(histogram_pb(tag, finite).value)
        with self._writing():
            self._main.write_summary(step, summary)

    def flush(self) -> None:
        """Hands everything to the operating system."""
        with self._writing():
            for writer in self._writers.values():
                writer.flush()

    def close(self) -> None:
        """Flushes and closes; if one of the files fails, the others are closed nevertheless."""
        with self._writing(), contextlib.ExitStack() as closing:
            for writer in self._writers.values():
                closing.callback(writer.close)


def prepare_events(workdir: Path) -> str | None:
    """Makes the folder of the event files of a run; imports nothing that takes long.

    Args:
      workdir: folder of the run.

    Returns:
      The name that the run has in the names of its files; None, with one warning, if TensorFlow is missing.

    Raises:
      ConfigError: `tensorboard` is not a folder.
      StorageFailed: the folder cannot be written.
    """
    folder = workdir / layout.TENSORBOARD
    check_folders(folder)
    silence_tensorflow()
    missing = [name for name in ("clu", "tensorflow") if not _is_there(name)]
    if missing:  # before the folder is made, as TensorBoard would show an empty run
        _warn_of_missing(f"No module named {missing[0]!r}")
        return None
    with storage_errors(folder, OSError):
        for run in RUNS:
            (folder / run).mkdir(exist_ok=True)
        return own_name(folder) or new_name(folder)


def open_events(workdir: Path, name: str, about: About | None = None) -> EventWriter | None:
    """A writer for new event files of a run; None, with one warning, if TensorFlow cannot be imported.

    Args:
      workdir: folder of the run.
      name: result of `prepare_events`.
      about: is written into a file of its own, which replaces that of the last start; None: the old one stays.

    Raises:
      StorageFailed: a file cannot be written.
    """
    folder = workdir / layout.TENSORBOARD
    error = _import_libraries()
    if error is not None:
        _warn_of_missing(error)
        return None
    import tensorflow as tf

    with storage_errors(folder, OSError), storage_errors(folder, tf.errors.OpError):
        if about is not None:
            _replace_about(folder, name, about)
        return EventWriter(folder, name)


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _warn_of_missing(reason: str) -> None:
    warn(f"only metrics.jsonl is written, no TensorBoard files ({reason}): pip install tensorflow-cpu tensorboard")


@functools.cache
def _import_libraries() -> str | None:
    """Imports what writes event files; returns why this is not possible."""
    try:
        import clu.metric_writers  # noqa: F401
        import tensorflow as tf
    except ImportError as error:
        return f"{error}"
    tf.config.set_visible_devices([], "GPU")
    return None


def _replace_about(folder: Path, name: str, about: About) -> None:
    """Writes the files about the run, and before that, removes the old ones: nothing may be there twice."""
    for run in RUNS:
        for path in about_files(folder / run, name):
            path.unlink()
    name_end = suffix(name, is_about=True)
    with contextlib.closing(_new_writer(folder, name_end)) as writer:
        writer.write_texts(0, about.texts)
        writer.write_summary(0, layout_proto(about.charts))
    for run, parameters in COMPARED_RUNS.items():
        with contextlib.closing(_new_writer(folder / run, name_end)) as writer:
            writer.write_hparams({"parameters": parameters, **about.hparams})


def _new_writer(folder: Path, name_end: str) -> Any:
    import tensorflow as tf
    from clu.metric_writers import SummaryWriter

    class Writer(SummaryWriter):
        """CLU's writer, for whose files the end of the name cannot be chosen otherwise."""

        def __init__(self) -> None:
            super(SummaryWriter, self).__init__()
            self._summary_writer = tf.summary.create_file_writer(str(folder), filename_suffix=name_end)

        def write_summary(self, step: int, summary: Any) -> None:
            """Adds a summary that TensorBoard's own functions made, with one or more values."""
            with self._summary_writer.as_default():
                tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=step)

    return Writer()
