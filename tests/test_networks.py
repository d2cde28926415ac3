"""Odd networks, odd images: DeepInversion dreams through each, or says in one line what to
do.
"""

import pytest
import torch
from cases import each
from torch import nn

from dfkd_nb.dreams.extractor import fuse_statistics
from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.statistics import Statistics, Watch
from dfkd_nb.toolbox.core import import_torchvision
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.teachers import Teacher

torchvision = import_torchvision()


def domain(channels=3, height=8, width=8, classes=10):
    return Domain(
        'odd',
        (channels, height, width),
        (0.5,) * channels,
        (0.25,) * channels,
        tuple(f'kind {i}' for i in range(classes)),
    )


def network(norm, channels=3, classes=10):
    """Two convolutions, each followed by `norm(channels)` if there is one and by a ReLU
    that writes over its input.
    """
    torch.manual_seed(0)

    def block(inputs, stride):
        return [
            nn.Conv2d(inputs, 8, 3, stride, 1),
            *([norm(8)] if norm else []),
            nn.ReLU(inplace=True),
        ]

    net = nn.Sequential(
        *block(channels, 1),
        *block(8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    for layer in net:
        if isinstance(getattr(layer, 'running_mean', None), torch.Tensor):
            layer.running_mean.normal_(0, 0.1)
    return net


def unremembered(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


def grouped():
    "Three groups, then depthwise, then 1 x 1."
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1, groups=3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4, eps=1e-3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    ).eval()


def one_place(norm=nn.BatchNorm2d):
    "The last normalisation sees one place an image."
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(8, 8, 1),
        norm(8),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def transformer(size=16):
    torch.manual_seed(0)
    sizes = {
        'patch_size': 8,
        'num_layers': 2,
        'num_heads': 2,
        'hidden_dim': 16,
        'mlp_dim': 32,
    }
    return torchvision.models.VisionTransformer(image_size=size, num_classes=10, **sizes)


def shifted_windows():
    torch.manual_seed(0)
    sizes = {
        'patch_size': [4, 4],
        'embed_dim': 8,
        'depths': [1, 1],
        'num_heads': [2, 2],
        'window_size': [4, 4],
    }
    return torchvision.models.SwinTransformer(num_classes=10, **sizes)


class Twice(nn.Module):
    "The same BatchNorm at two places."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 1, 1)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 10)

    def forward(self, x):
        return self.linear(self.norm(self.conv(self.norm(self.conv(x)))).mean((2, 3)))


class Helped(nn.Module):
    "A second head that only works in training, as in GoogLeNet and Inception."

    def __init__(self):
        super().__init__()
        self.main = network(nn.BatchNorm2d)
        self.help = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10))

    def forward(self, x):
        return (self.main(x), self.help(x)) if self.training else self.main(x)


def foreign(name, channels):
    return Statistics({name: (torch.zeros(channels), torch.ones(channels))})


def layer_norms(net):
    return [name for name, layer in net.named_modules() if isinstance(layer, nn.LayerNorm)]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def dream(net, where, n=3, **settings):
    made = DeepInversion(Teacher(net, where), steps=3, device='cpu', **settings).synthesize(
        n
    )
    # bytes are made of finite numbers only
    assert made.images.shape == (n, *where.shape) and made.images.dtype == torch.uint8
    return made.images


@pytest.mark.filterwarnings('ignore:every running mean')
@pytest.mark.parametrize(
    ('make', 'where', 'n'),
    [
        (lambda: network(torchvision.ops.FrozenBatchNorm2d), domain(), 3),
        (grouped, domain(), 3),
        (one_place, domain(), 3),
        (one_place, domain(), 1),
        (lambda: network(nn.BatchNorm2d), domain(), 1),
        (lambda: network(nn.BatchNorm2d, channels=1), domain(channels=1), 3),
        (lambda: network(nn.BatchNorm2d, channels=4), domain(channels=4), 3),
        (lambda: network(nn.BatchNorm2d, classes=1), domain(classes=1), 3),
        (lambda: network(nn.BatchNorm2d, classes=2), domain(classes=2), 3),
        (lambda: network(nn.BatchNorm2d, classes=10_000), domain(classes=10_000), 3),
        (lambda: network(nn.BatchNorm2d), domain(height=33, width=47), 3),
        (lambda: network(nn.BatchNorm2d), domain(height=2, width=9), 3),
        (lambda: network(nn.BatchNorm2d).requires_grad_(False), domain(), 3),
        (Twice, domain(), 3),
        (Helped, domain(), 3),
    ],
    ids=[
        'frozen',
        'grouped',
        'one place',
        'one place, one image',
        'one image',
        'grey',
        'four channels',
        'one class',
        'two classes',
        'ten thousand classes',
        '33 x 47',
        '2 x 9',
        'frozen weights',
        'layer used twice',
        'head used in training only',
    ],
)
def test_what_looks_odd_and_works(make, where, n):
    images = dream(make(), where, n)
    # the statistics had a say
    assert not torch.equal(images, dream(make(), where, n, feature_weight=0))


def test_stages_of_sizes_that_do_not_divide():
    dream(
        network(nn.BatchNorm2d),
        domain(height=33, width=47),
        stages=[((11, 16), 2), ((33, 47), 2)],
    )


ATTENTION = 'encoder.layers.encoder_layer_0.self_attention'
MEASURED = {
    'convolution inputs': (lambda: network(None), domain(), ['0', '2'], 'input'),
    'convolution outputs': (lambda: network(None), domain(), ['0', '2'], 'output'),
    'inputs that are written over': (lambda: network(None), domain(), ['1', '3'], 'input'),
    'ReLU outputs': (lambda: network(None), domain(), ['1', '3'], 'output'),
    'BatchNorm outputs': (lambda: network(nn.BatchNorm2d), domain(), ['1', '4'], 'output'),
    'BatchNorm without memory': (lambda: network(unremembered), domain(), None, 'input'),
    'GroupNorm': (
        lambda: network(lambda c: nn.GroupNorm(2, c)),
        domain(),
        ['1', '4'],
        'input',
    ),
    'InstanceNorm': (lambda: network(nn.InstanceNorm2d), domain(), ['1', '4'], 'input'),
    'LayerNorm of images': (
        lambda: network(torchvision.models.convnext.LayerNorm2d),
        domain(),
        ['1', '4'],
        'input',
    ),
    'linear layers': (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 10)),
        domain(),
        ['1'],
        'output',
    ),
    'LayerNorm of a transformer': (
        transformer,
        domain(height=16, width=16),
        layer_norms(transformer()),
        'input',
    ),
    'LayerNorm outputs': (
        transformer,
        domain(height=16, width=16),
        layer_norms(transformer()),
        'output',
    ),
    'patches': (transformer, domain(height=16, width=16), ['conv_proj'], 'output'),
    'attention': (transformer, domain(height=16, width=16), [ATTENTION], 'output'),
    'channels last': (
        shifted_windows,
        domain(height=32, width=32),
        layer_norms(shifted_windows()),
        'input',
    ),
}


@pytest.mark.parametrize('case', MEASURED)
def test_any_layer_can_be_measured_saved_and_dreamed_with(case, tmp_path):
    make, where, layers, at = MEASURED[case]
    net = make()
    images = noise(20, *where.shape)
    Statistics.measure(net, [images[:3], images[3:]], layers, at).save(
        tmp_path / 'statistics.safetensors'
    )
    statistics = Statistics.load(tmp_path / 'statistics.safetensors')
    assert list(statistics) == (layers or ['1', '4']) and statistics.at == at
    with torch.no_grad(), Watch(net.eval(), layers, at) as watch:
        net(images)
    # as if it had been one batch; a BatchNorm without memory makes answers depend on the
    # batch
    if layers:
        assert statistics.distance(watch.moments).max() < 1e-4
    only = {'class_weight': 0.0, 'tv_l2': 0.0, 'l2': 0.0, 'flip': False, 'jitter': 0}
    synthesizer = DeepInversion(
        Teacher(net, where),
        steps=12,
        device='cpu',
        statistics=statistics,
        feature_weight=1.0,
        **only,
    )
    synthesizer.start(4)
    synthesizer.run(log_every=1)
    paid = [row['features'] for row in synthesizer.history]
    assert paid[-1] < paid[0] and synthesizer.images.images.shape == (4, *where.shape)


def test_channels_are_found_where_they_are():
    net = transformer()
    wide = {
        'conv_proj': 16,
        'encoder.layers.encoder_layer_0.ln_1': 16,
        'encoder.layers.encoder_layer_0.mlp.0': 32,
        'heads.head': 10,
    }
    measured = Statistics.measure(net, noise(3, 3, 16, 16), list(wide), at='output')
    assert {name: len(mean) for name, (mean, _) in measured.items()} == wide
    rows = nn.Sequential(nn.Conv1d(3, 5, 1), nn.InstanceNorm1d(5), nn.BatchNorm1d(5))
    assert [
        len(mean)
        for mean, _ in Statistics.measure(
            rows, noise(2, 3, 9), ['0', '1', '2'], at='output'
        ).values()
    ] == [5, 5, 5]
    whole = nn.Sequential(nn.Conv2d(3, 5, 1), nn.LayerNorm((5, 4, 7)))
    assert len(Statistics.measure(whole, noise(2, 3, 4, 7), ['1'])['1'][0]) == 5


def test_a_network_that_writes_over_its_features_is_watched_with_the_right_gradient():
    net = network(None).eval()
    calm = nn.Sequential(
        *(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in net)
    )
    slopes = []
    for one in (net, calm):
        x = noise(2, 3, 8, 8).requires_grad_()
        with Watch(one, ['0', '2'], at='output') as watch:
            one(x)
        slopes.append(
            torch.autograd.grad(
                sum(v.square().sum() for pair in watch.moments.values() for v in pair), x
            )[0]
        )
    assert torch.equal(*slopes)


def test_fusing_observes_what_it_cannot_fuse():
    for norm in (unremembered, torchvision.ops.FrozenBatchNorm2d):
        net, x = network(norm).eval(), noise(4, 3, 8, 8)
        logits, moments = fuse_statistics(net)(x)
        with Watch(net) as watch:
            torch.testing.assert_close(logits, net(x))
        assert all(
            torch.equal(a, b)
            for name in watch.moments
            for a, b in zip(moments[name], watch.moments[name])
        )


def test_layers_that_logits_do_not_pass_are_left_out():
    teacher = Teacher(Helped(), domain())
    assert set(Statistics.from_batchnorm(teacher)) == {'model.main.1', 'model.main.4'}
    assert set(fuse_statistics(teacher)(noise(2, 3, 8, 8))[1]) == {
        'model.main.1',
        'model.main.4',
    }
    # a bare network does not say which images it takes
    assert 'help.0' in Statistics.from_batchnorm(Helped())


@pytest.mark.filterwarnings('ignore:every running mean')
@each(
    ('call', 'words'),
    [
        (
            lambda: dream(network(None), domain()),
            r"measure\(teacher, images, layers=\['model.0', 'model.2'\]\), or do without",
        ),
        (
            lambda: dream(network(lambda c: nn.GroupNorm(2, c)), domain()),
            r"layers=\['model.1', 'model.4'\]",
        ),
        (
            lambda: dream(network(nn.InstanceNorm2d), domain()),
            r"layers=\['model.1', 'model.4'\]",
        ),
        (
            lambda: dream(transformer(), domain(height=16, width=16)),
            r"layers=\['model.encoder.layers.encoder_layer_0.ln_1'",
        ),
        (
            lambda: dream(network(unremembered), domain()),
            'keeps no running statistics .*Statistics.measure',
        ),
        (
            lambda: dream(one_place(unremembered), domain(), 1, statistics=foreign('5', 8)),
            'two images or more',
        ),
        (lambda: dream(network(nn.BatchNorm2d), domain(height=1, width=1)), '2 x 2 pixels'),
        (
            lambda: dream(one_place(nn.InstanceNorm2d), domain()),
            'does not take images of shape',
        ),
        (
            lambda: dream(transformer(), domain(height=15, width=16)),
            'does not take images of shape',
        ),
        (
            lambda: dream(network(nn.BatchNorm2d, channels=1), domain()),
            'does not take images of shape',
        ),
        (lambda: dream(network(nn.BatchNorm2d), domain(classes=2)), 'has 10 outputs'),
        (
            lambda: dream(network(nn.BatchNorm2d), domain(), statistics=foreign('99', 8)),
            "no layer '99'",
        ),
        (
            lambda: dream(network(nn.BatchNorm2d), domain(), statistics=foreign('1', 5)),
            'belong to another network',
        ),
        (
            lambda: Statistics.measure(
                transformer(), noise(2, 3, 16, 16), [ATTENTION + '.out_proj']
            ),
            'did not call layer',
        ),
        (
            lambda: Statistics({'1': (torch.zeros(5), torch.ones(5))}, at='middle'),
            "use 'input' or 'output'",
        ),
    ],
)
def test_what_cannot_work_says_what_to_do(call, words):
    with pytest.raises(DFKDError, match=words) as caught:
        call()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'make',
    [
        lambda: network(None),
        lambda: network(lambda c: nn.GroupNorm(2, c)),
        lambda: network(nn.InstanceNorm2d),
    ],
)
def test_without_statistics_any_network_dreams(make):
    dream(make(), domain(), feature_weight=0)
