"""Re-training of classifiers on mixtures of class directions and features, for RUCR (Huang et al.; see there)."""

import torch
from torch import Tensor
from torch.nn import functional


def virtual_features(
    directions: Tensor,
    features: Tensor,
    number: int,
    low: float,
    high: float,
    rescale: bool,
    generator: torch.Generator,
) -> Tensor:
    """Return mixtures of the direction of each class and the directions of random local examples, whatever their class.

    They are ``lambda P'_c + (1 - lambda) z_j / |z_j|``, with lambda uniform in [low, high] and rounded to 0.01.

    Args:
        directions: Directions P' of the classes that are to get features, shape (C, D).
        features: Features z of the client, shape (n, D).
        number: Number of features per class.
        low: Smallest lambda.
        high: Largest lambda.
        rescale: Whether to multiply the mixtures by the mean length of z.
        generator: Source of the draws, on the CPU.

    Returns:
        Shape (C, number, D).
    """
    count, size = len(directions), len(features)
    if size >= number:  # use each example at most once per class
        chosen = torch.rand(count, size, generator=generator, dtype=torch.float64).argsort(1)[:, :number]
    else:
        chosen = torch.randint(size, (count, number), generator=generator)
    draws = torch.rand(count, number, 1, generator=generator, dtype=torch.float64)
    mix = ((low + (high - low) * draws) * 100).round().div(100).to(features)
    units = functional.normalize(features, dim=1)[chosen.to(features.device)]
    made = mix * directions[:, None] + (1 - mix) * units
    return made * features.norm(dim=1).mean() if rescale else made


def rectify(
    features: Tensor,
    classes: Tensor,
    weight: Tensor,
    bias: Tensor,
    epochs: int,
    lr: float,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train a linear classifier on features of some classes by plain SGD; the other classes are left out of the softmax.

    Args:
        features: Features of shape (K, n, D).
        classes: The classes of these features, shape (K,).
        weight: Initial weights, shape (C, D).
        bias: Initial bias, shape (C,).
        epochs: Passes over the features.
        lr: Learning rate.
        batch_size: Features per step.
        generator: Source of the order of the features, on the CPU.

    Returns:
        Weights of shape (C, D), bias of shape (C,).
    """
    weight, bias, inputs = weight.clone(), bias.clone(), features.flatten(0, 1)
    targets = torch.arange(len(classes), device=features.device).repeat_interleave(features.shape[1])
    moving, offset = weight[classes], bias[classes]
    members = torch.eye(len(classes)).to(inputs)[targets]
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(inputs), generator=generator).to(inputs.device), batch_size):
            entered = inputs[chosen]
            # the gradient of the cross-entropy with respect to the logits
            errors = (functional.linear(entered, moving, offset).softmax(1) - members[chosen]) / len(chosen)
            moving, offset = moving - lr * errors.T @ entered, offset - lr * errors.sum(0)
    weight[classes], bias[classes] = moving, offset
    return weight, bias
