"""Compilation is most of the suite's time: what the compiler's last passes gain in speed, short runs never earn back.
Fusions in one module each, which XLA's CPU compiler makes by default, take it more than twice as long as without.

Processes that tests start inherit the settings. Tests of the promise itself run as users' runs do
(`runs.OPTIMIZED`). The thread pool has the size that `nfnet train` gives it, so that runs within pytest's own process
round as others do.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
import pytest

from nfnet_flax.data.workers import STOP_SIGNALS
from nfnet_flax.garbage import collect_rarely
from tests import bucket_sets, image_sets, stores
from tests.image_sets import make_sets

os.environ.setdefault("NPROC", "8")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
_WITHOUT_FUSION_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
_flags = os.environ.get("XLA_FLAGS", "")  # of the process that started pytest's workers, which has the flag already
# A version of XLA that does not know a flag ends the process.
if jaxlib.__version__.startswith("0.10.") and _WITHOUT_FUSION_EMITTERS not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {_WITHOUT_FUSION_EMITTERS}".strip()
# Users' shells do not set these, which hide what a command leaves unwritten, and what it writes besides.
for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)
sys.dont_write_bytecode = False
collect_rarely()  # as the command does
for number in STOP_SIGNALS:  # ignored where the suite runs in the background or under `nohup`; tests send them
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


_LONGEST_FIRST = (
    *("resume", "docs", "models", "step", "spatial", "own_code", "training", "execution", "processes", "identity"),
    *("objectives", "copies", "output", "reproducible", "workers", "frozen", "extending", "recipes", "tensorboard"),
    *("profiling", "trackers", "telemetry", "terminal", "goodput", "report", "signal", "agc_statistics"),
    *("claim_agc", "claim_cuts", "claim_exact"),
)
"""Files that take minutes. Workers get whole files in turn: one that began last would be waited for by all others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest in front."""
    rank = {f"test_{name}.py": number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """A test leaves the environment as it was: commands run within pytest's own process set what libraries read."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as `folder`, `array_record`, `tfds`, `parquet` and `webdataset`. A test that changes them takes
    `image_sets.copied`."""
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    image_sets.make_folder(root / "folder", num_train=12)
    image_sets.prepare(root / "set", f"--folder={root / 'folder'}", "--num-processes=1")
    return root / "set"


@pytest.fixture(scope="module", params=stores.KINDS)
def served(request: pytest.FixtureRequest, small_set: Path) -> Iterator[bucket_sets.Bucket]:
    with stores.proxied(request.param, []) as (proxy, set_rules), pytest.MonkeyPatch.context() as patch:
        stores.use(patch, request.param, proxy)
        found = bucket_sets.Bucket(
            request.param, f"{request.param}://{stores.BUCKET}/data [v2]/set", proxy, small_set, set_rules
        )
        found.fill()
        yield found


@pytest.fixture
def bucket(served: bucket_sets.Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[bucket_sets.Bucket]:
    stores.use(monkeypatch, served.kind, served.proxy)
    before = bucket_sets.contents(served)
    yield served
    served.set_rules([])
    if bucket_sets.contents(served) != before:
        served.fill()
