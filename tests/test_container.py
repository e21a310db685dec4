"""The Dockerfile is sound as far as that can be seen without a container engine, and signals reach process 1.

`tools/try_container.sh` runs its steps.
"""

import dataclasses
import fnmatch
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

DOCKERFILE = ROOT / "docs" / "Dockerfile"
IGNORED = ROOT / "docs" / "Dockerfile.dockerignore"
AS_PROCESS_1 = ("unshare", "--user", "--map-root-user", "--pid", "--fork")


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction of the Dockerfile."""

    word: str
    rest: str


def steps() -> list[Step]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [Step(*line.split(maxsplit=1)) for line in lines if line.strip()]


def of(word: str) -> list[str]:
    return [step.rest for step in steps() if step.word == word]


def sources() -> list[str]:
    """Files and folders of the repository that are copied."""
    copies = [rest.split()[:-1] for rest in of("COPY") if not rest.startswith("--from=")]
    return [source for words in copies for source in words]


def test_every_instruction_is_known() -> None:
    known = {
        "ARG",
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "LABEL",
        "USER",
        "VOLUME",
        "ENV",
        "STOPSIGNAL",
        "ENTRYPOINT",
        "CMD",
    }
    assert {step.word for step in steps()} <= known  # so there is no ADD, which could fetch a URL


def test_stages_have_tags_and_arguments_have_defaults() -> None:
    bases = of("FROM")
    assert len(bases) == 2
    for base in bases:
        assert re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+( AS \w+)?", base), base
    given = dict(argument.split("=", 1) for argument in of("ARG"))  # fails for one without a default
    assert set(given) == {"PYTHON", "DEVICE", "EXTRAS"}
    least = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert least
    assert int(given["PYTHON"].removeprefix("3.")) >= int(least[1])
    known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    devices = re.search(r"cpu\) .* ;; (\w+) \| (\w+)\) extras=", "\n".join(of("RUN")))
    assert devices
    assert {*given["EXTRAS"].split(","), *devices.groups()} <= set(known)


@pytest.mark.parametrize("source", sources())
def test_what_is_copied_is_in_the_repository_and_may_be_read(source: str) -> None:
    rules = [line for line in IGNORED.read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert any(source == rule[1:] or source.startswith(f"{rule[1:]}/") for rule in rules if rule.startswith("!"))
    assert (ROOT / source).exists()
    tracked = subprocess.run(["git", "ls-files", "--", source], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:  # in a checkout
        assert tracked.stdout.strip(), f"{source} is not tracked"
        assert not fnmatch.filter(tracked.stdout.splitlines(), "*__pycache__*")


def test_only_the_wheel_is_installed_with_locked_versions() -> None:
    built, *installed = [rest for rest in of("RUN") if "pip " in rest]
    assert "pip wheel" in built
    (line,) = installed
    assert "--constraint /build/newest.txt" in line
    assert "/build/wheels/nfnet_flax-*.whl" in line
    last = [step.word for step in steps()].index("FROM", 2)
    copied = [step.rest for step in steps()[last:] if step.word == "COPY"]
    assert copied == ["docs/constraints/newest.txt /build/newest.txt", "--from=wheel /build/wheels /build/wheels"]


@pytest.mark.parametrize(("device", "expected"), [("cpu", "[gcs,s3]"), ("tpu", "[gcs,s3,tpu]"), ("gpu", None)])
def test_the_device_chooses_the_extra(device: str, expected: str | None, tmp_path: Path) -> None:
    (line,) = (rest for rest in of("RUN") if "pip install" in rest)
    (tmp_path / "nfnet_flax-1.whl").touch()
    script = 'pip() { echo "${@: -1}"; }; ' + line.replace("/build/wheels", str(tmp_path))
    arguments = {"DEVICE": device, "EXTRAS": "gcs,s3", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=arguments, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if expected is None else 0), done.stderr
    assert done.stdout.strip() == ("" if expected is None else f"{tmp_path}/nfnet_flax-1.whl{expected}")


def test_nfnet_is_process_1_of_a_user_that_is_not_root() -> None:
    (user,) = of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    words = [step.word for step in steps()]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert "RUN" not in words[words.index("USER") :]
    (start,) = of("ENTRYPOINT")
    assert json.loads(start) == ["nfnet"]  # the form without a shell, which would keep signals for itself
    (options,) = of("CMD")
    assert json.loads(options) == ["--help"]
    assert of("STOPSIGNAL") == ["SIGTERM"]
    assert of("VOLUME") == of("WORKDIR")[-1:] == ["/work"]


def test_signals_end_process_1_before_it_trains(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*AS_PROCESS_1, "true"], check=False).returncode != 0:
        pytest.skip("no namespaces of processes here")
    recipe = tmp_path / "slow.py"
    recipe.write_text('import os, time\nprint("process", os.getpid(), flush=True)\ntime.sleep(60)\n')
    words = ["-m", "nfnet_flax.cli", "train", str(recipe), "--workdir", str(tmp_path / "run")]
    with subprocess.Popen([*AS_PROCESS_1, sys.executable, *words], stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "process 1\n"
        (child,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        subprocess.run(["kill", "-TERM", child], check=True)
        try:
            assert outer.wait(timeout=30) == 128 + signal.SIGTERM
        finally:
            subprocess.run(["kill", "-KILL", child], check=False, stderr=subprocess.DEVNULL)
