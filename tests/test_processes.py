"""Several processes of one run: they find one another, agree, stop together, and notice who died."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nfnet_flax import exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.parallel import processes as parallel
from nfnet_flax.parallel.processes import DistributedConfig, check_agreement, check_platform, find_cluster
from nfnet_flax.training.preemption import StopPoint
from tests import runs

ALONE = parallel.Processes(index=0, count=1, store=None)
NUM_STEPS = 12
# So small that compiling takes seconds; two processes of one device each.
TINY = (
    "--model.widths=8",
    "--model.depths=1",
    "--model.group-width=4",
    "--data.num-threads=1",
    f"--num-steps={NUM_STEPS}",
    "--eval-every-steps=1000",
)
BOUND_S = 60
"""Within which a process ends whose other one is gone, on a busy machine."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Store:
    """The key-value store of a real coordination service, with clients for several processes in this one."""

    def __init__(self, count: int) -> None:
        from jaxlib import _jax

        address = f"127.0.0.1:{free_port()}"
        self.service = _jax.get_distributed_runtime_service(address, count)
        self.clients = [_jax.get_distributed_runtime_client(address, index, init_timeout=30) for index in range(count)]
        self.in_parallel(lambda index: self.clients[index].connect())
        self.processes = [parallel.Processes(index, count, client) for index, client in enumerate(self.clients)]

    def in_parallel(self, call: object) -> list[object]:
        """Results of `call(index)`, or what it raised, of one thread per process."""
        results: list[object] = [None] * len(self.clients)

        def run(index: int) -> None:
            try:
                results[index] = call(index)  # type: ignore[operator]
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(self.clients))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def close(self) -> None:
        self.in_parallel(lambda index: self.clients[index].shutdown())
        self.service.shutdown()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator_address": "10.0.0.1:1"}, "distributed.num_processes = None: is missing"),
        ({"num_processes": 2, "process_id": 0}, "distributed.coordinator_address = None: is missing"),
        ({"coordinator_address": "10.0.0.1", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, r"must lie in 0 ... 1"),
        ({"start_timeout_s": 0.0}, "start_timeout_s"),
        ({"heartbeat_timeout_s": 1.0}, "heartbeat_timeout_s"),
    ],
)
def test_partial_or_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistributedConfig(**settings)  # type: ignore[arg-type]


def test_clusters_are_found_and_a_laptop_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cluster(DistributedConfig()) is None
    given = DistributedConfig(coordinator_address="10.0.0.1:8476", num_processes=4, process_id=3)
    assert find_cluster(given) == parallel.Cluster("10.0.0.1:8476", 4, 3, None)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:8476")
    with pytest.raises(ConfigError, match=r"JAX_COORDINATOR_ADDRESS = '10.0.0.1:8476': is set, but no cluster"):
        find_cluster(DistributedConfig())
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with monkeypatch.context() as slurm:
        for name, value in (
            ("SLURM_JOB_ID", "4096"),
            ("SLURM_STEP_NODELIST", "node[007-009]"),
            ("SLURM_NTASKS", "3"),
            ("SLURM_PROCID", "2"),
            ("SLURM_LOCALID", "0"),
        ):
            slurm.setenv(name, value)
        found = find_cluster(DistributedConfig())
        assert found is not None
        assert (found.address, found.num_processes, found.process_id) == ("node007:61440", 3, 2)
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    found = find_cluster(DistributedConfig())
    assert found is not None
    assert (found.address.split(":")[0], found.num_processes, found.process_id) == ("10.96.0.1", 2, 1)


def test_a_cpu_is_no_accelerator() -> None:
    check_platform("any")
    for wanted in ("accelerator", "gpu", "tpu"):
        with pytest.raises(ConfigError, match=f"platform = '{wanted}': JAX found only cpu devices") as raised:
            check_platform(wanted)
        assert "pip install 'nfnet_flax[" in str(raised.value)


def test_processes_that_differ_all_hear_of_every_difference() -> None:
    check_agreement(ALONE, "run", {"jax": "1"}, 1.0)
    store = Store(3)
    try:
        facts = [{"jax": "1", "recipe.seed": "0"}, {"jax": "1", "recipe.seed": "7"}, {"jax": "2", "recipe.seed": "0"}]
        found = store.in_parallel(lambda index: check_agreement(store.processes[index], "run", facts[index], 20.0))
        for error in found:
            assert isinstance(error, ConfigError)
            assert "recipe.seed: 0 in process 0, 7 in process 1" in str(error)
            assert "jax: 1 in process 0, 2 in process 2" in str(error)
        assert str(found[0]) == str(found[1]) == str(found[2])
    finally:
        store.close()


def steps_until_stop(points: list[StopPoint], index: int, trial: int) -> int:
    """Steps of process `index`, at a pace of its own; one of the processes is asked to stop after seven."""
    rng = np.random.default_rng([trial, index])
    num_steps = 0
    while not points[index].reached():
        num_steps += 1
        time.sleep(rng.uniform(0, 0.01))
        if index == trial % 3 and num_steps == 7:
            points[index].request("a test")
    return num_steps


def test_all_stop_at_the_first_point_that_none_had_passed() -> None:
    for trial in range(5):
        store = Store(3)
        try:
            points = [StopPoint(process) for process in store.processes]
            found = store.in_parallel(lambda index, points=points, trial=trial: steps_until_stop(points, index, trial))
            assert found[0] == found[1] == found[2], found
            assert all(point.reason == "a test" for point in points)
            assert all(point.reached() for point in points)  # and from there on
        finally:
            store.close()


START = """
import sys
from nfnet_flax.parallel.processes import DistributedConfig, start
start(DistributedConfig(coordinator_address=sys.argv[1], num_processes=2, process_id=1, start_timeout_s=2.0))
"""


def test_who_waits_in_vain_says_for_what() -> None:
    address = f"127.0.0.1:{free_port()}"
    words = [sys.executable, "-c", START, address]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, cwd=runs.ROOT)
    assert done.returncode == exit_codes.EXIT_LOST, done.stderr
    assert done.stdout == f"process 1: waiting for 2 processes at {address} for up to 2 s\n"
    assert f"process 1 waited 2 s for 2 processes at {address}, and not all of them connected" in done.stderr
    assert "--distributed.start-timeout-s" in done.stderr


def test_a_proxy_between_the_processes_is_named() -> None:
    host, port = "127.0.0.1", free_port()
    words = [sys.executable, "-c", START, f"{host}:{port}"]
    proxy = {"http_proxy": f"http://user:secret@localhost:{free_port()}", "no_proxy": "internal.example"}
    for no_proxy in ("internal.example", f"internal.example, {host}"):
        environment = {**os.environ, **proxy, "no_proxy": no_proxy}
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=120, cwd=runs.ROOT, env=environment
        )
        assert done.returncode == exit_codes.EXIT_LOST, done.stderr
        said = f"The variable http_proxy sends this call to the proxy localhost: set no_proxy={host}" in done.stderr
        assert said == (host not in no_proxy)
        assert "secret" not in done.stderr.split("nfnet: ")[1]


def test_two_processes_that_differ_end_with_exit_code_2(tmp_path: Path) -> None:
    started = runs.start_all(tmp_path / "run", 2, *TINY, of_last=("--seed=7",))
    for process in started:
        printed = runs.finish(process)
        assert process.returncode == exit_codes.EXIT_BAD_INPUT, printed
        assert "recipe.seed: 0 in process 0, 7 in process 1" in printed
        assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_stops_all_and_one_goes_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of what this test costs
    workdir = tmp_path / "run"
    # With `fsdp`, collectives of a part of the processes would be possible, and wait for each other for ever.
    first, *rest = runs.start_all(workdir, 4, *TINY, "--execution.fsdp=2")
    printed = runs.signal_at(first, 3, signal.SIGUSR1, to=rest[-1])
    others = "".join(runs.finish(process) for process in rest)
    assert [process.returncode for process in (first, *rest)] == [exit_codes.EXIT_STOPPED] * 4, printed + others
    stopped = re.search(r"stopping at step (\d+): SIGUSR1 to process 3", printed)
    assert stopped is not None, printed
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [stopped[1]]
    assert "loss" not in others  # one process speaks for all
    process = runs.start(workdir, *TINY)
    printed = runs.finish(process)
    assert process.returncode == exit_codes.EXIT_DONE, printed
    assert f"continuing from step {stopped[1]} " in printed
    assert int(runs.saved_arrays(workdir, NUM_STEPS)["['step']"]) == NUM_STEPS


TOGETHER = """
import sys, time
import jax.numpy as jnp
from jax.experimental import multihost_utils
from nfnet_flax.cli.errors import explain
from nfnet_flax.parallel.processes import DistributedConfig
from nfnet_flax.training.launch import run_together
from nfnet_flax.training.watchdog import WatchdogConfig

index = int(sys.argv[2])

def run(watchdog):
    for step in range(100_000):
        watchdog.enter("step", step)
        time.sleep(0.1)
        multihost_utils.process_allgather(jnp.ones(3))
        print(f"step {step}/", flush=True)
        if step == 20 and index == 1 and sys.argv[3] == "raise":
            raise ValueError("something is wrong here")

config = DistributedConfig(
    coordinator_address=sys.argv[1], num_processes=2, process_id=index, heartbeat_timeout_s=10.0
)
sys.exit(run_together(config, WatchdogConfig(), run, explain))
"""


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("SIGKILL", exit_codes.EXIT_LOST, "nfnet: process 1 died or is frozen; last heard:"),
        ("SIGSTOP", exit_codes.EXIT_LOST, "nfnet: process 1 died or is frozen; last heard:"),
        (
            "raise",
            exit_codes.EXIT_BUG,
            "nfnet: process 1 ended: unexpected error (a bug, or in code of your own): ValueError: something",
        ),
    ],
)
def test_who_is_left_alone_ends_and_names_the_other(how: str, code: int, message: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, address, str(index), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=runs.ROOT,
            start_new_session=True,
        )
        for index in range(2)
    )
    assert first.stdout is not None
    started = time.monotonic()
    while first.poll() is None and not first.stdout.readline().startswith("step 5/"):
        started = time.monotonic()
    if how == "raise":
        printed = runs.finish(first)
    else:
        printed = runs.signal_at(first, 50, signal.Signals[how], to=second)
    assert time.monotonic() - started < BOUND_S
    try:
        assert first.returncode == code, printed
        assert message in printed
        if how != "raise":
            assert re.search(r"  process 1: step \d+: step, for \d+ s \(\d+ s ago\)", printed), printed
        else:
            assert "ValueError: something is wrong here" in runs.finish(second)
            assert second.returncode == exit_codes.EXIT_BUG
    finally:
        second.kill()
        runs.finish(second)
