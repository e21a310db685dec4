"""Code of a user's own, as users write it: a network, a source, an objective and a method outside of the package."""

from pathlib import Path

MY_LAYERS = '''
"""What my networks share."""

WIDTH = 8


def shrunk(width):
    return max(2, width // 2)
'''

MY_NET = '''
"""My family: two stages of one convolution each."""

import dataclasses

import jax
from flax import nnx

from my_layers import WIDTH, shrunk
from nfnet_flax.models import Classifier, ModelConfig
from nfnet_flax.models.classifier import HEAD_NORMAL, block_specs
from nfnet_flax.models.layers import WSConv


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyNetConfig(ModelConfig):
    width: int = WIDTH
    """Channels of all layers."""

    def build(self, num_classes, rngs):
        return MyNet(self, num_classes, rngs)

    def small(self):
        return dataclasses.replace(self, width=shrunk(self.width))


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = WSConv(width, width, 3, compute_dtype="float32", rngs=rngs)

    def __call__(self, x, keys, spec):
        branch = self.conv(jax.nn.relu(x) * spec.beta)
        return x + 0.2 * branch, branch  # no skip gain


class MyNet(Classifier):
    def __init__(self, config, num_classes, rngs):
        self.config = config
        dtype = config.compute_dtype
        self.stem = WSConv(3, config.width, 3, stride=2, compute_dtype=dtype, rngs=rngs)
        specs = block_specs((1, 1), alpha=0.2, stochdepth_rate=0.0)
        self._add_blocks(lambda stage, position: Block(config.width, rngs), specs)
        self._add_head(
            config.width, num_classes, kernel_init=HEAD_NORMAL, drop_rate=0.0, compute_dtype=dtype, rngs=rngs
        )

    def _stem(self, x):
        return self.stem(x)

    def _final(self, x):
        return jax.nn.relu(x)
'''

MY_RECIPE = '''
"""My run, with a source, an objective and a method of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from my_net import MyNetConfig
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.random_access import SourceConfig, check_index, digest
from nfnet_flax.models import ExecutionConfig
from nfnet_flax.objectives import Metric, Objective
from nfnet_flax.optim import AGC, Method, OptimConfig
from nfnet_flax.recipe import CheckpointConfig, Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shades(SourceConfig):
    """Noise that is dark, grey or light."""

    num_examples: int = 60

    def open(self, split, image_size):
        return ShadeImages(split, self.num_examples, image_size)


class ShadeImages:
    class_names = ("dark", "grey", "light")
    unused = ()

    def __init__(self, split, num_examples, image_size):
        self.split, self.num_examples, self.image_size = split, num_examples, image_size

    def __len__(self):
        return self.num_examples

    def __getitem__(self, index):
        index = check_index(index, len(self))
        rng = np.random.default_rng([index, self.split == "train"])
        label = int(rng.integers(3))
        image = rng.integers(70 * label, 70 * label + 100, (self.image_size, self.image_size, 3))
        return {"image": image.astype(np.uint8), "label": np.int32(label)}

    def fingerprint(self):
        return digest("shades", self.split, str(self.num_examples), str(self.image_size))

    def contents(self):
        return ""

    def describe(self, index):
        return f"shade {index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brier(Objective):
    """Squared distance of the probabilities from the target."""

    weight: float = 1.0

    def train(self, logits, batch, arrays):
        return self.weight * self._distance(logits, batch), {"surest": Metric(jnp.max(jax.nn.softmax(logits), axis=-1))}

    def evaluate(self, logits, batch):
        return {"loss": self._distance(logits, batch), "surest": jnp.max(jax.nn.softmax(logits), axis=-1)}

    def _distance(self, logits, batch):
        target = jax.nn.one_hot(batch["label"], logits.shape[-1])
        return jnp.sum(jnp.square(jax.nn.softmax(logits) - target), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(Method):
    share: float = 0.9

    def transformation(self, learning_rate, decay, names):
        return optax.chain(decay, optax.trace(self.share), optax.scale_by_learning_rate(learning_rate))


def recipe(width: int = 8):
    return Recipe(
        name="mine",
        model=MyNetConfig(width=width),
        num_classes=3,
        data=DataConfig(source=Shades(), image_size=16, eval_image_size=16, batch_size=16, eval_batch_size=20),
        optim=OptimConfig(
            method=Momentum(), learning_rate_per_256=1.0, clipping=AGC(ratio=0.5), ema_decay=0.9
        ),
        execution=ExecutionConfig(num_microbatches=2),
        checkpoint=CheckpointConfig(every_steps=20, best_metric="eval_ema/loss", best_is="lowest"),
        objective=Brier(),
        num_steps=200,
        eval_every_steps=100,
        log_every_steps=1,
        tensorboard=False,
    )
'''
FILES = {"my_layers.py": MY_LAYERS, "my_net.py": MY_NET, "my_recipe.py": MY_RECIPE}


def write(folder: Path) -> Path:
    """Writes the files into a folder; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text.lstrip())
    return folder / "my_recipe.py"


def replace(file: Path, old: str, new: str) -> None:
    """Edits a file."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
