"""Reading compiled programs, on a hand-written one whose sums are known."""

# ruff: noqa: E501 - the lines of a program are as long as they are

import pytest

from nfnet_flax.hlo import collective_bytes, estimated_cycles, parse

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


def test_collectives_count_their_payload() -> None:
    assert collective_bytes(parse(TEXT)) == {"all-reduce": 3 * 32, "collective-permute": (2 * 16 + 8) // 2}


def test_a_loop_without_a_stated_length_is_read_from_its_condition() -> None:
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"3"}}', "").replace(
        "  ROOT %less", "  %turns = s32[]{:T(128)} constant(4)\n  ROOT %less"
    )
    assert estimated_cycles(parse(text))[0] == 4 * (7 + 2) + 100 + 50
    with pytest.raises(ValueError, match="cannot be read"):
        estimated_cycles(parse(text.replace("constant(4)", "parameter(1)")))
