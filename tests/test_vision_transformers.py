"""A vision transformer, and images from it: patch entropy, sparse patches, LayerNorm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dfkd_nb.applications.quantization import QuantizedNetwork, calibrate
from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.dreams.statistics import Statistics
from dfkd_nb.dreams.vision_transformers import (
    PatchEntropy,
    PatchStops,
    attention_layers,
    layernorm_layers,
    masked_images,
    moved_patches,
    patch_counts,
    patch_similarities,
    similarity_entropy,
    token_moments,
)
from dfkd_nb.lab.recipes import Recipe
from dfkd_nb.lab.runs import Run
from dfkd_nb.lab.tasks import transformer
from dfkd_nb.toolbox.core import load_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import load_data
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError, RunStopped
from dfkd_nb.toolbox.models import build_model, count_parameters
from dfkd_nb.toolbox.networks import save_weights
from dfkd_nb.toolbox.teachers import Teacher
from dfkd_nb.toolbox.vision_transformer import (
    PatchAttention,
    VisionTransformer,
    local_bias,
    offset_pairs,
)

DOMAIN = DOMAINS['cifar10']


def small(seed: int = 0) -> Teacher:
    "Two blocks: a network is a network."
    torch.manual_seed(seed)
    network = VisionTransformer(10, width=16, depth=2, heads=2)
    return Teacher(network, DOMAIN, 'small')


def noise(count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator)


# the network


def test_the_network_of_the_list() -> None:
    network = build_model('vit-tiny')
    assert isinstance(network, VisionTransformer)
    width, hidden, depth = 64, 128, 4
    linear = width * 3 * width + 3 * width + width * width + width
    linear += 2 * width * hidden + hidden + width
    block = linear + 4 * width + 4 * (15 * 15 + 3)
    ends = 3 * 16 * width + width + 66 * width + 2 * width + width * 10 + 10
    assert count_parameters(network) == depth * block + ends
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def test_each_head_begins_at_a_neighbour() -> None:
    pairs, bias = offset_pairs(8), local_bias(4, 8)
    centre = 1 + 8 * 3 + 3
    favourites = bias[:, pairs[centre]].argmax(1) - centre
    assert favourites.tolist() == [1, -1, 8, -8]
    corners = local_bias(4, 8, diagonal=True)[:, pairs[centre]].argmax(1) - centre
    assert corners.tolist() == [9, 7, -7, -9]
    # the class token begins with the mean of all patches
    assert bias[:, pairs[0]].unique().tolist() == [0.0]


def test_attention_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    layer, x = PatchAttention(6, 2, 2), torch.randn(1, 5, 6)
    taken = []
    layer.weights.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    out = layer(x)
    q, k, v = layer.qkv(x)[0].split(6, 1)
    rows = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        scores = q[:, part] @ k[:, part].T / math.sqrt(3) + layer.bias[head][layer.pairs]
        weights = scores.softmax(1)
        torch.testing.assert_close(taken[0][0, head], weights)
        rows.append(weights @ v[:, part])
    torch.testing.assert_close(out[0], layer.proj(torch.cat(rows, 1)))


def test_all_patches_named_are_all_patches() -> None:
    network, x = small().model, noise()
    everything = torch.arange(64).expand(2, 64)
    assert network(x, everything).equal(network(x))


def test_the_order_of_kept_patches_is_free() -> None:
    network, x = small().model, noise()
    kept = torch.randperm(64)[:21].expand(2, 21)
    shuffled = kept[:, torch.randperm(21)]
    torch.testing.assert_close(network(x, kept), network(x, shuffled))
    assert not torch.allclose(network(x, kept), network(x))


def test_fewer_patches_cost_fewer_operations() -> None:
    network, x, costs = small().model, noise(1), []
    for count in (64, 44, 30, 21, 14):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, torch.arange(count)[None])
        costs.append(counter.get_total_flops())
    embedding = 2 * 64 * 48 * 16
    shares = [(cost - embedding) / (costs[0] - embedding) for cost in costs]
    assert all(a > b for a, b in zip(shares, shares[1:]))
    # linear layers fall with the tokens, attention with their square
    assert all(s < (n + 1) / 65 + 1e-3 for s, n in zip(shares[1:], (44, 30, 21, 14)))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: VisionTransformer(10, patch=5), 'give sizes that divide'),
        (lambda: VisionTransformer(10, heads=3), 'give sizes that divide'),
        (lambda: build_model('vit-tiny')(torch.zeros(1, 3, 28, 28)), 'takes 32 x 32'),
    ],
)
def test_sizes_that_do_not_fit(call: object, message: str) -> None:
    with pytest.raises(DFKDError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.slow
def test_the_quantiser_takes_it() -> None:
    teacher = small()
    rounded = QuantizedNetwork(teacher, DOMAIN, 8, observer='min-max')
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    calibrate(rounded, images)
    x = DOMAIN.normalize(images)
    exact = teacher(x)
    assert (rounded(x) - exact).abs().max() < 0.2 * exact.std()
    assert not rounded(x).equal(exact)


# the entropy of patch similarities


def of_samples(name: str) -> Tensor:
    "Uniform numbers, or normal ones of a deviation."
    generator = torch.Generator().manual_seed(0)
    if name in ('wide', 'half'):
        flat = torch.rand(1, 40_000, generator=generator)
        return 2 * flat - 1 if name == 'wide' else flat
    return float(name) * torch.randn(1, 40_000, generator=generator)


@pytest.mark.parametrize(
    ('sample', 'grid', 'entropy', 'within'),
    [
        # uniform: log 2 and 0
        ('wide', 'range', math.log(2), 0.01),
        ('wide', 'fixed', math.log(2), 0.01),
        ('half', 'range', 0.0, 0.06),
        ('half', 'fixed', 0.06, 0.01),
        # normal: the ten points rise again where the data contract
        ('0.1', 'range', -0.8, 0.15),
        ('0.01', 'range', -2.8, 0.15),
        ('0.001', 'range', -1.0, 0.3),
        ('0', 'range', 0.0, 1e-6),
        # and the fixed grid does not
        ('0.1', 'fixed', -0.76, 0.03),
        ('0.01', 'fixed', -1.56, 0.02),
        ('0.001', 'fixed', -1.58, 0.01),
        ('0', 'fixed', -1.58, 0.01),
    ],
)
def test_entropies_by_hand(sample: str, grid: str, entropy: float, within: float) -> None:
    found = float(similarity_entropy(of_samples(sample), grid)[0])
    assert found == pytest.approx(entropy, abs=within)


def test_the_fixed_grid_falls_with_the_spread_and_the_other_does_not() -> None:
    names = ('0.3', '0.1', '0.03', '0.01', '0.003', '0')
    found = {
        grid: [float(similarity_entropy(of_samples(n), grid)[0]) for n in names]
        for grid in ('fixed', 'range')
    }
    assert found['fixed'] == sorted(found['fixed'], reverse=True)
    assert found['range'] != sorted(found['range'], reverse=True)
    # a complete collapse beats a spread of a tenth
    assert found['range'][-1] > found['range'][1]


def test_fewer_points_of_the_fixed_grid_are_enough() -> None:
    for name in ('half', '0.1', '0.01'):
        s = of_samples(name)
        few = similarity_entropy(s, 'fixed', 41)
        torch.testing.assert_close(few, similarity_entropy(s), atol=5e-3, rtol=0)


def test_scale_and_order_of_patches_change_nothing() -> None:
    z = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(0))
    similar = patch_similarities(z, 2)
    torch.testing.assert_close(patch_similarities(5 * z, 2), similar)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])
    torch.testing.assert_close(
        similarity_entropy(patch_similarities(z[:, order], 2).flatten(1)),
        similarity_entropy(similar.flatten(1)),
    )


def test_similarities_by_hand() -> None:
    # a class token and two patches, two heads: the means over heads are (1, 0) and (1, 1)
    z = torch.tensor([[[9.0, 9, 9, 9], [2, 0, 0, 0], [1, 0, 1, 2]]])
    found = patch_similarities(z, 2)
    root = 1 / math.sqrt(2)
    torch.testing.assert_close(found, torch.tensor([[[1, root], [root, 1]]]))


@pytest.mark.parametrize('grid', ['fixed', 'range'])
@pytest.mark.parametrize('value', [1.0, 0.0])
def test_identical_patches_have_a_finite_gradient(grid: str, value: float) -> None:
    z = torch.full((2, 17, 8), value, requires_grad=True)
    entropy = similarity_entropy(patch_similarities(z, 2).flatten(1), grid)
    (gradient,) = torch.autograd.grad(entropy.sum(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize('grid', ['fixed', 'range'])
def test_descent_on_the_term_raises_the_entropy(grid: str) -> None:
    teacher = small()
    term = PatchEntropy(teacher, grid, 41 if grid == 'fixed' else 0)
    inversion = DeepInversion(
        teacher,
        steps=10,
        class_weight=0.0,
        tv_l2=0.0,
        l2=0.0,
        feature_weight=0.0,
        learning_rate=0.03,
        jitter=0,
        flip=False,
        terms={'entropy': (1.0, term)},
        device='cpu',
    )
    inversion.start(2)
    inversion.run(log_every=1)
    values = [row['entropy'] for row in inversion.history]
    assert len(values) == 10 and values[-1] < values[0]


def test_the_term_is_minus_the_sum_over_blocks() -> None:
    teacher = small()
    term = PatchEntropy(teacher)
    x = noise()
    logits = teacher(x)
    expected = -term.entropies().sum(0).mean()
    assert term.entropies().shape == (2, 2)
    targets = torch.tensor([0, 1])
    torch.testing.assert_close(term(LossInputs(x, logits, targets)), expected)
    with pytest.raises(DFKDError, match='was not asked'):
        term(LossInputs(x, logits, targets))  # it has forgotten them
    term.close()
    teacher(x)
    assert not term.values


def test_what_has_no_attention_is_refused() -> None:
    with pytest.raises(DFKDError, match='vit-tiny'):
        attention_layers(build_model('resnet8'))
    with pytest.raises(DFKDError, match='use fixed or range'):
        PatchEntropy(small(), 'other')
    with pytest.raises(DFKDError, match='2 points or more'):
        PatchEntropy(small(), 'fixed', 1)


# LayerNorm


def test_a_prior_on_what_leaves_layernorm_is_constant() -> None:
    x = torch.randn(3, 5, 64, dtype=torch.float64).mul(4).add(2).requires_grad_()
    mean, variance = token_moments(F.layer_norm(x, (64,)))
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-5, rtol=0)
    prior = mean.norm() + (variance - 1).norm()
    (gradient,) = torch.autograd.grad(prior, x)
    assert gradient.abs().max() < 1e-5
    # the moments of channels over tokens do vary
    channels = F.layer_norm(x, (64,)).flatten(0, 1).mean(0)
    (gradient,) = torch.autograd.grad(channels.square().sum(), x)
    assert gradient.abs().max() > 1e-4


def test_moments_are_measured_at_the_inputs_of_layernorm() -> None:
    teacher, x = small(), noise(4)
    names = layernorm_layers(teacher)
    blocks = [f'blocks.{i}.norm{j}' for i in (0, 1) for j in (1, 2)]
    assert names == [*blocks, 'norm']
    statistics = Statistics.measure(teacher.model, x, names)
    tokens = teacher.model.tokens(x).flatten(0, 1)
    mean, variance = statistics['blocks.0.norm1']
    torch.testing.assert_close(mean, tokens.mean(0))
    torch.testing.assert_close(variance, tokens.var(0, correction=0))
    with pytest.raises(DFKDError, match='has no LayerNorm'):
        layernorm_layers(build_model('resnet8'))


def test_measured_moments_are_matched() -> None:
    teacher = small()
    statistics = Statistics.measure(
        teacher.model, 0.5 * noise(8), layernorm_layers(teacher)
    )
    inversion = DeepInversion(
        teacher,
        steps=12,
        class_weight=0.0,
        tv_l2=0.0,
        l2=0.0,
        feature_weight=1.0,
        feature_scale='relative',
        statistics=statistics,
        device='cpu',
    )
    inversion.start(4)
    inversion.run(log_every=1)
    values = [row['total'] for row in inversion.history]
    assert values[-1] < 0.8 * values[0]


# sparse patches


def test_how_many_patches_are_kept() -> None:
    assert patch_counts(64, 4) == [64, 44, 30, 21, 14]
    assert patch_counts(196, 4) == [196, 137, 95, 66, 46]
    assert patch_counts(64, 3, 0.0) == [64] * 4
    assert patch_counts(10, 1) == [10, 7]


@pytest.mark.parametrize(
    ('shift', 'mirror'),
    [((0, 0), False), ((4, 0), False), ((-4, 8), False), ((0, 4), True), ((4, -4), True)],
)
def test_patches_move_with_the_image(shift: tuple[int, int], mirror: bool) -> None:
    kept = torch.tensor([[0, 9, 30, 63]])
    image = torch.zeros(64).scatter(0, kept[0], 1.0).view(1, 1, 8, 8)
    moved = F.interpolate(image, scale_factor=4).roll(shift, (-2, -1))
    moved = moved.flip(-1) if mirror else moved
    expected = F.max_pool2d(moved, 4).flatten().nonzero()[:, 0]
    assert moved_patches(kept, 8, 4, shift, mirror)[0].equal(expected)


def test_less_than_half_a_patch_is_no_move() -> None:
    kept = torch.tensor([[0, 9]])
    assert moved_patches(kept, 8, 4, (1, -1), False).equal(kept)
    assert moved_patches(kept, 8, 4, (2, 0), False).tolist() == [[8, 17]]


def inverted(
    teacher: Teacher, view: PatchStops | None, **settings: object
) -> DeepInversion:
    own = {'jitter': 4, 'flip': True} if view is None else {'jitter': 0, 'flip': False}
    inversion = DeepInversion(
        teacher if view is None else view.teacher,
        steps=12,
        batch_size=3,
        tv_l2=0.0,
        l2=0.0,
        feature_weight=0.0,
        view=view,
        device='cpu',
        **own,  # type: ignore[arg-type]
        **settings,  # type: ignore[arg-type]
    )
    inversion.start(3)
    return inversion


def test_a_share_of_nothing_changes_no_bit() -> None:
    teacher = small()
    dense = inverted(teacher, None).run().images
    view = PatchStops(teacher, 12, (3, 6), 0.0)
    assert inverted(teacher, view).run().images.equal(dense)
    assert view.masks[0].eq(1).all()
    sparse = inverted(teacher, PatchStops(teacher, 12, (3, 6))).run().images
    assert not sparse.equal(dense)


def test_the_patches_of_least_attention_drop_out() -> None:
    teacher, taken = small(), []
    view = PatchStops(teacher, 12, (6,), jitter=4)
    inversion = inverted(teacher, view)
    last = view.reader.network.blocks[-1].attention
    last.weights.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    for _ in range(6):
        inversion.step()
    assert view.reader.kept is None
    attention = taken[-1].mean(1)[:, 0, 1:]
    inversion.step()
    assert taken[-1].shape[-1] == 1 + 44
    assert view.kept is not None
    for image, row in enumerate(view.kept):
        dropped = torch.ones(64).scatter(0, row, 0.0) > 0
        assert attention[image][row].min() >= attention[image][dropped].max()


def test_dropped_patches_get_no_gradient_of_the_class_loss() -> None:
    teacher = small()
    view = PatchStops(teacher, 12, (3, 6))
    inverted(teacher, view).run()
    x = noise(3).requires_grad_()
    view.reader.kept = view.kept
    loss = F.cross_entropy(view.reader(x), torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(loss, x)
    outside = view.masks[0].expand_as(x) == 0
    assert int(outside[0, 0].sum()) == (64 - 30) * 16
    assert gradient[outside].eq(0).all()
    assert gradient[~outside].ne(0).float().mean() > 0.99


def test_random_patches_are_others() -> None:
    teacher = small()
    views = [PatchStops(teacher, 12, (3,), choose=c) for c in ('attention', 'random')]
    for view in views:
        inverted(teacher, view).run()
    assert views[0].kept is not None and views[1].kept is not None
    assert views[0].kept.shape == views[1].kept.shape == (3, 44)
    assert not views[0].kept.equal(views[1].kept)


def test_a_stop_is_resumed_to_the_same_bits() -> None:
    teacher = small()
    whole = inverted(teacher, PatchStops(teacher, 12, (3, 6))).run().images
    for after in (2, 3, 7):
        view = PatchStops(teacher, 12, (3, 6))
        first = inverted(teacher, view)
        for _ in range(after):
            first.step()
        state, kept = first.state_dict(), view.state_dict()
        again = PatchStops(teacher, 12, (3, 6))
        second = inverted(teacher, again)
        second.load_state_dict(state)
        again.load_state_dict(kept)
        assert second.run().images.equal(whole)
        assert again.masks[0].sum() == 3 * 30 * 16


def test_two_batches_begin_with_all_patches() -> None:
    teacher = small()
    view = PatchStops(teacher, 12, (3, 6))
    inversion = inverted(teacher, view)
    inversion.start(6)
    inversion.run()
    assert [len(mask) for mask in view.masks] == [3, 3]
    assert not view.masks[0].equal(view.masks[1])


def test_masked_images_are_grey_where_nothing_was_kept() -> None:
    images = ImageSet(torch.full((2, 3, 32, 32), 7, dtype=torch.uint8), None, DOMAIN)
    masks = torch.zeros(2, 1, 32, 32)
    masks[:, :, :4] = 1
    found = masked_images(images, masks).images
    assert found[:, :, :4].eq(7).all()
    assert found[0, :, 5, 5].tolist() == [round(255 * m) for m in DOMAIN.mean]
    with pytest.raises(DFKDError, match='one of the same size for each'):
        masked_images(images, masks[:1])


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'stops': (12,)}, 'between the first and the last'),
        ({'share': 1.0}, 'share from 0 to below 1'),
        ({'choose': 'best'}, 'use attention or random'),
        ({'stops': tuple(range(1, 12)), 'share': 0.9}, 'leave no patch'),
    ],
)
def test_stops_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DFKDError, match=message):
        PatchStops(small(), 12, **{'stops': (3,)} | settings)  # type: ignore[arg-type]


def test_other_networks_have_no_patches_to_drop() -> None:
    with pytest.raises(DFKDError, match='VisionTransformer'):
        PatchStops(Teacher(build_model('resnet8'), DOMAIN), 12, (3,))


# the task


TINY = {
    'sources': 'noise, sparse, moments, real',
    'images': 10,
    'moment_images': 10,
    'synthesis_steps': 6,
    'synthesis_batch_size': 5,
    'stops': '2, 4',
    'student': 'resnet8',
    'student_steps': 4,
    'batch_size': 5,
    'test_data': 'cifar10-mini',
    'test_limit': 20,
}


def a_run(out: Path, **changes: object) -> Run:
    torch.manual_seed(0)
    about = {'model': 'vit-tiny', 'domain': 'cifar10'}
    folder = out / 'cifar10-teacher-vit/quick'
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / 'weights.safetensors', build_model('vit-tiny'), about)
    recipe = Recipe.load('cifar10-vit-inversion')
    return Run(recipe, 'quick', TINY | changes, out=out, device='cpu', quiet=True)


@pytest.mark.slow
def test_a_run_is_stopped_and_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mini(name: str, split: str, limit: int, device: torch.device) -> ImageSet:
        return load_data('cifar10-mini', 'test', limit=min(limit, 200) or None)

    monkeypatch.setattr(transformer, 'real_images', mini)
    whole = a_run(tmp_path / 'whole')
    expected = whole.start().numbers
    rows = expected['rows']
    assert [row['source'] for row in rows] == ['noise', 'sparse', 'moments', 'real']
    assert all(0 <= row['recognised_judge'] <= 1 for row in rows)
    assert expected['student_accuracy_real'] == rows[-1]['student_accuracy']
    stops = 0
    for minutes in (*[1e-6] * 9, math.inf):
        broken = a_run(tmp_path / 'broken')
        try:
            found = broken.start(resume=True, max_minutes=minutes).numbers
            break
        except RunStopped:
            stops += 1
    assert stops > 4 and found == expected
    for name in ('noise', 'sparse', 'moments', 'real', 'student-sparse'):
        first, second = (
            load_tensors(r.folder / f'{name}.safetensors')[0] for r in (whole, broken)
        )
        assert all(first[k].equal(second[k]) for k in first), name
    grey = torch.tensor([round(255 * m) for m in DOMAIN.mean], dtype=torch.uint8)
    sparse = ImageSet.load(whole.folder / 'sparse.safetensors').images
    hidden = sparse.eq(grey[:, None, None]).all(1).float().mean()
    assert hidden == pytest.approx(34 / 64, abs=0.01)
    assert (whole.folder / 'images.png').is_file()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'stops': '6'}, 'between the first and the last'),
        ({'images': 15}, 'multiples of the 10 classes'),
        ({'teacher': 'cifar10-resnet20'}, 'no vision transformer'),
    ],
)
def test_runs_that_cannot_be(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DFKDError, match=message):
        a_run(tmp_path, **changes).start()
