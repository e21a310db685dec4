"""Other places that show the metrics of a run, such as Weights & Biases: a frozen configuration for each.

To add one, derive a frozen dataclass from `Tracker`. `tracking.py` calls it, in a thread.
"""

import abc
import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from nfnet_flax.config import Name, require
from nfnet_flax.open_config import OpenConfig, declare_kinds
from nfnet_flax.telemetry.flat_recipe import Scalar

END_WAIT_S = 10.0
"""How long the end of a run waits for its trackers, all together, in seconds."""
_FINISH_S = 8.0
"""How long W&B may send at the end of a run, in seconds: less than is waited for it."""
_PARAMS_AT_ONCE = 100
"""Number of parameters that MLflow takes in one request."""

Outcome = Literal["finished", "stopped", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStart:
    """What a tracker gets when a run begins or continues."""

    name: str
    """Name of the run in the recipe."""
    recipe: Mapping[str, Scalar]
    """Fields of the recipe by name, such as `optim.clipping.ratio`."""
    step: int
    """Number of updates done: 0, or those of the checkpoint from which the run continues."""
    run_id: str | None
    """What the tracker called the run when it was opened before, so that it continues that one; None: it is new."""
    folder: Path
    """A folder within that of the run, for files of the tracker."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEnd:
    """What a tracker gets when a run ends."""

    outcome: Outcome
    """`stopped`: by a signal; the same command continues it. A run that is killed is not ended: it only continues."""
    reason: str
    """Why it was stopped or failed, in a line; empty if it is finished."""
    step: int
    """Number of updates done."""
    metrics: Mapping[str, float]
    """Metrics of the newest evaluation, such as `eval_ema/top1`; empty if there was none."""


class TrackedRun(Protocol):
    """An opened run of a tracker. All calls come from one thread, one after the other."""

    @property
    def run_id(self) -> str | None:
        """What the tracker calls the run; None if it has no such name."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes metrics of a step. Steps do not decrease; the evaluation of a step comes after its other metrics."""

    def close(self, end: RunEnd) -> None:
        """Ends the run, after all metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracker(OpenConfig, abc.ABC):
    """Base class of the entries of a recipe's `telemetry.trackers`."""

    decides_updates = False

    stores_at_once: ClassVar[bool] = True
    """Whether metrics are stored when `on_metrics` returns. If not, those of the last minute before a kill are given
    again when the run continues, as they may be lost."""

    @abc.abstractmethod
    def open(self, start: RunStart) -> TrackedRun:
        """Begins a run, or continues the one that `start` names.

        Whatever it raises, and whatever the result's methods raise, ends the tracker for this start of the run with a
        warning, and never the run.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbTracker(Tracker):
    """Weights & Biases (extra `wandb`). Log in with `wandb login`, or set WANDB_API_KEY."""

    stores_at_once = False

    project: Name = "nfnet_flax"
    """Name of the project."""
    entity: Name | None = None
    """Name of the team or user; None: the default one of the login."""
    name: Name | None = None
    """Name of the run; None: that of the recipe."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: into `trackers/wandb` in the folder of the run; `wandb sync` sends it later."""

    def open(self, start: RunStart) -> TrackedRun:
        os.environ.setdefault("WANDB_SILENT", "true")  # read at the import; otherwise it may ask for a key, and wait
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from error
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or start.name,
            tags=self.tags,
            mode=self.mode,
            dir=start.folder,
            id=start.run_id,
            resume="allow",
            reinit="create_new",  # a run that the user's own code has opened stays as it is
            settings=wandb.Settings(silent=True, console="off", finish_timeout=_FINISH_S),
        )
        run.config.update(dict(start.recipe), allow_val_change=True)
        return _WandbRun(run)


class _WandbRun:
    def __init__(self, run: Any) -> None:
        self._run = run
        self.run_id: str | None = run.id
        # W&B ignores what is given for a step before its last one: an evaluation that a stop interrupted would be lost.
        # So the axis of the curves is a metric, and W&B's own step never goes back.
        run.define_metric("*", step_metric="step")
        self._stored_step: int = run.summary.get("step", -1)  # known if W&B continues a run online

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        is_evaluation = any(name.startswith("eval") for name in metrics)
        if step > self._stored_step or (step == self._stored_step and is_evaluation):
            self._run.log({"step": step, **metrics}, step=max(step, self._run.step))

    def close(self, end: RunEnd) -> None:
        self._run.summary.update({**end.metrics, "outcome": end.outcome, "reason": end.reason})
        self._run.finish(exit_code=1 if end.outcome == "failed" else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlflowTracker(Tracker):
    """MLflow (extra `mlflow`)."""

    experiment: Name = "nfnet_flax"
    """Name of the experiment; it is made if it does not exist."""
    name: Name | None = None
    """Name of the run; None: that of the recipe."""
    tags: tuple[str, ...] = ()
    """Tags of the run, such as `team=vision`."""
    tracking_uri: str | None = None
    """Where MLflow keeps runs, such as `http://HOST:5000`; None: as MLflow finds it, by MLFLOW_TRACKING_URI."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: into `trackers/mlruns` in the folder of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for tag in self.tags:
            require("=" in tag, "MlflowTracker.tags", tag, "give each tag as NAME=VALUE")
        is_one_place = self.mode == "online" or self.tracking_uri is None
        require(is_one_place, "MlflowTracker.mode", self.mode, "give online, or no tracking_uri")

    def open(self, start: RunStart) -> TrackedRun:
        uri = self.tracking_uri
        if self.mode == "offline":
            uri = (start.folder / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # otherwise MLflow refuses folders
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise _missing("mlflow", error) from error
        client = MlflowClient(tracking_uri=uri)
        run_id = start.run_id
        if run_id is not None:
            try:
                client.update_run(run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                run_id = None  # it was deleted, or the place is another one
        if run_id is None:
            tags = dict(tag.split("=", 1) for tag in self.tags)
            experiment = client.get_experiment_by_name(self.experiment)
            experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.experiment)
            run_id = client.create_run(experiment_id, tags=tags, run_name=self.name or start.name).info.run_id
        tracked = _MlflowRun(client, run_id)
        tracked.give_params(start.recipe)
        return tracked


class _MlflowRun:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.run_id: str | None = run_id

    def give_params(self, recipe: Mapping[str, Scalar]) -> None:
        """Stores the recipe. MLflow keeps the first value of a parameter and refuses any other, so fields that change
        while the run continues keep their first values there."""
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        params = [Param(name, str(value)) for name, value in recipe.items() if name not in known]
        for first in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=params[first : first + _PARAMS_AT_ONCE])

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        at_ms = int(1000 * time.time())
        values = [Metric(name, value, at_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=values)

    def close(self, end: RunEnd) -> None:
        for name in ("outcome", "reason"):
            self._client.set_tag(self.run_id, name, getattr(end, name))
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end.outcome]
        self._client.set_terminated(self.run_id, status)


def _missing(extra: str, error: ImportError) -> ImportError:
    return ImportError(f"pip install 'nfnet_flax[{extra}]' ({error})")


declare_kinds(Tracker, WandbTracker, MlflowTracker)
