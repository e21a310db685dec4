"""A table of the TPU compiler's estimates for several networks, without a TPU (`nfnet plan` for many).

`python tools/estimate_tpu.py --models nfnet_f0 nfnet_f1 --topologies v5e:2x4` (extra `tpu`) compiles the whole training
step (bfloat16, AGC, decay, momentum, EMA and metrics included) at each network's training size. For each it prints a
line of Markdown as soon as it is known, together with the latency of the step that the paper measured on TPUv3 (arXiv
2102.06171, table 3, "published"). Each step is compiled in its own process, one after the other.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nfnet_f0"])
    parser.add_argument("--topologies", nargs="+", default=["v3:2x2", "v5e:2x4", "v6e:2x4"])
    parser.add_argument("--images-per-device", type=int, default=32)
    parser.add_argument("--microbatches-per-device", type=int, default=1)
    parser.add_argument("--rematerialization", choices=("none", "blocks", "full"), default="none")
    parser.add_argument("--reproducible", action="store_true", help="sums in a fixed order")
    parser.add_argument("--fsdp", type=int, default=1, help="devices over which parameters are divided")
    parser.add_argument("--spatial", type=int, default=1, help="devices over which the height of images is divided")
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="time limit of one compilation")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        print(json.dumps(estimate(options)))
        return
    columns = ["network", "px", "TPU", "images", "rematerialization", "memory", "FLOPs", "estimate", "per image"]
    columns += ["published v3", "collectives", "compiled"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for model in options.models:
        for topology in options.topologies:
            print(line(options, model, topology), flush=True)


def line(options: argparse.Namespace, model: str, topology: str) -> str:
    """One row of the table, or the error."""
    from nfnet_flax.claims.published import STEP_MS
    from nfnet_flax.units import duration, human_size, scaled

    command = [sys.executable, __file__, "--inner", "--models", model, "--topologies", topology]
    command += ["--images-per-device", str(options.images_per_device), "--rematerialization", options.rematerialization]
    command += ["--microbatches-per-device", str(options.microbatches_per_device)]
    command += ["--spatial", str(options.spatial)]
    command += ["--fsdp", str(options.fsdp), *(["--reproducible"] if options.reproducible else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout_s, check=True)
    except subprocess.TimeoutExpired:
        return f"| {model} | | {topology} | did not compile within {options.timeout_s:.0f} s |"
    except subprocess.CalledProcessError as error:
        return f"| {model} | | {topology} | {error.stderr.strip().splitlines()[-1]} |"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    time_ms = "" if found["clock_hz"] is None else f" = {duration(found['cycles'] / found['clock_hz'])}"
    fits = "" if found["peak_bytes"] <= found["hbm_bytes"] else ", does not fit"
    moved = ", ".join(f"{kind} {scaled(size)}B" for kind, size in found["collectives"].items())
    published = STEP_MS.get(model)
    return (
        f"| {model} | {found['image_size']} | {topology} | {found['images_per_device']} | {found['rematerialization']} "
        f"| {human_size(found['peak_bytes'])}{fits} | {scaled(found['flops'])} "
        f"| {scaled(found['cycles'])} cycles{time_ms} | {scaled(found['cycles'] / found['images_per_device'])} "
        f"| {'' if published is None else f'{published} ms'} | {moved} | {found['compile_s']:.0f} s |"
    )


def estimate(options: argparse.Namespace) -> dict[str, object]:
    """The plan of one network on one topology."""
    from nfnet_flax.programs.plan import devices_of, plan, set_environment

    set_environment()
    from nfnet_flax.models import IMAGE_SIZES, ExecutionConfig, model_config
    from nfnet_flax.optim import OptimConfig
    from nfnet_flax.recipe_file import load_recipe

    config = model_config(options.models[0], compute_dtype="bfloat16")
    base = load_recipe(ROOT / "recipes" / "nfnet_imagenet.py")
    num_groups = len(devices_of(options.topologies[0])) // options.spatial
    batch_size = options.images_per_device * num_groups
    recipe = dataclasses.replace(
        base,
        model=config,
        optim=base.optim if options.models[0].startswith("nfnet") else OptimConfig(clipping=None),
        data=dataclasses.replace(
            base.data,
            image_size=IMAGE_SIZES[options.models[0]].train,
            batch_size=batch_size,
            eval_batch_size=batch_size,
            mixing=None,
        ),
        execution=ExecutionConfig(
            rematerialization=options.rematerialization,
            reproducible=options.reproducible,
            fsdp=options.fsdp,
            spatial=options.spatial,
            num_microbatches=options.microbatches_per_device * num_groups,
        ),
    )
    found = dataclasses.asdict(plan(recipe, options.topologies[0]))
    return {name: value for name, value in found.items() if name != "most_expensive"}


if __name__ == "__main__":
    main()
