"""Parts of a recipe that users bring: how they are named, stored and found, and what is said of wrong ones."""

import dataclasses
import json
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnet_flax.cli import alternatives
from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import ADDED_LATER, CodeNotLoaded, from_json, to_json
from nfnet_flax.data.random_access import ArraySource, SourceConfig, Split
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.data.sources import open_source
from nfnet_flax.models import Classifier, ModelConfig, NFNetConfig, build_model
from nfnet_flax.models.classifier import block_specs
from nfnet_flax.models.layers import Dense, WSConv
from nfnet_flax.objectives import Distillation, Objective, SoftmaxCrossEntropy
from nfnet_flax.open_config import OpenConfig, kinds_of, type_name, with_absolute_places, with_places_of
from nfnet_flax.own_code import load_code
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.kept_code import changed_files, code_of, keep
from tests import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels(OpenConfig):
    """A field of each type that there is."""

    widths: tuple[int, ...] | None = None
    pair: tuple[float, str] = (1.0, "a")
    inner: NFNetConfig | None = None
    path: str = "images"
    files: tuple[str, ...] = ("~/a", "b")
    place_fields = ("path", "files")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Older(OpenConfig):
    rate: float = 0.5
    kind: str = dataclasses.field(default="plain", metadata=ADDED_LATER)


def through_json(hint: Any, config: Any) -> Any:
    return from_json(hint, json.loads(json.dumps(to_json(config))))


def test_values_survive_json_and_what_is_derived_comes_last() -> None:
    inner = NFNetConfig(widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), group_width=4)
    for config in (Levels(), Levels(widths=(1, 2), pair=(0.5, "b"), inner=inner)):
        assert through_json(Levels, config) == config
        assert through_json(OpenConfig, config) == config
    assert to_json(Levels())["type"] == "tests.test_open_config:Levels"
    assert list(to_json(inner))[:3] == ["type", "group_width", "expansion"]
    assert list(to_json(inner))[-1] == "compute_dtype"
    assert list(to_json(Distillation(teacher="t")))[1:] == [
        "teacher",
        "temperature",
        "teacher_share",
        "label_smoothing",
    ]


def test_a_field_that_was_added_later_has_its_default() -> None:
    assert to_json(Older()) == {"type": "tests.test_open_config:Older", "rate": 0.5}
    assert through_json(Older, Older()) == Older()
    assert through_json(Older, Older(kind="new")) == Older(kind="new")
    with pytest.raises(
        ConfigError, match=r"fields \['rate'\] are unknown or missing: it was written by another version of"
    ):
        from_json(Older, {"type": type_name(Older)})


@pytest.mark.parametrize("name", ["antigravity:Config", "os:system", "nfnet_flax.models:NFNetConfig", "my.deep:Net"])
def test_nothing_is_imported_for_a_name(name: str) -> None:
    with pytest.raises(CodeNotLoaded, match=rf"model names the class {name} of a user's own code.*--code \w+\.py"):
        from_json(ModelConfig, {"type": name}, "model")
    assert "antigravity" not in sys.modules


def test_the_newest_class_of_a_name_counts(tmp_path: Path) -> None:
    file = tmp_path / "levels_of_mine.py"
    text = """
        import dataclasses
        from nfnet_flax.objectives import SoftmaxCrossEntropy

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Mine(SoftmaxCrossEntropy):
            power: float = {}
    """
    file.write_text(textwrap.dedent(text).format("1.0"))
    first = load_code(file)
    assert load_code(str(file)) is first
    file.write_text(textwrap.dedent(text).format("2.0") + "recipe = None\n")
    with pytest.raises(ConfigError, match=r"defines no function recipe"):
        load_recipe(file)  # runs it anew
    kind = kinds_of(Objective)["levels_of_mine:Mine"]
    assert kind is not vars(first)["Mine"]
    assert kind is vars(sys.modules["levels_of_mine"])["Mine"]
    assert type(pickle.loads(pickle.dumps(kind()))) is kind
    recipe = load_recipe(runs.DIGITS)
    changed, _ = alternatives.choose(recipe, ["--objective", "Mine", "--objective.power", "3"], "nfnet train")
    assert changed.objective == kind(power=3.0)
    changed, _ = alternatives.choose(recipe, ["--objective", "levels_of_mine:Mine"], "nfnet train")
    assert changed.objective == kind()


def test_classes_of_a_file_that_failed_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "fails_at_its_end.py"
    text = """
        import dataclasses
        from nfnet_flax.objectives import SoftmaxCrossEntropy

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class OfFailed(SoftmaxCrossEntropy):
            power: float = 1.0
    """
    file.write_text(textwrap.dedent(text) + "\nraise ValueError('at its end')\n")
    with pytest.raises(ConfigError, match="at its end"):
        load_code(file)
    kept = [kind for kind in SoftmaxCrossEntropy.__subclasses__() if kind.__name__ == "OfFailed"]
    assert len(kept) == 1  # as Python has not collected it yet
    assert "fails_at_its_end:OfFailed" not in kinds_of(Objective)
    alternatives.describe(load_recipe(runs.DIGITS))

    file.write_text(textwrap.dedent(text))
    first = load_code(file)
    file.write_text(textwrap.dedent(text) + "\nraise ValueError('at its end')\n")
    with pytest.raises(ConfigError, match="at its end"):
        load_recipe(file)
    assert sys.modules["fails_at_its_end"] is first
    assert kinds_of(Objective)["fails_at_its_end:OfFailed"] is vars(first)["OfFailed"]


@pytest.mark.parametrize("name", ["json", "grain", "my-recipe", "my.recipe"])
def test_a_file_may_have_the_name_of_another_module(name: str, tmp_path: Path) -> None:
    text = (
        runs.DIGITS.read_text()
        + "\n\n@dataclasses.dataclass(frozen=True)\nclass Mine(DigitsSource):\n    size: int = 1\n"
    )
    text = text.replace("source=DigitsSource()", "source=Mine()").replace(
        '"""\n\nfrom', '"""\n\nimport dataclasses\nfrom', 1
    )
    (tmp_path / f"{name}.py").write_text(text)
    before = sys.modules.get(name)
    recipe = load_recipe(tmp_path / f"{name}.py")
    assert sys.modules.get(name) is before
    assert to_json(recipe)["data"]["source"]["type"] == f"{name}:Mine"
    assert through_json(type(recipe), recipe) == recipe
    assert list(code_of(recipe).files) == [f"{name}.py"]


def test_places_are_free_at_any_depth_and_absolute_on_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    here = with_absolute_places(Levels())
    assert (here.path, here.files) == (f"{tmp_path}/images", ("/home/me/a", f"{tmp_path}/b"))
    assert with_places_of(Levels(pair=(2.0, "b")), here) == dataclasses.replace(here, pair=(2.0, "b"))
    assert to_json(here, places=False).keys() == {"type", "widths", "pair", "inner"}
    recipe = load_recipe(runs.DIGITS)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=FolderSource(root="x")))
    placed = with_absolute_places(recipe)
    assert placed.data.source == FolderSource(root=f"{tmp_path}/x")
    assert with_places_of(recipe, placed) == placed


def test_a_part_that_is_no_frozen_dataclass_is_refused() -> None:
    class Bare(OpenConfig):
        width: int = 3

    @dataclasses.dataclass(frozen=True)
    class Listed(OpenConfig):
        widths: list[int] = dataclasses.field(default_factory=list)

    @dataclasses.dataclass(frozen=True)
    class Misplaced(OpenConfig):
        root: str = ""
        place_fields = ("rot",)

    with pytest.raises(ConfigError, match=r"Bare has fields and is no dataclass: put @dataclasses"):
        Bare()
    with pytest.raises(ConfigError, match=r"Listed\.widths: is annotated as list\[int\]: give a tuple"):
        Listed()
    with pytest.raises(ConfigError, match=r"Misplaced\.place_fields = \('rot',\): 'rot' is no field of it"):
        Misplaced()


class Net(Classifier):
    """A network without blocks; its parts are the configuration's."""

    def __init__(self, config: "NetConfig", num_classes: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.stem = WSConv(3, 4, 3, compute_dtype="float32", rngs=rngs)
        self._add_blocks(lambda stage, position: self.stem, block_specs((), alpha=0.2, stochdepth_rate=0.0))
        init = nnx.initializers.zeros
        self._add_head(4, num_classes, kernel_init=init, drop_rate=0.0, compute_dtype="float32", rngs=rngs)
        config.spoil(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetConfig(ModelConfig):
    fault: str = "none"

    def build(self, num_classes: int, rngs: nnx.Rngs) -> Classifier:
        return Net(self, num_classes, rngs)

    def spoil(self, net: Net, rngs: nnx.Rngs) -> None:
        def dense() -> Dense:
            init = nnx.initializers.zeros
            return Dense(2, 4, kernel_init=init, compute_dtype="float32", rngs=rngs)

        faults: dict[str, Callable[[], object]] = {
            "none": lambda: None,
            "no config": lambda: delattr(net, "config"),
            "no head": lambda: delattr(net, "head"),
            "another config": lambda: setattr(net, "config", dataclasses.replace(self, fault="none")),
            "another head": lambda: setattr(net, "head", dense()),
            "one list": lambda: setattr(net, "stages", nnx.List([net.stem])),
            "random state": lambda: setattr(net, "dropout", nnx.Dropout(0.5, rngs=rngs)),
            "bfloat16": lambda: setattr(net, "scale", nnx.Param(jnp.ones(3, jnp.bfloat16))),
            "kernel": lambda: setattr(net.stem, "kernel", nnx.Param(jnp.ones((3, 4, 5)))),
            "stray gain": lambda: setattr(net.head, "gain", nnx.Param(jnp.ones(net.num_classes))),
            "digits": lambda: setattr(net, "parts", nnx.Dict({"1": dense()})),
        }
        faults[self.fault]()


def test_a_network_without_blocks_is_one() -> None:
    model = build_model(NetConfig(), num_classes=3, rngs=nnx.Rngs(0))
    assert model.num_blocks == 0
    assert not model.is_foldable


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no config", r"NetConfig\.build: Net\.__init__ must set self\.config"),
        ("no head", r"NetConfig\.build: Net\.__init__ must call self\._add_head"),
        ("another config", r"NetConfig\.build: config = .*: must be the configuration itself"),
        ("another head", r"head\.bias of Net = \(4,\): the last axis of the head's parameters must be the 3 classes"),
        ("one list", r"NetConfig\.build: Net\.stages must be lists of blocks \(nnx\.Module\), one for each BlockSpec"),
        (
            "random state",
            r"dropout\.rngs\S* of Net is an nnx\.Rng\w+: a network holds nnx\.Param and nnx\.BatchStat alone",
        ),
        ("bfloat16", r"scale of Net = 'bfloat16': parameters must be float32"),
        ("kernel", r"stem\.kernel of Net = \(3, 4, 5\): a kernel is \(I, O\) or HWIO"),
        ("stray gain", r"head\.kernel of Dense: a kernel is standardized if its module has a gain"),
        ("digits", r"parts\.1\.\w+ of Net: a part of a name must be an attribute, or the position in an nnx\.List"),
    ],
)
def test_a_network_that_does_not_keep_to_the_names_is_refused(fault: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(NetConfig(fault=fault), num_classes=3, rngs=nnx.Rngs(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(SourceConfig):
    what: str

    def open(self, split: Split, image_size: int) -> Any:
        images, labels = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int32)
        return {
            "list": [1, 2],
            "no examples": ArraySource(images=images[:0], labels=labels[:0], names=("a", "b")),
            "twice": ArraySource(images=images, labels=labels, names=("a", "a")),
            "floats": ArraySource(images=images / 255, labels=labels, names=("a", "b")),
            "labels": ArraySource(images=images, labels=labels + 2, names=("a", "b")),
        }[self.what]

    def small(self) -> Self:
        return self


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("list", "Broken.open returned list: return an ArraySource, or an object with class_names"),
        ("no examples", "Broken.open: returned no examples"),
        ("twice", "Broken.open: class_names = .*: must be texts, each of them once"),
        (
            "floats",
            r"Broken.open: example 0: image = 'ndarray': must be the bytes of an image file, or \(H, W, 3\) uint8",
        ),
        ("labels", "Broken.open: example 0: label = .*2.*: must be the number of a class, from 0 to 1"),
    ],
)
def test_a_source_that_gives_something_else_is_refused(what: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source(Broken(what=what), "train", 8)


IN_THE_PROGRAM = """
import dataclasses
import sys
from pathlib import Path
from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import to_json
from nfnet_flax.data.workers import WorkerProcess
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.training.kept_code import changed_files, code_of, keep

@dataclasses.dataclass(frozen=True)
class Mine(SoftmaxCrossEntropy):
    def evaluate(self, logits, batch):
        return super().evaluate(logits, batch)

print(to_json(Mine())["type"])
code = code_of((Mine(),))
print(sorted(code.files), code.without_source)
keep(Path(sys.argv[1]), code)
print(changed_files(Path(sys.argv[1]), code))
worker = WorkerProcess(0, Mine)
try:
    worker.compute(0)
except ConfigError as error:
    print(error)
worker.close()
"""


def test_a_class_of_the_program_itself(tmp_path: Path) -> None:
    script = tmp_path / "my_program.py"
    script.write_text(IN_THE_PROGRAM)
    for command, given in (([str(script), str(tmp_path)], None), (["-", str(tmp_path / "typed")], IN_THE_PROGRAM)):
        (tmp_path / "typed").mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, *command], input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        name, kept, changes, refused = done.stdout.splitlines()
        if given is None:
            assert (name, kept) == ("my_program:Mine", "['my_program.py'] ()")
            assert (
                (tmp_path / "code" / "my_program.py")
                .read_text()
                .startswith("@dataclasses.dataclass(frozen=True)\nclass")
            )
        else:
            assert (name, kept) == ("__main__:Mine", "[] ('__main__:Mine',)")
        assert changes == "{}"
        assert refused.startswith("data.num_workers: Mine is defined in the program that runs, where worker processes")


def test_code_is_compared_by_what_it_does(tmp_path: Path) -> None:
    package = tmp_path / "mine" / "my_parts"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("FACTOR = 2\n")
    (package / "unused.py").write_text("")
    (package / "deep" / "late.py").write_text("import json\nimport numpy\nfrom ..base import FACTOR\n")
    (package / "deep" / "__init__.py").write_text("")
    own = tmp_path / "mine" / "parts_of_mine.py"
    own.write_text(
        "import dataclasses\n"
        "from nfnet_flax.objectives import SoftmaxCrossEntropy\n\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Mine(SoftmaxCrossEntropy):\n"
        "    def evaluate(self, logits, batch):\n"
        "        from my_parts.deep.late import FACTOR\n"
        "        return {'loss': FACTOR * logits[:, 0]}\n\n"
        "def recipe():\n    pass\n"
    )
    mine = vars(load_code(own))["Mine"]()
    files = ["my_parts/__init__.py", "my_parts/base.py", "my_parts/deep/__init__.py", "my_parts/deep/late.py"]
    assert list(code_of(mine).files) == [*files, "parts_of_mine.py"]  # also what is imported later

    workdir = tmp_path / "run"
    workdir.mkdir()
    keep(workdir, code_of(mine))
    assert sorted(str(path.relative_to(workdir / "code")) for path in (workdir / "code").rglob("*.py")) == [
        *files,
        "parts_of_mine.py",
    ]

    def changes() -> dict[str, list[str]]:
        return changed_files(workdir, code_of(mine))

    assert changes() == {}
    own.write_text(
        '"""Mine."""\n' + own.read_text().replace("    pass\n", "    return 3\n").replace("'loss'", '"loss"')
    )
    own.write_text(own.read_text() + "\nif __name__ == '__main__':\n    print(recipe())\n")
    (package / "base.py").write_text("# Two.\nFACTOR = (2)\n")
    assert changes() == {}
    before = code_of(mine).digests()
    (package / "base.py").write_text("FACTOR = 3\n")
    assert changes() == {"my_parts/base.py": ["-FACTOR = 2", "+FACTOR = 3"]}
    assert {path for path, digest in code_of(mine).digests().items() if digest != before[path]} == {"my_parts/base.py"}
    (package / "extra.py").write_text("EXTRA = 1\n")
    own.write_text(own.read_text().replace("import dataclasses\n", "import dataclasses\nimport my_parts.extra\n"))
    assert changes()["my_parts/extra.py"] == ["+EXTRA = 1"]
    assert changes()["parts_of_mine.py"] == ["+import my_parts.extra"]
