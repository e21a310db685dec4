"""The table of timm's own normalizer-free networks (`model_cfgs` and `default_cfgs` in `timm/models/nfnet.py`).

Names are timm's. Where a published network has the same name, `timm_` stands in front.
"""

from nfnet_flax.models.config import ImageSizes
from nfnet_flax.models.timm_nfnet import AttentionName, TimmNFNetConfig

_Rows = dict[str, tuple[TimmNFNetConfig, int, int]]
"""Name -> network, training and test resolution of its weights."""


def _light(level: int, attention: AttentionName, num_final: int = 3072) -> TimmNFNetConfig:
    depths = (level + 1, 2 * (level + 1), 6 * (level + 1), 3 * (level + 1))
    return TimmNFNetConfig(depths=depths, attention=attention, se_ratio=0.25, num_final=num_final)


def _tiny() -> TimmNFNetConfig:
    widths = (32, 64, 96, 128)
    return TimmNFNetConfig(depths=(1, 1, 1, 1), widths=widths, group_width=8, se_ratio=0.25, num_final=192)


def _nfnet(depths: tuple[int, ...]) -> TimmNFNetConfig:
    return TimmNFNetConfig(depths=depths, activation="gelu_erf", group_width=128, expansion=0.5, stochdepth_rate=0.25)


def _regnet(depths: tuple[int, ...], widths: tuple[int, ...]) -> TimmNFNetConfig:
    return TimmNFNetConfig(
        depths=depths,
        widths=widths,
        width_multiplier=0.75,
        stem="3x3",
        stem_width=None,
        group_width=8,
        expansion=2.25,
        is_regnet=True,
        has_second_3x3=False,
        num_final=1280 * widths[-1] // 440,
    )


def _resnet(depths: tuple[int, ...], attention: AttentionName) -> TimmNFNetConfig:
    return TimmNFNetConfig(
        depths=depths,
        widths=(256, 512, 1024, 2048),
        stem="7x7_pool",
        stem_width=64,
        group_width=None,
        has_second_3x3=False,
        attention=attention,
        se_ratio=1 / 16,
        num_final=None,
        activation="relu",
    )


_LIGHT: _Rows = {
    "nfnet_l0": (_light(0, "squeeze_excite", 2304), 224, 288),
    "eca_nfnet_l0": (_light(0, "efficient_channel", 2304), 224, 288),
    "eca_nfnet_l1": (_light(1, "efficient_channel"), 256, 320),
    "eca_nfnet_l2": (_light(2, "efficient_channel"), 320, 384),
    "eca_nfnet_l3": (_light(3, "efficient_channel"), 352, 448),
    "test_nfnet": (_tiny(), 160, 160),
}
_NFNETS: _Rows = {
    f"timm_nfnet_f{level}": (_nfnet((level + 1, 2 * (level + 1), 6 * (level + 1), 3 * (level + 1))), train, test)
    for level, (train, test) in enumerate(
        ((192, 256), (224, 320), (256, 352), (320, 416), (384, 512), (416, 544), (448, 576), (480, 608))
    )
}
_REGNETS: _Rows = {
    f"timm_nf_regnet_b{level}": (_regnet(depths, widths), train, test)
    for level, (depths, widths, train, test) in enumerate(
        (
            ((1, 3, 6, 6), (48, 104, 208, 440), 192, 256),
            ((2, 4, 7, 7), (48, 104, 208, 440), 256, 288),
            ((2, 4, 8, 8), (56, 112, 232, 488), 240, 272),
            ((2, 5, 9, 9), (56, 128, 248, 528), 288, 320),
            ((2, 6, 11, 11), (64, 144, 288, 616), 320, 384),
            ((3, 7, 14, 14), (80, 168, 336, 704), 384, 456),
        )
    )
}
_PREFIXES: dict[str, AttentionName] = {"timm_nf_": "none", "nf_se": "squeeze_excite", "nf_eca": "efficient_channel"}
_RESNETS: _Rows = {
    f"{prefix}resnet{depth}": (_resnet(depths, attention), 224, 224)
    for prefix, attention in _PREFIXES.items()
    for depth, depths in ((26, (2, 2, 2, 2)), (50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)))
}
_RESNETS["timm_nf_resnet50"] = (_RESNETS["timm_nf_resnet50"][0], 256, 288)  # the only one of which there are weights

_TABLE = _LIGHT | _NFNETS | _REGNETS | _RESNETS
VARIANTS = {name: config for name, (config, _, _) in _TABLE.items()}
IMAGE_SIZES = {name: ImageSizes(train, test) for name, (_, train, test) in _TABLE.items()}
