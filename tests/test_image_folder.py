"""What lies in an image folder and is no image of a class: counted and said, or an error; never dropped silently."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data.source_config import ArrayRecordSource, FolderSource
from nfnet_flax.data.sources import open_source
from tests import runs
from tests.image_sets import CLASSES, copied, image_file


def said(root: Path) -> list[str]:
    unused = open_source(FolderSource(root=str(root)), "train", 0).unused
    assert all(f"not used are {count} " in text for count, text in unused)
    return [text for _, text in unused]


def refused(root: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_source(FolderSource(root=str(root)), "train", 0)
    return str(caught.value)


def test_what_is_not_used_is_said_by_reason_with_count_and_example(sets: Path, tmp_path: Path) -> None:
    root = copied("folder", sets, tmp_path)
    assert said(root) == []
    train = root / "train"
    (train / "README").write_text("of the set")
    (train / ".DS_Store").write_bytes(b"")
    for name in CLASSES[:2]:
        for file in ("scan.pdf", "noname", "photo.jpg?w=640"):
            (train / name / file).write_bytes(image_file(0))
        (train / name / "gone.jpg").symlink_to("/mnt/none.jpg")
        (train / name / "round.jpg").symlink_to("round.jpg")
        (train / name / "more" / "deep").mkdir(parents=True)
        (train / name / "more" / "a.jpg").write_bytes(image_file(0))
        (train / name / "more" / "deep" / "b.jpg").write_bytes(image_file(0))
    os.mkfifo(train / CLASSES[2] / "pipe.jpg")
    lines = said(root)
    assert all(line.startswith(f"{train}: not used are ") for line in lines)
    found = {line.split("not used are ")[1].split(",")[0].split(" (")[0] for line in lines}
    assert {text.split(" .jpg")[0] for text in found} == {
        "1 files beside the class folders",
        "1 hidden files or folders",
        "6 files whose names end in none of",
        "4 links to files that are not there",
        "4 files in sub-folders of a class folder",
        "1 things that are neither files nor folders",
    }
    assert len(open_source(FolderSource(root=str(root)), "train", 0)) == 12


def test_a_class_is_never_missing_silently(sets: Path, tmp_path: Path) -> None:
    root = copied("folder", sets, tmp_path)
    victim = root / "train" / CLASSES[1]
    shutil.rmtree(victim)
    victim.symlink_to("/mnt/not_mounted/class")
    assert f"{str(victim)!r} is a link to '/mnt/not_mounted/class', which is not there" in refused(root)
    victim.unlink()
    victim.mkdir()
    for number in range(3):
        (victim / f"{number}.raw").write_bytes(b"x")
    assert "has no image in it; it has 3 files whose names end in none of" in refused(root)
    shutil.rmtree(root / "val")
    with pytest.raises(ConfigError, match=r"val' does not exist.*--data\.num-held-out"):
        open_source(FolderSource(root=str(root)), "eval", 0)


OPEN = """
import sys
from nfnet_flax.config import ConfigError
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.data.sources import open_source
try:
    open_source(FolderSource(root=sys.argv[1]), "train", 0)
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", [0o000, 0o444])  # not to be listed; to be listed but not entered
def test_a_class_folder_that_may_not_be_entered_is_named(sets: Path, tmp_path: Path, mode: int) -> None:
    root = copied("folder", sets, tmp_path)
    victim = root / "train" / CLASSES[1]
    victim.chmod(mode)
    rights = "-dac_override,-dac_read_search"  # which root would pass over
    powerless = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.getuid() == 0 else []
    command = [*powerless, sys.executable, "-W", "error", "-c", OPEN, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=runs.ROOT)
    victim.chmod(0o755)
    assert str(victim) in done.stdout, done
    assert "cannot be read (Permission denied)" in done.stdout


def test_paths_are_resolved_and_urls_refused(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(sets))
    assert open_source(FolderSource(root="~/folder"), "train", 0).describe(0).startswith(f"{sets}/folder/train/")
    for wrong in ("gs://bucket/images", "s3:/bucket", ""):
        with pytest.raises(ConfigError, match=r"source\.root = "):
            FolderSource(root=wrong)
    with pytest.raises(ConfigError, match=r"storage cp .*'gs://bucket/images'.* tools/prepare_imagenet\.py --folder"):
        FolderSource(root="gs://bucket/images")
    for wrong in ("az://bucket/train-*", "gs:/bucket/train-*", ""):
        with pytest.raises(ConfigError, match=r"source\.train = "):
            ArrayRecordSource(train=(wrong,), eval=("x",))
