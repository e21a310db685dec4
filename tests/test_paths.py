"""Paths as users give them."""

import os
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.paths import local_path, run_folder


def test_a_path_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = tmp_path / "real" / "run [v2] %20 größe"
    for text in ("", "./", "../real//", "~/link/", f"{tmp_path}/link/../real/"):
        assert local_path("workdir", f"{text}run [v2] %20 größe") == wanted


def test_a_folder_named_like_a_url_is_reached_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("workdir", "./gs:/run") == tmp_path / "gs:" / "run"


@pytest.mark.parametrize(
    "text", ["gs://bucket/run", "gs:/bucket/run", "s3://b/r", "file:///tmp/x", "hdfs+x:/a", "", "a\0b"]
)
def test_what_is_no_local_path_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"source\.root = "):
        local_path("source.root", text)


def test_a_loop_of_links_is_refused_by_name(tmp_path: Path) -> None:
    os.symlink("b", tmp_path / "a")
    os.symlink("a", tmp_path / "b")
    with pytest.raises(ConfigError, match=r"workdir = .*/a/run"):
        local_path("workdir", tmp_path / "a" / "run")


def test_what_is_no_text_is_refused_by_name() -> None:
    for value in (None, 3, b"run"):
        with pytest.raises(ConfigError, match=rf"workdir = {value!r}: give a path"):
            local_path("workdir", value)  # type: ignore[arg-type]


def test_a_folder_that_tensorstore_takes_for_another_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a\\b")
    for name in ("a\\b", "link", "a\\b/run", "link/run"):
        with pytest.raises(ConfigError, match=r"workdir = .*: holds a backslash"):
            run_folder("workdir", tmp_path / name)
    with pytest.raises(ConfigError, match=r"init_from = .*: is not UTF-8"):
        run_folder("init_from", tmp_path / os.fsdecode(b"\xff"))


def test_a_checkpoint_lies_in_any_folder_that_is_not_refused(tmp_path: Path) -> None:
    for name in ("%41", "a?b#c", "a*b", "[a", "{a", "a|b", " a ", "a:b;c", "a\nb", "\x01", "größe", "'a\"", "...", "%"):
        place = run_folder("workdir", tmp_path / name)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(place / "state", {"a": np.ones(3)})
            found = checkpointer.restore(place / "state")["a"]
        assert np.array_equal(found, np.ones(3)), name
        assert len([path for path in (place / "state").rglob("*") if path.is_file()]) > 3, name
