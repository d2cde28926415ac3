"Networks that are small enough for a test."

import torch
from torch import nn

from dfkd_nb.toolbox.domains import DOMAINS, Domain

DIGITS = DOMAINS['digits']


def used(
    model: nn.Module,
    shape: tuple[int, int, int] = DIGITS.shape,
    batches: int = 10,
    images: int = 32,
) -> nn.Module:
    """The network in eval mode, after some batches of noise.

    Its BatchNorm layers have seen something.
    """
    with torch.no_grad():
        for _ in range(batches):
            model(torch.randn(images, *shape))
    return model.eval()


def stirred(model: nn.Module) -> nn.Module:
    """The network with random numbers in its BatchNorm layers, as if it had seen something:
    quicker than `used`.
    """
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
    return model


def network(seed: int = 0, domain: Domain = DIGITS) -> nn.Module:
    "One convolution whose BatchNorm has seen something."
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(domain.channels, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return used(nn.Sequential(*layers, nn.Linear(6, domain.num_classes)), domain.shape)
