"""Plans for GPUs: what their programs show, read from hand-written ones; the compiler needs the extra `cuda-plan`."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.programs.gpu import GPUS, gpus_of, kind_of, names_gpus
from nfnet_flax.programs.gpu_plan import GpuPlan, describe_gpu_plan
from nfnet_flax.programs.hlo import parse
from nfnet_flax.programs.memory_traffic import Kernel, kernels_of
from tests import runs
from tests.test_cli import fails

PLAN = GpuPlan(
    topology="h100:8",
    device_kind="NVIDIA H100 80GB HBM3",
    num_devices=8,
    images_per_device=32,
    images_per_turn=4,
    batch_size=256,
    image_size=192,
    rematerialization="none",
    num_parameters=71_500_000,
    parameter_bytes=36_000_000,
    state_bytes=108_000_000,
    compile_s=200.0,
    temporary_bytes=3 << 30,
    least_bytes=4 << 30,
    memory_bytes=GPUS["h100"].memory_bytes,
    flops=1.398e12,
    collectives={"all-reduce": 286_000_000},
    turn_copies_bytes=71_500_000,
    copies_bytes=858_000_000,
    traffic_bytes=6_700_000_000,
    flops_bound_s=1.41e-3,
    traffic_bound_s=2e-3,
    kernels_bound_s=2.5e-3,
    largest=[("stem/convolution", 1e-4)],
)
"""Numbers as of F0."""


def test_a_plan_says_what_it_cannot_say() -> None:
    text = describe_gpu_plan(PLAN)
    for words in (
        "h100:8: 8 x NVIDIA H100 80GB HBM3, 32 images of 192 px each, 4 at a time",
        "nothing was run on a GPU",
        "together at least 4.0 GiB of 79.1 GiB: whether it fits is not known",
        "all-reduce: 286 MB per device and step (1.00 x the gradient)",
        "copies: 858 MB per device and step (3.00 x the gradient), 0.25 x the gradient in each turn",
        "bounds, not a time, at 989 TFLOP/s (bfloat16, dense) and 3.35 TB/s as published",
        "1.4 ms  FLOPs",
        "2.0 ms  reading and writing 6.70 GB without a cache",
        "2.5 ms  the larger of both, kernel by kernel",
        "100.0 µs    stem/convolution",
    ):
        assert words in text, text
    assert ": fits" not in text
    assert "images/s" not in text


def test_only_what_is_certain_is_said_of_memory() -> None:
    def verdict(gib: int) -> str:
        return describe_gpu_plan(dataclasses.replace(PLAN, least_bytes=gib << 30))

    assert "together at least 70.0 GiB of 79.1 GiB: more than the 75% that JAX takes" in verdict(70)
    assert "together at least 90.0 GiB of 79.1 GiB: DOES NOT FIT" in verdict(90)


def test_a_step_without_a_loop_has_no_copies_in_turns() -> None:
    text = describe_gpu_plan(dataclasses.replace(PLAN, turn_copies_bytes=None))
    assert "copies: 858 MB per device and step (3.00 x the gradient)\n" in text


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100:0", "topology 'h100:0': give a number of GPUs, as in h100:8 or a100:8: the number of GPUs is 1 to 8"),
        ("h100:12", "topology 'h100:12': give a number of GPUs"),
        ("h100", "topology 'h100': give a number of GPUs"),
        ("a100:²", "topology 'a100:²': give a number of GPUs"),
        ("h200:8", "topology 'h200:8': the GPUs that can be planned for are h100 and a100, as in h100:8"),
        ("H100:8", "topology 'H100:8': the GPUs that can be planned for are h100 and a100"),
    ],
)
def test_gpus_that_cannot_be_planned_for_are_named(
    topology: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "plan", str(runs.DIGITS), "--topology", topology)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "h100:8", "--search"], "--search = True: leave it out for h100:8"),
        (["--compare", "h100:8", "h100:4"], "--compare = 'h100:8': give TPUs: libraries choose on the GPU"),
    ],
)
def test_what_needs_times_or_whole_programs_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "plan", str(runs.DIGITS), *options)


def test_names_of_tpus_are_not_taken_for_gpus() -> None:
    assert not any(map(names_gpus, ("v5e:2x4", "v5e:2x4/2", "tpu7x:2x2x1", "v6e:16x16", "")))
    assert all(map(names_gpus, ("h100:8", "A100:1", "h200:8", "gb200:4", "b200:x")))


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "nvidia-cuda-nvcc":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.10.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"'h100:8': nvidia-cuda-nvcc is not installed.*nfnet_flax\[cuda-plan\]"):
        gpus_of("h100:8")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.0" if name == "jaxlib" else "0.10.2")
    with pytest.raises(ConfigError, match=r"jax-cuda13-plugin 0\.10\.2 does not belong to jaxlib 0\.9\.0: pip install"):
        gpus_of("h100:8")


PROGRAM = """HloModule step

%row (p: f32[4,256], i: s32[]) -> f32[256] {
  %p = f32[4,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice = f32[1,256]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,256}
  ROOT %flat = f32[256]{0} bitcast(%slice)
}

%write (p: f32[4,256], new: f32[256], i: s32[]) -> f32[4,256] {
  %p = f32[4,256]{1,0} parameter(0)
  %new = f32[256]{0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,256]{1,0} bitcast(%new)
  ROOT %updated = f32[4,256]{1,0} dynamic-update-slice(%p, %row, %i, %i)
}

%turned (p: f32[16,16]) -> f32[16,16] {
  %p = f32[16,16]{1,0} parameter(0)
  ROOT %turn = f32[16,16]{0,1} transpose(%p), dimensions={1,0}
}

%body (p: (s32[], f32[4,256])) -> (s32[], f32[4,256]) {
  %p = (s32[], f32[4,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %rows = f32[4,256]{1,0} get-tuple-element(%p), index=1
  %taken = f32[256]{0} fusion(%rows, %i), kind=kLoop, calls=%row
  %copied = f32[256]{0} copy(%taken)
  %written = f32[4,256]{1,0} fusion(%rows, %copied, %i), kind=kLoop, calls=%write
  ROOT %both = (s32[], f32[4,256]{1,0}) tuple(%i, %written)
}

%condition (p: (s32[], f32[4,256])) -> pred[] {
  %p = s32[] parameter(0)
  ROOT %less = pred[] compare(%p, %p), direction=LT
}

%dear (p: f32[16,16]) -> f32[16,16] {
  %p = f32[16,16]{1,0} parameter(0)
  ROOT %product = f32[16,16]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cheap (p: f32[16,16]) -> f32[16,16] {
  %p = f32[16,16]{1,0} parameter(0)
  ROOT %same = f32[16,16]{1,0} bitcast(%p)
}

ENTRY %main (p: (s32[], f32[4,256]), q: f32[16,16]) -> f32[16,16] {
  %p = (s32[], f32[4,256]{1,0}) parameter(0)
  %q = f32[16,16]{1,0} parameter(1)
  %room = u8[64]{0} custom-call(), custom_call_target="AllocateBuffer"
  %loop = (s32[], f32[4,256]{1,0}) while(%p), condition=%condition, body=%body, metadata={op_name="jit(step)/turns_8/while"}
  %sent = f32[16,16]{1,0} all-reduce(%q), to_apply=%add
  %turn = f32[16,16]{0,1} fusion(%sent), kind=kLoop, calls=%turned
  ROOT %chosen = f32[16,16]{1,0} conditional(%q, %turn, %turn), branch_computations={%cheap, %dear}
}
"""  # noqa: E501 - the lines of a program are as long as they are


def test_kernels_read_the_rows_that_they_take_and_write_those_that_they_set() -> None:
    found = {kernel.operation.name: kernel for kernel in kernels_of(parse(PROGRAM))}
    assert set(found) == {"taken", "copied", "written", "less", "turn", "product"}
    row, matrix, index = 4 * 256, 4 * 16 * 16, 4

    def facts(kernel: Kernel) -> tuple[int, int, int, bool]:
        return kernel.times, kernel.num_turns, kernel.num_bytes, kernel.is_copy

    assert facts(found["taken"]) == (8, 8, 2 * row + index, False)
    assert facts(found["copied"]) == (8, 8, 2 * row, True)
    assert facts(found["written"]) == (8, 8, 2 * row + index, False)
    assert facts(found["turn"]) == (1, 0, 2 * matrix, True)  # a fusion that only copies
    assert facts(found["product"]) == (1, 0, 3 * matrix, False)  # of the branch that moves most
    assert found["product"].flops == 2 * 16**3


SCRIPT = """
import dataclasses, json, re
from nfnet_flax.programs.plan import set_environment
set_environment()
from nfnet_flax.models import NFNetConfig
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.programs.gpu import gpus_of
from nfnet_flax.programs.gpu_plan import describe_gpu_plan, plan_for_gpus
from nfnet_flax.programs.products import product_flops
from nfnet_flax.programs.step_plan import lower_step
from nfnet_flax.recipe_file import load_recipe

base = load_recipe("recipes/digits.py")
network = NFNetConfig(widths=(64,), depths=(1,), group_width=32, compute_dtype="bfloat16")
execution = dataclasses.replace(base.execution, num_microbatches=4)
recipe = dataclasses.replace(base, model=network, execution=execution)
found = plan_for_gpus(recipe, "h100:2")
_, lowered = lower_step(recipe, make_mesh(gpus_of("h100:2")))
flops_before, results = 0, {}
for line in lowered.as_text("hlo").splitlines():  # before it is compiled; all products are in the loop of two turns
    if operation := re.match(r"\\s+(?:ROOT )?([\\w.\\-]+) = (.*? ([a-z][a-z0-9\\-]*)\\(.*)", line):
        name, text, opcode = operation.groups()
        results[name] = text[: text.index(f" {opcode}(")]
        flops_before += 2 * product_flops(opcode, text, results) if opcode in ("convolution", "dot") else 0
print(describe_gpu_plan(found))
print(json.dumps([dataclasses.asdict(found), flops_before]))
"""


def test_the_step_of_a_small_network_compiles_for_gpus() -> None:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        with pytest.raises(ConfigError, match=r"is not installed.*nfnet_flax\[cuda-plan\]"):
            gpus_of("h100:2")
        return
    env = {**os.environ, **runs.OPTIMIZED, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr
    plan, flops_before = json.loads(done.stdout.splitlines()[-1])
    gradient = 4 * plan["num_parameters"]
    assert (plan["num_devices"], plan["images_per_device"], plan["images_per_turn"]) == (2, 32, 16)
    assert plan["flops"] == pytest.approx(flops_before, rel=0.01)
    assert plan["turn_copies_bytes"] < 1.1 * gradient
    # The gradient is exchanged, and the weights are gathered; activations would be far more.
    assert sum(plan["collectives"].values()) < 2.5 * gradient
    sum_of_bounds = plan["kernels_bound_s"] * (1 + 1e-9)  # rounded in another order
    assert 0 < plan["flops_bound_s"] <= sum_of_bounds
    assert plan["traffic_bound_s"] <= sum_of_bounds
    assert plan["state_bytes"] < plan["least_bytes"] < 2**30
    assert kind_of("h100:2").name == plan["device_kind"]
