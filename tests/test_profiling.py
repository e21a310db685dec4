"""Profiles of a running job: which steps, in all processes; that the run survives whatever goes wrong; what is in them.

Traces are read by XProf's own converters. Most tests trace a loop of a small function, as `Profiler` knows nothing of
training; one takes a profile of a real run of two processes.
"""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib import _hlo  # type: ignore[attr-defined]
from xprof.convert import raw_to_tool_data as xprof

from nfnet_flax import train
from nfnet_flax.config import ConfigError
from nfnet_flax.data.workers import STOP_SIGNALS
from nfnet_flax.programs.hlo import parse
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.storage import BucketFolder, BucketUrl, Folder, LocalFolder, bucket
from nfnet_flax.telemetry import profile_requests
from nfnet_flax.telemetry.profile_requests import REQUEST
from nfnet_flax.telemetry.profile_steps import NUM_REQUESTED, Agreement, Appointment, parse_steps, undisturbed
from nfnet_flax.telemetry.profiling import ProfileOptions, Profiler, profiling
from nfnet_flax.training import layout
from nfnet_flax.training.mirror import Mirror
from nfnet_flax.training.preemption import stop_requests
from tests import runs, stores
from tests.test_processes import ALONE, TINY, Store

FOLDER = f"{layout.TENSORBOARD}/{layout.PROFILES}"
compute = jax.jit(lambda array: jnp.sin(array @ array))


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are looked for more often than in a run of hours."""
    monkeypatch.setattr(profile_requests, "_LOOK_S", 0.02)


class Loop:
    """Some steps under a profiler."""

    def __init__(self, profiler: Profiler, said: list[str], step: int) -> None:
        self.profiler = profiler
        self.said = said
        self.step = step
        self._array = jnp.ones((8, 8))

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._array = compute(self._array)
            self.step += 1
            self.profiler.step(self.step, self._array)

    def run_until(self, is_so: Callable[[], bool]) -> None:
        """Goes on for at most 20 s; fails if it is not so then."""
        deadline = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < deadline, self.said
            self.run(1)
            time.sleep(0.001)

    def says(self, beginning: str) -> bool:
        return any(line.startswith(beginning) for line in self.said)


@contextlib.contextmanager
def looping(place: Folder, steps: range | None = None, *, start_step: int = 0) -> Iterator[Loop]:
    said: list[str] = []
    with profiling(
        ProfileOptions(steps),
        ALONE,
        place,
        FOLDER,
        start_step=start_step,
        num_steps=10**6,
        eval_every_steps=10**6,
        say=said.append,
        look_s=0.02,
    ) as profiler:
        yield Loop(profiler, said, start_step)


def traced(workdir: Path) -> list[list[str]]:
    """For each profile in a folder, the steps that XProf's trace viewer shows."""
    found = []
    for folder in sorted((workdir / FOLDER).iterdir()) if (workdir / FOLDER).exists() else []:
        (file,) = folder.glob("*.xplane.pb")
        assert (folder / file.name.replace("xplane.pb", "memory.pb.gz")).stat().st_size > 0
        shown = json.loads(xprof.xspace_to_tool_data([str(file)], "trace_viewer", {})[0])["traceEvents"]
        found.append(sorted({event["name"] for event in shown if event.get("name", "").startswith("train ")}))
    return found


def test_an_option_names_steps_as_a_slice_does() -> None:
    assert list(parse_steps("100:103")) == [100, 101, 102]
    for text in ("100", "100:", ":103", "a:b", "103:100", "5:5", "0:3", "-1:3"):
        with pytest.raises(ConfigError, match=f"profile_steps = '{text}': .*100:103 for the steps 100, 101 and 102"):
            parse_steps(text)
    for steps in (range(0), range(5, 9, 2), range(3), (100, 103)):
        with pytest.raises(ConfigError, match=r"profile_steps = .*range\(100, 103\) for the steps 100, 101 and 102"):
            ProfileOptions(steps)  # type: ignore[arg-type]


def test_steps_beyond_the_end_are_refused_before_the_first(tmp_path: Path) -> None:
    recipe = load_recipe(str(runs.DIGITS))
    with pytest.raises(
        ConfigError, match=r"profile_steps = '9999:20000': the run has only \d+ steps: name steps up to"
    ):
        train(recipe, tmp_path / "run", profile_steps=range(9999, 20000))


def test_no_evaluation_lies_within_the_steps_of_a_request() -> None:
    for first, every in itertools.product(range(1, 40), range(1, 12)):
        steps = undisturbed(first, num_steps=60, eval_every_steps=every)
        assert len(steps) == NUM_REQUESTED
        assert first <= steps[0] <= first + NUM_REQUESTED
        if every > NUM_REQUESTED:  # an evaluation follows the steps that are its multiples
            assert not [step for step in range(steps[0] - 1, steps[-1]) if step % every == 0]
    assert undisturbed(59, num_steps=60, eval_every_steps=100) == range(59, 61)
    assert not undisturbed(61, num_steps=60, eval_every_steps=100)


def begins(agreement: Agreement, rng: np.random.Generator, *, pace_s: float) -> list[tuple[int, range]]:
    """After which steps of a loop profiles began; the loop ends when a requested one has begun."""
    found: list[tuple[int, range]] = []
    for step in itertools.count(1):
        time.sleep(rng.uniform(0, pace_s))
        due = agreement.passed(step)
        found += [(step, each.steps) for each in due]
        if any(each.reason for each in due):
            break
    return found


@pytest.mark.parametrize("pace_s", [0.0, 0.005])
def test_all_processes_profile_the_same_steps_at_any_pace(pace_s: float) -> None:
    store = Store(3)
    try:
        agreements = [
            Agreement(processes, "test", start_step=0, num_steps=10**9, eval_every_steps=10**9, given=range(3, 5))
            for processes in store.processes
        ]

        def loop(index: int) -> list[tuple[int, range]]:
            if index == 0:
                threading.Timer(0.1, lambda: asked.append(agreements[0].request("a test"))).start()
            return begins(agreements[index], np.random.default_rng(index), pace_s=pace_s)

        asked: list[Appointment | None] = []
        found = store.in_parallel(loop)
        assert found[0] == found[1] == found[2]
        assert asked[0] is not None
        assert found[0] == [(2, range(3, 5)), (asked[0].steps[0] - 1, asked[0].steps)]
    finally:
        store.close()


def test_a_file_asks_for_a_profile_and_once_only(tmp_path: Path) -> None:
    (tmp_path / REQUEST).touch()  # before the first step, which compiles
    with looping(LocalFolder(tmp_path)) as loop:
        loop.run_until(lambda: loop.says("steps"))  # are agreed on
        loop.run(NUM_REQUESTED)  # begins, and does not end
        assert not (tmp_path / REQUEST).exists()
        (tmp_path / REQUEST).touch()
        while not loop.says("a request for a profile is ignored"):
            time.sleep(0.001)  # the trace stays on
        loop.run_until(lambda: loop.says("profile of steps"))
        (tmp_path / REQUEST).touch()
        loop.run_until(lambda: sum(line.startswith("profile of steps") for line in loop.said) == 2)
    first, second = traced(tmp_path)
    assert len(first) == len(second) == NUM_REQUESTED
    assert "train 1" not in first
    (line, *_) = [line for line in loop.said if line.startswith("profile of steps")]
    assert f"xprof --logdir {tmp_path}/tensorboard (pip install 'nfnet_flax[profile]')" in line
    assert f"{tmp_path}/{FOLDER}/" in line


def test_a_profile_of_the_first_steps_and_of_a_run_that_continues(tmp_path: Path) -> None:
    with looping(LocalFolder(tmp_path / "new"), range(1, 3)) as loop:
        loop.run(5)
    assert traced(tmp_path / "new") == [["train 1", "train 2"]]
    with looping(LocalFolder(tmp_path / "within"), range(1, 8), start_step=5) as loop:
        loop.run(5)
    assert traced(tmp_path / "within") == [["train 6", "train 7"]]
    with looping(LocalFolder(tmp_path / "beyond"), range(1, 6), start_step=5) as loop:
        loop.run(5)
    assert loop.said == ["steps 1 to 5 are not profiled: they were done before this start"]
    assert not (tmp_path / "beyond").exists()


def test_a_run_that_ends_within_a_trace_writes_it(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), looping(LocalFolder(tmp_path), range(3, 10)) as loop:
        loop.run(5)
        raise KeyboardInterrupt
    (steps,) = traced(tmp_path)
    assert {"train 3", "train 4", "train 5"} <= set(steps)
    assert next((tmp_path / FOLDER).iterdir()).name.endswith("_steps_3_to_5")


def test_a_full_disk_costs_a_warning_and_the_next_profile_is_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with looping(LocalFolder(tmp_path), range(2, 4)) as loop:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))  # the kernel refuses more, as on a full disk
        try:
            loop.run(5)
            loop.run_until(lambda: not loop.profiler.is_busy())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert traced(tmp_path) == []
        (tmp_path / REQUEST).touch()
        loop.run_until(lambda: loop.says("profile of steps"))
    assert len(traced(tmp_path)[-1]) == NUM_REQUESTED
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("nfnet: ")]
    assert line.startswith("nfnet: the profile of steps 2 to 3 is missing: ")
    assert "File too large" in line
    assert line.endswith("The run goes on")


def test_a_trace_of_the_users_own_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with jax.profiler.trace(tmp_path / "own"), looping(LocalFolder(tmp_path / "run"), range(2, 4)) as loop:
        loop.run(5)
    assert list((tmp_path / "own").rglob("*.xplane.pb"))
    assert not (tmp_path / "run").exists()
    assert "the profile of steps 2 to 3 is missing: Profile has already been started" in capfd.readouterr().err


KILLED = """
import sys, time
from pathlib import Path
from nfnet_flax.storage import LocalFolder
from tests.test_profiling import looping
with looping(LocalFolder(sys.argv[1]), range(2, 100)) as loop:
    loop.run(5)
    print("tracing", flush=True)
    time.sleep(60)
"""


def test_a_process_that_is_killed_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    words = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=runs.ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "tracing\n"
    process.kill()
    process.communicate()
    assert list((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "run").exists()
    with looping(LocalFolder(tmp_path / "run"), range(2, 4)) as loop:
        loop.run(5)
    assert traced(tmp_path / "run") == [["train 2", "train 3"]]
    assert not list((tmp_path / "temporary").iterdir())


def test_a_signal_asks_and_a_handler_of_the_users_own_is_left_alone() -> None:
    asked = threading.Event()
    others = {signal.SIGUSR2: asked.set}
    with stop_requests(ALONE, owns_process=True, others=others) as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert asked.wait(10)
        assert not stop.reached()
    asked.clear()
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    try:
        with stop_requests(ALONE, owns_process=True, others=others):
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.1)
        assert seen == [signal.SIGUSR2]
        assert not asked.is_set()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_without_the_main_thread_signals_are_as_before_and_the_file_asks(tmp_path: Path) -> None:
    handlers: list[Any] = []
    (tmp_path / REQUEST).touch()

    def trains() -> None:
        with (
            stop_requests(ALONE, owns_process=False, others={signal.SIGUSR2: print}),
            looping(LocalFolder(tmp_path)) as loop,
        ):
            handlers.extend(signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR2))
            loop.run_until(lambda: loop.says("profile of steps"))

    before = [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR2)]
    thread = threading.Thread(target=trains)
    thread.start()
    thread.join()
    assert handlers == before
    assert len(traced(tmp_path)[0]) == NUM_REQUESTED


@pytest.mark.parametrize("kind", stores.KINDS)
def test_a_run_in_a_bucket_is_asked_there_and_puts_its_profile_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stores.store(kind) as address:
        for name, value in stores.environment(kind, address).items():
            monkeypatch.setenv(name, value)
        bucket._file_system.cache_clear()
        url = BucketUrl(kind, stores.BUCKET, "runs/a")
        place = BucketFolder(url)
        place.put(REQUEST, b"")
        with looping(place) as loop:
            loop.run_until(lambda: loop.says("profile of steps"))
        assert f"{url}/{FOLDER}/" in loop.said[-1]
        place.put(f"{layout.TENSORBOARD}/events", b"")
        Mirror(url, tmp_path / "next start", is_owner=True).pull()
        found = [Path(name).name.partition(".")[2] for name in place.files() if name.startswith(FOLDER)]
        assert sorted(found) == ["memory.pb.gz", "xplane.pb"]
        assert REQUEST not in place.files()
        files = [path.name for path in (tmp_path / "next start").rglob("*") if path.is_file()]
        assert files == ["events"]  # a profile is large, and of no use for the next start


def op_names(program_name: str, file: Path) -> dict[str, str]:
    """Name of each operation of a program in a trace -> what it belongs to, by XProf's graph viewer."""
    options = {"type": "pb", "module_name": program_name}
    proto = xprof.xspace_to_tool_data([str(file)], "graph_viewer", {"graph_viewer_options": options})[0]
    # The module is the first field of the message: its tag, its size in groups of seven bits, its bytes.
    end = next(position for position in range(1, len(proto)) if proto[position] < 128)
    size = sum((proto[position] & 127) << 7 * (position - 1) for position in range(1, end + 1))
    module = _hlo.HloModule.from_serialized_hlo_module_proto(proto[end + 1 : end + 1 + size])
    program = parse(module.to_string())
    return {operation.name: operation.source for each in program.computations.values() for operation in each}


def executed(file: Path, folder: Path) -> set[str]:
    """What the operations belong to that a process executed within its trace, as XProf reads it."""
    folder.mkdir()
    alone = Path(shutil.copy(file, folder))  # XProf writes the programs of all traces of a folder beside them
    assert {"trace_viewer@", "graph_viewer"} <= set(xprof.xspace_to_tool_names([str(alone)]))
    (program,) = folder.glob("jit_train_step*.hlo_proto.pb")
    names = op_names(program.name.removesuffix(".hlo_proto.pb"), alone)
    shown = json.loads(xprof.xspace_to_tool_data([str(alone)], "trace_viewer", {})[0])["traceEvents"]
    ops = {event["args"]["hlo_op"] for event in shown if event.get("args", {}).get("hlo_module") == "jit_train_step"}
    assert len(ops) > 100
    return {names[op] for op in ops}


SCOPES = (
    "jvp(network)/stem/stem0/",
    "jvp(network)/stage0/block0/conv1/",
    "transpose(jvp(network))/stage0/block0/conv1/",
    "transpose(jvp(network))/stage0/block0/squeeze_excite/expand/",
    "jvp(network)/head/",
    "jvp(loss)/",
    "/standardize/",
    "/standardize_gradient/",
    "/exchange/",
    "/update/agc/",
    "/update/",
    "/ema/",
)


def test_a_running_job_of_two_processes_is_profiled_by_touch_and_by_a_signal(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    options = (*TINY, "--num-steps=100000", "--log-every-steps=20", "--checkpoint.every-steps=100000")
    # Names are no part of a program's key: one that was compiled before its operations had other names would be found.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    first, second = runs.start_all(workdir, 2, *options, environment=environment)
    assert first.stdout is not None
    printed: list[str] = []

    def wait_for(text: str) -> str:
        assert first.stdout is not None
        for line in first.stdout:
            printed.append(line)
            if text in line:
                return line
        raise AssertionError("".join(printed))

    wait_for("first step after")
    (workdir / REQUEST).touch()
    by_file = wait_for("profile of steps")
    second.send_signal(signal.SIGUSR2)
    wait_for("(SIGUSR2 to process 1)")
    by_signal = wait_for("profile of steps")
    first.send_signal(signal.SIGTERM)
    for process in (first, second):
        rest = runs.finish(process)
        assert process.returncode == 75, f"{printed}\n{rest}"
    folders = sorted((workdir / FOLDER).iterdir())
    for folder, line in zip(folders, (by_file, by_signal), strict=True):
        assert str(folder) in line
        files = sorted(folder.glob("*.xplane.pb"))
        hosts = [file.name.removesuffix(".xplane.pb") for file in files]
        assert [host.rpartition(".")[2] for host in hosts] == ["process0", "process1"]
        assert all((folder / f"{host}.memory.pb.gz").stat().st_size > 0 for host in hosts)
        together = xprof.xspace_to_tool_data([str(file) for file in files], "trace_viewer@", {"hosts": hosts})[0]
        shown = json.loads(together)["traceEvents"]
        names = {event["pid"]: event["args"]["name"] for event in shown if event.get("name") == "process_name"}
        steps = {(names[event["pid"]], event["name"]) for event in shown if event["name"].startswith("train ")}
        begin = int(folder.name.split("_")[-3])
        assert steps == {
            (f"{host} /host:CPU", f"train {step}") for host in hosts for step in range(begin, begin + NUM_REQUESTED)
        }
    for index, file in enumerate(sorted(folders[0].glob("*.xplane.pb"))):
        found = executed(file, tmp_path / str(index))
        assert not [scope for scope in SCOPES if not any(scope in name for name in found)]


STEPS = """
import contextlib, dataclasses, json, sys
import jax

@contextlib.contextmanager
def nothing(name):
    yield

if sys.argv[1] == "without":
    jax.named_scope = nothing  # before the package is imported

from nfnet_flax.models import NFResNetConfig
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.programs.step_plan import lower_step
from nfnet_flax.recipe_file import load_recipe

recipe = load_recipe("recipes/digits.py")
model = NFResNetConfig(widths=(8,), depths=(1,), stem_width=8)
programs = []
for changes in ({}, {"reproducible": False, "num_microbatches": None}):
    execution = dataclasses.replace(recipe.execution, **changes)
    _, lowered = lower_step(dataclasses.replace(recipe, model=model, execution=execution), make_mesh())
    programs.append(lowered.compile().as_text())
print(json.dumps(programs))
"""


def test_names_change_no_program() -> None:
    """The compiled steps in both modes, on two devices, are the same but for metadata."""
    environment = {**runs.with_devices(2), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    started = [
        subprocess.Popen([sys.executable, "-c", STEPS, how], stdout=subprocess.PIPE, text=True, env=environment)
        for how in ("with", "without")
    ]
    named, plain = (json.loads(process.communicate(timeout=300)[0]) for process in started)
    for with_names, without in zip(named, plain, strict=True):
        assert "transpose(jvp(network))/stage0/block0/conv1/" in with_names
        assert "stage0" not in without
        assert without_metadata(with_names) == without_metadata(without)


def without_metadata(text: str) -> str:
    """A compiled program without the names of its operations and where they come from."""
    lines = [line for line in text.splitlines() if not line[:1].isdigit() and not line.startswith(METADATA_TABLES)]
    parts = (line.partition(", metadata={")[::2] for line in lines)
    return "\n".join(before + (after.partition("}")[2] if after else "") for before, after in parts)


METADATA_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
