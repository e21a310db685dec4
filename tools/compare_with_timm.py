"""Compares normalizer-free networks with timm's (PyTorch, float64): counts, logits, features, and weights both ways.

`pip install torch torchvision timm`, then `python tools/compare_with_timm.py [NAME ...]`; without names all networks
are compared that timm has, the smallest first. Parameters are those of `make_timm_golden.fill`: random and not uniform.
Ends with exit code 1 if a network differs by more than `--tolerance`.
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))

from nfnet_flax.models import NFNetConfig, TimmNFNetConfig, build_model, list_models, model_config
from nfnet_flax.models.counts import COUNTS
from nfnet_flax.models.params import merge, split
from nfnet_flax.weights import TIMM_FORM, to_timm
from nfnet_flax.weights.timm import timm_arrays
from tools.make_timm_golden import fill


def timm_name(name: str) -> str | None:
    """Timm's name of one of our networks; None if timm has no such network."""
    config = model_config(name)
    if isinstance(config, TimmNFNetConfig):
        return name.removeprefix("timm_")
    return f"dm_{name}" if isinstance(config, NFNetConfig) and not name.endswith("+") and name != "nfnet_f7" else None


def compare(name: str, theirs: str, options: argparse.Namespace) -> float:
    """Prints a row for one network, and returns its largest relative difference."""
    import timm
    import torch

    pool, channels = options.global_pool, options.in_channels
    judge = timm.create_model(theirs, pretrained=False, global_pool=pool, in_chans=channels).double().eval()
    tensors = {key: fill(key, tuple(value.shape)) for key, value in judge.state_dict().items()}
    judge.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    shape = (options.batch_size, options.image_size, options.image_size, channels)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with torch.no_grad():
        final = judge.forward_features(torch.from_numpy(images).double().permute(0, 3, 1, 2))
        wanted = [judge.forward_head(final, pre_logits=early).numpy() for early in (False, True)]
    del judge, final
    form = TIMM_FORM if theirs.startswith("dm_") else {}
    config = model_config(name, in_channels=channels, global_pool=pool, compute_dtype=options.dtype, **form)
    model = nnx.eval_shape(lambda: build_model(config, num_classes=1000, rngs=nnx.Rngs(0)))
    params = {key: jnp.asarray(value) for key, value in timm_arrays(model, tensors).items()}
    network = merge(split(model)[0], params, {})
    network.eval()
    back = to_timm(network)
    is_same = back.keys() == tensors.keys() and all(np.array_equal(back[key], tensors[key]) for key in tensors)
    got = [network(jnp.asarray(images)), network.features(jnp.asarray(images))]
    worst = [float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))) for a, b in zip(got, wanted, strict=True)]
    count = sum(value.size for value in tensors.values())
    in_table = count == COUNTS[name].parameters or (pool, channels) != ("avg", 3)
    told = f"{count:>13,} parameters, {'as in the table' if in_table else 'TABLE DIFFERS'}"
    trip = "equal" if is_same else "DIFFERENT"
    print(f"{name:<20}{told}, logits {worst[0]:.1e}, features {worst[1]:.1e}, there and back {trip}", flush=True)
    return max(worst) if is_same and in_table else float("inf")


def main() -> None:
    """Compares the networks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="our name of a network; none: all that timm has")
    parser.add_argument("--batch-size", type=int, default=2, help="number of images")
    parser.add_argument("--image-size", type=int, default=64, help="height and width of the images, in pixels")
    parser.add_argument("--in-channels", type=int, default=3, help="number of channels of the images")
    parser.add_argument("--global-pool", default="avg", choices=["avg", "max", "avgmax", "catavgmax"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="type of our computation")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest difference, relative to the largest value"
    )
    options: Any = parser.parse_args()
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    known = {name: theirs for name in list_models() if (theirs := timm_name(name)) is not None}
    names = options.names or sorted(known, key=lambda name: COUNTS[name].parameters)
    failed = []
    for name in names:
        if name not in known:
            parser.error(f"{name}: timm has no such network; known are {', '.join(known)}")
        if not compare(name, known[name], options) <= options.tolerance:
            failed.append(name)
        gc.collect()
    print(f"{len(names) - len(failed)} of {len(names)} agree to {options.tolerance:g}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
