"""Networks, chosen by name: plain ``nn.Module`` classes that map (B, in_channels, H, W) or (B, D) to (B, num_classes)."""

from fedamm_pl.models.build import build_model, registered_only
from fedamm_pl.models.cnn import SmallCNN
from fedamm_pl.models.mlp import MLP
from fedamm_pl.models.names import MODELS, NAMES, registered
from fedamm_pl.models.outputs import features_and_logits, inputs_of, logits_of
from fedamm_pl.models.probe import attempt, classifier_of, complete_lazy_layers, deep_copy
from fedamm_pl.models.resnet_cifar import ResNetCIFAR
from fedamm_pl.models.weight_net import WeightNet

__all__ = [
    "MLP",
    "MODELS",
    "NAMES",
    "ResNetCIFAR",
    "SmallCNN",
    "WeightNet",
    "attempt",
    "build_model",
    "classifier_of",
    "complete_lazy_layers",
    "deep_copy",
    "features_and_logits",
    "inputs_of",
    "logits_of",
    "registered",
    "registered_only",
]
