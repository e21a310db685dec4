"""The account of a run's time: real runs that are killed and stopped, and the arithmetic of histories made by hand."""

import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from nfnet_flax import cli
from nfnet_flax.config import ConfigError
from nfnet_flax.telemetry import ledger as ledger_module
from nfnet_flax.telemetry.goodput import Account, account_of
from nfnet_flax.telemetry.ledger import Ledger
from nfnet_flax.telemetry.sessions import read_history
from nfnet_flax.units import long_duration
from tests import runs
from tests.test_reading import files_in

OPTIONS = ("--num-steps=160", "--eval-every-steps=80", "--checkpoint.every-steps=10")
SIGNALS = ((25, signal.SIGKILL), (55, signal.SIGTERM))
_ROUNDING_S = 0.01
START = {
    "num_steps": 100,
    "num_processes": 1,
    "num_devices": 1,
    "device_kind": "cpu",
    "host": "here",
    "versions": {"jax": "1"},
}


@dataclasses.dataclass(frozen=True)
class Life:
    """A start of the run until its end, seen from outside."""

    began_s: float
    ended_s: float
    printed: str

    @property
    def first_step(self) -> int:
        continued = re.search(r"continuing from step (\d+)", self.printed)
        return int(continued[1]) if continued else 0

    @property
    def last_step(self) -> int:
        return int(re.findall(r"^step +(\d+)/", self.printed, re.MULTILINE)[-1])


@dataclasses.dataclass(frozen=True)
class Killed:
    """A run that was killed, stopped and finished."""

    workdir: Path
    lives: list[Life]
    while_training: dict[str, Any]
    """Its report, made while it was training for the first time."""

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.workdir / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    workdir = tmp_path_factory.mktemp("goodput") / "run"
    lives: list[Life] = []
    report, head = workdir.with_name("report.json"), ""
    for step, number in SIGNALS:
        began_s = time.time()
        process = runs.start(workdir, *OPTIONS)
        if not lives:
            head = report_in_between(process, workdir, report)
        printed = head + runs.signal_at(process, step, number, workdir / "checkpoints" / str(step // 10 * 10))
        lives.append(Life(began_s, time.time(), printed))
        head = ""
    began_s = time.time()
    lives.append(Life(began_s, 0.0, runs.finish(runs.start(workdir, *OPTIONS))))
    lives[-1] = dataclasses.replace(lives[-1], ended_s=time.time())
    return Killed(workdir, lives, json.loads(report.read_text())[0])


def report_in_between(process: subprocess.Popen[str], workdir: Path, report: Path) -> str:
    """Makes a report of a run that is training, while it stands still; returns what the run has printed."""
    assert process.stdout is not None
    printed = ""
    while not re.search("^step +5/", printed, re.MULTILINE):
        printed += process.stdout.readline()
        assert process.poll() is None, printed
    os.killpg(process.pid, signal.SIGSTOP)
    before = files_in(workdir)
    assert cli.main(["report", str(workdir), "--out", str(report)]) == 0
    assert files_in(workdir) == before
    os.killpg(process.pid, signal.SIGCONT)
    return printed


def test_a_report_can_be_made_while_a_run_trains(killed: Killed) -> None:
    found = killed.while_training
    assert re.match(r"training, step \d+ of 160; process \d+ on host .+, last sign of life 20", found["status"])
    (session,) = found["time"]["sessions"]
    assert (session["ending"], session["from_step"], session["cost"]) == (None, 0, None)
    assert session["last_step"] >= 5
    assert found["time"]["num_productive"] == session["last_step"]


def test_every_second_has_a_part(killed: Killed) -> None:
    account = account_of(read_history(killed.workdir / "events.jsonl"))
    lines = killed.lines
    on_record_s = lines[-1]["at_s"] - lines[0]["began_at_s"]
    assert sum(account.seconds.values()) == pytest.approx(on_record_s, abs=1e-3 * len(lines))
    assert account.wall_s == pytest.approx(sum(account.seconds.values()), rel=1e-9)
    assert account.seconds["unrecorded"] == account.set_back_s == 0.0
    assert account.goodput == pytest.approx(account.seconds["productive"] / on_record_s, abs=1e-3)
    # Seen from outside: sessions lie within the lives of their processes.
    assert len(account.sessions) == len(killed.lives) == 3
    for one, life in zip(account.sessions, killed.lives, strict=True):
        assert life.began_s <= one.session.began_at_s <= one.session.last_at_s <= life.ended_s + _ROUNDING_S
        parts_s = sum(one.seconds.values())
        assert parts_s == pytest.approx(one.session.last_at_s - one.session.began_at_s, abs=1e-3 * len(lines))
    for part in ("productive", "start", "restore", "compile", "save", "evaluation", "not_running"):
        assert account.seconds[part] > 0, part


def test_repeated_steps_are_those_that_were_seen(killed: Killed) -> None:
    account = account_of(read_history(killed.workdir / "events.jsonl"))
    first, second, third = killed.lives
    # A step is recorded before it is printed: a kill may come in between.
    reached = account.sessions[0].session.last_step
    assert reached - first.last_step in (0, 1)
    assert [one.session.from_step for one in account.sessions] == [0, second.first_step, third.first_step]
    assert account.num_repeated == reached - second.first_step > 0
    assert [one.num_repeated for one in account.sessions] == [account.num_repeated, 0, 0]
    assert account.num_productive == 160
    assert third.first_step == second.last_step
    steps_s = sum(line["seconds"].get("step", 0.0) for line in killed.lines)
    assert account.seconds["productive"] + account.seconds["repeated"] == pytest.approx(steps_s)
    # Each line is a step here: what is lost are the lines of the first session beyond the checkpoint.
    session = killed.lines[0]["session"]
    beyond = [one for one in killed.lines if one["session"] == session and one["step"] > second.first_step]
    assert account.seconds["repeated"] == pytest.approx(sum(one["seconds"].get("step", 0.0) for one in beyond))


def test_what_each_interruption_cost(killed: Killed) -> None:
    account = account_of(read_history(killed.workdir / "events.jsonl"))
    assert [one.ending for one in account.sessions] == ["killed", "stopped", "finished"]
    assert [one.session.reason for one in account.sessions] == [None, "SIGTERM to process 0", None]
    kill, stop = account.interruptions
    assert account.sessions[2].interruption is None
    begins = [line for line in killed.lines if line["event"] == "start"]
    for index, cost in enumerate((kill, stop)):
        before = [line for line in killed.lines if line["session"] == begins[index]["session"]]
        after = [line for line in killed.lines if line["session"] == begins[index + 1]["session"]]
        assert cost.not_running_s == pytest.approx(after[0]["began_at_s"] - before[-1]["at_s"])
        for name, seconds in (("start", cost.start_s), ("restore", cost.restore_s), ("compile", cost.compile_s)):
            assert seconds == pytest.approx(sum(line["seconds"].get(name, 0.0) for line in after)), name
    assert kill.repeated_s == account.seconds["repeated"] > 0
    assert (kill.num_repeated, stop.num_repeated, stop.repeated_s) == (account.num_repeated, 0, 0.0)
    assert account.not_running_s == {
        "stopped": stop.not_running_s,
        "failed": 0.0,
        "killed": kill.not_running_s,
    }
    parts_s = (stop.not_running_s, stop.start_s, stop.restore_s, stop.compile_s, stop.repeated_s)
    assert stop.total_s == pytest.approx(sum(parts_s))


def test_the_command_prints_the_account(killed: Killed, capsys: pytest.CaptureFixture[str]) -> None:
    account = account_of(read_history(killed.workdir / "events.jsonl"))
    assert cli.main(["report", str(killed.workdir), "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["status"] == "finished, step 160 of 160"
    assert found["time"]["seconds"] == {part: round(seconds, 3) for part, seconds in account.seconds.items()}
    assert found["time"]["num_repeated"] == account.num_repeated
    costs = [one["cost"]["total_s"] for one in found["time"]["sessions"] if one["cost"]]
    assert costs == [round(one.total_s, 3) for one in account.interruptions]
    assert cli.main(["report", str(killed.workdir)]) == 0
    text = capsys.readouterr().out
    assert f"goodput {account.goodput:.1%}" in text
    for one in account.interruptions:
        assert re.search(rf"{re.escape(long_duration(one.total_s))}$", text, re.MULTILINE)


def test_lines_that_a_kill_cut_short_are_left_out_and_counted(killed: Killed, tmp_path: Path) -> None:
    whole = account_of(read_history(killed.workdir / "events.jsonl"))
    path = tmp_path / "events.jsonl"
    lines = (killed.workdir / "events.jsonl").read_bytes().splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if killed.lines[0]["session"].encode() in line)
    cut = lines[last][: len(lines[last]) // 2]
    for end in (b"\n", b""):  # as the recorder leaves it, and as it would be without its care
        path.write_bytes(b"".join([*lines[:last], cut + end, *lines[last + 1 :]]))
        history = read_history(path)
        assert history.unread_lines == (last + 1,)
        found = account_of(history)
        assert len(found.sessions) == 3
        assert found.wall_s == pytest.approx(whole.wall_s, abs=0.1)
        missing_s = sum(json.loads(lines[last])["seconds"].values())
        assert found.seconds["not_running"] == pytest.approx(whole.seconds["not_running"] + missing_s, abs=_ROUNDING_S)

    path.write_bytes(b"".join(lines[:last]) + cut)  # a run that writes at this moment
    assert read_history(path).unread_lines == ()

    middle = next(index for index, line in enumerate(killed.lines) if line["event"] == "evaluated")
    path.write_bytes(b"".join([*lines[:middle], b"\0" * 100 + b"\n", *lines[middle + 1 :]]))
    found = account_of(read_history(path))
    missing_s = sum(json.loads(lines[middle])["seconds"].values())
    assert found.seconds["unrecorded"] == pytest.approx(missing_s, abs=_ROUNDING_S)
    assert found.wall_s == pytest.approx(whole.wall_s, abs=0.1)


class Written:
    """A history made by hand: lines with round numbers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []

    def add(self, session: int, event: str, at_s: float, done: int, /, **seconds: float) -> None:
        began = {"began_at_s": at_s - sum(seconds.values()), **START} if event == "start" else {}
        line = {"event": event, "at_s": at_s, "session": f"{session:08x}", "step": done, "seconds": seconds}
        self._lines.append(json.dumps(line | began))

    def account(self) -> Account:
        self._path.write_text("".join(f"{line}\n" for line in self._lines))
        return account_of(read_history(self._path))


def test_steps_are_lost_over_several_sessions(tmp_path: Path) -> None:
    written = Written(tmp_path / "events.jsonl")
    written.add(1, "start", 5, 0, start=5)
    written.add(1, "restored", 6, 0, restore=1)
    written.add(1, "interval", 16, 10, step=10)
    written.add(2, "start", 30, 0, start=4)  # killed before it restores
    written.add(3, "start", 40, 0, start=4)
    written.add(3, "restored", 41, 8, restore=1)
    written.add(3, "interval", 51, 12, step=10)
    written.add(4, "start", 60, 0, start=4)
    written.add(4, "restored", 61, 4, restore=1)
    written.add(4, "finished", 81, 14, step=20)
    found = written.account()
    # Of the first session, the steps 9 and 10 are lost as the third began at 8, and 5 to 8 as the fourth began at 4.
    assert (found.num_productive, found.num_repeated) == (14, 2 + 4 + 4)
    assert found.seconds["productive"] == 4 + 20
    assert found.seconds["repeated"] == 6 + 10
    assert [one.num_repeated for one in found.sessions] == [6, 0, 4, 0]
    assert [one.num_repeated for one in found.interruptions] == [2, 0, 8]
    assert [one.repeated_s for one in found.interruptions] == [2, 0, 14]
    assert [one.not_running_s for one in found.interruptions] == [10, 6, 5]
    assert found.wall_s == 81 == sum(found.seconds.values())


def test_clocks_that_are_set_back_count_as_no_time(tmp_path: Path) -> None:
    written = Written(tmp_path / "events.jsonl")
    written.add(1, "start", 100, 0, start=5)
    written.add(1, "restored", 101, 0, restore=1)
    written.add(1, "stopped", 111, 10, step=10)
    written.add(2, "start", 95, 0, start=5)  # began 21 s before the first one ended
    written.add(2, "restored", 96, 10, restore=1)
    written.add(2, "interval", 90, 20, step=10)  # set back by 16 s within the session
    found = written.account()
    assert found.set_back_s == 21 + 16
    assert found.seconds["not_running"] == 0
    assert found.wall_s == sum(found.seconds.values()) == 16 + 16
    assert found.num_productive == 20


def test_the_time_in_which_a_run_is_finished_does_not_count(tmp_path: Path) -> None:
    written = Written(tmp_path / "events.jsonl")
    written.add(1, "start", 5, 0, start=5)
    written.add(1, "restored", 6, 0, restore=1)
    written.add(1, "finished", 16, 10, step=10)
    written.add(2, "start", 3605, 0, start=5)
    written.add(2, "restored", 3606, 10, restore=1)
    written.add(2, "finished", 3607, 10, end=1)
    found = written.account()
    assert (found.wall_s, found.num_needless, found.finished_s) == (16, 1, 0)
    assert found.goodput == 10 / 16
    written.add(3, "start", 7205, 0, start=5)
    written.add(3, "restored", 7206, 10, restore=1)
    written.add(3, "finished", 7216, 20, step=10)
    found = written.account()
    assert (found.wall_s, found.num_needless, found.finished_s) == (32, 1, 7200 - 16)
    assert sum(found.seconds.values()) == 32
    assert (found.seconds["not_running"], found.num_productive) == (0, 20)


def test_what_is_written_before_a_checkpoint_is_restored_is_no_step(tmp_path: Path) -> None:
    written = Written(tmp_path / "events.jsonl")
    written.add(1, "start", 5, 0, start=5)
    written.add(1, "restored", 6, 0, restore=1)
    written.add(1, "interval", 16, 10, step=10)
    written.add(2, "start", 25, 0, start=5)
    written.add(2, "interval", 35, 0, start=10)
    written.add(2, "restored", 36, 8, restore=1)
    written.add(2, "interval", 46, 8, compile=10)
    written.add(2, "interval", 56, 12, step=10)
    found = written.account()
    assert (found.num_productive, found.num_repeated) == (12, 2)
    assert (found.seconds["start"], found.seconds["compile"]) == (20, 10)


def test_a_kill_in_a_long_compilation_loses_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "LONGEST_SILENCE_S", 0.2)
    path = tmp_path / "events.jsonl"
    ledger = Ledger(time.perf_counter())
    with ledger.recording(path, KeyError, **START):
        ledger.record("restored", 4)
        ledger.enter("compile", 4)
        time.sleep(1.0)
        # What a kill would leave.
        (session,) = read_history(path).sessions
        assert (session.from_step, session.last_step, session.ending) == (4, 4, None)
        assert sum(line.seconds.get("compile", 0.0) for line in session.lines) > 0.4
        ledger.enter("step", 6)
        time.sleep(0.5)
    (session,) = read_history(path).sessions
    assert (session.lines[-2].event, session.last_step, session.ending) == ("interval", 6, "failed")
    account = account_of(read_history(path))
    assert account.num_productive == 2
    assert account.seconds["unrecorded"] == 0
    num_lines = len(session.lines)
    time.sleep(0.5)
    assert len(read_history(path).sessions[0].lines) == num_lines  # the thread has ended


def test_lines_of_a_process_that_lost_the_run_are_left_out(tmp_path: Path) -> None:
    written = Written(tmp_path / "events.jsonl")
    written.add(1, "start", 5, 0, start=5)
    written.add(1, "restored", 6, 0, restore=1)
    written.add(1, "interval", 16, 10, step=10)
    written.add(2, "start", 130, 0, start=4)
    written.add(1, "failed", 140, 10, step=1)
    written.add(2, "restored", 131, 5, restore=1)
    found = written.account()
    assert [one.ending for one in found.sessions] == ["killed", None]
    assert read_history(tmp_path / "events.jsonl").num_late == 1
    assert found.wall_s == 131


@pytest.mark.parametrize("seed", range(20))
def test_an_account_agrees_with_one_that_is_made_step_by_step(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    written = Written(tmp_path / "events.jsonl")
    now, done = 0.0, 0
    standing: dict[int, float] = {}  # step -> seconds of those that count
    lost: dict[int, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    cause = 0
    for session in range(rng.randint(2, 8)):
        now += rng.randint(0, 50)
        now += 2
        written.add(session, "start", now, 0, start=2)
        if rng.random() < 0.2:
            continue
        first = rng.randint(0, done)
        for step in [step for step in standing if step > first]:
            lost[cause] = lost[cause][0] + 1, lost[cause][1] + standing.pop(step)
        now, done, cause = now + 1, first, session
        written.add(session, "restored", now, first, restore=1)
        for _ in range(rng.randint(0, 5)):
            count, seconds = rng.randint(1, 7), rng.randint(1, 20)
            now += seconds + 1
            written.add(session, "interval", now, done + count, step=seconds, input=1)
            standing |= dict.fromkeys(range(done + 1, done + count + 1), seconds / count)
            done += count
    found = written.account()
    assert found.num_productive == len(standing) == done
    assert found.num_repeated == sum(count for count, _ in lost.values())
    assert found.seconds["productive"] == pytest.approx(sum(standing.values()))
    assert found.seconds["repeated"] == pytest.approx(sum(seconds for _, seconds in lost.values()))
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    by_end = {index: one.interruption for index, one in enumerate(found.sessions) if one.interruption is not None}
    assert {index: one.num_repeated for index, one in by_end.items() if one.num_repeated} == {
        index: count for index, (count, _) in lost.items() if count
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"event": "began"}, "event = 'began'"),
        ({"session": "1"}, "session = '1'"),
        ({"at_s": None}, "at_s is missing"),
        ({"at_s": math.inf}, "at_s = inf"),
        ({"step": -1}, "step = -1"),
        ({"step": True}, "step = True"),
        ({"seconds": {"sleep": 1}}, "seconds.sleep = 1"),
        ({"seconds": {"step": -1}}, "seconds.step = -1"),
        ({"seconds": [1]}, r"seconds = \[1\]"),
        ({"num_steps": 1.5}, "num_steps = 1.5"),
        ({"versions": {"jax": 1}}, "versions = "),
        ({"host": None}, "host is missing"),
    ],
)
def test_whole_lines_of_another_format_are_an_error(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    line = {"event": "start", "at_s": 1.0, "session": "0" * 8, "step": 0, "seconds": {}, "began_at_s": 1.0, **START}
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert len(read_history(path).sessions) == 1
    path.write_text(json.dumps(line | changed) + "\n")
    with pytest.raises(ConfigError, match=rf"line 1: {said}.*another version of nfnet_flax"):
        read_history(path)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (("start", "start"), "'start' follows 'start' in the same session"),
        (("start", "stopped", "interval"), "'interval' follows 'stopped' in the same session"),
    ],
)
def test_lines_in_another_order_are_an_error(events: tuple[str, ...], said: str, tmp_path: Path) -> None:
    written = Written(tmp_path / "events.jsonl")
    for event in events:
        written.add(1, event, 1, 0)
    with pytest.raises(ConfigError, match=said):
        written.account()


def test_a_run_without_a_record_has_no_sessions(tmp_path: Path) -> None:
    assert read_history(tmp_path / "events.jsonl").sessions == ()
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(ConfigError, match="is a folder, but a run writes a file there: move it away"):
        read_history(tmp_path / "events.jsonl")
