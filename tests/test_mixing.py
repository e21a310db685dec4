"""Mixup and CutMix: pixels against labels, rounding, what is drawn, and that nothing leaves a group."""

import numpy as np
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data.mixing import mix
from nfnet_flax.data.mixing_config import MixingConfig

GREY = np.array([0, 255, 30, 190, 77, 121, 5, 240], np.uint8)
MIXUP = MixingConfig(group_size=8, cutmix=False)
CUTMIX = MixingConfig(group_size=8, mixup_alpha=None)
BOTH = MixingConfig(group_size=8)


def plain_rows(height: int = 21, width: int = 34) -> dict[str, np.ndarray]:
    """Eight images of one grey level each; the label is the position."""
    images = np.broadcast_to(GREY[:, None, None, None], (8, height, width, 3)).copy()
    return {"image": images, "label": np.arange(8, dtype=np.int32)}


def check_types(mixed: dict[str, np.ndarray]) -> None:
    assert mixed.keys() == {"image", "label", "mix_label", "label_weight"}
    assert [mixed[name].dtype for name in ("image", "label", "mix_label", "label_weight")] == [
        np.uint8,
        np.int32,
        np.int32,
        np.float32,
    ]
    assert np.all((mixed["label_weight"] >= 0) & (mixed["label_weight"] <= 1))


def mixed_up(mixed: dict[str, np.ndarray], row: int) -> bool:
    """Whether a row is the mixture of its label's and its partner's level in the proportion of its weight."""
    weight = np.float64(mixed["label_weight"][row])
    level = np.rint(weight * GREY[row] + (1 - weight) * GREY[mixed["mix_label"][row]])
    return bool(np.all(mixed["image"][row] == level))


def cut(mixed: dict[str, np.ndarray], row: int) -> bool:
    """Whether a row consists of its own and its partner's pixels in the proportion of its weight."""
    pixels = mixed["image"][row]
    own = np.all(pixels == GREY[row], axis=-1)
    other = np.all(pixels == GREY[mixed["mix_label"][row]], axis=-1)
    return bool(np.all(own | other) and np.float32(own.mean()) == mixed["label_weight"][row])


@pytest.mark.parametrize("seed", range(20))
def test_weights_are_the_shares_of_the_pixels(seed: int) -> None:
    for config in (MIXUP, CUTMIX, BOTH):
        rows = plain_rows()
        mixed = mix(rows, np.random.default_rng(seed), config)
        check_types(mixed)
        assert np.array_equal(mixed["label"], np.arange(8))
        num_mixup = {MIXUP: 8, CUTMIX: 0, BOTH: 4}[config]
        assert all(mixed_up(mixed, row) for row in range(num_mixup))
        assert all(cut(mixed, row) for row in range(num_mixup, 8))
        assert np.array_equal(rows["image"], plain_rows()["image"])


def test_both_halves_do_what_they_are_said_to_do() -> None:
    # In a mixed-up image there is one level, in a cut one there are two, unless the box is empty or everything.
    num_levels = np.zeros(8)
    for seed in range(20):
        mixed = mix(plain_rows(), np.random.default_rng(seed), BOTH)
        num_levels = np.maximum(num_levels, [len(np.unique(image)) for image in mixed["image"]])
    assert num_levels.tolist() == [1] * 4 + [2] * 4


def test_partners_are_the_others_of_the_half() -> None:
    for config, halves in ((MIXUP, [range(8)]), (CUTMIX, [range(8)]), (BOTH, [range(4), range(4, 8)])):
        partners = mix(plain_rows(), np.random.default_rng(0), config)["mix_label"]
        for half in halves:
            assert sorted(partners[half]) == list(half)  # each image is a partner once
            assert all(partners[row] != row for row in half)


def test_mixup_rounds_exactly() -> None:
    # All 65,536 pairs of levels in one image.
    first, second = (np.repeat(level[..., None], 3, axis=2).astype(np.uint8) for level in np.mgrid[:256, :256])
    rows: dict[str, np.ndarray] = {"image": np.stack([first, second]), "label": np.array([0, 1], np.int32)}
    for seed in range(20):
        mixed = mix(rows, np.random.default_rng(seed), MixingConfig(group_size=2, mixup_alpha=1.0, cutmix=False))
        weight = mixed["label_weight"].astype(np.float64)
        assert 0 < weight[0] < 1
        want = np.rint(weight[0] * first + (1 - weight[0]) * second)
        np.testing.assert_array_equal(mixed["image"][0], want)
        np.testing.assert_array_equal(mixed["image"][1], np.rint(weight[1] * second + (1 - weight[1]) * first))


def weights(config: MixingConfig, num_groups: int) -> np.ndarray:
    found = [mix(plain_rows(20, 30), np.random.default_rng(seed), config)["label_weight"] for seed in range(num_groups)]
    return np.concatenate(found).astype(np.float64)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_ratios_are_beta(alpha: float) -> None:
    found = weights(MixingConfig(group_size=8, mixup_alpha=alpha, cutmix=False), 500)
    assert found.mean() == pytest.approx(0.5, abs=0.03)
    assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_cut_areas_are_uniform_before_the_edges() -> None:
    found = 1 - weights(CUTMIX, 500)
    # The same by chance over a continuous image: side sqrt(u) about a uniform centre, what lies within [0, 1] twice.
    rng = np.random.default_rng(0)
    side, x, y = np.sqrt(rng.random(200_000)), rng.random(200_000), rng.random(200_000)
    spans = [np.minimum(c + side / 2, 1) - np.maximum(c - side / 2, 0) for c in (x, y)]
    want = spans[0] * spans[1]
    for share in (0.25, 0.5, 0.75, 0.9):
        assert np.quantile(found, share) == pytest.approx(np.quantile(want, share), abs=0.05)


def test_a_group_is_mixed_by_itself_and_by_its_generator_alone() -> None:
    rows = plain_rows()
    first = mix(rows, np.random.default_rng(1), BOTH)
    again = mix(rows, np.random.default_rng(1), BOTH)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = mix(rows, np.random.default_rng(2), BOTH)
    assert not np.array_equal(first["label_weight"], other["label_weight"])
    assert len(np.unique(first["label_weight"])) > 4  # every row draws its own


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_the_smallest_images_are_mixed(shape: tuple[int, int]) -> None:
    for seed in range(20):
        mixed = mix(plain_rows(*shape), np.random.default_rng(seed), BOTH)
        assert all(mixed_up(mixed, row) for row in range(4))
        assert all(cut(mixed, row) for row in range(4, 8))


def test_wrong_settings_and_wrong_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"group_size = 16: got 8 rows"):
        mix(plain_rows(), np.random.default_rng(0), MixingConfig(group_size=16))
    with pytest.raises(ConfigError, match=r"data\.mixing\.cutmix = False: nothing is left to mix"):
        MixingConfig(mixup_alpha=None, cutmix=False)
    for size in (2, 7):
        with pytest.raises(ConfigError, match=rf"data\.mixing\.group_size = {size}: must be even"):
            MixingConfig(group_size=size)
    assert MixingConfig(group_size=3, cutmix=False).group_size == 3
    with pytest.raises(ConfigError, match=r"data\.mixing\.mixup_alpha = 0"):
        MixingConfig(mixup_alpha=0.0)
