"""Predictions for images of any kind: files, folders, encoded bytes and arrays."""

from nfnet_flax.prediction.files import find_images
from nfnet_flax.prediction.images import Unreadable
from nfnet_flax.prediction.loading import load_predictor
from nfnet_flax.prediction.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor", "Unreadable", "find_images", "load_predictor"]
