"""Reading a run whose images are gone: its weights, its evaluation on moved images, and what another run takes over."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nfnet_flax
from nfnet_flax import cli, weights
from nfnet_flax.config import ConfigError
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import eval_batches, open_split
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.data.transforms import preprocess
from nfnet_flax.exit_codes import EXIT_BAD_INPUT
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.evaluating import evaluate
from nfnet_flax.training.initial import initial_weights
from nfnet_flax.training.reading import Run, export_weights, stored_weights
from nfnet_flax.weights.entries import HostArrays, shapes_of, skipped
from tests.image_sets import CLASSES, make_folder
from tests.runs import claimed, damage, finish, saved_arrays, start, start_all

RECIPE = '''
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.exit_codes import EXIT_BAD_INPUT
from nfnet_flax.models import ExecutionConfig, ResNetConfig
from nfnet_flax.optim import OptimConfig
from nfnet_flax.recipe import CheckpointConfig, Recipe


def recipe(root: str) -> Recipe:
    """A small network with BatchNorm."""
    return Recipe(
        name="three_classes",
        model=ResNetConfig(widths=(8, 16), depths=(1, 2), stem_width=8, expansion=0.5),
        num_classes=4,
        data=DataConfig(source=FolderSource(root=root), batch_size=8, eval_batch_size=4),
        optim=OptimConfig(learning_rate_per_256=3.2, warmup_epochs=0.0, ema_decay=0.5),
        execution=ExecutionConfig(num_microbatches=4),
        checkpoint=CheckpointConfig(every_steps=2),
        num_steps=6,
        log_every_steps=1,
        eval_every_steps=2,
        tensorboard=False,
    )
'''


OPTIONS = ("--num-steps=6", "--eval-every-steps=2", "--checkpoint.every-steps=2")


@dataclasses.dataclass(frozen=True)
class Made:
    """What `nfnet train` made; the folder and the images have moved since."""

    workdir: Path
    recipe: Path
    """With the images where they are by now."""

    @property
    def data(self) -> DataConfig:
        return load_recipe(self.recipe).data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    make_folder(folder / "images")
    file = folder / "three.py"
    file.write_text(RECIPE)
    process = start(folder / "run", *OPTIONS, recipe=Path(f"{file}:root={folder / 'images'}"))
    printed = finish(process)
    assert process.returncode == 0, printed
    assert "nfnet: 3 classes, 4 outputs: no image has the label of the last 1; " in printed
    (folder / "images").rename(folder / "moved_images")
    workdir = (folder / "run").rename(folder / "moved_run")
    return Made(workdir, Path(f"{file}:root={folder / 'moved_images'}"))


def metrics_of(workdir: Path, step: int) -> dict[str, float]:
    """What the evaluation during training found."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, float] = {}
    for row in rows:
        if row["step"] == step:
            found |= {name: value for name, value in row.items() if name.startswith("eval")}
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_need_the_folder_alone(made: Made) -> None:
    before = files_in(made.workdir)
    run = Run(made.workdir)
    assert (run.class_names, run.steps(), run.recipe.name) == (CLASSES, [6, 4, 2], "three_classes")
    network = run.model("raw")
    assert network.deterministic
    stored = saved_arrays(made.workdir, 6)
    found: dict[str, HostArrays] = {"": run.weights("raw"), "ema_": run.weights()}
    for prefix, arrays in found.items():
        assert {name: (value.shape, value.dtype) for name, value in arrays.items()} == shapes_of(network)
        for name, value in arrays.items():
            kind = "batch_stats" if name.endswith((".mean", ".variance", ".count")) else "params"
            assert np.array_equal(stored[f"['{prefix}{kind}']['{name}']"], value)
    assert not np.array_equal(found[""]["head.kernel"], found["ema_"]["head.kernel"])
    assert np.array_equal(
        run.weights(checkpoint=4)["head.kernel"], saved_arrays(made.workdir, 4)["['ema_params']['head.kernel']"]
    )
    assert files_in(made.workdir) == before


def test_a_checkpoint_that_is_not_there(made: Made, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nothing for checkpoint = 3; there are checkpoints of steps \[6, 4, 2\], best"
    ):
        Run(made.workdir).weights(checkpoint=3)
    with pytest.raises(
        ConfigError, match=r"workdir = '.*': the folder holds no run \(no recipe\.json\): give the folder"
    ):
        Run(tmp_path)
    with pytest.raises(ConfigError, match="workdir = 'az://bucket/run': is a URL"):
        Run("az://bucket/run")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(made.workdir / "recipe.json", bare)
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        Run(bare).weights()
    with pytest.raises(ConfigError, match=r"holds no classes\.json"):
        print(Run(bare).class_names)


@pytest.mark.parametrize("value", ["38", "latest", "Best", "", None, 6.0, True, np.True_, np.float32(6), (6,)])
def test_what_names_no_checkpoint_is_none_and_not_the_best(made: Made, tmp_path: Path, value: Any) -> None:
    run = Run(made.workdir)
    for read in (
        lambda: run.weights(checkpoint=value),
        lambda: run.model(checkpoint=value),
        lambda: evaluate(made.workdir, checkpoint=value, data=made.data),
        lambda: export_weights(made.workdir, tmp_path / "out", parameters="raw", checkpoint=value),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"checkpoint = {value!r}: give 'newest', 'best' or")) as error:
            read()
    assert ("give 38, not '38'" in str(error.value)) == (value == "38")
    assert not (tmp_path / "out").exists()


def test_a_step_may_be_numpys(made: Made) -> None:
    steps: tuple[Any, ...] = (np.int64(4), 4)
    found, wanted = (Run(made.workdir).weights(checkpoint=step) for step in steps)
    assert np.array_equal(found["head.kernel"], wanted["head.kernel"])


def test_arguments_of_another_kind_are_refused_by_name(made: Made, tmp_path: Path) -> None:
    wrong: Any = "foo"
    rngs = nnx.Rngs(0)
    for call, message in (
        (lambda: Run(made.workdir).weights(wrong), "parameters = 'foo': give one of 'raw', 'ema'"),
        (lambda: export_weights(made.workdir, tmp_path, parameters=wrong), "parameters = 'foo'"),
        (lambda: evaluate(made.workdir, data=wrong), "data = 'foo': give a DataConfig"),
        (lambda: nfnet_flax.train(wrong, tmp_path), "recipe = 'foo': give a Recipe; nfnet_flax.load_recipe(file)"),
        (lambda: nfnet_flax.train(made.recipe, wrong), "nfnet_flax.load_recipe(file)"),  # type: ignore[arg-type]
        (lambda: Run(None), "workdir = None: give a path"),  # type: ignore[arg-type]
        (lambda: nfnet_flax.load_model(3), "weights = 3: give a path"),  # type: ignore[arg-type]
        (lambda: nfnet_flax.create_model(5, rngs=rngs), "model = 5: give the name"),  # type: ignore[arg-type]
        (lambda: nfnet_flax.create_model("nfnet_f0", num_classes=wrong, rngs=rngs), "num_classes = 'foo'"),
        (lambda: nfnet_flax.create_model("nfnet_f0", num_classes=True, rngs=rngs), "num_classes = True"),
        (lambda: nfnet_flax.create_model("nfnet_f0", rngs=wrong), "rngs = 'foo': give a source"),
        (lambda: nfnet_flax.fold(wrong), "model = 'foo': give a network"),
        (lambda: skipped(["head.bias"], "head.*"), "skip = 'head.*': give a tuple of patterns, such as ('head.*',)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            call()


def test_evaluation_finds_what_training_found(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="images"):
        evaluate(made.workdir)
    capsys.readouterr()
    assert evaluate(made.workdir, data=made.data) == {"step": 6} | metrics_of(made.workdir, 6)
    assert evaluate(made.workdir, checkpoint=4, data=made.data) == {"step": 4} | metrics_of(made.workdir, 4)
    best = int(next((made.workdir / "best").glob("[0-9]*")).name)
    said = capsys.readouterr().err
    assert "3 classes, 4 outputs" in said
    assert "preprocessing" not in said
    darker = dataclasses.replace(made.data, mean=(0.0, 0.0, 0.0))
    assert evaluate(made.workdir, checkpoint="best", data=made.data) == {"step": best} | metrics_of(made.workdir, best)
    assert evaluate(made.workdir, data=darker)["eval/loss"] != metrics_of(made.workdir, 6)["eval/loss"]
    said = capsys.readouterr().err
    assert "preprocessing: stored -> asked for: mean (123.675, 116.28, 103.53) -> (0.0, 0.0, 0.0): " in said


def root_of(made: Made) -> str:
    """The folder of the images of a run."""
    assert isinstance(made.data.source, FolderSource)
    return made.data.source.root


def test_labels_mean_names_and_what_is_left_out_is_said(
    made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    shutil.copytree(root_of(made), root)
    data = dataclasses.replace(made.data, source=FolderSource(root=str(root)))
    shutil.rmtree(root / "train")  # of no use to an evaluation
    shutil.rmtree(root / "val" / CLASSES[0])
    found = evaluate(made.workdir, data=data)
    model = Run(made.workdir).model("raw")
    source = open_split(data, "eval", CLASSES)
    with eval_batches(data, source, process_index=0, num_processes=1) as batches:
        rows = [(batch["image"][i], batch["label"][i]) for batch in batches for i in np.flatnonzero(batch["mask"])]
    images = (np.stack([image for image, _ in rows]) - np.asarray(data.mean)) / np.asarray(data.std)
    logits = np.asarray(model(jnp.asarray(images, jnp.float32)))
    info, _ = stored_weights(Run(made.workdir), "raw", "newest")
    assert info.preprocessing is not None
    encoded = [source[index]["image"] for index in range(len(source))]
    assert np.allclose(preprocess(encoded, **dataclasses.asdict(info.preprocessing)), images, atol=1e-5)
    labels = np.asarray([label for _, label in rows])
    assert set(labels) == {1, 2}
    log_shares = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    assert found["eval/num_examples"] == 4
    assert found["eval/loss"] == pytest.approx(-np.mean(log_shares[range(4), labels]), rel=1e-4)
    assert found["eval/top1"] == np.mean(np.argmax(logits, axis=1) == labels)
    bad = sorted((root / "val" / CLASSES[1]).iterdir())
    for path in bad:
        path.write_bytes(b"not an image")
    (root / "val" / "notes.txt").touch()
    capfd.readouterr()
    skipping = evaluate(made.workdir, data=dataclasses.replace(data, on_corrupt="skip"))
    assert (skipping["eval/num_examples"], skipping["eval/num_corrupt"]) == (2, 2)
    said = capfd.readouterr().err
    assert "nfnet: 2 of the 4 held-out images cannot be decoded and are left out of the evaluation" in said
    assert any(f"the first is {path}\n" in said for path in bad)
    assert f"nfnet: {root / 'val'}: not used are 1 " in said
    (root / "val" / CLASSES[1]).rename(root / "val" / "wasp")
    with pytest.raises(ConfigError, match="class 'wasp' is unknown"):
        evaluate(made.workdir, data=data)


def test_the_command_refuses_what_the_run_trained_on(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(root_of(made), tmp_path / "images"))
    options = ["eval", "--workdir", str(made.workdir), "--data.source.root", str(root)]
    assert cli.main([*options, "--data.num-held-out", "3"]) == EXIT_BAD_INPUT
    assert "data.num_held_out = 3: must be None, as in the run" in capsys.readouterr().err
    assert cli.main([*options, "--data.source.eval", "train"]) == EXIT_BAD_INPUT
    assert "an evaluation on training images means nothing" in capsys.readouterr().err
    shutil.rmtree(root / "val")
    assert cli.main(options) == EXIT_BAD_INPUT
    assert "a run that has not begun can hold out training images" in capsys.readouterr().err
    workdir = Path(shutil.copytree(made.workdir, tmp_path / "run"))
    (workdir / "input.json").write_text('{"source": 3}')
    assert cli.main(["eval", "--workdir", str(workdir)]) == EXIT_BAD_INPUT
    assert "does not say what the run was trained on" in capsys.readouterr().err


def test_damaged_checkpoints_are_named_and_stay(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(made.workdir, workdir)
    damage(workdir / "checkpoints" / "6")
    shutil.rmtree(workdir / "best")  # which may be of step 6, too
    before = files_in(workdir)
    run = Run(workdir)
    assert evaluate(workdir, data=made.data)["step"] == 4
    assert "checkpoints/6 is damaged and skipped: " in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"no good checkpoint for checkpoint = 6; there are"):
        evaluate(workdir, checkpoint=6, data=made.data)
    assert files_in(workdir) == before
    for step in (4, 2):
        damage(workdir / "checkpoints" / str(step))
    with pytest.raises(ConfigError, match="no good checkpoint for checkpoint = 'newest'"):
        evaluate(workdir, data=made.data)
    assert run.steps() == [6, 4, 2]


def test_a_run_becomes_a_weight_file(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", "run", str(made.workdir), "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    path = tmp_path / "weights.safetensors"
    info, arrays = weights.read_weights(path)
    run = Run(made.workdir)
    expected = run.weights("ema")
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], expected[name]) for name in arrays)
    assert (info.class_names, info.num_classes, info.model) == (CLASSES, 4, run.recipe.model)
    assert info.source == "run 'three_classes', step 6, seed 0"
    assert info.preprocessing == weights.Preprocessing(
        image_size=32, crop_margin=0, resampler="area_cubic", mean=run.recipe.data.mean, std=run.recipe.data.std
    )
    images = jnp.ones((2, 32, 32, 3))
    assert np.array_equal(nfnet_flax.load_model(path)(images), run.model()(images))
    assert cli.main(argv) == EXIT_BAD_INPUT
    assert "exists already" in capsys.readouterr().err


def recipe_from(made: Made, init_from: Path, *skip: str) -> Recipe:
    return dataclasses.replace(load_recipe(made.recipe), init_from=str(init_from), init_from_skip=skip)


def test_a_run_starts_from_a_run_or_a_file(made: Made, tmp_path: Path) -> None:
    path = export_weights(made.workdir, tmp_path, parameters="ema")
    recipe = recipe_from(made, made.workdir)
    from_run = initial_weights(recipe, CLASSES).arrays
    from_file = initial_weights(recipe_from(made, path), CLASSES).arrays
    expected = Run(made.workdir).weights("ema")
    for arrays in (from_run, from_file):
        assert arrays.keys() == expected.keys()
        assert all(np.array_equal(arrays[name], expected[name]) for name in arrays)
    # Outputs go with the names of their classes.
    other = initial_weights(recipe, (CLASSES[2], CLASSES[0], CLASSES[1])).arrays
    assert np.array_equal(other["head.kernel"], expected["head.kernel"][:, [2, 0, 1, 3]])
    assert np.array_equal(other["head.bias"], expected["head.bias"][[2, 0, 1, 3]])
    assert np.array_equal(other["final_bn.gain"], expected["final_bn.gain"])
    with pytest.raises(ConfigError, match=r"(?s)of other classes .* new: wasp.* gone: n01484850.*--init-from-skip"):
        initial_weights(recipe, (*CLASSES[:2], "wasp"))
    without_head = initial_weights(recipe_from(made, made.workdir, "head.*"), ("ant", "bee", "cat")).arrays
    assert without_head.keys() == {name for name in expected if not name.startswith("head.")}
    with pytest.raises(ConfigError, match="leave out all"):
        initial_weights(recipe_from(made, made.workdir, "*"), CLASSES)
    with pytest.raises(ConfigError, match=r"init_from = '.*': there is no such file or folder"):
        initial_weights(recipe_from(made, tmp_path / "absent"), CLASSES)


def test_a_run_is_one_with_the_weights_that_it_began_with(made: Made, tmp_path: Path) -> None:
    files = {kind: export_weights(made.workdir, tmp_path / kind, parameters=kind) for kind in ("ema", "raw")}
    ema, raw = (recipe_from(made, files[kind]) for kind in ("ema", "raw"))
    records = {recipe.init_from: initial_weights(recipe, CLASSES).record for recipe in (ema, raw)}
    workdir = tmp_path / "run"
    claimed(workdir, raw, records[raw.init_from], logs=False)
    (said,) = claimed(workdir, ema, records[ema.init_from])
    assert re.search(r"which trained nothing here: init_from: run .* with other content", said)
    # By now it trained, though it has no checkpoint: it starts from its weights again, wherever they lie.
    moved = dataclasses.replace(ema, init_from=str(made.workdir))
    (said,) = claimed(workdir, moved, initial_weights(moved, CLASSES).record)
    assert said.startswith("changed since the last start, without an effect on updates: init_from: ")
    with pytest.raises(ConfigError, match="holds other weights than this run began with") as error:
        claimed(workdir, raw, records[raw.init_from])
    assert str(files["raw"]) in str(error.value)
    # From a checkpoint it needs none of them: what is not read is not put on record.
    shutil.copytree(made.workdir / "checkpoints" / "2", workdir / "checkpoints" / "2")
    (said,) = claimed(workdir, dataclasses.replace(ema, init_from="/nope"))
    assert said.startswith("init_from = '/nope' has no effect: the run continues from a checkpoint, and began with ")
    assert Run(workdir).recipe.init_from == str(made.workdir)


def test_weights_that_know_other_images_are_named(made: Made) -> None:
    recipe = recipe_from(made, made.workdir)
    assert initial_weights(recipe, CLASSES).said is None
    data = dataclasses.replace(recipe.data, std=(255.0, 255.0, 255.0), image_size=64, eval_image_size=64)
    said = initial_weights(dataclasses.replace(recipe, data=data), CLASSES).said
    assert said is not None
    assert said.startswith(f"init_from {str(made.workdir)!r}: preprocessing: stored -> asked for: std (58.395, ")
    assert "mean (" not in said


def test_processes_start_from_the_same_weights(made: Made, tmp_path: Path) -> None:
    paths = {kind: export_weights(made.workdir, tmp_path / kind, parameters=kind) for kind in ("ema", "raw")}
    processes = start_all(
        tmp_path / "run", 2, f"--init-from={paths['ema']}", of_last=(f"--init-from={paths['raw']}",), recipe=made.recipe
    )
    for process, path in zip(processes, paths.values(), strict=True):
        printed = finish(process)
        assert process.returncode == EXIT_BAD_INPUT, printed
        assert f"init_from = {str(path)!r}: the processes of this run differ" in printed
        assert re.search(r"start: content (\w+) in process 0, content (?!\1)\w+ in process 1", printed)
    assert not (tmp_path / "run").exists()
