"""Networks of the NFNet papers, and the baselines with which the papers compare them, as Flax NNX modules."""

from nfnet_flax.models.classifier import Classifier, ExecutionConfig
from nfnet_flax.models.config import ImageSizes, ModelConfig
from nfnet_flax.models.efficientnet import EfficientNet, EfficientNetConfig
from nfnet_flax.models.keys import example_keys
from nfnet_flax.models.nf_regnet import NFRegNet, NFRegNetConfig
from nfnet_flax.models.nf_resnet import NFResNet, NFResNetConfig
from nfnet_flax.models.nfnet import NFNet, NFNetConfig
from nfnet_flax.models.registry import IMAGE_SIZES, build_model, list_models, model_config
from nfnet_flax.models.resnet import ResNet, ResNetConfig
from nfnet_flax.models.timm_nfnet import TimmNFNet, TimmNFNetConfig

__all__ = [
    "IMAGE_SIZES",
    "Classifier",
    "EfficientNet",
    "EfficientNetConfig",
    "ExecutionConfig",
    "ImageSizes",
    "ModelConfig",
    "NFNet",
    "NFNetConfig",
    "NFRegNet",
    "NFRegNetConfig",
    "NFResNet",
    "NFResNetConfig",
    "ResNet",
    "ResNetConfig",
    "TimmNFNet",
    "TimmNFNetConfig",
    "build_model",
    "example_keys",
    "list_models",
    "model_config",
]
