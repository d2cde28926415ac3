"""Networks of the gallery that no library builds: the code that goes with files of weights.

`dfkd ... --model "networks.py:Crepe(size='tiny')" --checkpoint crepe-tiny.pth` reads this
file. Names of layers are those in the files of weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Crepe(nn.Module):
    """CREPE, the pitch of 1,024 samples at 16 kHz: logits of 360 pitches, 20 cents apart.

    Its own program subtracts the mean of a window and divides by its standard deviation,
    which is a part of the network here.
    """

    def __init__(self, size: str = 'tiny', num_classes: int = 360) -> None:
        super().__init__()
        widths = {
            'quarter': (1, 48, 8, 8, 8, 16, 24),  # a student: a quarter of tiny's weights
            'tiny': (1, 128, 16, 16, 16, 32, 64),
            'full': (1, 1024, 128, 128, 128, 256, 512),
        }[size]
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:]), 1):
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            convolution = nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1))
            self.add_module(f'conv{i}', convolution)
            self.add_module(f'conv{i}_BN', _norm(outputs))
        self.classifier = nn.Linear(4 * widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:  # `(N, 1, 1024)` to logits `(N, 360)`
        x = x - x.mean(2, keepdim=True)
        x = (x / x.std(2, keepdim=True).clamp_min(1e-10))[..., None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f'conv{i}')(x).relu()
            x = F.max_pool2d(getattr(self, f'conv{i}_BN')(x), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))


class Faces(nn.Module):
    """A network of MTCNN that tells faces from other things: 24 pixels ('r') or 48 ('o').

    Like its authors' code it returns the corrections of a box, and the two probabilities.
    """

    def __init__(self, size: str = 'r') -> None:
        super().__init__()
        kernels = {'r': (3, 3, 2), 'o': (3, 3, 3, 2)}[size]
        widths = {'r': (3, 28, 48, 64), 'o': (3, 32, 64, 64, 128)}[size]
        inner, last = {'r': (128, 4), 'o': (256, 5)}[size]
        self.count = len(kernels)
        for i, kernel in enumerate(kernels):
            convolution = nn.Conv2d(widths[i], widths[i + 1], kernel)
            self.add_module(f'conv{i + 1}', convolution)
            self.add_module(f'prelu{i + 1}', nn.PReLU(widths[i + 1]))
        self.last = last
        self.add_module(f'dense{last}', nn.Linear(9 * widths[-1], inner))
        self.add_module(f'prelu{last}', nn.PReLU(inner))
        for i, outputs in enumerate((2, 4) if size == 'r' else (2, 4, 10), 1):
            self.add_module(f'dense{last + 1}_{i}', nn.Linear(inner, outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # `(N, 3, H, W)`
        for i in range(1, self.count + 1):
            x = getattr(self, f'prelu{i}')(getattr(self, f'conv{i}')(x))
            if i < self.count:
                x = F.max_pool2d(x, 3 if i < 3 else 2, 2, ceil_mode=True)
        x = x.permute(0, 3, 2, 1).flatten(1)
        x = getattr(self, f'prelu{self.last}')(getattr(self, f'dense{self.last}')(x))
        scores, boxes = (getattr(self, f'dense{self.last + 1}_{i}')(x) for i in (1, 2))
        return boxes, scores.softmax(1)


def pitch(cls: Tensor) -> Tensor:
    "The frequency of a class of CREPE, Hz."
    return 10 * 2 ** ((20 * cls + 1997.3794084376191) / 1200)


def tones(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Synthetic tones with harmonics and noise, `(N, 1, 1024)`, and the classes of pitch.

    From 49 to 778 Hz, one to six harmonics of random loudness and phase.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(38, 278, (count,), generator=generator)
    time = torch.arange(1024) / 16000
    phase = 2 * torch.pi * torch.rand(count, 6, 1, generator=generator)
    loudness = torch.rand(count, 6, 1, generator=generator) / torch.arange(1, 7)[:, None]
    loudness[:, 0] = 1
    harmonics = torch.arange(1, 7)[:, None] * pitch(labels)[:, None, None]
    waves = (loudness * (2 * torch.pi * harmonics * time + phase).sin()).sum(1)
    noise = 0.1 * torch.randn(count, 1024, generator=generator)
    return (waves + noise)[:, None], labels
