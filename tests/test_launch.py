"""The launch files: real shells run them against stand-ins for the programs of a cluster, which is not at hand here."""

import os
import re
import stat
import subprocess
import time
from pathlib import Path

import pytest

from nfnet_flax import cli, exit_codes
from tests.runs import ROOT

LAUNCH = ROOT / "tools" / "launch"
NUM_HOSTS = 2

# Keeps the cloud's side in $CLOUD: `request` and `tpu` hold the states, `hostN` is the home folder of a host, on which
# commands really run. `codes` lists what the runs end with, one line a start; "preempt" takes the TPU away meanwhile.
GCLOUD = r"""#!/usr/bin/env bash
set -euo pipefail
echo "$*" >>"$CLOUD/calls"
hosts() { for host in "$CLOUD"/host*; do HOME=$host PATH=$CLOUD/programs:$PATH "$@"; done; }
state() { cat "$CLOUD/$1" 2>/dev/null || { echo "ERROR: NOT_FOUND: there is no $1" >&2; exit 1; }; }
case "$3 $4" in
"queued-resources create") echo ACTIVE >"$CLOUD/request"; echo READY >"$CLOUD/tpu" ;;
"queued-resources delete") rm -rf "$CLOUD/request" "$CLOUD/tpu" "$CLOUD"/host*/nfnet_flax ;;
"queued-resources describe") state request ;;
"tpu-vm describe") state tpu ;;
"tpu-vm scp") hosts bash -c 'cp "$0" "$HOME/nfnet_flax.tar.gz"' "$5" ;;
"tpu-vm ssh")
    for word; do case $word in --command=*) command=${word#--command=} ;; esac; done
    echo "Using ssh batch size of 1." >&2
    hosts bash -c "$command"
    ;;
*) exit 64 ;;
esac
"""
# On a host: `uv` makes the environment, in which `nfnet` records its words and ends as this start is to end.
UV = r"""#!/usr/bin/env bash
mkdir -p .venv/bin
cat >.venv/bin/nfnet <<'END'
#!/usr/bin/env bash
echo "$*" >>~/starts
code=$(sed -n "$(wc -l <~/starts)p" "$CLOUD/codes")
if [ "$code" = preempt ]; then echo PREEMPTED >"$CLOUD/tpu"; exec sleep 3; fi
if [ "$code" = wait ]; then trap 'exit 75' TERM; while :; do sleep 0.05; done; fi
exit "$code"
END
ln -s /bin/true .venv/bin/python
chmod +x .venv/bin/*
"""
TRAIN = "train recipes/nfnet_imagenet.py:variant=f0 --workdir"
NOTHING = "#!/bin/sh\nexit 0\n"


def data_options(folder: str) -> str:
    """Patterns that have reached `nfnet` as they are."""
    return " ".join(f"--data.source.{split} {folder}/{split}-*.array_record" for split in ("train", "eval"))


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Cloud:
    """A cloud of one TPU with two hosts, as the script sees it."""

    def __init__(self, folder: Path, codes: list[str]) -> None:
        self.folder = folder
        program(folder / "bin" / "gcloud", GCLOUD)
        for name in ("sudo", "python3"):
            program(folder / "programs" / name, NOTHING)
        program(folder / "programs" / "mountpoint", "#!/bin/sh\nexit 1\n")
        for host in range(NUM_HOSTS):
            program(folder / f"host{host}" / ".local" / "bin" / "uv", UV)
        (folder / "codes").write_text("".join(f"{code}\n" for code in codes))

    def script(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a subcommand of tpu_vm.sh."""
        settings = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CLOUD": str(self.folder),
            "PROJECT": "mine",
            "ZONE": "here",
            "NFS": "10.0.0.2:/shared",
            "POLL_S": "0.1",
            "OPTIONS": "--optim.clipping.ratio 0.02 --name 'two words'",
        }
        words = ["bash", str(LAUNCH / "tpu_vm.sh"), command]
        return subprocess.run(
            words, env={**os.environ, **settings, **variables}, capture_output=True, text=True, check=False, timeout=60
        )

    def starts(self) -> list[list[str]]:
        """The words of every start of `nfnet`, by host."""
        files = [self.folder / f"host{host}" / "starts" for host in range(NUM_HOSTS)]
        return [file.read_text().splitlines() for file in files]

    def calls(self, words: str) -> list[str]:
        """The calls of gcloud that begin with some words."""
        calls = (self.folder / "calls").read_text().splitlines()
        return [call for call in calls if call.startswith(f"compute tpus {words}")]


def test_a_tpu_run_that_was_stopped_is_started_again_and_ends(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, [str(exit_codes.EXIT_STOPPED), str(exit_codes.EXIT_DONE)])
    done = cloud.script("run", NFS="", BUCKET="gs://mine")
    assert done.returncode == 0, done.stderr
    assert "the run ended: 75" in done.stdout
    words = f"{TRAIN} gs://mine/runs/f0 --platform tpu {data_options('gs://mine/imagenet')}"
    assert cloud.starts() == [[f"{words} --optim.clipping.ratio 0.02 --name two words"] * 2] * NUM_HOSTS
    (create,) = cloud.calls("queued-resources create")
    options = ("--project=mine", "--zone=here", "--accelerator-type=v5litepod-256", "--node-id=nfnet", "--spot")
    assert [option for option in options if option not in create.split()] == []
    assert len(cloud.calls("tpu-vm scp")) == 1
    assert cloud.calls("queued-resources delete") == []
    installed = tmp_path / "host1" / "nfnet_flax"
    assert (installed / "nfnet_flax" / "recipe.py").read_bytes() == (ROOT / "nfnet_flax" / "recipe.py").read_bytes()
    assert (installed / "recipes" / "nfnet_imagenet.py").is_file()


@pytest.mark.parametrize("code", [exit_codes.EXIT_BAD_INPUT, exit_codes.EXIT_DIVERGED])
def test_a_tpu_run_that_cannot_go_on_is_not_started_again(tmp_path: Path, code: int) -> None:
    cloud = Cloud(tmp_path, [str(code), str(exit_codes.EXIT_DONE)])
    assert cloud.script("run").returncode == code
    assert [len(starts) for starts in cloud.starts()] == [1, 1]


def test_a_tpu_run_on_a_shared_disk(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, [str(exit_codes.EXIT_DONE)])
    assert cloud.script("run").returncode == 0
    words = f"{TRAIN} /mnt/shared/runs/f0 --platform tpu {data_options('/mnt/shared/imagenet')}"
    assert cloud.starts() == [[f"{words} --optim.clipping.ratio 0.02 --name two words"]] * NUM_HOSTS


def test_a_place_for_data_and_runs_is_needed(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, [])
    assert "set BUCKET" in cloud.script("status", NFS="").stderr
    assert "not both" in cloud.script("status", BUCKET="gs://mine").stderr


def test_a_preempted_tpu_is_replaced(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["preempt", str(exit_codes.EXIT_DONE)])
    done = cloud.script("run")
    assert done.returncode == 0, done.stderr
    assert "the run ended: preempted" in done.stdout
    assert [len(starts) for starts in cloud.starts()] == [2, 2]
    assert len(cloud.calls("queued-resources create")) == 2
    assert len(cloud.calls("queued-resources delete")) == 1
    assert len(cloud.calls("tpu-vm scp")) == 2


def test_failures_of_a_tpu_run_are_counted(tmp_path: Path) -> None:
    cloud = Cloud(
        tmp_path, [str(exit_codes.EXIT_INPUT_FAILED), str(exit_codes.EXIT_STOPPED), "1", str(exit_codes.EXIT_DONE)]
    )
    done = cloud.script("run", MAX_FAILURES="2")
    assert done.returncode == 1
    assert "failed 2 times" in done.stderr
    assert [len(starts) for starts in cloud.starts()] == [3, 3]


def test_the_steps_of_a_tpu_run_one_by_one(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["wait"])
    for command in ("create", "setup", "start", "start"):
        done = cloud.script(command)
        assert done.returncode == 0, done.stderr
    assert "is running already" in done.stdout
    assert cloud.script("status").stdout == "request: ACTIVE\nTPU: READY\n" + "run-state: running\n" * NUM_HOSTS
    assert cloud.script("stop").returncode == 0
    for host in range(NUM_HOSTS):
        assert within_10_s(tmp_path / f"host{host}" / "nfnet_flax" / "exit_code") == f"{exit_codes.EXIT_STOPPED}\n"
    assert cloud.script("delete").returncode == 0
    assert cloud.script("status", MAX_SILENT_POLLS="0").stdout.startswith("request: NOT_FOUND\nTPU: NOT_FOUND\n")


def within_10_s(path: Path) -> str:
    """What is in a file, once something is."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    return ""


def test_a_tpu_script_explains_itself(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, [])
    done = cloud.script("strat")
    assert done.returncode == 2
    assert "tpu_vm.sh run       create, setup and start" in done.stderr
    assert "set -euo" not in done.stderr


def slurm(folder: Path, code: int, state: str = "RUNNING", **variables: str) -> tuple[int, list[str]]:
    """Runs slurm.sbatch with tasks that end with `code`; its exit code, and what it called."""
    for name, end in (("srun", code), ("scontrol", 0)):
        program(folder / name, f'#!/bin/sh\necho "{name} $*" >>"{folder}/calls"\nexit {end}\n')
    program(folder / "squeue", f"#!/bin/sh\necho {state}\n")
    (folder / "calls").unlink(missing_ok=True)
    settings = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "12",
        "SHARED": "/shared",
        "OPTIONS": "--seed 3",
    }
    words = ["bash", str(LAUNCH / "slurm.sbatch")]
    done = subprocess.run(
        words, env={**os.environ, **settings, **variables}, capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_slurm_requeues_what_can_go_on(tmp_path: Path) -> None:
    srun = (
        f"srun --kill-on-bad-exit=0 --wait=600 --cpus-per-task=12 .venv/bin/nfnet {TRAIN} /shared/runs/f0 "
        f"--platform gpu {data_options('/shared/imagenet')} --seed 3"
    )
    for code in (exit_codes.EXIT_DONE, exit_codes.EXIT_BAD_INPUT, exit_codes.EXIT_DIVERGED):
        assert slurm(tmp_path, code) == (code, [srun])
    for code in (exit_codes.EXIT_STOPPED, exit_codes.EXIT_INPUT_FAILED, 137):
        assert slurm(tmp_path, code) == (code, [srun, "scontrol requeue 17"])
    for state in ("COMPLETING", "PENDING"):  # cancelled or preempted
        assert slurm(tmp_path, exit_codes.EXIT_STOPPED, state) == (exit_codes.EXIT_STOPPED, [srun])
    many = {"SLURM_RESTART_COUNT": "100"}
    assert slurm(tmp_path, exit_codes.EXIT_INPUT_FAILED, **many) == (exit_codes.EXIT_INPUT_FAILED, [srun])
    assert slurm(tmp_path, exit_codes.EXIT_STOPPED, **many) == (exit_codes.EXIT_STOPPED, [srun, "scontrol requeue 17"])


def test_slurms_options_stand_before_the_first_command() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH")]
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert all(option.startswith("--") and " " not in option for option in options)
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= set(options)
    given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    assert given["ntasks-per-node"] == given["gpus-per-node"]


def test_the_options_that_the_files_give_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", str(ROOT / "recipes" / "nfnet_imagenet.py"), "--help"])
    known = set(re.findall(r"--[a-z][a-z.-]+", capsys.readouterr().out))
    given = set()
    for path in LAUNCH.iterdir():
        given |= set(re.findall(r"--(?:workdir|platform|(?:data|execution)\.[a-z.-]+)", path.read_text()))
    assert len(given) >= 5
    assert given <= known


def test_the_docs_tell_what_every_exit_code_means() -> None:
    text = (ROOT / "docs" / "from_laptop_to_pod.md").read_text()
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    assert {value for name, value in vars(exit_codes).items() if name.startswith("EXIT_")} <= told


def test_an_interpreter_that_does_not_start_is_not_called_too_old(tmp_path: Path) -> None:
    program(tmp_path / "broken", "#!/bin/sh\necho 'cannot open shared object' >&2\nexit 127\n")
    old = "#!/bin/sh\ncase $2 in *version*) exit 1 ;; esac\n[ $1 = --version ] && echo Python 3.9.1\nexit 0\n"
    program(tmp_path / "old", old)
    for name, message in (("broken", "does not start"), ("old", "Python 3.11 or newer is needed")):
        words = ["bash", "-c", f"source {ROOT / 'tools' / 'venv.sh'} test"]
        environment = {**os.environ, "PYTHON": str(tmp_path / name)}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert ("newer" in done.stderr) == (name == "old")


def test_every_script_is_one_for_bash() -> None:
    for path in (*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")):
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
