"""`nfnet models`."""

import dataclasses
import fnmatch
import os

import tyro

from nfnet_flax.config import unknown_name
from nfnet_flax.exit_codes import EXIT_DONE


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""

    @dataclasses.dataclass(frozen=True)
    class ModelsOptions:
        pattern: tyro.conf.Positional[str] = "*"
        """Shell-style pattern of names."""

    options = tyro.cli(ModelsOptions, args=argv, prog="nfnet models", description="List the named networks.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes only: leave the accelerators to whoever uses them
    from flax import nnx

    from nfnet_flax.models import build_model, list_models, model_config
    from nfnet_flax.models.flops import forward_flops
    from nfnet_flax.models.params import split
    from nfnet_flax.models.registry import PUBLISHED_TOP1_PERCENT

    names = fnmatch.filter(list_models(), options.pattern)
    if not names:
        raise unknown_name("model", options.pattern, list_models())
    print("GFLOPs: multiply-adds of one image at train px, forward. Top-1: published, ImageNet, at test px.")
    print(f"{'name':<16}{'parameters':>14}{'GFLOPs':>9}{'train px':>10}{'test px':>9}{'top-1':>8}")
    for name in names:
        config = model_config(name)
        model = nnx.eval_shape(lambda config=config: build_model(config, num_classes=1000, rngs=nnx.Rngs(0)))
        count = sum(leaf.size for leaf in split(model)[1].values())
        gflops = forward_flops(model, config.train_image_size) / 1e9
        top1 = f"{PUBLISHED_TOP1_PERCENT[name]:.1f}%" if name in PUBLISHED_TOP1_PERCENT else "-"
        print(
            f"{name:<16}{count:>14,}{gflops:>9.2f}{config.train_image_size:>10}{config.test_image_size:>9}{top1:>8}",
            flush=True,
        )
    return EXIT_DONE
