"""Compares the time of our training step and inference with timm on PyTorch.

Network, batch, image size, precision and number of threads are the same for both. `pip install -e .[bench]`, then
`python tools/bench_step.py [--model nfnet_f0 --batch 8 --size 128 --dtype float32]`. A training step is forward,
backward, AGC, weight decay, Nesterov momentum and EMA. All contestants take turns within one run; the ratios are
medians over the rounds. Contestants that could not be run are listed at the end.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

Run = Callable[[], None]


@dataclasses.dataclass
class Contestant:
    """A program that is timed."""

    name: str
    kind: str
    run: Run
    compile_s: float
    memory: str
    text: str = ""
    """The text of our compiled program, for `tools/profile_step.py`; empty for timm."""
    times: list[float] = dataclasses.field(default_factory=list)


def parse() -> argparse.Namespace:
    """The command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="nfnet_f0", help="one of `nfnet models`; timm has NFNet F0-F6 and EfficientNet"
    )
    parser.add_argument("--batch", type=int, default=8, help="number of images of a step")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, in pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the computation")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="number of threads of PyTorch; XLA uses all cores it sees"
    )
    parser.add_argument("--rounds", type=int, default=7, help="number of timed runs of each contestant")
    parser.add_argument(
        "--microbatches", type=int, default=4, help="number of parts in our second training step; 1: leave it out"
    )
    parser.add_argument(
        "--plain", action="store_true", help="also time the library's grouped convolutions (slow on CPU)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table there, as docs/figures/ has them"
    )
    parser.add_argument("--torch-compile", action="store_true", help="also time timm under torch.compile")
    return parser.parse_args()


def timed(function: Run) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def our_training(
    options: argparse.Namespace, name: str, microbatches: int | None, *, library: bool, reproducible: bool
) -> Contestant:
    """Our training step."""
    import jax
    import jax.numpy as jnp

    from nfnet_flax.models import ExecutionConfig, convolution, model_config
    from nfnet_flax.models.convolution import library_convolutions
    from nfnet_flax.objectives import SoftmaxCrossEntropy
    from nfnet_flax.optim import OptimConfig, make_optimizer
    from nfnet_flax.parallel.mesh import make_mesh
    from nfnet_flax.training.state import create_state, model_structure
    from nfnet_flax.training.step import make_train_step

    rates = {"drop_rate": 0.0} | ({"stochdepth_rate": 0.0} if "resnet" not in options.model else {})
    config = model_config(options.model, compute_dtype=options.dtype, **rates)
    if model_structure(config, 1000).batch_stat_shapes:  # BatchNorm normalises each part, so their number is given
        microbatches = microbatches or 1
    structure = model_structure(config, 1000, ExecutionConfig(num_microbatches=microbatches, reproducible=reproducible))
    groups = OptimConfig() if "nfnet" in options.model else OptimConfig(clipping=None)
    mesh = make_mesh(jax.devices()[:1])

    def schedule(step: Any) -> Any:
        return jnp.asarray(0.01, jnp.float32) + 0 * step

    optimizer = make_optimizer(groups, schedule, structure.shapes)
    state = create_state(structure, 0, optimizer, mesh)
    step = make_train_step(structure, optimizer, SoftmaxCrossEntropy(), mesh, seed=0)
    images = jax.random.randint(jax.random.key(0), (options.batch, options.size, options.size, 3), 0, 256)
    batch = {"image": images.astype(jnp.uint8), "label": jnp.arange(options.batch) % 1000}
    started = time.perf_counter()
    with library_convolutions() if library else convolution.for_platform(jax.default_backend()):
        compiled = step.lower(state, batch).compile()
    compile_s = time.perf_counter() - started
    held = [state]

    def run() -> None:
        held[0], metrics = compiled(held[0], batch)
        jax.block_until_ready(metrics)

    return Contestant(name, "train", run, compile_s, memory_of(compiled), compiled.as_text() or "")


def our_inference(options: argparse.Namespace, name: str, folded: bool) -> Contestant:
    """Our inference."""
    import jax
    from flax import nnx

    import nfnet_flax
    from nfnet_flax.models.params import merge, split

    model = nfnet_flax.create_model(options.model, rngs=nnx.Rngs(0), compute_dtype=options.dtype)
    model.eval()
    graphdef, params, batch_stats = split(nfnet_flax.fold(model) if folded else model)
    images = jax.random.normal(jax.random.key(0), (options.batch, options.size, options.size, 3))
    started = time.perf_counter()
    forward = jax.jit(lambda params, images: merge(graphdef, params, batch_stats)(images))
    compiled = forward.lower(params, images).compile()
    compile_s = time.perf_counter() - started
    return Contestant(
        name, "infer", lambda: jax.block_until_ready(compiled(params, images)), compile_s, memory_of(compiled)
    )


def memory_of(compiled: Any) -> str:
    """Peak memory of a compiled program, by the compiler's analysis."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "-"
    total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return f"{(total - analysis.alias_size_in_bytes) / 2**30:.2f}"


def timm_model(options: argparse.Namespace, device: str) -> Any:
    """timm's network of the same name."""
    import timm
    import torch

    name = options.model.replace("nfnet", "dm_nfnet") if options.model.startswith("nfnet") else f"tf_{options.model}"
    model = timm.create_model(name, pretrained=False, drop_rate=0.0)
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    return model.to(device=device, memory_format=layout)


def timm_training(options: argparse.Namespace, name: str, is_compiled: bool) -> Contestant:
    """timm's training step: its network and its AGC, PyTorch's SGD, a fused EMA."""
    import torch
    from timm.utils.agc import adaptive_clip_grad

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm_model(options, device).train()
    averaged = [parameter.detach().clone() for parameter in model.parameters()]
    clipped = [parameter for key, parameter in model.named_parameters() if key != "head.fc.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=2e-5)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.to(memory_format=torch.channels_last) if device == "cuda" else images
    labels = torch.arange(options.batch, device=device) % 1000
    forward = torch.compile(model) if is_compiled else model

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits = forward(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if "nfnet" in options.model:
            adaptive_clip_grad(clipped, 0.01)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(model.parameters()), 1e-4)
        if device == "cuda":
            torch.cuda.synchronize()

    compile_s = timed(run)
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if device == "cuda" else "-"
    return Contestant(name, "train", run, compile_s, memory)


def timm_inference(options: argparse.Namespace, name: str, is_compiled: bool) -> Contestant:
    """timm's inference."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm_model(options, device).eval()
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.to(memory_format=torch.channels_last) if device == "cuda" else images
    forward = torch.compile(model) if is_compiled else model

    def run() -> None:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            forward(images)
        if device == "cuda":
            torch.cuda.synchronize()

    return Contestant(name, "infer", run, timed(run), "-")


def peak_flops(options: argparse.Namespace) -> tuple[float, str]:
    """The device's peak in FLOP/s, and where the number comes from."""
    import jax
    import jax.numpy as jnp

    from nfnet_flax.telemetry.peaks import peak_of

    device = jax.devices()[0]
    published = None if device.platform == "cpu" else peak_of(device.device_kind, options.dtype)
    if published is not None:
        return published.flops_per_s, published.source
    x = jnp.ones((4096, 4096), options.dtype)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    seconds = min(timed(lambda: jax.block_until_ready(product(x))) for _ in range(5))
    return 2 * 4096**3 / seconds, "measured: a 4096^3 matrix product"


def contestants(options: argparse.Namespace) -> tuple[list[Contestant], list[str]]:
    """The contestants that can be run, and messages about the others."""
    makers: list[tuple[str, Callable[..., Contestant], dict[str, Any]]] = [
        ("timm: training step", timm_training, {"is_compiled": False}),
        ("training step, fast mode", our_training, {"microbatches": None, "library": False, "reproducible": False}),
        ("timm: inference", timm_inference, {"is_compiled": False}),
        ("inference, folded", our_inference, {"folded": True}),
        ("inference", our_inference, {"folded": False}),
    ]
    if options.microbatches > 1:
        for mode, reproducible in (("fast mode", False), ("`reproducible`", True)):
            settings = {"microbatches": options.microbatches, "library": False, "reproducible": reproducible}
            makers.append((f"{mode}, {options.microbatches} parts", our_training, settings))
    if options.plain:
        makers.append(
            (
                "training step with the library's grouped convolution",
                our_training,
                {"microbatches": None, "library": True, "reproducible": False},
            )
        )
    if options.torch_compile:
        makers.append(("timm: training step, compiled", timm_training, {"is_compiled": True}))
        makers.append(("timm: inference, compiled", timm_inference, {"is_compiled": True}))
    found, missing = [], []
    for name, maker, settings in makers:
        try:
            found.append(maker(options, name, **settings))
        except Exception as error:  # a contestant that does not run here must not end the others
            missing.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return found, missing


def main() -> None:
    """Prints the table."""
    options = parse()
    import jax
    from flax import nnx

    from nfnet_flax.models import build_model, model_config
    from nfnet_flax.models.flops import forward_flops
    from nfnet_flax.runtime import keep_freed_memory
    from tools.figures import Row, write_figures

    keep_freed_memory()  # as `nfnet train` does; PyTorch has the same allocator
    try:
        import torch

        torch.set_num_threads(options.threads)
        torch_version = torch.__version__
    except ImportError:
        torch_version = "absent"
    device = jax.devices()[0]
    print(
        f"{options.model}, batch {options.batch}, {options.size} px, {options.dtype}; {device.device_kind}, "
        f"{options.threads} threads; JAX {jax.__version__}, PyTorch {torch_version}; {options.rounds} rounds"
    )
    found, missing = contestants(options)
    for contestant in found:
        contestant.run()  # warm
    for _ in range(options.rounds):
        for contestant in found:
            contestant.times.append(timed(contestant.run))
    model = nnx.eval_shape(lambda: build_model(model_config(options.model), num_classes=1000, rngs=nnx.Rngs(0)))
    forward = 2.0 * forward_flops(model, options.size) * options.batch
    peak, source = peak_flops(options)
    baselines = {
        contestant.kind: contestant
        for contestant in found
        if contestant.name in ("timm: training step", "timm: inference")
    }
    print(f"{'':<54}{'ms':>9}{'x timm':>8}{'images/s':>10}{'GFLOP/s':>9}{'of peak':>9}{'compile s':>11}{'GiB':>7}")
    rows: list[Row] = []
    for contestant in found:
        seconds = statistics.median(contestant.times)
        base = baselines.get(contestant.kind)
        ratio = statistics.median(a / b for a, b in zip(contestant.times, base.times, strict=True)) if base else None
        rate = forward * (3 if contestant.kind == "train" else 1) / seconds
        print(
            f"{contestant.name:<54}{1e3 * seconds:>9.1f}{f'{ratio:.2f}' if ratio else '-':>8}"
            f"{options.batch / seconds:>10.1f}{rate / 1e9:>9.0f}{rate / peak:>9.0%}"
            f"{contestant.compile_s:>11.1f}{contestant.memory:>7}"
        )
        rows.append(
            {
                "what": contestant.name,
                "ms": round(1e3 * seconds, 1),
                "as a multiple of timm's time": f"{ratio:.2f}" if ratio else "",
            }
        )
    if options.json:
        write_figures(options.json, rows)
    print(f"peak: {peak / 1e9:.0f} GFLOP/s ({source}); GiB: by XLA's analysis, or PyTorch's allocator on a GPU")
    print("could not be run: " + ("; ".join(missing) if missing else "nothing"))


if __name__ == "__main__":
    main()
