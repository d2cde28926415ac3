"""Contracts of dfkd_nb.dreams.priors and dfkd_nb.dreams.statistics that the chapters do not
show.
"""

import copy
import math
import warnings

import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dfkd_nb.dreams.extractor import FusedBatchNorm, fuse_statistics
from dfkd_nb.dreams.inversion import deepinversion_preset
from dfkd_nb.dreams.layers import find_layers
from dfkd_nb.dreams.moment_rows import MomentRow, PartNorms, check_all_moments
from dfkd_nb.dreams.moments import batch_moments
from dfkd_nb.dreams.priors import (
    LossInputs,
    Objective,
    _neighbours,
    class_loss,
    clip_to_domain,
    jitter,
    l2_norm,
    l2_term,
    per_image_weight,
    total_variation,
    tv_term,
)
from dfkd_nb.dreams.statistics import Statistics, Watch, feature_loss, feature_term
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.teachers import Teacher

quick = settings(max_examples=15, deadline=None)
shapes = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)
)


def noise(shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(seed=0, **settings):
    "A small network with BatchNorm whose running statistics are not the initial ones."
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, **settings),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, **settings),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 10),
        nn.BatchNorm1d(10),
    )
    with torch.no_grad():
        for _ in range(3):
            net(noise((8, 3, 8, 8), seed))
        for layer in net:
            if getattr(layer, 'weight', None) is not None:
                layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    return net.eval()


# priors


@quick
@given(shapes, st.integers(0, 10), st.sampled_from(['l2', 'l1']))
def test_an_images_loss_does_not_depend_on_its_neighbours_in_the_batch(shape, seed, norm):
    x = noise(shape, seed)
    alone = torch.cat([total_variation(image[None], norm) for image in x])
    torch.testing.assert_close(total_variation(x, norm), alone)
    torch.testing.assert_close(l2_norm(x), torch.cat([l2_norm(image[None]) for image in x]))


@quick
@given(shapes, st.integers(0, 10), st.sampled_from(['l2', 'l1']))
def test_total_variation_is_a_seminorm_and_blind_to_mirrors(shape, seed, norm):
    x, y = noise(shape, seed), noise(shape, seed + 100)
    assert (
        total_variation(x + y, norm)
        <= total_variation(x, norm) + total_variation(y, norm) + 1e-4
    ).all()
    for mirrored in (x.flip(2), x.flip(3), x.transpose(2, 3)):
        torch.testing.assert_close(
            total_variation(mirrored, norm), total_variation(x, norm), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize('norm', ['l2', 'l1'])
def test_total_variation_has_the_gradient_of_finite_differences(norm):
    x = noise((2, 1, 3, 4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: total_variation(x, norm), x)


def test_flat_images_have_no_nan_gradient():
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    for loss in (total_variation(x), total_variation(x, 'l1'), l2_norm(x)):
        assert torch.equal(torch.autograd.grad(loss.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_losses_are_summed_in_float32(dtype):
    x = noise((2, 3, 64, 64)).to(dtype)
    for loss in (total_variation, l2_norm):
        assert loss(x).dtype == torch.float32
        torch.testing.assert_close(loss(x), loss(x.float()), rtol=1e-2, atol=0)
    assert l2_norm(1000 * x).isfinite().all()  # squares beyond float16


@pytest.mark.parametrize('size', [1, 7, 256])
def test_per_image_weight_reproduces_one_norm_over_equal_images(size):
    x = noise((1, 3, 8, 8)).expand(size, -1, -1, -1).clone().requires_grad_()
    whole = torch.linalg.vector_norm(x)
    ours = per_image_weight(1.0, size) * l2_norm(x).mean()
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x)[0],
        torch.autograd.grad(whole, x)[0],
        rtol=1e-4,
        atol=1e-7,
    )


@each(
    ('call', 'words'),
    [
        (lambda: total_variation(torch.zeros(8, 8)), 'give images'),
        (lambda: total_variation(torch.zeros(1, 3, 1, 8)), 'give images'),
        (lambda: total_variation(torch.zeros(1, 3, 8, 8), 'l3'), "use 'l2' or 'l1'"),
        (lambda: tv_term('huber'), "use 'l2' or 'l1'"),
        (lambda: jitter(torch.zeros(1, 3, 8, 8), -1), 'use 0 or more'),
        (lambda: per_image_weight(1.0, 0), 'give 1 or more'),
        (
            lambda: LossInputs(torch.zeros(2, 3, 8, 8), torch.zeros(3, 10), torch.zeros(2)),
            'give one of each',
        ),
        (lambda: Objective({}), 'no term has a weight'),
        (lambda: Objective({'a': (math.nan, class_loss)}), 'give a finite number'),
        (lambda: Objective({'a': (1, class_loss)}).reweigh(b=2), "no term 'b'"),
    ],
)
def test_priors_refuse_in_one_line(call, words):
    with pytest.raises(DFKDError, match=words) as caught:
        call()
    assert '\n' not in str(caught.value)


@quick
@given(st.integers(0, 5), st.integers(0, 100))
def test_jitter_rolls_by_at_most_so_many_pixels_and_repeats_itself(pixels, seed):
    x = torch.arange(2 * 12 * 12.0).view(1, 2, 12, 12)
    rolled = jitter(x, pixels, torch.Generator().manual_seed(seed))
    place = (rolled[0, 0] == 0).nonzero()[0]
    assert all(min(int(p), 12 - int(p)) <= pixels for p in place)
    assert torch.equal(rolled, jitter(x, pixels, torch.Generator().manual_seed(seed)))


def test_jitter_reaches_every_offset():
    x, generator = torch.arange(49.0).view(1, 1, 7, 7), torch.Generator().manual_seed(0)
    places = {
        tuple((jitter(x, 2, generator)[0, 0] == 0).nonzero()[0].tolist())
        for _ in range(400)
    }
    assert places == {
        (down % 7, right % 7) for down in range(-2, 3) for right in range(-2, 3)
    }


def test_the_class_loss_is_the_cross_entropy():
    logits, targets = 3 * noise((4, 5)).double(), torch.tensor([0, 4, 2, 2])
    expected = -logits.log_softmax(1)[range(4), targets].mean()
    assert torch.allclose(
        class_loss(LossInputs(noise((4, 1, 2, 2)), logits, targets)), expected
    )


def test_clipping_is_in_place_leaves_the_graph_alone_and_is_the_nearest_point():
    domain = DOMAINS['cifar10']
    x = (5 * noise((2, 3, 8, 8))).requires_grad_()
    before = x.detach().clone()
    assert clip_to_domain(x, domain) is x and x.is_leaf and x.requires_grad
    low, high = domain.limits()
    inside = low + (high - low) * torch.rand(2, 3, 8, 8)
    assert (x - before).norm() <= (inside - before).norm()
    (x**2).sum().backward()


def test_objective_weighs_and_names_and_skips():
    def never(inputs):
        raise AssertionError('a term of weight 0 was computed')

    objective = Objective(
        {
            'class': (2.0, class_loss),
            'tv': (0.5, tv_term('l1')),
            'l2': (-1.0, l2_term),
            'never': (0, never),
        }
    )
    x = noise((3, 1, 4, 4)).requires_grad_()
    total, values = objective(
        LossInputs(x, x.mean((1, 2, 3))[:, None].expand(3, 5), torch.arange(3))
    )
    torch.testing.assert_close(
        total, 2 * values['class'] + 0.5 * values['tv'] - values['l2']
    )
    assert list(values) == ['class', 'tv', 'l2'] and total.requires_grad
    assert objective.reweigh(never=0, l2=0).weights == {
        'class': 2.0,
        'tv': 0.5,
        'l2': 0.0,
        'never': 0.0,
    }
    assert objective.weights['l2'] == -1.0  # reweighing made a new one


# moments


@quick
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(0, 9),
    st.booleans(),
)
def test_moments_are_those_of_torch_for_any_shape_and_layout(
    batch, channels, rest, seed, last
):
    x = noise((batch, channels, *rest), seed, torch.float64) + 3
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last in memory
    x.requires_grad_()
    over = [d for d in range(x.ndim) if d != 1]
    theirs = (
        x.mean(over),
        x.var(over, correction=0) if x.numel() > channels else 0 * x.sum(over),
    )
    weights = noise((2, channels), seed + 1, torch.float64)
    slopes = []
    for mean, var in (batch_moments(x), theirs):
        slopes.append(
            torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), x)[0]
        )
    for ours, other in zip(batch_moments(x), theirs):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_moments_are_summed_in_float32(dtype):
    x = (noise((64, 2, 32, 32)) + 1).to(dtype).requires_grad_()
    mean, var = batch_moments(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean, x.detach().float().mean((0, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        var, x.detach().float().var((0, 2, 3), correction=0), rtol=1e-3, atol=0
    )
    (slope,) = torch.autograd.grad(var.sum() * 65536, x)
    exact = 2 * (x.detach().float() - mean.detach().view(1, -1, 1, 1))
    assert slope.dtype == dtype and (slope.float() - exact).norm() < 1e-2 * exact.norm()


def test_one_pixel_and_constant_batches_are_no_accident():
    for x in (torch.ones(1, 3, 1, 1), torch.full((4, 3, 5, 5), 1e4)):
        x.requires_grad_()
        mean, var = batch_moments(x)
        assert (var >= 0).all() and torch.autograd.grad((mean + var).sum(), x)[
            0
        ].isfinite().all()


@each(
    ('call', 'words'),
    [
        (lambda: batch_moments(torch.zeros(0, 3, 4, 4)), 'at least one image'),
        (lambda: batch_moments(torch.zeros(2, 3, 0, 4)), 'at least one image'),
        (
            lambda: batch_moments(torch.zeros(2, 3, dtype=torch.uint8)),
            'give float features',
        ),
        (lambda: batch_moments(torch.zeros(3)), 'give float features'),
        (lambda: batch_moments(torch.zeros(2, 3), 5), 'use -2 to 1'),
        (lambda: Statistics({}), 'at least one'),
        (lambda: Statistics({'a': (torch.zeros(2), torch.zeros(3))}), r'give \(C,\) each'),
        (lambda: Statistics({'a': (torch.zeros(2), -torch.ones(2))}), 'negative variance'),
        (
            lambda: Statistics({'a': (torch.full((2,), math.inf), torch.ones(2))}),
            'NaN or infinity',
        ),
        (
            lambda: Statistics.from_batchnorm(
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
            ),
            r"layers=\['1'\]",
        ),
        (lambda: fuse_statistics(nn.Linear(3, 4)), 'no BatchNorm'),
        (
            lambda: Statistics.from_batchnorm(trained(track_running_stats=False)),
            'no running statistics',
        ),
        (lambda: Watch(trained(), at='middle'), "use 'input' or 'output'"),
        (lambda: Watch(trained(), layers=[]), 'one or more'),
        (lambda: Watch(trained(), layers='1'), 'give a list'),
        (lambda: find_layers(trained(), ['11']), "no layer '11'"),
        (lambda: Statistics.load('/nowhere/statistics.safetensors'), 'check the path'),
        (
            lambda: Statistics.measure(
                trained(), [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
            ),
            'normalised floats',
        ),
    ],
)
def test_statistics_refuse_in_one_line(call, words):
    with pytest.raises(DFKDError, match=words) as caught:
        call()
    assert '\n' not in str(caught.value)


# watching and measuring


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_go_whatever_happens():
    net = trained()
    watch = Watch(net)
    for _ in range(2):  # a watch can be used again
        with watch:
            net(noise((2, 3, 8, 8)))
        assert hooks(net) == 0 and len(watch.moments) == 3
    with pytest.raises(RuntimeError), watch:
        net(noise((2, 4, 8, 8)))
    assert hooks(net) == 0


def test_watching_leaves_logits_and_running_statistics_alone():
    net, x = trained(), noise((4, 3, 8, 8))
    state, logits = copy.deepcopy(net.state_dict()), net(x)
    with Watch(net):
        assert torch.equal(net(x), logits)
    Statistics.measure(net, x)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_inputs_and_outputs():
    net, x = trained(), noise((4, 3, 8, 8))
    with Watch(net, ['1']) as entering, Watch(net, ['0'], at='output') as leaving:
        net(x)
    for a, b in zip(entering.moments['1'], leaving.moments['0']):
        torch.testing.assert_close(a, b)


def test_measuring_restores_modes_and_refuses_nothing():
    net = trained().train()
    net[1].eval()
    Statistics.measure(net, noise((4, 3, 8, 8)))
    assert net.training and not net[1].training
    with pytest.raises(DFKDError, match='no images'):
        Statistics.measure(net, iter([]))
    assert net.training and hooks(net) == 0


@quick
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 9))
def test_measured_in_pieces_is_measured_at_once(sizes, seed):
    net = trained()
    batches = [
        noise((size, 3, 8, 8), seed + i) * (i + 1) + i for i, size in enumerate(sizes)
    ]
    pieces = Statistics.measure(net, batches)
    whole = Statistics.measure(net, torch.cat(batches))
    for name in whole:
        for a, b in zip(pieces[name], whole[name]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_transformers_keep_channels_last():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = noise((3, 5, 8))
    measured = Statistics.measure(layer, x, layers=['norm1', 'linear1'])
    assert all(len(mean) == 8 for mean, _ in measured.values())


def test_saved_statistics_come_back(tmp_path):
    measured = Statistics.measure(
        trained(), noise((4, 3, 8, 8)), layers=['0', '1'], at='output'
    )
    measured.save(tmp_path / 'statistics.safetensors')
    again = Statistics.load(tmp_path / 'statistics.safetensors')
    assert list(again) == ['0', '1'] and again.at == 'output'
    assert all(
        torch.equal(a, b) for name in again for a, b in zip(again[name], measured[name])
    )
    (tmp_path / 'statistics.safetensors').write_bytes(b'half a file')
    with pytest.raises(DFKDError):
        Statistics.load(tmp_path / 'statistics.safetensors')


def test_statistics_of_another_network_are_refused():
    statistics = Statistics.from_batchnorm(trained())
    with Watch(trained(), ['1']) as watch:
        trained()(noise((2, 3, 8, 8)))
    with pytest.raises(DFKDError, match='no moments of layer'):
        statistics.distance(watch.moments)
    with pytest.raises(DFKDError, match='belong to another network'):
        statistics.distance({name: (torch.zeros(9), torch.zeros(9)) for name in statistics})
    inputs = LossInputs(
        noise((2, 3, 8, 8)), torch.zeros(2, 10), torch.zeros(2, dtype=torch.long)
    )
    with pytest.raises(DFKDError, match='no features'):
        feature_term(statistics)(inputs)


def test_an_untrained_network_is_pointed_out():
    with pytest.warns(UserWarning, match='was this network trained'):
        Statistics.from_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Statistics.from_batchnorm(trained())


# the loss


def test_feature_loss_is_equation_4():
    statistics = Statistics.from_batchnorm(trained())
    moments = {
        name: (mean + noise(mean.shape, 1), var + noise(var.shape, 2))
        for name, (mean, var) in statistics.items()
    }
    by_hand = [
        sum(math.dist(a.tolist(), b.tolist()) for a, b in zip(moments[name], pair))
        for name, pair in statistics.items()
    ]
    total, layers = feature_loss(moments, statistics)
    torch.testing.assert_close(layers, torch.tensor(by_hand))
    torch.testing.assert_close(total, torch.tensor(sum(by_hand)))
    weighted, layers = feature_loss(moments, statistics, first_layer_weight=10)
    torch.testing.assert_close(weighted, torch.tensor(sum(by_hand) + 9 * by_hand[0]))
    assert len(layers) == 3


def test_perfect_agreement_has_no_loss_and_no_gradient():
    statistics = Statistics.from_batchnorm(trained())
    moments = {
        name: (mean.clone().requires_grad_(), var.clone().requires_grad_())
        for name, (mean, var) in statistics.items()
    }
    total, _ = feature_loss(moments, statistics)
    assert total == 0
    total.backward()
    assert all(
        torch.equal(v.grad, torch.zeros_like(v)) for pair in moments.values() for v in pair
    )


@pytest.mark.parametrize('norm', ['l2', 'l1'])
def test_a_few_steps_improve_any_objective(norm):
    net = trained().requires_grad_(False)
    fast = fuse_statistics(net)
    features = feature_term(Statistics.from_batchnorm(net))
    parts = {
        'class': (1.0, class_loss),
        'tv': (0.1, tv_term(norm)),
        'l2': (0.1, l2_term),
        'features': (1.0, features),
    }
    for objective in (
        *(Objective({name: part}) for name, part in parts.items()),
        Objective(parts),
    ):
        x = noise((4, 3, 8, 8), 5)

        def loss(x, objective=objective):
            logits, features = fast(x)
            return objective(LossInputs(x, logits, torch.arange(4), features))[0]

        before = loss(x)
        for _ in range(3):
            (slope,) = torch.autograd.grad(loss(x.requires_grad_()), x)
            x = (x - 0.01 * slope / slope.norm()).detach()
        assert loss(x) < before


# the fast path


@pytest.mark.parametrize('settings', [{}, {'affine': False}, {'eps': 0.3}])
def test_fused_is_watched(settings):
    net, x = trained(**settings), noise((4, 3, 8, 8)).requires_grad_()
    statistics = Statistics.from_batchnorm(net)
    with Watch(net) as watch:
        slow = net(x)
    fast, moments = fuse_statistics(net)(x)
    assert list(moments) == list(watch.moments) == list(statistics)
    slopes = [
        torch.autograd.grad(logits.square().sum() + feature_loss(m, statistics)[0], x)[0]
        for logits, m in ((slow, watch.moments), (fast, moments))
    ]
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_fusing_copies_freezes_and_stays_in_eval_mode():
    net = trained().train()
    fast = fuse_statistics(net)
    assert (
        net.training
        and all(p.requires_grad for p in net.parameters())
        and isinstance(net[1], nn.BatchNorm2d)
    )
    assert not fast.train().model.training and not any(
        p.requires_grad for p in fast.parameters()
    )
    with torch.no_grad():
        net[0].weight.zero_()
    assert fast.model[0].weight.abs().sum() > 0
    fast(noise((2, 3, 8, 8)).requires_grad_())
    assert not any(
        layer.calls for layer in fast.modules() if isinstance(layer, FusedBatchNorm)
    )


def test_a_subclass_with_its_own_forward_keeps_it():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    net = nn.Sequential(WithActivation(3)).eval()
    net[0].running_mean.fill_(0.1)
    x = noise((2, 3, 4, 4))
    logits, moments = fuse_statistics(net)(x)
    assert torch.equal(logits, net(x))
    torch.testing.assert_close(moments['0'][0], x.mean((0, 2, 3)))


@pytest.mark.parametrize('kind', [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_other_kinds_of_batchnorm(kind):
    layer = kind(3)
    layer.running_mean.fill_(0.5)
    net = nn.Sequential(layer).eval()
    x = noise((4, 3, 5) if kind is nn.BatchNorm1d else (4, 3, 5, 5, 5))
    logits, moments = fuse_statistics(net)(x)
    torch.testing.assert_close(logits, net(x))
    with Watch(net) as watch:
        net(x)
    torch.testing.assert_close(moments['0'], watch.moments['0'])


def test_half_precision_teachers_keep_exact_moments():
    net = trained().to(torch.bfloat16)
    logits, moments = fuse_statistics(net)(noise((4, 3, 8, 8)).to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16 and all(
        m.dtype == torch.float32 for pair in moments.values() for m in pair
    )


def test_mixed_precision_keeps_exact_moments_of_what_it_sees():
    net, x = trained(), noise((8, 3, 8, 8)).requires_grad_()
    statistics = Statistics.from_batchnorm(net)
    with torch.autocast('cpu', torch.bfloat16):
        _, moments = fuse_statistics(net)(x)
    assert all(m.dtype == torch.float32 for pair in moments.values() for m in pair)
    total, _ = feature_loss(moments, statistics)
    exact, _ = feature_loss(fuse_statistics(net)(x)[1], statistics)
    slope, exact_slope = (torch.autograd.grad(loss, x)[0] for loss in (total, exact))
    assert abs(total - exact) < 0.02 * exact
    assert (slope - exact_slope).norm() < 0.05 * exact_slope.norm()


def test_the_gradient_of_all_norms_at_once_is_that_of_each():
    sizes = [3, 1, 7, 2]
    vector = torch.randn(13, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(4, dtype=torch.float64)
    parts = torch.stack([part.norm() for part in vector.split(sizes)])
    found = PartNorms(sizes)(vector)
    torch.testing.assert_close(found, parts)
    pairs = [torch.autograd.grad((v * pull).sum(), vector)[0] for v in (found, parts)]
    torch.testing.assert_close(*pairs)
    still = torch.zeros(13, requires_grad=True)
    (slope,) = torch.autograd.grad(PartNorms(sizes)(still).sum(), still)
    assert torch.equal(slope, torch.zeros(13))


def test_a_row_is_its_layers_and_finds_the_one_that_is_not_finite():
    moments = {name: (torch.randn(n), torch.rand(n)) for name, n in zip('abc', (3, 1, 2))}
    row = MomentRow.join(moments)
    for name, pair in moments.items():
        assert all(torch.equal(v, w) for v, w in zip(row[name], pair))
    assert list(row) == ['a', 'b', 'c'] and len(row.tensor) == 12
    check_all_moments(row)
    bad = row.with_tensor(row.tensor.clone())
    bad['b'][1].fill_(torch.nan)
    with pytest.raises(DFKDError, match="layer 'b' hold NaN"):
        check_all_moments(bad)


# features whose mean is far from zero


@pytest.mark.parametrize('layout', ['channels second', 'channels last'])
def test_a_mean_of_ten_thousand_deviations_loses_nothing(layout):
    "Values and gradients of the measured path, against float64 on the same numbers."
    channel_dim = 1 if layout == 'channels second' else -1
    shape, size = (
        ((8, 3, 12, 12), (1, 3, 1, 1)) if channel_dim == 1 else ((8, 40, 3), (1, 1, 3))
    )
    x = (noise(shape) + torch.tensor([1e4, -1e4, 1.0]).view(size)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found = []
    for v in (x, exact):
        mean, var = batch_moments(v, channel_dim)
        (slope,) = torch.autograd.grad((var * torch.tensor([1.0, 2.0, 3.0])).sum(), v)
        found.append((mean.detach().double(), var.detach().double(), slope.double()))
    (mean, var, slope), (true_mean, true_var, true_slope) = found
    over = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
    # the judge itself is right
    torch.testing.assert_close(true_var, exact.detach().var(over, correction=0))
    # float32 near 10,000 has steps of a thousandth
    torch.testing.assert_close(mean, true_mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(var, true_var, rtol=1e-4, atol=0)
    assert (slope - true_slope).norm() < 1e-3 * true_slope.norm()


def test_the_fast_path_loses_nothing_where_the_running_mean_is_far():
    "Ten thousand deviations away; the other channel near zero."
    layer = nn.BatchNorm2d(2).eval()
    layer.running_mean.copy_(torch.tensor([1e4, 0.1]))
    x = (noise((8, 2, 12, 12)) + torch.tensor([1e4, 0.1]).view(1, 2, 1, 1)).requires_grad_()
    _, moments = fuse_statistics(nn.Sequential(layer))(x)
    mean, var = moments['0']
    torch.testing.assert_close(
        var.detach().double(),
        x.detach().double().var((0, 2, 3), correction=0),
        rtol=1e-4,
        atol=0,
    )
    (slope,) = torch.autograd.grad(var.sum(), x)
    exact = x.detach().double()
    exact = 2 * (exact - exact.mean((0, 2, 3), keepdim=True)) / (8 * 12 * 12)
    assert (slope.double() - exact).norm() < 1e-3 * exact.norm()


def test_measuring_a_transformer_whose_features_stand_far_from_zero():
    """A LayerNorm input at 10,000 deviations, in batches.

    The law of total variance does not lose it either.
    """

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x + torch.tensor([1e4, -1e4, 0.0, 1.0]))

    x = noise((40, 6, 4))
    measured = Statistics.measure(Far(), x.split(7), layers=['norm'])['norm']
    seen = (x + torch.tensor([1e4, -1e4, 0.0, 1.0])).double()
    torch.testing.assert_close(
        measured[1].double(), seen.flatten(0, 1).var(0, correction=0), rtol=1e-4, atol=0
    )


# one layer, two names; one layer, two calls


class Shared(nn.Module):
    """A BatchNorm that is registered twice and used by its second name, and one that is
    called twice.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)
        self.alias, self.block = self.norm, nn.Sequential(self.twice)

    def forward(self, x):
        x = self.alias(self.conv(x)).relu()
        x = self.block(x) + 3
        return self.fc(self.twice(x).relu().mean((2, 3)))


def test_a_layer_with_two_names_and_one_called_twice_are_the_same_on_all_paths():
    torch.manual_seed(0)
    net = Shared().eval()
    for layer in (net.norm, net.twice):
        layer.running_mean.normal_(0, 0.3)
    x = noise((6, 3, 8, 8))
    calls = {}  # by hand
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: calls.setdefault(name, []).append(args[0])
        )
        for name, layer in {'norm': net.norm, 'twice': net.twice}.items()
    ]
    with torch.no_grad():
        plain = net(x)
    for hook in hooks:
        hook.remove()
    assert [len(calls[name]) for name in ('norm', 'twice')] == [1, 2]
    alone = {
        name: [(c.mean((0, 2, 3)), c.var((0, 2, 3), correction=0)) for c in found]
        for name, found in calls.items()
    }
    by_hand = {
        name: tuple(torch.stack(v).mean(0) for v in zip(*pairs))
        for name, pairs in alone.items()
    }
    fused_logits, fused = fuse_statistics(net)(x)
    with torch.no_grad(), Watch(net) as watch:
        net(noise((2, 3, 8, 8), 9))  # the last pass counts
        logits = net(x)
    statistics = Statistics.from_batchnorm(net)
    for moments in (watch.moments, fused, Statistics.measure(net, [x[:1], x[1:]])):
        assert list(moments) == list(statistics) == ['norm', 'twice']
        for name, pair in by_hand.items():
            torch.testing.assert_close(
                tuple(v.detach() for v in moments[name]), pair, rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(fused_logits.detach(), plain)
    torch.testing.assert_close(logits, plain)
    # both names can be asked for
    with torch.no_grad(), Watch(net, ['alias', 'norm']) as watch:
        net(x)
    torch.testing.assert_close(watch.moments['alias'], watch.moments['norm'])


def test_a_part_called_by_itself_is_a_pass_of_its_own():
    net = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.Flatten()).eval()
    with torch.no_grad(), Watch(net) as watch:
        for seed in (0, 1):
            net[0](noise((4, 3, 2, 2), seed))
        torch.testing.assert_close(
            watch.moments['0.0'], batch_moments(noise((4, 3, 2, 2), 1))
        )
        with pytest.raises(RuntimeError):
            net(noise((4, 5, 2, 2)))  # a pass that broke off
        net[0](noise((4, 3, 2, 2), 2))
        torch.testing.assert_close(
            watch.moments['0.0'], batch_moments(noise((4, 3, 2, 2), 2))
        )


# what measuring takes


def test_measuring_takes_what_distilling_takes():
    domain = DOMAINS['cifar10']
    teacher = Teacher(trained(), domain)
    images = torch.randint(
        0,
        256,
        (20, *domain.shape),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.uint8,
    )
    data = ImageSet(images, torch.arange(20) % 10, domain)
    x = domain.normalize(images)
    right = Statistics.measure(teacher, x)
    loaders = [DataLoader(TensorDataset(part, data.labels), 6) for part in (images, x)]
    for same in (data, images, [images[:5], images[5:]], *loaders):
        found = Statistics.measure(teacher, same)
        assert list(found) == list(right)
        for name in right:
            torch.testing.assert_close(found[name], right[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'images',
    [
        None,
        7,
        'a folder',
        [object()],
        [None],
        {'pixels': 1},
        [torch.zeros(2, 3, 8, 8).long()],
    ],
)
def test_measuring_refuses_in_one_line_that_names_the_way_out(images):
    with pytest.raises(DFKDError, match='give normalised floats') as caught:
        Statistics.measure(trained(), images)
    assert '\n' not in str(caught.value)


def test_bytes_need_somebody_who_knows_the_scale():
    images = ImageSet(
        torch.zeros(4, *DOMAINS['cifar10'].shape, dtype=torch.uint8),
        None,
        DOMAINS['cifar10'],
    )
    with pytest.raises(DFKDError, match='a Teacher'):
        Statistics.measure(trained(), images)


# the paper's weights


def test_the_papers_weights_act_like_norms_over_its_whole_batch():
    weights = deepinversion_preset('deepinversion', 'paper')
    one = noise((1, 3, 8, 8))
    # 256 images of equal norms in every direction
    x = torch.cat([one, -one]).repeat(128, 1, 1, 1).requires_grad_()
    whole_tv = sum(torch.linalg.vector_norm(d) for d in _neighbours(x))
    whole_l2 = torch.linalg.vector_norm(x)
    pairs = {
        'tv_l2': (total_variation(x).mean(), 2.5e-5 * whole_tv),
        'l2': (l2_norm(x).mean(), 3e-8 * whole_l2),
    }
    for name, (ours, theirs) in pairs.items():
        slope, wanted = (
            torch.autograd.grad(v, x)[0] for v in (weights[name] * ours, theirs)
        )
        torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-12)
    assert (weights['tv_l2'], weights['l2']) == (4e-4, 4.8e-7)
