"""TensorBoard reads the curves of a run straight from its bucket, and follows them while the run goes on."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nfnet_flax.storage import BucketUrl
from nfnet_flax.training.metrics import MetricsLog
from nfnet_flax.training.mirror import Mirror
from tests import stores

READS = """
import json
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())  # as in an environment that holds TensorBoard alone
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.util.tensor_util import make_ndarray

curves = EventMultiplexer()
for line in sys.stdin:
    curves.AddRunsFromDirectory(sys.argv[1])
    curves.Reload()
    found = curves.Tensors(".", "train/loss")
    print(json.dumps([[event.step, make_ndarray(event.tensor_proto).item()] for event in found]), flush=True)
"""


@pytest.mark.parametrize("kind", stores.KINDS)
def test_tensorboard_follows_a_run_in_a_bucket(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as opened:
        stores.use(monkeypatch, kind, opened.enter_context(stores.store(kind)))
        place = BucketUrl(kind, stores.BUCKET, "runs/a")
        mirror = Mirror(place, tmp_path, is_owner=True)
        reader = opened.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", READS, str(place / "tensorboard")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        opened.callback(reader.kill)
        assert reader.stdin is not None
        assert reader.stdout is not None
        for first in (1, 5):  # the run begins, and is continued, which makes another file
            with contextlib.closing(
                MetricsLog(tmp_path, resume_step=first - 1, evaluated=True, tensorboard=True)
            ) as log:
                for last in (first + 1, first + 3):  # and the file grows
                    for step in (last - 1, last):
                        log.write(step, {"train/loss": 1.0 / 2**step})
                    log.flush()
                    mirror.push()
                    reader.stdin.write("\n")
                    reader.stdin.flush()
                    found = json.loads(reader.stdout.readline())
                    assert found == [[step, 1.0 / 2**step] for step in range(1, last + 1)]
