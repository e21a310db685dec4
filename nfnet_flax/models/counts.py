"""Numbers of parameters and multiply-adds of the named networks: a table, as counting all of them takes a minute.

`tests/test_models.py` compares it with `flops.forward_flops` and with the shapes of the parameters.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Counts(NamedTuple):
    """Numbers for one network with 1000 classes."""

    parameters: int
    """Number of parameters."""
    multiply_adds: int
    """Multiply-adds of one image's forward pass at the training resolution, as `flops.forward_flops` counts them."""


COUNTS: Mapping[str, Counts] = {
    "nfnet_f0": Counts(71_489_284, 6_977_003_520),
    "nfnet_f1": Counts(132_634_256, 17_437_921_280),
    "nfnet_f2": Counts(193_779_228, 33_139_318_784),
    "nfnet_f3": Counts(254_924_200, 67_944_292_352),
    "nfnet_f4": Counts(316_069_172, 121_122_250_752),
    "nfnet_f5": Counts(377_214_144, 169_498_382_336),
    "nfnet_f6": Counts(438_359_116, 228_292_861_952),
    "nfnet_f7": Counts(499_504_088, 298_476_539_904),
    "nfnet_f0+": Counts(118_824_516, 10_999_005_184),
    "nfnet_f1+": Counts(220_357_008, 27_210_002_432),
    "nfnet_f2+": Counts(321_889_500, 51_508_625_408),
    "nfnet_f3+": Counts(423_421_992, 105_382_952_960),
    "nfnet_f4+": Counts(524_954_484, 187_619_000_320),
    "nfnet_f5+": Counts(626_486_976, 262_327_709_696),
    "nfnet_f6+": Counts(728_019_468, 353_101_611_008),
    "nfnet_f7+": Counts(829_551_960, 461_436_497_920),
    "nf_resnet50": Counts(25_557_048, 4_089_184_256),
    "nf_resnet101": Counts(44_549_193, 7_801_405_440),
    "nf_resnet152": Counts(60_192_858, 11_513_626_624),
    "nf_resnet200": Counts(64_673_898, 15_007_481_856),
    "nf_resnet288": Counts(146_460_552, 21_558_460_416),
    "nf_resnet600": Counts(300_646_896, 44_268_519_424),
    "nf_regnet_b0": Counts(8_595_372, 327_149_536),
    "nf_regnet_b1": Counts(10_019_208, 562_813_864),
    "nf_regnet_b2": Counts(13_785_904, 897_946_824),
    "nf_regnet_b3": Counts(18_136_667, 1_621_118_328),
    "nf_regnet_b4": Counts(29_315_830, 3_106_822_976),
    "nf_regnet_b5": Counts(48_707_138, 7_496_250_368),
    "nf_regnet_b6": Counts(70_045_805, 14_183_144_848),
    "nf_regnet_b7": Counts(101_743_204, 27_283_033_088),
    "nf_regnet_b8": Counts(142_314_441, 51_805_389_336),
    "nfnet_l0": Counts(35_074_488, 4_255_094_784),
    "eca_nfnet_l0": Counts(24_143_924, 4_244_183_040),
    "eca_nfnet_l1": Counts(41_407_728, 9_428_459_520),
    "eca_nfnet_l2": Counts(56_722_348, 20_682_547_200),
    "eca_nfnet_l3": Counts(72_036_968, 32_227_528_704),
    "test_nfnet": Counts(383_080, 285_058_560),
    "timm_nfnet_f0": Counts(71_489_272, 6_977_003_520),
    "timm_nfnet_f1": Counts(132_634_232, 17_437_921_280),
    "timm_nfnet_f2": Counts(193_779_192, 33_139_318_784),
    "timm_nfnet_f3": Counts(254_924_152, 67_944_292_352),
    "timm_nfnet_f4": Counts(316_069_112, 121_122_250_752),
    "timm_nfnet_f5": Counts(377_214_072, 169_498_382_336),
    "timm_nfnet_f6": Counts(438_359_032, 228_292_861_952),
    "timm_nfnet_f7": Counts(499_503_992, 298_476_539_904),
    "timm_nf_regnet_b0": Counts(8_764_288, 351_345_536),
    "timm_nf_regnet_b1": Counts(10_223_984, 790_689_280),
    "timm_nf_regnet_b2": Counts(14_314_608, 933_524_352),
    "timm_nf_regnet_b3": Counts(18_593_832, 1_623_749_376),
    "timm_nf_regnet_b4": Counts(30_210_816, 3_219_430_016),
    "timm_nf_regnet_b5": Counts(49_741_728, 7_830_020_224),
    "timm_nf_resnet26": Counts(15_995_176, 2_342_256_640),
    "timm_nf_resnet50": Counts(25_557_032, 5_340_348_416),
    "timm_nf_resnet101": Counts(44_549_160, 7_801_405_440),
    "nf_seresnet26": Counts(17_395_976, 2_343_649_280),
    "nf_seresnet50": Counts(28_088_024, 4_091_699_200),
    "nf_seresnet101": Counts(49_326_872, 7_806_148_608),
    "nf_ecaresnet26": Counts(15_995_220, 2_342_256_640),
    "nf_ecaresnet50": Counts(25_557_118, 4_089_184_256),
    "nf_ecaresnet101": Counts(44_549_331, 7_801_405_440),
    "resnet50": Counts(25_549_352, 4_089_184_256),
    "resnet101": Counts(44_541_480, 7_801_405_440),
    "resnet152": Counts(60_185_128, 11_513_626_624),
    "resnet200": Counts(64_666_152, 15_007_481_856),
    "se_resnext_d50": Counts(27_571_448, 4_472_635_392),
    "efficientnet_b0": Counts(5_288_548, 385_814_752),
    "efficientnet_b1": Counts(7_794_184, 686_802_832),
    "efficientnet_b2": Counts(9_109_994, 993_561_872),
    "efficientnet_b3": Counts(12_233_232, 1_827_141_392),
    "efficientnet_b4": Counts(19_341_616, 4_393_771_024),
    "efficientnet_b5": Counts(30_389_784, 10_266_384_752),
    "efficientnet_b6": Counts(43_040_704, 19_067_593_536),
    "efficientnet_b7": Counts(66_347_960, 37_745_884_192),
}
