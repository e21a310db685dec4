"""Reading compiled programs, on a hand-written one whose sums are known."""

# ruff: noqa: E501 - the lines of a program are as long as they are

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from nfnet_flax.programs.hlo import collective_bytes, estimated_cycles, flops, parse

TEXT = """HloModule step

%fused (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} negate(%p), backend_config={"window_config":{"estimated_cycles":"1000000"}}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %work = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/conv"}, backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %sum = f32[8]{0} all-reduce(%work), to_apply=%add, backend_config={"estimated_cycles":"2"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%p, %p), direction=LT
}

%dear (p: f32[8]) -> f32[8] {
  ROOT %update = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/update"}, backend_config={"estimated_cycles":"50"}
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %keep = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"5"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], /*index=1*/f32[8]{0:T(1024)}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %moved = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%loop), source_target_pairs={{0,1}}
  %arrived = f32[4]{0} collective-permute-done(%moved)
  %sent = (f32[2]{0}, f32[16]{0}) all-gather-start(%loop), dimensions={0}
  %whole = f32[16]{0} all-gather-done(%sent)
  %tail = f32[8]{0} fusion(%loop), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/conv"}, backend_config={"estimated_cycles":"100"}
  ROOT %chosen = f32[8]{0} conditional(%tail, %tail, %tail), branch_computations={%cheap, %dear}
}
"""


def test_loops_are_multiplied_and_the_dearest_branch_counts() -> None:
    total, by_source = estimated_cycles(parse(TEXT))
    assert total == 3 * (7 + 2) + 100 + 50
    assert by_source["jit(step)/conv  bf16[8,128]"] == 21
    assert by_source["jit(step)/conv  f32[8]"] == 100
    assert by_source["jit(step)/update  f32[8]"] == 50


def test_the_blocks_of_a_stage_count_together() -> None:
    text = TEXT.replace("jit(step)/conv", "jit(step)/stage2/block0/conv1/dot", 1)
    _, by_source = estimated_cycles(parse(text.replace("jit(step)/conv", "jit(step)/stage2/block11/conv1/dot")))
    assert by_source["jit(step)/stage2/block*/conv1/dot  bf16[8,128]"] == 21
    assert by_source["jit(step)/stage2/block*/conv1/dot  f32[8]"] == 100


def test_collectives_count_their_payload() -> None:
    # Of asynchronous ones, what arrives: the result of their start has the operand and more, too.
    found = collective_bytes(parse(TEXT))
    assert found == {"all-reduce": 3 * 32, "collective-permute": 4 * 4, "all-gather": 16 * 4}


def test_the_pieces_of_a_collective_that_runs_beside_other_work_count_once() -> None:
    piece = '  %piece.{n} = bf16[8,64]{{1,0}} all-gather(%p), frontend_attributes={{chain_id="{chain}"}}\n'

    def with_pieces(*chains: str) -> dict[str, int]:
        pieces = "".join(piece.format(n=n, chain=chain) for n, chain in enumerate(chains))
        return collective_bytes(parse(TEXT.replace("  ROOT %inner", pieces + "  ROOT %inner")))

    num_turns, others = 3, 16 * 4
    assert with_pieces("0", "0", "0")["all-gather"] == num_turns * 8 * 64 * 2 + others
    assert with_pieces("0", "1", "0")["all-gather"] == num_turns * 2 * 8 * 64 * 2 + others


def test_a_loop_without_a_stated_length_is_read_from_its_condition() -> None:
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"3"}}', "").replace(
        "  ROOT %less", "  %turns = s32[]{:T(128)} constant(4)\n  ROOT %less"
    )
    assert estimated_cycles(parse(text))[0] == 4 * (7 + 2) + 100 + 50
    carried = text.replace("body=%body", 'body=%body, metadata={op_name="jit(step)/turns_4/while/body/carry/while"}')
    assert estimated_cycles(parse(carried))[0] == (7 + 2) + 100 + 50  # once per turn, as `parallel/turns.py` does
    with pytest.raises(ValueError, match="cannot be read"):
        estimated_cycles(parse(text.replace("constant(4)", "parameter(1)")))


def flops_of(function: Callable[..., jax.Array], *shapes: tuple[int, ...]) -> tuple[int, float]:
    """By `flops`, and by the compiler, which counts loops once and elementwise work, too."""
    abstract = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    compiled: Any = jax.jit(function).lower(*abstract).compile()
    return flops(parse(compiled.as_text())), compiled.cost_analysis()["flops"]


def test_flops_of_a_strided_convolution_and_its_gradients_leave_out_padding() -> None:
    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    shapes = (3, 3, 8, 16), (4, 33, 20, 8)
    # Of 33 rows the 17 windows meet 49 (one less at each end); of 20 columns the 10 windows meet 29.
    once = 2 * 4 * 8 * 16 * 49 * 29
    assert flops_of(loss, *shapes)[0] == once
    for gradient in (jax.grad(loss), jax.grad(loss, argnums=1)):
        ours, theirs = flops_of(gradient, *shapes)
        assert ours == once
        assert ours == pytest.approx(theirs, rel=0.02)


def test_flops_of_a_loop_are_multiplied() -> None:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.scan(lambda a, _: (jnp.sin(a @ b), None), a, None, length=5)[0]

    ours, theirs = flops_of(product, (30, 50), (50, 50))
    assert ours == 5 * 2 * 30 * 50 * 50
    assert ours > 4 * theirs


LIBRARY_CALLS = """HloModule step

%padded (p: bf16[4,33,20,8]) -> bf16[4,34,21,8] {
  %p = bf16[4,33,20,8]{3,2,1,0} parameter(0)
  %zero = bf16[] constant(0)
  ROOT %pad = bf16[4,34,21,8]{3,2,1,0} pad(%p, %zero), padding=0_0x1_0x0_1x0_0
}

%interleaved (p: bf16[4,17,10,16]) -> (bf16[4], bf16[4,35,21,16]) {
  %p = bf16[4,17,10,16]{3,2,1,0} parameter(0)
  %zero = bf16[] constant(0)
  %other = bf16[4]{0} broadcast(%zero), dimensions={}
  %pad = bf16[4,35,21,16]{3,2,1,0} pad(%p, %zero), padding=0_0_0x1_1_1x1_1_1x0_0_0
  ROOT %both = (bf16[4], bf16[4,35,21,16]{3,2,1,0}) tuple(%other, %pad)
}

ENTRY %main (x: bf16[4,33,20,8], kernel: bf16[16,3,3,8], dy: bf16[4,17,10,16]) -> f32[8] {
  %x = bf16[4,33,20,8]{3,2,1,0} parameter(0)
  %kernel = bf16[16,3,3,8]{3,2,1,0} parameter(1)
  %dy = bf16[4,17,10,16]{3,2,1,0} parameter(2)
  %flipped = bf16[8,3,3,16]{3,2,1,0} parameter(3)
  %wide = bf16[4,34,21,8]{3,2,1,0} fusion(%x), kind=kLoop, calls=%padded
  %spread = (bf16[4], bf16[4,35,21,16]{3,2,1,0}) fusion(%dy), kind=kLoop, calls=%interleaved
  %holes = bf16[4,35,21,16]{3,2,1,0} get-tuple-element(%spread), index=1
  %call = CALL
}
"""
"""Convolutions as the compiler for GPUs writes them: labels and window are always those of the forward convolution."""

FORWARD = "(bf16[4,17,10,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %kernel), window={size=3x3 stride=2x2 pad=1_1x0_1}"
PADDED = "(bf16[4,16,10,16]{3,2,1,0}, u8[0]{0}) custom-call(%wide, %kernel), window={size=3x3 stride=2x2}"
OF_INPUT = "(bf16[4,33,20,8]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %kernel), window={size=3x3 stride=2x2 pad=1_1x0_1}"
OF_KERNEL = "(bf16[16,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), window={size=3x3 stride=2x2 pad=1_1x0_1}"
OVER_ZEROS = "(bf16[4,33,19,8]{3,2,1,0}, u8[0]{0}) custom-call(%holes, %flipped), window={size=3x3}"
LABELS = ', dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv'
PRODUCT = (
    '(f32[10,17]{1,0}, s8[0]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}'
)


@pytest.mark.parametrize(
    ("call", "flops_of_call"),
    [
        # Of 33 rows the 17 windows meet 49, of 20 columns the 10 windows meet 29.
        (FORWARD + LABELS + 'BiasActivationForward"', 2 * 4 * 8 * 16 * 49 * 29),
        (OF_INPUT + LABELS + 'BackwardInput"', 2 * 4 * 8 * 16 * 49 * 29),
        (OF_KERNEL + LABELS + 'BackwardFilter"', 2 * 4 * 8 * 16 * 49 * 29),
        # The zeros lie in the input already: one row before 33, one column after 20.
        (PADDED + LABELS + 'Forward"', 2 * 4 * 8 * 16 * (16 * 3 - 1) * (10 * 3 - 1)),
        # The gradient of the input as a convolution over 17 rows and 10 columns with zeros in between.
        (OVER_ZEROS + LABELS + 'Forward"', 2 * 4 * 8 * 16 * 49 * 28),
        ('u8[16]{0} custom-call(%x), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_flops_of_calls_of_cudnn_leave_out_zeros_wherever_they_are(call: str, flops_of_call: int) -> None:
    assert flops(parse(LIBRARY_CALLS.replace("CALL", call))) == flops_of_call


def test_flops_of_a_call_of_cublas() -> None:
    operands = "  %a = f32[12,10]{1,0} parameter(4)\n  %b = f32[12,17]{1,0} parameter(5)\n  %call"
    text = LIBRARY_CALLS.replace("CALL", PRODUCT).replace("  %call", operands)
    assert flops(parse(text)) == 2 * 12 * 10 * 17
