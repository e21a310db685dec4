"""Compiled steps that are kept on disk: by what they are found, and that they change nothing but the time."""

import dataclasses
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfnet_flax
from nfnet_flax import runtime
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training import kept_programs
from tests import runs

NAMES = "*.program"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache of JAX's own, in a folder of the test; returns the folder of the steps."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "steps"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(str(runs.DIGITS))


def program(recipe: Recipe, *facts: object, name: str = "train", add: float = 1.0) -> Callable[..., jax.Array]:
    """A small function that is kept as the step of a recipe is; `add` tells which function was compiled."""
    programs = kept_programs.KeptPrograms(recipe, make_mesh())
    programs.read_ahead(name)
    wrapped: Callable[..., jax.Array] = programs.kept(jax.jit(lambda array: array + add), name, facts)
    return wrapped


def test_a_program_is_found_by_all_that_decides_it(
    cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = jnp.zeros(3)
    assert program(recipe, 5)(zero)[0] == 1
    assert len(list(cache.glob(NAMES))) == 1
    # The same facts: read, though another function is given.
    assert program(recipe, 5, add=2.0)(zero)[0] == 1
    other_name = dataclasses.replace(recipe, name="other", log_every_steps=7, tensorboard=False)
    assert program(other_name, 5, add=2.0)(zero)[0] == 1
    # Any other fact: compiled.
    seed = dataclasses.replace(recipe, seed=recipe.seed + 1)
    rate = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, ema_decay=0.5))
    assert program(seed, 5, add=3.0)(zero)[0] == 3
    assert program(rate, 5, add=4.0)(zero)[0] == 4
    assert program(recipe, 6, add=5.0)(zero)[0] == 5
    assert program(recipe, 5, add=6.0, name="eval")(zero)[0] == 6
    assert program(recipe, 5, add=7.0)(jnp.zeros(4))[0] == 7
    assert program(recipe, 5, add=8.0)(jnp.zeros(3, jnp.bfloat16))[0] == 8
    for flag, add in (("XLA_FLAGS", 9.0), ("LIBTPU_INIT_ARGS", 10.0)):
        with monkeypatch.context() as patch:
            patch.setenv(flag, os.environ.get(flag, "") + " --xla_cpu_enable_fast_math=false")
            assert program(recipe, 5, add=add)(zero)[0] == add
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "processor", lambda: "another one")
        assert program(recipe, 5, add=13.0)(zero)[0] == 13
    with jax.default_matmul_precision("float32"):
        assert program(recipe, 5, add=11.0)(zero)[0] == 11
    assert program(recipe, 5, add=12.0)(zero)[0] == 1


def test_a_changed_file_of_a_package_is_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package" / "inner"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    before = kept_programs._files_of("some_package").digest
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "compiled.pyc").touch()
    assert kept_programs._files_of("some_package").digest == before
    (package / "__init__.py").write_text("a = 1")
    changed = kept_programs._files_of("some_package").digest
    assert changed != before
    (package / "added.py").touch()
    assert kept_programs._files_of("some_package").digest != changed


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "of another step", "somebody else's", "of a group"])
def test_a_damaged_or_foreign_file_is_not_used(
    damage: str, cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = jnp.zeros(3)
    program(recipe)(zero)
    (file,) = cache.glob(NAMES)
    content = file.read_bytes()
    match damage:
        case "flipped":
            file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
        case "cut":
            file.write_bytes(content[:-1])
        case "empty":
            file.write_bytes(b"")
        case "of another step":
            program(recipe, add=2.0, name="eval")(zero)
            (other,) = set(cache.glob(NAMES)) - {file}
            shutil.copyfile(other, file)
        case "of a group":
            file.chmod(0o620)
        case _:
            monkeypatch.setattr(os, "getuid", lambda: 12345)
    damaged = file.stat().st_ino
    assert program(recipe, add=3.0)(zero)[0] == 3
    assert file.stat().st_ino != damaged  # and it is replaced
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_files_that_changed_after_they_were_loaded_are_noticed(
    cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = max(kept_programs._files_of(package).newest_ns for package in kept_programs._PACKAGES)
    monkeypatch.setattr(nfnet_flax, "IMPORTED_NS", newest)
    assert isinstance(program(recipe), jax.stages.Wrapped)
    monkeypatch.setattr(nfnet_flax, "IMPORTED_NS", newest + 1)
    assert program(recipe)(jnp.zeros(3))[0] == 1
    assert len(list(cache.glob(NAMES))) == 1


def test_a_program_that_cannot_run_is_removed(cache: Path, recipe: Recipe) -> None:
    program(recipe)(jnp.zeros(3))
    (file,) = cache.glob(NAMES)
    program(recipe, name="eval")(jnp.zeros(4))
    (other,) = set(cache.glob(NAMES)) - {file}
    content = other.read_bytes()[kept_programs._DIGEST_BYTES :]
    file.write_bytes(kept_programs._digest(file, content) + content)  # of other arguments, but called its own
    with pytest.raises(TypeError):
        program(recipe)(jnp.zeros(3))
    assert not file.exists()
    assert program(recipe, add=2.0)(jnp.zeros(3))[0] == 2


def test_the_longest_unused_are_removed(cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = jnp.zeros(3)
    for fact in range(3):
        program(recipe, fact)(zero)
    files = sorted(cache.glob(NAMES), key=lambda path: path.stat().st_mtime_ns)
    os.utime(files[0], (10, 10))
    program(recipe, 0, add=2.0)(zero)  # used again
    assert files[0].stat().st_mtime > 10
    os.utime(files[1], (20, 20))
    monkeypatch.setattr(kept_programs, "_MAX_BYTES", sum(file.stat().st_size for file in files) + 1000)
    program(recipe, 3)(zero)
    assert set(files) - set(cache.glob(NAMES)) == {files[1]}


def test_without_a_cache_nothing_is_kept(cache: Path, recipe: Recipe) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert program(recipe)(jnp.zeros(3))[0] == 1
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    for place in (None, "gs://bucket/cache"):
        jax.config.update("jax_compilation_cache_dir", place)
        assert isinstance(program(recipe), jax.stages.Wrapped)
    assert not cache.exists()


def test_a_program_that_is_read_ahead_is_only_used_for_what_it_is_of(cache: Path, recipe: Recipe) -> None:
    zero = jnp.zeros(3)
    for fact in (1, 2):
        program(recipe, fact, add=float(fact))(zero)
    of_one, of_two = sorted(cache.glob(NAMES), key=lambda path: path.stat().st_mtime_ns)
    for newest in (of_one, of_two):
        newest.touch()
        assert program(recipe, 1, add=3.0)(zero)[0] == 1
        assert program(recipe, 2, add=3.0)(zero)[0] == 2


def test_a_run_has_the_same_bits_with_compiled_damaged_and_kept_programs(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {**runs.with_devices(2), "JAX_COMPILATION_CACHE_DIR": str(cache)}

    def train(name: str) -> tuple[dict[str, np.ndarray], set[Path]]:
        """The last checkpoint of a run, and the training steps that JAX's own cache has then."""
        options = ("--num-steps=2", "--eval-every-steps=2", "--model.widths=16", "--model.depths=1")
        printed = runs.finish(runs.start(tmp_path / name, *options, environment=environment))
        assert "finished: 2 steps" in printed, printed
        return runs.saved_arrays(tmp_path / name, 2), set(cache.glob("jit_train_step*-cache"))

    first, compiled = train("first")
    kept = {path: path.read_bytes() for path in (cache / "steps").glob(NAMES)}
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    # They are traced, found in JAX's own cache, and kept again.
    second, of_second = train("second")
    assert of_second == compiled
    assert {path: path.stat().st_size for path in kept} == {path: len(content) for path, content in kept.items()}
    for path in compiled:
        path.unlink()
    third, of_third = train("third")
    assert not of_third
    assert len(first) > 20
    for others in (second, third):
        assert first.keys() == others.keys()
        assert all(np.array_equal(first[name], others[name]) for name in first)
