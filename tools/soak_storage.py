"""Tests a training run on a disk that becomes full or read-only: it must report the reason and keep its checkpoints.

Mounts a small tmpfs in its own user and mount namespaces (so no special rights are needed if the system allows these)
and starts `nfnet train` on it: once until the disk is full, and once until its folder of checkpoints is made read-only.
Each time the run must end with exit code 6 and name the folder and the reason. When the disk is repaired, the run must
continue from its newest checkpoint.

Usage: python tools/soak_storage.py   (about two minutes)
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "digits.py"
OPTIONS = [
    *("--num-steps", "400", "--log-every-steps", "5", "--eval-every-steps", "1000"),
    *("--checkpoint.every-steps", "10", "--checkpoint.keep-last", "1000"),
    *("--model.widths", "16", "32", "--model.depths", "1", "1"),
]
SIZE = "12m"
"""Size of the disk: there is space for some of the checkpoints."""


def start(workdir: Path) -> subprocess.Popen[str]:
    """Starts or continues the run."""
    return subprocess.Popen(
        [sys.executable, "-m", "nfnet_flax.cli", "train", str(RECIPE), "--workdir", str(workdir), *OPTIONS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
    )


def check_stopped(printed: str, returncode: int, reason: str) -> int:
    """Checks how a run ended that the disk stopped; returns the last step that it logged."""
    print(printed.splitlines()[-1])
    assert returncode == 6, printed
    assert re.search(rf"the run's folder failed: /.*{reason}", printed), printed
    assert "Traceback" not in printed, printed
    return int(re.findall(r"^step +(\d+)/", printed, re.MULTILINE)[-1])


def main() -> None:
    """Tests both kinds of disk, one after the other."""
    if "--inside" not in sys.argv:
        namespaces = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]
        sys.exit(subprocess.run([*namespaces, sys.executable, __file__, "--inside"], check=False).returncode)
    disk = Path(tempfile.mkdtemp(prefix="soak_storage_"))
    for kind, reason in (("full", "No space left on device"), ("read-only", "Read-only file system")):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True)
        checkpoints = disk / "run" / "checkpoints"
        process = start(disk / "run")
        printed = ""
        if kind == "read-only":
            assert process.stdout is not None
            for line in process.stdout:
                printed += line
                if re.match(r"step +25/", line):
                    # Only this folder, as a file system with open files cannot be made read-only.
                    subprocess.run(["mount", "--bind", str(checkpoints), str(checkpoints)], check=True)
                    subprocess.run(["mount", "-o", "remount,ro,bind", str(checkpoints)], check=True)
                    break
        printed += process.communicate(timeout=300)[0]
        failed_at = check_stopped(printed, process.returncode, reason)
        if kind == "read-only":
            subprocess.run(["umount", str(checkpoints)], check=True)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        process = start(disk / "run")
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed
        (resumed,) = re.findall(r"continuing from step (\d+)", printed)
        print(f"{kind}: stopped at step {failed_at}, went on from step {resumed}, finished")
        assert 0 <= failed_at - int(resumed) <= 30
        subprocess.run(["umount", str(disk)], check=True)
    disk.rmdir()


if __name__ == "__main__":
    main()
