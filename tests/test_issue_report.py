"""`nfnet doctor --report`: a text about real runs that can be published, as nothing private is in it."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import nfnet_flax
from nfnet_flax import exit_codes
from nfnet_flax.doctor.private import is_public, without_private
from tests import runs

HOME, PROJECT, USER, HOST, SECRET, NAME = "quokkahome", "zebrafish", "wombatina", "tapir17", "kakapo51x7", "pangolin"
FOLDER, BUCKET, OTHER = "axolotl", "narwhal-7", "numbatdata"
TELLTALE = (HOME, PROJECT, USER, HOST, SECRET, NAME, FOLDER, BUCKET, OTHER)


def nfnet(home: Path, workdir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of a user whose environment is full of private things."""
    private = {
        "HOME": str(home),
        "USER": USER,
        "LOGNAME": USER,
        "HOSTNAME": f"{HOST}.example.com",
        "HF_TOKEN": SECRET,
        "NFNET_TEST_URL": f"gs://{BUCKET}/{PROJECT}",
        "NFNET_TEST_TOKEN": SECRET,
        "TF_TEST_FILE": f"/mnt/{OTHER}/{SECRET}",
        "SLURM_JOB_NODELIST": f"{HOST}-a",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_hlo_module_re={PROJECT}",
        "PYTHONPATH": str(runs.ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    words = ("-m", "nfnet_flax.cli", *words, "--workdir", str(workdir))
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **private},
        cwd=home / PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a project, in which a run was trained."""
    home = tmp_path_factory.mktemp("users") / HOME
    (home / PROJECT).mkdir(parents=True)
    trained = nfnet(home, home / PROJECT / "runs" / "a", "train", "digits", "--debug", "--no-tensorboard")
    assert trained.returncode == exit_codes.EXIT_DONE, trained.stderr
    return home


def telltale_in(text: str) -> list[str]:
    host = socket.gethostname()
    known = [*TELLTALE, host] if len(host) > 3 and not is_public(host) else TELLTALE
    return [word for word in known if word.lower() in text.lower()]


def test_a_report_of_a_sound_run_has_what_a_reader_needs(home: Path) -> None:
    workdir = home / PROJECT / "runs" / "a"
    plain, made = nfnet(home, workdir, "doctor"), nfnet(home, workdir, "doctor", "--report")
    assert made.returncode == plain.returncode == exit_codes.EXIT_DONE, made.stderr
    assert set(telltale_in(plain.stdout)) >= {HOME, PROJECT}  # otherwise this would test nothing
    assert telltale_in(made.stdout) == []
    headings = re.findall(r"^### (.+)$", made.stdout, re.MULTILINE)
    assert headings == ["Versions", "Machine", "Environment variables", "What nfnet doctor says", "Recipe"]
    assert made.stdout.count("```") == 2 * len(headings)
    for line in (
        rf"nfnet_flax {re.escape(nfnet_flax.__version__)}",
        r"Python 3\.\d+\.\d+",
        r"(jax|jaxlib|flax|optax|grain) \d+\.\d+\S*",
        r"opencv-python-headless \d+(\.\d+)+",  # some have four numbers, as an address has
        r"tensorflow(-cpu)? \d+\.\d+\S*",
        r"\d+ of \d+ CPUs, [\d.]+ GiB of memory",
        r"JAX_PLATFORMS=cpu",
        r"NFNET_TEST_(URL|TOKEN)=<value>",
        r"XLA_FLAGS=.*--xla_dump_hlo_module_re=<value>",
        r"devices   1 x cpu \(cpu\)",
        r"recipe    digits_debug",
        r"workdir   <home>/<path \d>/runs/a",
        r"          checkpoints: steps 2, 4; newest 4 of .*",
        r"nothing is wrong",
        r"data\.batch_size = 16",
        r"optim\.clipping = AGC",
        r"optim\.clipping\.groups\.0\.pattern = 'head\.kernel'",
        r"data\.resampler = area_cubic",
        r"checkpoint\.best_metric = eval_ema/top1",
    ):
        assert re.search(rf"^{line}$", made.stdout, re.MULTILINE), f"{line}:\n{made.stdout}"
    assert "SLURM_JOB_NODELIST" not in made.stdout


def test_a_report_of_a_broken_run_names_no_file_of_the_user(home: Path) -> None:
    workdir, recipe = home / PROJECT / "runs" / "a", home / PROJECT / f"{NAME}.py"
    text = runs.DIGITS.read_text().replace("import DigitsSource", "import FolderSource")
    text = text.replace('name="digits"', f'name="{NAME}_3"')
    recipe.write_text(text.replace("DigitsSource()", f"FolderSource(root={str(home.parent / OTHER / FOLDER)!r})"))
    made = nfnet(home, workdir, "doctor", "--report", "--recipe", f"{NAME}.py")
    assert made.returncode == exit_codes.EXIT_WRONG, made.stderr
    assert telltale_in(made.stdout) == []
    assert re.search(r"WRONG: image folder '<path \d>/train' does not exist: ", made.stdout), made.stdout
    assert re.search(r"WRONG: .*'type': 'FolderSource', 'root': '<path \d>', 'train': 'train'", made.stdout), (
        made.stdout
    )
    root = re.search(r"^data\.source\.root = '(<path \d>)'$", made.stdout, re.MULTILINE)
    assert root, made.stdout
    assert made.stdout.count(root[1]) >= 2, "the finding and the field name the same folder"
    assert re.search(r"^name = '<\w+ \d>'$", made.stdout, re.MULTILINE), made.stdout
    assert re.search(r"^\d wrong, as marked above$", made.stdout, re.MULTILINE)


def test_a_recipe_that_does_not_load_says_nothing_private(home: Path) -> None:
    recipe = home / PROJECT / f"{NAME}.py"
    recipe.write_text(f'raise ValueError("no {OTHER} at s3://{BUCKET}/{PROJECT}/run of {USER}@example.org")\n')
    made = nfnet(home, home / PROJECT / "new", "doctor", "--report", "--recipe", f"{NAME}.py")
    assert made.returncode == exit_codes.EXIT_WRONG
    assert set(telltale_in(made.stdout)) <= {OTHER}  # a word of a sentence, of which nothing can be known
    assert "none was given or found" in made.stdout


@pytest.fixture
def as_anna(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/anna", "USER": "anna", "HOSTNAME": "tapir17.acme.com"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", "correcthorse9")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("free at /home/anna/acme/runs/a", "free at <home>/<path 1>/runs/a"),
        ("free at /home/anna/runs/a.", "free at <home>/runs/a."),
        ("/data/acme/photos, /data/acme/x/1, /data/acme", "<path 1>/photos, <path 1>/x/1, <path 1>"),
        ("(at /data/acme/b1)", "(at <path 1>/b1)"),
        ("/home/bob/acme/checkpoints/4 is", "<path 1>/checkpoints/4 is"),
        ("--workdir=/mnt/acme=2/x runs/acme/best", "--workdir=<path 1>/x <path 2>/best"),
        ("root = '/data/our photos/acme'", "root = '<path 1>'"),
        ("gs://acme/runs/a and gs://acme/else", "gs://<bucket 1>/runs/a and gs://<bucket 1>/<path 1>"),
        ("s3://acme, https://anna:pw@x.acme.com/a?b=c", "s3://<bucket 1>, <url 1>"),
        ("ask anna.b@acme.com", "ask <e-mail 1>"),
        ("host 10.3.4.5:8476, fe80::1ff:fe23:4567:890a", "host <address 1>:8476, <address 2>"),
        ("jax 5.0.0.93 at 09:15:02", "jax 5.0.0.93 at 09:15:02"),
        ("process 3 on host 'node7.acme'", "process 3 on host '<text 1>'"),
        ("on tapir17 for ANNA: anna_runs", "on <host 1> for <user>: <user>_runs"),
        ("joanna had a banana", "joanna had a banana"),
        ("key correcthorse9x", "key <token>x"),
        ("hf_AbcdefgHijkl and ghp_0123456789abcdef", "<token> and <token>"),
        ("password: hunter2", "password: <token 1>"),
        ("commit 0123456789abcdef0123456789abcdef01234567", "commit <token>"),
        ("acme_7.jpg (example 0): damaged", "<name 1>.jpg (example 0): damaged"),
        ("recipe.json is missing; images/s", "recipe.json is missing; images/s"),
        ("cpu_features: 'x86_64 avx512f' -> 'aarch64 sve'", "cpu_features: 'x86_64 avx512f' -> 'aarch64 sve'"),
        ("pip install 'nfnet_flax[tpu]'", "pip install 'nfnet_flax[tpu]'"),
        ("the user's file, the runs' names", "the user's file, the runs' names"),
        ("/dev/nvidia0 exists, /dev/shm: none", "/dev/nvidia0 exists, /dev/shm: none"),
    ],
)
def test_the_rule(text: str, expected: str, as_anna: None) -> None:
    found = without_private(text, keep={"5.0.0.93"})
    assert found == expected
    assert without_private(found, keep={"5.0.0.93"}) == expected, "a second time changes nothing"


def test_what_the_user_gave_is_found_everywhere(as_anna: None) -> None:
    text = "see /mnt/our things/acme set/runs/a: acme set of my_secret; learning_rate"
    places = ["/mnt/our things/acme set/runs/a", "learning/run"]
    found = without_private(text, places=places, names=["my_secret"])
    assert found == "see <path 1>/runs/a: <name 2> of <name 1>; learning_rate"


def test_a_bucket_with_spaces_is_found_where_it_was_given(as_anna: None) -> None:
    place = "gs://acme-7/our things/run 5/a"
    found = without_private(f"{place} can be listed; {place}/checkpoints/4 is damaged", places=[place])
    shown = "gs://<bucket 1>/<path 1>/run 5/a"
    assert found == f"{shown} can be listed; {shown}/checkpoints/4 is damaged"
