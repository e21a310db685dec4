"""Small sets of real image files in the layouts that the sources read."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]

from nfnet_flax.data.source_config import (
    ArrayRecordSource,
    DigitsSource,
    FolderSource,
    ParquetSource,
    SourceConfig,
    SyntheticSource,
    TfdsSource,
    WebDatasetSource,
)
from tests.packed_sets import make_parquet, make_webdataset

ROOT = Path(__file__).parent.parent
CLASSES = ("n01440764", "n01443537", "n01484850")

# Removes one package from Python's sight, as if it were not installed.
WITHOUT_TENSORFLOW = """
import sys

class Without:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "tensorflow" else self._finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

_WRITE_TFDS = (
    WITHOUT_TENSORFLOW
    + """
import tensorflow_datasets as tfds
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.data.sources import open_source

folder, data_dir = sys.argv[1:]
SOURCES = {split: open_source(FolderSource(root=folder), split, 0) for split in ("train", "eval")}

class TinySet(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        names = SOURCES["train"].class_names
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=names)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, manager):
        return {
            "train": self._generate_examples("train", True),
            "validation": self._generate_examples("eval", True),
            "test": self._generate_examples("eval", False),
        }

    def _generate_examples(self, split, labelled):
        for index in range(len(SOURCES[split])):
            record = SOURCES[split][index]
            yield index, {"image": record["image"], "label": int(record["label"]) if labelled else -1}

tfds.disable_progress_bar()
TinySet(data_dir=data_dir, file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""
)


def image_file(seed: int, kind: str = "JPEG") -> bytes:
    """A small encoded image, other for each seed."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 40, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((int(width), int(height))).save(file, kind)
    return file.getvalue()


def make_folder(root: Path, *, num_train: int = 4, num_val: int = 2) -> Path:
    """An image folder with the file names of ILSVRC2012; the first training image of each class is a PNG."""
    seed = 0
    for split, count in (("train", num_train), ("val", num_val)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                seed += 1
                file = f"{name}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{seed:08d}.JPEG"
                kind = "PNG" if split == "train" and number == 0 else "JPEG"
                (root / split / name / file).write_bytes(image_file(seed, kind))
    return root


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_tars(folder: Path, out: Path) -> list[str]:
    """The images of a folder as ILSVRC2012 is downloaded; returns the tool's options that name the files."""
    out.mkdir()
    with tarfile.open(out / "train.tar", "w") as outer:
        for name in reversed(CLASSES):  # the order within the file must not count
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in sorted((folder / "train" / name).iterdir(), reverse=True):
                    _add(tar, path.name, path.read_bytes())
            _add(outer, f"{name}.tar", inner.getvalue())
    images = sorted((folder / "val").glob("*/*"), key=lambda path: path.name)
    with tarfile.open(out / "val.tar", "w") as tar:
        for path in reversed(images):
            _add(tar, path.name, path.read_bytes())
    # The development kit numbers its classes in another order than their ids, and has inner nodes after the leaves.
    ids = {name: number for number, name in enumerate(reversed(CLASSES), start=1)}
    synsets = np.array(
        [(number, name) for name, number in ids.items()] + [(4, "n00000004")],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object)],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ids[path.parent.name]}\n" for path in images)
    with tarfile.open(out / "devkit.tar.gz", "w:gz") as tar:
        _add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        _add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    (out / "synsets.txt").write_text("".join(f"{path.name} {path.parent.name}\n" for path in images))
    return [f"--train-tar={out / 'train.tar'}", f"--val-tar={out / 'val.tar'}", f"--devkit={out / 'devkit.tar.gz'}"]


def prepare_command(out: Path, *options: str, train_shards: int = 3, eval_shards: int = 2) -> list[str]:
    """The command line of tools/prepare_imagenet.py for a small set."""
    tool = str(ROOT / "tools" / "prepare_imagenet.py")
    shards = [f"--train-shards={train_shards}", f"--eval-shards={eval_shards}"]
    return [sys.executable, "-W", "error", tool, f"--out={out}", "--no-expect-imagenet", *shards, *options]


def prepare(out: Path, *options: str, train_shards: int = 3, eval_shards: int = 2) -> str:
    """Runs the tool and returns what it printed."""
    command = prepare_command(out, *options, train_shards=train_shards, eval_shards=eval_shards)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_tfds(folder: Path, data_dir: Path) -> None:
    """Prepares the set `tiny_set` by TFDS from an image folder, in a process that has no TensorFlow.

    It has the splits train, validation and test; the last one without labels. The order is that of the folder source.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WRITE_TFDS, str(folder), str(data_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def make_sets(root: Path) -> Path:
    """The same images as `folder` and in every kind of storage; see the fixture `sets`."""
    make_folder(root / "folder")
    prepare(root / "array_record", f"--folder={root / 'folder'}", "--num-processes=1")
    make_tfds(root / "folder", root / "tfds")
    make_parquet(root / "folder", root / "parquet")
    make_webdataset(root / "folder", root / "webdataset")
    return root


def config_of(kind: str, sets: Path) -> SourceConfig:
    """The source of one of the sets that `make_sets` made, or of one that is at hand."""
    configs: dict[str, SourceConfig] = {
        "folder": FolderSource(root=str(sets / "folder")),
        "array_record": ArrayRecordSource(
            train=(str(sets / "array_record" / "train-*"),), eval=(str(sets / "array_record" / "eval-*"),)
        ),
        "tfds": TfdsSource(name="tiny_set", data_dir=str(sets / "tfds")),
        "parquet": ParquetSource(root=str(sets / "parquet")),
        "webdataset": WebDatasetSource(root=str(sets / "webdataset")),
        "digits": DigitsSource(),
        "synthetic": SyntheticSource(num_train_examples=5000, num_eval_examples=7, num_classes=3),
    }
    return configs[kind]


def copied(kind: str, sets: Path, to: Path) -> Path:
    """A copy of a set that a test may damage."""
    shutil.copytree(sets / kind, to / kind)
    return to / kind
