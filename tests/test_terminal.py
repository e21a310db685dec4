"""What people see of a command: drawn on a terminal, in lines elsewhere, less with `-q`, more with `-v`."""

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfnet_flax import cli, exit_codes, output, progress, session_log
from nfnet_flax.data import image_folder
from nfnet_flax.data.image_folder import scan
from nfnet_flax.doctor.workdir import check_workdir
from nfnet_flax.messages import warn
from nfnet_flax.training.run_folder import RunFolder
from tests import image_sets, runs, terminals
from tests.terminals import Terminal

NUM_STEPS = 30
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "
STEP_LINE = re.compile(r"step +\d+/\d+ .*images/s +\d+:\d\d left")
BROKEN = """
import dataclasses
from pathlib import Path

import numpy as np

from nfnet_flax.data.random_access import ArraySource
from nfnet_flax.data.source_config import SourceConfig
from nfnet_flax.recipe_file import load_recipe


class Images(ArraySource):
    def __getitem__(self, index):
        if index:  # the first one is looked at when a set is opened
            raise ZeroDivisionError("a mistake\\nof mine")
        return super().__getitem__(index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(SourceConfig):
    early: bool = False

    def open(self, split, image_size):
        if self.early:
            raise ZeroDivisionError("a mistake\\nof mine")
        images = np.full((64, 16, 16, 3), 9 if split == "train" else 0, np.uint8)
        return Images(images, np.arange(64, dtype=np.int32) % 10)


def recipe(early: bool = False):
    made = load_recipe(DIGITS)
    data = dataclasses.replace(made.data, source=Broken(early=early), num_held_out=None)
    return dataclasses.replace(made, data=data)
"""


def words_of(workdir: Path) -> list[str]:
    """The command of a run that does all that can be seen."""
    return runs.command(workdir, f"--num-steps={NUM_STEPS}", "--eval-every-steps=10", "--checkpoint.every-steps=10")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Terminal]:
    """A run, and the terminal on which it was watched."""
    workdir, terminal = tmp_path_factory.mktemp("watched") / "run", terminals.opened(columns=100, lines=40)
    process = subprocess.Popen(
        words_of(workdir),
        stdin=terminal.file,
        stdout=terminal.file,
        stderr=terminal.file,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TERM": "xterm-256color"},
    )
    assert process.wait(timeout=300) == exit_codes.EXIT_DONE
    terminal.end()
    return workdir, terminal


def test_a_run_shows_what_a_person_wants_to_know(watched: tuple[Path, Terminal]) -> None:
    _, terminal = watched
    drawn = [frame for frame in terminal.frames if any(line.startswith("step ") and "━" in line for line in frame)]
    assert any(frame[-1] == "compiling" for frame in drawn)
    full = r"loss \d+\.\d{4}  top-1 [\d.]+% raw, [\d.]+% EMA at step (\d+)  [\d,.]+ images/s  checkpoint (\d+)"
    found = [match for frame in drawn if (match := re.fullmatch(full, frame[-1])) is not None]
    assert found, drawn[-1]
    assert all(match[1] == match[2] or int(match[1]) == int(match[2]) + 10 for match in found)
    bars = [match for frame in drawn if (match := re.match(rf"step +(\d+)/{NUM_STEPS} +━.* (\d+)% ", frame[-2]))]
    assert all(int(bar[2]) == round(100 * int(bar[1]) / NUM_STEPS) for bar in bars)
    assert any(re.search(r"%  \d+:\d\d left$", frame[-2]) for frame in drawn)
    # What was printed stays above, and of what was drawn nothing is left; the cursor was never hidden.
    last = terminal.lines()
    assert [line for line in last if "━" in line or STEP_LINE.match(line)] == []
    for step in (10, 20, 30):
        assert len([line for line in last if line.startswith(f"step {step}: top-1 ")]) == 1
    assert f"finished: {NUM_STEPS} steps" in last
    assert b"\033[?25l" not in terminal.written


def test_the_log_of_a_run_holds_the_lines_that_a_pipe_gets(watched: tuple[Path, Terminal]) -> None:
    workdir, _ = watched
    (log,) = (workdir / "log").iterdir()
    lines = log.read_text().splitlines()
    assert all(re.match(TIME, line) for line in lines)
    texts = [re.sub(TIME, "", line, count=1) for line in lines]
    assert [int(line.split("/")[0].removeprefix("step")) for line in texts if STEP_LINE.fullmatch(line)] == [
        *range(1, NUM_STEPS + 1)
    ]
    assert f"finished: {NUM_STEPS} steps" in texts
    assert "\033" not in log.read_text()
    found = [finding for finding in check_workdir(RunFolder(workdir), None, until_s=0.0) if "log" in finding.text]
    assert [(finding.text, finding.is_wrong) for finding in found] == [(f"logs: 1, the newest is {log}", False)]


def test_quiet_verbose_and_plain(watched: tuple[Path, Terminal], capfd: pytest.CaptureFixture[str]) -> None:
    """The run is finished, so that each command only restores it."""
    workdir, _ = watched
    words = words_of(workdir)[3:]
    assert cli.main([*words, "-q"]) == exit_codes.EXIT_DONE
    quiet = capfd.readouterr()
    assert quiet.out.startswith(f"finished: {NUM_STEPS} steps\nparameters ")
    assert quiet.err == ""
    assert cli.main(words) == exit_codes.EXIT_DONE
    plain = capfd.readouterr()
    assert plain.out.endswith(quiet.out)
    assert f"continuing from step {NUM_STEPS} in {workdir}\n" in plain.out
    assert "\033" not in plain.out + plain.err
    assert cli.main(["-v", *words]) == exit_codes.EXIT_DONE
    verbose = capfd.readouterr()
    assert re.search(f"^{TIME}continuing from step {NUM_STEPS}", verbose.out, re.MULTILINE)
    assert re.search(f"^{TIME}checkpoint_manager: ", verbose.err, re.MULTILINE)  # of Orbax
    assert verbose.out.endswith(quiet.out)


def test_an_error_is_a_sentence_and_its_traceback_is_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(BROKEN.replace("DIGITS", repr(str(runs.DIGITS))))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = str(tmp_path / "mine.py")
    small = [
        *runs.SMALL,
        "--data.batch-size=16",
        "--data.image-size=16",
        "--data.eval-image-size=16",
        "--no-tensorboard",
    ]

    # In a thread that prepares batches, after the run has begun: a file of the run.
    assert cli.main(["train", recipe, "--workdir", str(tmp_path / "run"), *small]) == exit_codes.EXIT_INPUT_FAILED
    error = capfd.readouterr().err
    (log,) = (tmp_path / "run" / "log").iterdir()
    assert error.splitlines()[-1].endswith(f"; its traceback is in {log}")
    assert "nfnet: the input failed: " in error
    assert "a mistake" in error
    assert "Traceback" not in error
    kept = log.read_text()
    assert "in __getitem__" in kept
    assert error.splitlines()[-1] in kept

    # Before that, and so for all other commands: a file in the user's cache.
    words = ["train", f"{recipe}:early=True", "--workdir", str(tmp_path / "other"), *small]
    assert cli.main(words) == exit_codes.EXIT_BUG
    error = capfd.readouterr().err
    (log,) = (tmp_path / "cache" / "nfnet_flax" / "log").iterdir()
    assert error.splitlines()[-1] == (
        "nfnet: unexpected error (a bug, or in code of your own): ZeroDivisionError: a mistake of mine; its traceback "
        f"is in {log}"
    )
    assert "Traceback" not in error
    assert "in open\n    raise ZeroDivisionError" in log.read_text()
    assert not (tmp_path / "other").exists()

    assert cli.main(["-v", *words]) == exit_codes.EXIT_BUG
    assert "Traceback (most recent call last):\n" in capfd.readouterr().err
    log.parent.chmod(0o500)
    (tmp_path / "cache" / "nfnet_flax").rename(tmp_path / "cache" / "kept")
    (tmp_path / "cache" / "nfnet_flax").write_text("no folder")  # nothing can be kept: then it is printed
    assert cli.main(words) == exit_codes.EXIT_BUG
    error = capfd.readouterr().err
    assert "Traceback (most recent call last):\n" in error
    assert error.endswith("; its traceback is printed above\n")


@contextlib.contextmanager
def shown_on(terminal: Terminal, *, also_stdout: bool = True) -> Iterator[None]:
    """Shows the progress of this process on a terminal, as a command does."""
    with terminal.used(also_stdout=also_stdout), output.guarded_output(goes_on=True), progress.showing():
        yield


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return terminals.opened(columns=40)


def test_it_fits_into_forty_columns_and_follows_the_window(terminal: Terminal) -> None:
    with shown_on(terminal):
        wide = "scanning /数据/图像/训练集/一级目录/二级目录/三级目录"
        with (
            progress.tracking(wide, 1000, "folders", at_once=True) as task,
            progress.tracking("copying\n\033[2J shards", 1 << 30, progress.BYTES, at_once=True) as copied,
            progress.tracking("step  5/10", 10, at_once=True) as steps,
        ):
            task.advance(250)
            copied.advance(1 << 29)
            steps.facts = (
                "loss 2.3012",
                "top-1 98.06% raw, 98.33% EMA at step 100",
                "1,234.5 images/s",
                "checkpoint 4",
            )
            steps.expect(3725)
            narrow = terminal.wait_for(lambda lines: len(lines) == 6 and "checkpoint 4" in lines[-1])
            print("a result", flush=True)
            since = len(terminal.frames)
            above = terminal.wait_for(lambda lines: len(lines) == 7 and "checkpoint 4" in lines[-1], since)
            terminal.resize(100)
            since = len(terminal.frames)
            task.advance(50)
            wider = terminal.wait_for(
                lambda lines: any(line.endswith("images/s  checkpoint 4") for line in lines), since
            )
    last = terminal.end()
    assert narrow[0].replace(" ", "").startswith("scanning/数据")  # `pyte` puts a space behind wide characters
    assert re.search(r"25%  \d+:\d\d left$", narrow[0])
    assert narrow[1].startswith(r"copying\n\x1b[2J sh")
    assert re.search(r"50%  \d+:\d\d left$", narrow[1])
    assert re.fullmatch(r"step  5/10  ━+    0%  1:02:0\d left", narrow[2])
    assert narrow[3:] == ["loss 2.3012", "top-1 98.06% raw, 98.33% EMA at step ..", "1,234.5 images/s  checkpoint 4"]
    assert above[0] == "a result"
    assert [line.split(" ")[0] for line in above[1:]] == [line.split(" ")[0] for line in narrow]
    assert re.search(r" 30%  \d+:\d\d left  300 of 1,000 folders", wider[1])
    assert wider[-1] == "loss 2.3012  top-1 98.06% raw, 98.33% EMA at step 100  1,234.5 images/s  checkpoint 4"
    assert last == ["a result"]


def test_colours_only_where_they_are_wanted(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with shown_on(terminal), progress.tracking("step", 4, at_once=True) as task:
        task.done = 2
        terminal.wait_for(lambda lines: "50%" in "".join(lines))
    terminal.end()
    assert not re.search(rb"\033\[[\d;]*(?:3\d|38;5;\d+)m", terminal.written)
    assert b"\033[J" in terminal.written
    coloured = terminals.opened(columns=40)
    monkeypatch.delenv("NO_COLOR")
    with shown_on(coloured), progress.tracking("step", 4, at_once=True) as task:
        task.done = 2
        coloured.wait_for(lambda lines: "50%" in "".join(lines))
    coloured.end()
    assert re.search(rb"\033\[[\d;]*3[\d;]*m", coloured.written)


@pytest.mark.parametrize("why", ["dumb", "unset", "piped"])
def test_nothing_is_drawn_where_it_would_not_look_right(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    terminal.resize(60)
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    elif why == "unset":
        monkeypatch.delenv("TERM")
    with contextlib.ExitStack() as opened:
        if why == "piped":  # as in `nfnet train ... | tee log`, which prints on the same terminal
            read_end, write_end = os.pipe()
            opened.callback(os.close, read_end)
            monkeypatch.setattr(sys, "stdout", opened.enter_context(os.fdopen(write_end, "w")))
        with shown_on(terminal, also_stdout=why != "piped"):
            assert not progress.is_drawn()
            with progress.tracking("scan", 4, "folders", first_line_s=0.0, at_once=True):
                time.sleep(0.2)
    lines = terminal.end()
    assert b"\033" not in terminal.written
    assert lines == ["nfnet: scan: 0 of 4 folders after 0:00", "nfnet: scan: done after 0:00 (0 of 4 folders)"]


def test_text_stays_whole_whoever_prints_it(terminal: Terminal) -> None:
    """Pieces of a line from this thread, and warnings from another one, while something is drawn."""
    with shown_on(terminal), progress.tracking("step", 40, at_once=True) as task:
        terminal.wait_for(lambda lines: "step" in "".join(lines))

        def warnings() -> None:
            for number in range(5):
                warn(f"warning {number}")
                time.sleep(0.05)

        thread = threading.Thread(target=warnings)
        thread.start()
        for number in range(5):
            for piece in ("result", " ", str(number)):
                sys.stdout.write(piece)
            sys.stdout.write("\n")
            task.advance()
            time.sleep(0.06)
        thread.join()
        output.draw_no_more()
        os.write(terminal.file, b"from elsewhere\n")  # such as the stacks of all threads
        time.sleep(2 * progress._DRAWING_INTERVAL_S)
        print("the end", flush=True)
    lines = terminal.end()
    assert sorted(lines[:-2]) == sorted(
        [f"nfnet: warning {number}" for number in range(5)] + [f"result {number}" for number in range(5)]
    )
    assert lines[-2:] == ["from elsewhere", "the end"]


def test_a_terminal_that_goes_away_does_not_end_the_command(terminal: Terminal) -> None:
    with terminal.used(), output.guarded_output(goes_on=True), progress.showing():
        with progress.tracking("step", 4, at_once=True) as task:
            terminal.wait_for(lambda lines: "step" in "".join(lines))
            os.close(terminal._master)
            task.advance()
            print("lost")
            time.sleep(2 * progress._DRAWING_INTERVAL_S)
            task.advance()
        assert task.done == 2


def test_a_slow_scan_says_so_within_two_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image_sets.make_folder(tmp_path / "set", num_train=12)
    whole = scan(tmp_path / "set" / "train")
    listing = image_folder._list_class

    def slow(folder: Path) -> Any:
        time.sleep(3.6)  # long enough for a busy machine to print in between
        return listing(folder)

    monkeypatch.setattr(image_folder, "_list_class", slow)
    began = time.monotonic()
    said_s: list[float] = []
    said = output.recorded_by(lambda text: said_s.append(time.monotonic() - began))
    with output.guarded_output(goes_on=True), progress.showing(), said:
        found = scan(tmp_path / "set" / "train")
    assert found.file_names.tolist() == whole.file_names.tolist()
    first, last = capsys.readouterr().err.splitlines()
    num = len(whole.class_names)
    assert re.fullmatch(rf"nfnet: scanning {tmp_path}/set/train: 0 of {num} class folders after 0:0[23]", first)
    assert re.fullmatch(
        rf"nfnet: scanning {tmp_path}/set/train: done after 0:0[45] \({num} of {num} class folders\)", last
    )
    assert 2.0 <= said_s[0] < 3.6


def test_lines_are_sparse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_NEXT_LINE_S", 0.4)
    monkeypatch.setattr(progress._Lines, "interval_s", 0.02)
    with output.guarded_output(goes_on=True), progress.showing():
        with progress.tracking("copying", 4 << 20, progress.BYTES, first_line_s=0.2) as task:
            for _ in range(4):
                time.sleep(0.25)
                task.advance(1 << 20)
        with contextlib.suppress(ValueError), progress.tracking("failing", first_line_s=0.0):
            time.sleep(0.1)
            raise ValueError
        assert list(progress.track(iter("abc"), "quick", "letters")) == ["a", "b", "c"]
        with progress.hidden(), progress.tracking("in Python code that does not ask for it", first_line_s=0.0):
            time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ [KM]iB of|0:0\d(?= left)", "N", line) for line in lines] == [
        "nfnet: copying: N 4.0 MiB after 0:00",
        *["nfnet: copying: N 4.0 MiB after 0:01, N left"] * (len(lines) - 3),
        "nfnet: copying: done after 0:01 (N 4.0 MiB)",
        "nfnet: failing: running for 0:00",
    ]
    assert len(lines) in (4, 5)


def test_only_the_first_process_of_a_run_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    from nfnet_flax.cli.command import _is_first

    assert _is_first(["train", "mine.py"])
    assert not _is_first(["train", "mine.py", "--distributed.process-id=1"])
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert not _is_first(["train", "mine.py"])
    assert _is_first(["predict", "photo.jpg"])  # started by `srun`, but no run of several processes
    assert _is_first(["train", "mine.py", "--distributed.process-id", "0"])


def test_the_hub_shows_its_progress_here() -> None:
    from nfnet_flax.weights.hub import _bar_of

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), progress.tracking("fetching", unit=progress.BYTES) as task:
        bar = _bar_of(task)(desc="model", total=100, initial=10, unit="B", unit_scale=True, name="x", disable=True)
        with bar:
            bar.update(30)
            assert (task.done, task.total) == (40, 100)
            bar.set_postfix_str("fast", refresh=False)
            bar.update(60)
        assert task.done == 100
    assert printed.getvalue() == ""


def test_a_log_that_cannot_be_written_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with output.guarded_output(goes_on=True), session_log.keeping():
        log = session_log.current()
        assert log is not None
        print("one")
        (tmp_path / "log").write_text("no folder")
        log.open(tmp_path / "log" / "file", "RUN/log/file")
        print("two")
        log.close()
        log.open(tmp_path / "good" / "file", "RUN/log/file")
        print("three")
    told = "nfnet: RUN/log/file cannot be written (File exists); what is printed is not kept from now on\n"
    assert capsys.readouterr().err == told
    kept = (tmp_path / "good" / "file").read_text()
    assert [re.sub(TIME, "", line) for line in kept.splitlines()][-2:] == ["two", "three"]


def test_a_log_on_a_disk_that_hangs_keeps_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "file")  # whoever opens it to write waits for a reader, as on a disk that does not answer
    error = ValueError("a mistake")
    with output.guarded_output(goes_on=True), session_log.keeping():
        log = session_log.current()
        assert log is not None
        log.open(tmp_path / "file", "RUN/log/file")
        began = time.monotonic()
        for number in range(100):
            print(f"line {number}")
        log.keep_stacks()
        assert time.monotonic() - began < 3
        assert capsys.readouterr().out.splitlines() == [f"line {number}" for number in range(100)]
        with (tmp_path / "file").open() as reader:  # it answers again
            assert log.keep_traceback(error)
            log.close()
            kept = reader.read()
    assert kept.count("line 99\n") == 1
    assert "test_a_log_on_a_disk_that_hangs" in kept  # the stacks
    assert kept.endswith("ValueError: a mistake\n")
