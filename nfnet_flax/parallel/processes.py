"""The processes of a run: they connect to one another, compare their settings before the first step, and end together.

They exchange data through the key-value store of JAX's coordination service, which runs in process 0. No device is
needed for this, so it works before the first computation and while the devices are busy or hang.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv

from nfnet_flax.config import ConfigError, Shown, check_types, require
from nfnet_flax.exit_codes import EXIT_LOST
from nfnet_flax.verbosity import is_quiet, stamp

Platform = Literal["any", "accelerator", "gpu", "tpu"]
"""Kind of device that a recipe needs: `accelerator` is any device that is not a CPU."""
_PREFIX = "nfnet_flax"
_START_MARGIN_S = 60
"""Time that is added to JAX's limit for the start: JAX aborts at its limit, and our message shall come before that."""
_DEATH_MARGIN_S = 30
"""Time that is added to JAX's limit for a silent process, for the same reason."""
_LAST_OUT_S = 1.0
"""Time by which process 0 ends after the others, which JAX would abort if process 0 ended first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the processes of a run connect to one another, and how long they wait. Updates do not depend on it.

    Nothing need be given on TPU VMs, GKE, Slurm and Open MPI, nor for a run of one process.
    """

    coordinator_address: Annotated[str, Shown("HOST:PORT")] | None = None
    """HOST:PORT of process 0, which all processes must be able to reach; None: detected from the cluster, or
    `JAX_COORDINATOR_ADDRESS`."""
    num_processes: int | None = None
    """Number of processes of the run; None: detected from the cluster."""
    process_id: int | None = None
    """Number of this process, counted from 0; None: detected from the cluster."""
    start_timeout_s: float = 300.0
    """Longest time to wait until all processes have started, and then until they have reported their settings for
    comparison, in seconds."""
    heartbeat_timeout_s: float = 60.0
    """Time without a sign of life, in seconds, after which a process is considered dead or frozen and the others
    end."""

    def __post_init__(self) -> None:
        check_types(self)
        given = {
            "coordinator_address": self.coordinator_address,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            remedy = "is missing; give coordinator_address, num_processes and process_id, or none of them"
            require(False, f"distributed.{missing[0]}", None, remedy)
        if self.coordinator_address is not None and self.num_processes is not None and self.process_id is not None:
            host, _, port = self.coordinator_address.rpartition(":")
            remedy = "must be HOST:PORT of process 0, such as 10.0.0.2:8476"
            valid = bool(host) and port.isdecimal() and 0 < int(port) < 65536
            require(valid, "distributed.coordinator_address", self.coordinator_address, remedy)
            require(self.num_processes >= 1, "distributed.num_processes", self.num_processes, "must be at least 1")
            remedy = f"must lie in 0 ... {self.num_processes - 1}, different in each process"
            require(0 <= self.process_id < self.num_processes, "distributed.process_id", self.process_id, remedy)
        require(self.start_timeout_s >= 1, "distributed.start_timeout_s", self.start_timeout_s, "must be at least 1")
        remedy = "must be at least 10, as a busy host may be late"
        require(self.heartbeat_timeout_s >= 10, "distributed.heartbeat_timeout_s", self.heartbeat_timeout_s, remedy)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The place of a process among those of a run."""

    address: str
    """HOST:PORT of process 0."""
    num_processes: int
    """Number of processes of the run."""
    process_id: int
    """Number of this process, counted from 0."""
    local_device_ids: Sequence[int] | None
    """Devices of this host that this process uses; None: all."""


def find_cluster(config: DistributedConfig) -> Cluster | None:
    """The cluster that is given, or that JAX detects; None for a run of one process. Starts nothing.

    Raises:
      ConfigError: only the address is known, or the cluster's environment cannot be read.
    """
    if config.coordinator_address is not None and config.num_processes is not None and config.process_id is not None:
        return Cluster(config.coordinator_address, config.num_processes, config.process_id, None)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        # `jax.distributed.initialize` would detect it, too; it is done earlier here, to print a message before waiting.
        found = ClusterEnv.auto_detect_unset_distributed_params(
            address, None, None, None, None, round(config.start_timeout_s)
        )
    except Exception as error:
        raise ConfigError(
            f"the cluster's environment cannot be read ({type(error).__name__}: {error}): give "
            "--distributed.coordinator-address, --distributed.num-processes and --distributed.process-id"
        ) from error
    address, num_processes, process_id, local_device_ids = found
    if num_processes is None or process_id is None or address is None:
        remedy = "is set, but no cluster was found; give --distributed.num-processes and --distributed.process-id, too"
        require(address is None, "JAX_COORDINATOR_ADDRESS", address, remedy)
        return None
    return Cluster(address, num_processes, process_id, local_device_ids)


def start(config: DistributedConfig) -> None:
    """Joins the other processes; does nothing for a run of one process. To be called before JAX looks for devices.

    If the others do not start in time, the process ends with a message and `EXIT_LOST`.

    Raises:
      ConfigError: not enough is known about the cluster, or process 0 cannot listen at its address.
    """
    cluster = find_cluster(config)
    if cluster is None or cluster.num_processes == 1:
        return
    about = f"{cluster.num_processes} processes at {cluster.address}"
    if not is_quiet():
        waiting = f"waiting for {about} for up to {config.start_timeout_s:g} s"
        print(f"{stamp()}process {cluster.process_id}: {waiting}", flush=True)
    # JAX waits in C++ and aborts after its time limit: a timer ends the process before that.
    timer = threading.Timer(config.start_timeout_s, _not_all_came, (cluster, config.start_timeout_s))
    timer.daemon = True
    timer.start()
    host = cluster.address.rpartition(":")[0]
    jax.config.update("jax_enable_preemption_service", False)  # `training.preemption` handles the signals
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.address,
            num_processes=cluster.num_processes,
            process_id=cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=round(config.start_timeout_s) + _START_MARGIN_S,
            heartbeat_timeout_seconds=round(config.heartbeat_timeout_s) + _DEATH_MARGIN_S,
            # If all processes are on this machine, other machines need not reach it.
            coordinator_bind_address=cluster.address if host in ("127.0.0.1", "localhost") else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"process {cluster.process_id} cannot join {about}: {error}") from error
    finally:
        timer.cancel()


def _not_all_came(cluster: Cluster, waited_s: float) -> None:
    role = "process 0 listens there" if cluster.process_id == 0 else "this process calls there"
    print(
        f"{stamp()}nfnet: process {cluster.process_id} waited {waited_s:g} s for {cluster.num_processes} processes at "
        f"{cluster.address}, and not all of them connected ({role}). Check that as many were started, each with a "
        "distributed.process_id of its own; that this address is that of process 0's host; and that no firewall is "
        f"between them.{_about_proxy(cluster.address)} A longer wait: --distributed.start-timeout-s",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST)


def _about_proxy(address: str) -> str:
    """A message if gRPC, by which the processes call one another, would send the call to an HTTP proxy; else empty."""
    host = address.rpartition(":")[0]
    name = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)
    spared = next((os.environ[name] for name in ("no_grpc_proxy", "no_proxy") if os.environ.get(name)), "")
    if name is None or any(part.strip() and host.endswith(part.strip()) for part in spared.split(",")):
        return ""
    proxy = urllib.parse.urlsplit(os.environ[name]).hostname  # only the host, as the URL may contain a password
    return f" The variable {name} sends this call to the proxy {proxy}: set no_proxy={host} in all processes."


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this run, from the point of view of one of them."""

    index: int
    """Number of this process, counted from 0."""
    count: int
    """Number of processes."""
    store: Any
    """Client of the coordination service; None in a run of one process."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes the files that are not checkpoints."""
        return self.index == 0

    def put(self, key: str, value: Any) -> None:
        """Stores a value as JSON under a key, and replaces an older value."""
        self.store.key_value_set(f"{_PREFIX}/{key}", json.dumps(value), allow_overwrite=True)

    def wait_for(self, key: str, timeout_s: float) -> Any:
        """Waits until a value is stored under a key, and returns it.

        Raises:
          jax.errors.JaxRuntimeError: no value was stored within the time.
        """
        return json.loads(self.store.blocking_key_value_get(f"{_PREFIX}/{key}", round(1000 * timeout_s)))

    def of_all(self, folder: str) -> dict[int, Any]:
        """Index of a process -> the value it has stored under `folder/INDEX`, for the processes that have stored
        one."""
        found = self.store.key_value_dir_get(f"{_PREFIX}/{folder}/")
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}

    def barrier(self, name: str, timeout_s: float) -> None:
        """Waits until all processes have called this with the same name; each name can be used once.

        Raises:
          jax.errors.JaxRuntimeError: not all processes called it within the time.
        """
        if self.store is not None:
            self.store.wait_at_barrier(f"{_PREFIX}/{name}", round(1000 * timeout_s))


def current() -> Processes:
    """The processes that were joined by `start` or by the caller's own `jax.distributed.initialize`; starts no
    backend."""
    state = distributed.global_state
    if state.client is None:
        return Processes(index=0, count=1, store=None)
    return Processes(index=state.process_id, count=state.num_processes, store=state.client)


def check_agreement(processes: Processes, topic: str, facts: dict[str, str], timeout_s: float) -> None:
    """Compares the settings of all processes; does nothing in a run of one process.

    Args:
      processes: the processes of this run.
      topic: name of the comparison; each name can be used once.
      facts: name, such as `jax` or `recipe.seed` -> value, which must be the same in all processes.
      timeout_s: longest wait for the others, in seconds.

    Raises:
      ConfigError: values differ, or a process did not report in time. All processes raise it, with the same lines.
    """
    if processes.count == 1:
        return
    processes.put(f"{topic}/{processes.index}", facts)
    answers = []
    deadline = time.monotonic() + timeout_s
    for index in range(processes.count):
        try:
            answers.append(processes.wait_for(f"{topic}/{index}", max(1.0, deadline - time.monotonic())))
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(
                f"process {index} did not say within {timeout_s:g} s what it runs: look at its own messages ({error})"
            ) from error
    lines = [
        f"  {name}: {answers[0].get(name, '(absent)')} in process 0, {facts.get(name, '(absent)')} in process {index}"
        for index, facts in enumerate(answers)
        for name in sorted(answers[0].keys() | facts.keys())
        if answers[0].get(name) != facts.get(name)
    ]
    if lines:
        raise ConfigError("the processes of this run differ; start all alike:\n" + "\n".join(lines))


def check_platform(wanted: Platform) -> None:
    """Raises `ConfigError` unless JAX runs on the kind of device that a recipe needs."""
    found = jax.default_backend()
    if wanted == "any" or found == wanted or (wanted == "accelerator" and found != "cpu"):
        return
    extra = {"gpu": "nfnet_flax[cuda]", "tpu": "nfnet_flax[tpu]"}.get(wanted, "nfnet_flax[cuda]' or 'nfnet_flax[tpu]")
    raise ConfigError(
        f"platform = {wanted!r}: JAX found only {found} devices ({', '.join(map(str, jax.local_devices()[:4]))}; "
        f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}). Install the support (pip install '{extra}'), see "
        "what JAX says (python -c 'import jax; print(jax.devices())'), or give --platform any to train on what there is"
    )


def leave(processes: Processes, code: int, *, timeout_s: float) -> NoReturn:
    """Waits until the other processes call this, too, or the time is over, and then ends this process at once.

    Python's normal exit is not used, as it would wait minutes for processes that hang in a computation.

    Args:
      processes: the processes of this run.
      code: exit code.
      timeout_s: longest wait for the others, in seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process is dead or hangs
        processes.barrier("leave", timeout_s)
    if processes.is_first and processes.count > 1:
        time.sleep(_LAST_OUT_S)
    os._exit(code)
