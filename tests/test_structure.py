"""What may import what, and what must work without the heavy packages."""

import ast
import subprocess
import sys
from pathlib import Path

import nfnet_flax

PACKAGE = Path(nfnet_flax.__file__).parent
LEAVES = {"models", "optim", "data", "parallel"}
BASE = {
    "columns",
    "config",
    "config_json",
    "exit_codes",
    "garbage",
    "html_page",
    "json_files",
    "messages",
    "needed",
    "open_config",
    "output",
    "own_code",
    "paths",
    "plots",
    "progress",
    "python_parser",
    "run_clock",
    "runtime",
    "storage",
    "streams",
    "units",
    "verbosity",
}
ALLOWED = {
    "columns": set[str](),
    "config": set[str](),
    "config_json": {"config", "open_config"},
    "exit_codes": set[str](),
    "garbage": set[str](),
    "html_page": {"columns"},
    "json_files": {"config"},
    "drawing": {"columns", "progress", "units"},
    "messages": {"verbosity"},
    "needed": set[str](),
    "open_config": {"config", "own_code", "paths", "storage"},
    "output": set[str](),
    "own_code": {"config", "paths"},
    "paths": {"config", "storage"},
    "plots": {"config"},
    "progress": {"columns", "drawing", "messages", "output", "units", "verbosity"},
    "python_parser": set[str](),
    "run_clock": set[str](),
    "runtime": {"config", "messages", "paths", "python_parser"},
    "session_log": {"messages", "output", "paths", "storage", "verbosity"},
    "storage": {"config", "json_files", "progress"},
    "streams": set[str](),
    "units": set[str](),
    "verbosity": set[str](),
    **dict.fromkeys(LEAVES, BASE),
    "multi_label_metrics": set[str](),
    "objectives": BASE | {"weights", "multi_label_metrics"},
    "telemetry": {"models", "optim", "parallel"} | BASE,
    "recipe": LEAVES | BASE | {"objectives", "telemetry"},
    "recipe_file": BASE | {"recipe"},
    "debug": LEAVES | BASE | {"objectives", "recipe"},
    "imagenet": LEAVES | BASE | {"objectives", "recipe"},
    "weights": {"models"} | BASE,
    "export": {"models", "weights"} | BASE,
    "finetuning": LEAVES | BASE | {"weights"},
    "probe": LEAVES | BASE | {"finetuning", "training", "weights"},
    "training": LEAVES | BASE | {"objectives", "recipe", "session_log", "telemetry", "weights"},
    "prediction": LEAVES | BASE | {"training", "weights"},
    "programs": LEAVES | BASE | {"objectives", "recipe", "training"},
    "doctor": LEAVES | BASE | {"recipe", "recipe_file", "telemetry", "training"},
    "report": {"models"} | BASE | {"recipe", "telemetry", "training"},
    "claims": LEAVES
    | BASE
    | {"imagenet", "objectives", "programs", "recipe", "recipe_file", "telemetry", "training", "weights"},
    "cli": LEAVES
    | BASE
    | {"claims"}
    | {"recipe", "recipe_file", "training", "weights", "programs", "debug", "doctor", "export", "prediction"}
    | {"finetuning", "probe", "report", "session_log", "telemetry"},
}


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports, at any depth of indentation."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert not name.startswith(("recipes", "tools", "tests")), f"{path} imports {name}"
            if name.startswith("nfnet_flax."):
                found.add(name.split(".")[1])
    return found


def test_imports_go_one_way() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) > 20
    for path in files:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        wrong = imports(path) - ALLOWED[part] - {part}
        assert not wrong, f"{path} imports {wrong}"


def test_every_public_name_is_there_and_is_the_typed_one() -> None:
    typed = ast.parse((PACKAGE / "__init__.py").read_text())
    named = {alias.asname for node in ast.walk(typed) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert named - {None} - {"TYPE_CHECKING", "Any"} == set(nfnet_flax.__all__)
    for name in nfnet_flax.__all__:
        assert getattr(nfnet_flax, name).__doc__, name
    assert (PACKAGE / "py.typed").exists()


LIGHT = """
import sys

from nfnet_flax.needed import NAMES
THERE = {"jax", "flax", "optax", "numpy", "PIL", "absl", "orbax", "rich", "scipy", "tensorstore"}  # and what these need

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in set(NAMES) - THERE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import nfnet_flax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "importing the package started a backend"
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.state import create_state, model_structure
from nfnet_flax.training.step import make_train_step

assert len(nfnet_flax.list_models()) == 73
model = nfnet_flax.create_model("test_nfnet", num_classes=3, rngs=nnx.Rngs(0))
model.eval()
assert model(jnp.ones((2, 32, 32, 3))).shape == (2, 3)
config = NFNetConfig(widths=(8, 8), depths=(1, 1), group_width=4, expansion=0.5)
structure = model_structure(config, 3, ExecutionConfig(num_microbatches=2))
schedule = lambda step: 0.1
tx = make_optimizer(OptimConfig(), schedule, structure.shapes)
mesh = make_mesh()
state = create_state(structure, 0, tx, mesh)
step = make_train_step(structure, tx, SoftmaxCrossEntropy(), mesh, seed=0)
before = np.asarray(state.params["head.bias"])
images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8)
state, metrics = step(state, {"image": images, "label": np.arange(4) % 3})
assert int(state.step) == 1 and np.isfinite(metrics["train/loss"])
assert not np.array_equal(before, state.params["head.bias"])
"""


def test_models_and_step_need_only_jax_flax_optax_and_pillow() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
