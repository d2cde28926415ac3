"""Contrast: InfoNCE against a plain loop and its bound, views that are parts, a bank that
is a ring, batches that resume.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIGITS, used
from torch import nn

from dfkd_nb.dreams.extractor import fuse_statistics
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import AlternatingTrainer, GrowingPool
from dfkd_nb.generators.contrastive import (
    CMI_PRESETS,
    ContrastiveSynthesizer,
    LocalView,
    MemoryBank,
    PooledFeatures,
    cmi_preset,
    info_nce,
)
from dfkd_nb.generators.generators import Generator
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.core import load_checkpoint, save_checkpoint
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.teachers import Teacher


def network(seed=0, domain=DIGITS, norm=True):
    "Two convolutions; BatchNorm, where there is one, has seen something."
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(domain.channels, 6, 3, 2, 1),
        nn.BatchNorm2d(6) if norm else nn.GELU(),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
    ]
    layers += [
        nn.BatchNorm2d(5) if norm else nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, domain.num_classes),
    ]
    model = nn.Sequential(*layers)
    return used(model, domain.shape)


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


def forgetful(model):
    "With dropout before the last layer: in training mode it draws from the global streams."
    return nn.Sequential(*model[:-1], nn.Dropout(0.4), model[-1])


def synthesizer_of(teacher, **change):
    torch.manual_seed(change.pop('weights', 0))
    chosen = {
        'steps': 3,
        'batch_size': 6,
        'learning_rate': 5e-3,
        'latent_learning_rate': 5e-3,
    }
    chosen |= {'class_weight': 1.0, 'feature_weight': 1.0, 'labels': 'sampled'}
    chosen |= {
        'augment': Augment(1, False),
        'bank_size': 16,
        'negatives': 8,
        'head_size': 12,
        'device': 'cpu',
    }
    return ContrastiveSynthesizer(
        teacher, generator=Generator(teacher.domain.shape, 8, 4), **chosen | change
    )


# --- InfoNCE ---


def test_it_is_the_cross_entropy_of_finding_ones_own():
    u, v = torch.randn(2, 7, 4, dtype=torch.float64)
    likeness = torch.stack(
        [torch.stack([F.cosine_similarity(a, b, dim=0) for b in v]) for a in u]
    )
    wanted = F.cross_entropy(likeness / 0.3, torch.arange(7), reduction='none')
    assert torch.allclose(info_nce(u, v, 0.3), wanted, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda u, v: info_nce(u, v, 0.3), (u.requires_grad_(), v.requires_grad_())
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.sampled_from([1e-3, 1.0, 1e6]),
)
def test_its_bounds_and_that_length_and_order_do_not_count(seed, n, temperature, scale):
    u, v = torch.randn(
        2, n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    losses = info_nce(u, v, temperature)
    assert (losses >= 0).all() and (losses <= math.log(n) + 2 / temperature + 1e-9).all()
    assert torch.allclose(info_nce(scale * u, v, temperature), losses, atol=1e-9)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(
        info_nce(u[order], v[order], temperature), losses[order], atol=1e-9
    )


def test_a_guess_and_a_certainty():
    assert torch.allclose(
        info_nce(torch.eye(8), torch.ones(8, 8)), torch.tensor(math.log(8))
    )
    assert torch.allclose(
        info_nce(torch.eye(8), torch.eye(8), 0.1),
        torch.tensor(math.log(1 + 7 * math.exp(-10))),
        atol=1e-6,
    )
    assert info_nce(torch.zeros(3, 2), torch.zeros(3, 2)).isfinite().all()
    with pytest.raises(DFKDError, match='one key an anchor'):
        info_nce(torch.eye(3), torch.eye(4))
    with pytest.raises(DFKDError, match='positive'):
        info_nce(torch.eye(3), torch.eye(3), 0.0)


# --- views ---


def test_the_whole_is_a_view_of_itself_and_no_view_invents_pixels():
    x, rng = torch.rand(40, 3, 12, 20), torch.Generator().manual_seed(0)
    assert torch.allclose(LocalView((1.0, 1.0), (1.0, 1.0), False)(x, rng), x, atol=1e-5)
    mirrored = LocalView((1.0, 1.0), (1.0, 1.0))(x, rng)
    assert torch.allclose(
        mirrored.sort(3).values, x.sort(3).values, atol=1e-5
    ) and not torch.allclose(mirrored, x, atol=1e-5)
    parts = LocalView()(x, rng)
    assert parts.shape == x.shape
    assert (parts.amax((2, 3)) <= x.amax((2, 3)) + 1e-6).all() and (
        parts.amin((2, 3)) >= x.amin((2, 3)) - 1e-6
    ).all()


def test_a_part_has_the_area_that_was_asked_for():
    rows = torch.linspace(0, 1, 64)
    x = torch.stack([rows.expand(64, 64), rows[:, None].expand(64, 64)]).expand(
        200, 2, 64, 64
    )
    parts = LocalView((0.25, 0.6), (0.75, 4 / 3), False)(
        x, torch.Generator().manual_seed(1)
    )
    width = (parts[:, 0, 32, 48] - parts[:, 0, 32, 16]) * 63 / 32
    height = (parts[:, 1, 48, 32] - parts[:, 1, 16, 32]) * 63 / 32
    area, ratio = width * height, width / height
    assert 0.24 < area.min() and area.max() < 0.62 and area.std() > 0.05
    assert 0.72 < ratio.min() and ratio.max() < 1.38


@pytest.mark.parametrize('size', [(8, 8), (7, 12)], ids=str)
def test_a_view_is_the_resampling_of_an_affine_grid(size):
    "The same images and gradients as by PyTorch's resampling, which has no order on a GPU."
    x = torch.rand(30, 2, *size, dtype=torch.float64).requires_grad_()
    part, asked, inputs = (
        LocalView()(x, torch.Generator().manual_seed(4)),
        torch.Generator().manual_seed(4),
        LocalView(),
    )

    def uniform(low, high):
        return low + (high - low) * torch.rand(30, generator=asked)

    area, ratio = uniform(*inputs.scale), uniform(*map(math.log, inputs.ratio)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    right, down = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    width, zero = torch.where(uniform(0, 1) < 0.5, -width, width), torch.zeros(30)
    places = torch.stack(
        [torch.stack([width, zero, right], 1), torch.stack([zero, height, down], 1)], 1
    ).double()
    grid = F.affine_grid(places, list(x.shape), align_corners=False)
    wanted = F.grid_sample(x, grid, padding_mode='border', align_corners=False)
    torch.testing.assert_close(part, wanted, rtol=0, atol=1e-12)
    slope = torch.randn_like(x)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, slope)[0] for y in (part, wanted)), rtol=0, atol=1e-12
    )


def test_views_differ_between_images_repeat_with_the_seed_and_pass_gradients():
    x = (
        torch.rand(1, 1, 8, 8, dtype=torch.float64)
        .expand(5, 1, 8, 8)
        .clone()
        .requires_grad_()
    )
    one, two, other = (
        LocalView()(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert (
        torch.equal(one, two)
        and not torch.equal(one, other)
        and not torch.equal(one[0], one[1])
    )
    assert torch.autograd.grad(one.sum(), x)[0].abs().sum() > 0
    for wrong in ({'scale': (0.0, 1.0)}, {'scale': (0.5, 2.0)}, {'ratio': (2.0, 1.0)}):
        with pytest.raises(DFKDError, match='small to large'):
            LocalView(**wrong)
    for images in (torch.rand(3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(DFKDError, match=r'give floats \(N, C, H, W\)'):
            LocalView()(images, torch.Generator())


# --- summaries and the bank ---


def test_summaries_are_means_of_what_enters_and_hooks_are_removed():
    model, x = network(), torch.randn(4, 1, 8, 8)
    with PooledFeatures(model, ['1', '4', '7']) as summary:
        model(x)
        found = summary.vectors()
        with pytest.raises(DFKDError, match="did not use layer '1'"):
            summary.vectors()
    wanted = torch.cat(
        [model[:1](x).mean((2, 3)), model[:4](x).mean((2, 3)), model[:7](x)], 1
    )
    assert torch.allclose(found, wanted, atol=1e-6)
    with pytest.raises(RuntimeError), summary:
        raise RuntimeError
    assert not any(m._forward_pre_hooks for m in model.modules())


class Excite(nn.Module):
    "Squeeze and excite, with a layer called like the classifier."

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).sigmoid()[..., None, None]


class Named(nn.Module):
    """An `fc` before the classifier `fc`, a head not called in eval mode, a layer of two
    names.
    """

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = (
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
        )
        self.se, self.AuxLogits = Excite(), nn.Sequential()
        self.AuxLogits.add_module('norm', nn.BatchNorm1d(6) if norm else nn.Identity())
        self.AuxLogits.add_module('fc', nn.Linear(6, 10))
        self.fc = nn.Linear(6, 10)
        self.same = self.norm

    def forward(self, x):
        x = self.se(self.same(self.conv(x)).relu()).mean((2, 3))
        return self.fc(x) + self.AuxLogits(x) if self.training else self.fc(x)


@pytest.mark.parametrize('norm', [True, False], ids=['fused', 'plain'])
def test_the_right_layer_is_read(norm):
    torch.manual_seed(0)
    teacher, images = Teacher(used(Named(norm)), DIGITS), torch.rand(5, *DIGITS.shape)
    synthesizer = synthesizer_of(
        teacher, feature_weight=float(norm), layers=['fc', 'se.fc', 'same']
    )
    x = DIGITS.normalize(images)
    with torch.no_grad(), synthesizer.summary:
        synthesizer.extractor(x)
        found = synthesizer.summary.vectors()
    with torch.no_grad():
        entered = teacher.model.norm(teacher.model.conv(x)).relu()
        wanted = [
            teacher.embed(images),
            entered.mean((2, 3)),
            teacher.model.conv(x).mean((2, 3)),
        ]
    torch.testing.assert_close(found, torch.cat(wanted, 1), rtol=1e-5, atol=1e-5)
    default = synthesizer_of(teacher, feature_weight=float(norm))
    assert (
        list(default.summary.modules) == (['norm'] if norm else ['fc'])
        and default.features == 6
    )
    for layers in (['.fc'], ['c'], [''], ['model.fc'], []):
        with pytest.raises(DFKDError, match='layer'):
            synthesizer_of(teacher, feature_weight=0.0, layers=layers)
    with pytest.raises(DFKDError, match="did not use layer 'AuxLogits.fc'"):
        synthesizer_of(teacher, feature_weight=0.0, layers=['AuxLogits.fc'])
    with pytest.raises(DFKDError, match='give a list'):
        synthesizer_of(teacher, feature_weight=0.0, layers='fc')


def test_a_sequence_is_averaged_over_its_places_on_either_path():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 6, 3),
        nn.Flatten(2),
        nn.BatchNorm1d(6),
        nn.Flatten(),
        nn.Linear(216, 10),
    )
    teacher = Teacher(used(nn.Sequential(*layers)), DIGITS)
    x = torch.randn(3, *DIGITS.shape)
    for network in (
        teacher.model,
        teacher,
        fuse_statistics(teacher.model),
        fuse_statistics(teacher),
    ):
        with PooledFeatures(network, ['2']) as summary:
            network(x)
            torch.testing.assert_close(summary.vectors(), teacher.model[:2](x).mean(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(1, 20), max_size=6))
def test_the_bank_keeps_the_last_and_never_grows(size, batches):
    bank, ever = MemoryBank(size, 1), []
    for n in batches:
        new = torch.arange(len(ever), len(ever) + n).float()
        bank.add(torch.stack([new, -new], 1)[..., None])
        ever += new.tolist()
    pairs = bank.draw(99, torch.Generator().manual_seed(0))
    assert sorted(pairs[:, 0, 0].tolist()) == ever[-size:] and len(bank) == min(
        size, len(ever)
    )
    assert torch.equal(pairs[:, 0], -pairs[:, 1]) and bank.kept.shape == (size, 2, 1)


def test_a_bank_goes_on_where_its_ring_stood():
    def pairs(*numbers):
        return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1).expand(-1, 2, 1)

    bank, other = MemoryBank(3, 1), MemoryBank(3, 1)
    bank.add(pairs(1, 2, 3, 4, 5))
    other.load_state_dict(bank.state_dict())
    for some in (bank, other):
        some.add(pairs(6))
        assert sorted(some.kept[:, 0, 0].tolist()) == [4, 5, 6]


def test_a_bank_that_does_not_fit_is_refused():
    with pytest.raises(DFKDError, match=r'give \(n, 2, 3\)'):
        MemoryBank(4, 3).add(torch.zeros(2, 2, 4))
    with pytest.raises(DFKDError, match='same size and layers'):
        MemoryBank(4, 3).load_state_dict(MemoryBank(5, 3).state_dict())
    with pytest.raises(DFKDError, match='1 or more'):
        MemoryBank(0, 3)


# --- the synthesizer ---


def test_batches_fill_the_bank_and_each_begins_anew(teacher):
    synthesizer = synthesizer_of(teacher)
    images = synthesizer.synthesize(24)
    assert (
        len(images) == 24 and len(synthesizer.bank) == 16 and synthesizer.bank.added == 24
    )
    assert synthesizer.features == 11 and not synthesizer.bank.kept.requires_grad
    assert all(row['contrast'] > 0 for row in synthesizer.history)
    weights = {k: v.clone() for k, v in synthesizer.weights.items()}
    head = [p.clone() for p in synthesizer.head.parameters()]
    synthesizer.begin_batch()
    assert all(
        (synthesizer.weights[k] != v).any() for k, v in weights.items() if v.ndim > 1
    )
    assert all(
        (a != b).any() for a, b in zip(synthesizer.head.parameters(), head, strict=True)
    )
    assert not any(
        m._forward_pre_hooks
        for m in (*teacher.modules(), *synthesizer.extractor.network.modules())
    )


def test_the_head_learns_and_keys_stand_still(teacher):
    synthesizer = synthesizer_of(teacher)
    synthesizer.synthesize(6)
    synthesizer.step()
    before = [p.clone() for p in synthesizer.head.parameters()]
    synthesizer.step()
    assert all(
        (a != b).any() for a, b in zip(synthesizer.head.parameters(), before, strict=True)
    )
    images = synthesizer.generate(synthesizer.latents).detach().requires_grad_()
    synthesizer.local = lambda images, generator: images.detach()
    _, values, _ = synthesizer.compute_loss(images, synthesizer.targets)
    assert torch.autograd.grad(values['contrast'], images, allow_unused=True)[0] is None


def test_the_head_learns_from_anchors_alone(teacher):
    "The gradient of the head is that of InfoNCE with keys that are numbers."
    synthesizer = synthesizer_of(teacher)
    synthesizer.synthesize(6)
    synthesizer.step()
    images, seen = synthesizer.generate(synthesizer.latents), {}
    synthesizer.local = lambda images, generator: seen.setdefault('part', images.flip(3))
    synthesizer.bank.draw = lambda n, generator: seen.setdefault(
        'old', synthesizer.bank.kept[:4]
    )
    synthesizer.augment = None
    _, values, _ = synthesizer.compute_loss(images, synthesizer.targets)
    found = torch.autograd.grad(values['contrast'], list(synthesizer.head.parameters()))
    vectors = []
    with synthesizer.summary, torch.no_grad():
        for shown in (seen['part'], images):
            synthesizer.extractor(DIGITS.normalize(shown))
            vectors.append(synthesizer.summary.vectors())
    anchors = synthesizer.head(torch.cat([vectors[0], seen['old'][:, 0]]))
    keys = synthesizer.head(torch.cat([vectors[1], seen['old'][:, 1]])).detach()
    losses = info_nce(anchors, keys, synthesizer.contrastive_temperature)
    wanted = torch.autograd.grad(
        losses[:6].mean() + losses[6:].mean(), list(synthesizer.head.parameters())
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_some_steps_lower_the_contrast_of_a_batch(teacher):
    def loss_of(synthesizer, latents):
        with torch.no_grad():
            return sum(
                float(
                    synthesizer.compute_loss(
                        synthesizer.generate(latents), torch.zeros(32, dtype=torch.long)
                    )[1]['contrast']
                )
                for _ in range(10)
            )

    alone = {'class_weight': 0.0, 'feature_weight': 0.0, 'contrastive_weight': 1.0}
    synthesizer = synthesizer_of(
        teacher, **alone, steps=30, batch_size=32, weight_init='default'
    )
    synthesizer.begin_batch()
    synthesizer.bank.added, latents = 0, synthesizer.latents.detach().clone()
    before = loss_of(synthesizer, latents)
    for _ in range(29):
        synthesizer.step()
    assert loss_of(synthesizer, synthesizer.latents.detach()) < before


def test_without_weight_it_is_the_plain_synthesizer_with_a_bank_that_stays_empty(teacher):
    synthesizer = synthesizer_of(teacher, contrastive_weight=0.0)
    synthesizer.synthesize(64)
    assert not len(synthesizer.bank) and 'contrast' not in synthesizer.history[0]


@pytest.mark.parametrize('left', [0, 1, 2])
@pytest.mark.parametrize('init', ['scratch', 'sequential'])
def test_a_batch_resumes_to_the_same_bits_wherever_it_was_cut(
    teacher, tmp_path, init, left
):
    whole = synthesizer_of(teacher, init=init)
    part = synthesizer_of(teacher, init=init)
    resumed = synthesizer_of(teacher, init=init, weights=9)
    wanted = whole.synthesize(24)
    part.synthesize(6)
    part.step()
    while part.steps_left > left:
        part.step()
    save_checkpoint(tmp_path / 'state.pt', part.state_dict())
    resumed.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    while resumed.steps_left:
        resumed.step()
    assert torch.equal(
        torch.cat([resumed.pop().images, resumed.synthesize(12).images]),
        wanted.images[6:],
    )
    assert resumed.history == whole.history and torch.equal(
        resumed.bank.kept, whole.bank.kept
    )


def test_a_trainer_with_a_pool_resumes_to_the_same_bits(teacher, tmp_path):
    def trainer():
        student = forgetful(network(1))
        synthesizer = synthesizer_of(
            teacher, student=student, adversarial_weight=0.5, agreement=True
        )
        distiller = Distiller(
            teacher,
            student,
            GrowingPool(DIGITS),
            steps=8,
            batch_size=4,
            learning_rate=0.05,
            device='cpu',
        )
        return AlternatingTrainer(synthesizer, distiller, rounds=2, steps_per_round=4)

    whole = trainer().run()
    for until in (0, 2, 5, 8, 12):
        part, resumed = trainer(), trainer()
        for _ in range(until):
            part.step()
        save_checkpoint(tmp_path / 'trainer.pt', part.state_dict())
        torch.manual_seed(99)
        resumed.load_state_dict(load_checkpoint(tmp_path / 'trainer.pt'))
        resumed.run()
        assert torch.equal(resumed.pool.images, whole.pool.images), until
        assert torch.equal(resumed.synthesizer.bank.kept, whole.synthesizer.bank.kept), (
            until
        )
        states = (trainer.student.state_dict().values() for trainer in (resumed, whole))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True)), until


@each(
    ('change', 'message'),
    [
        ({'contrastive_weight': -1.0}, 'give 0 or more'),
        ({'contrastive_temperature': 0.0}, 'a positive one'),
        ({'bank_size': 0}, '1 or more of each'),
        ({'weight_init': 'ones'}, 'use normal or default'),
        ({'layers': ['9']}, "no layer '9'"),
        ({'init': 'meta'}, 'use sequential, scratch'),
    ],
)
def test_what_cannot_work_is_told_at_once(teacher, change, message):
    with pytest.raises(DFKDError, match=message):
        synthesizer_of(teacher, **change)


def test_a_state_of_other_settings_is_refused(teacher):
    with pytest.raises(DFKDError, match='contrastive_temperature'):
        synthesizer_of(teacher).load_state_dict(
            synthesizer_of(teacher, contrastive_temperature=0.5).state_dict()
        )
    with pytest.raises(DFKDError, match='contrast'):
        synthesizer_of(teacher).load_state_dict(
            synthesizer_of(teacher, contrastive_weight=0.5).state_dict()
        )
    with pytest.raises(DFKDError, match='same size'):
        synthesizer_of(teacher).load_state_dict(
            synthesizer_of(teacher, bank_size=17).state_dict()
        )
    for change in ({'head_size': 13}, {'local': LocalView((0.5, 1.0))}, {'layers': ['7']}):
        with pytest.raises(DFKDError, match=f'other settings: {next(iter(change))}'):
            synthesizer_of(teacher).load_state_dict(
                synthesizer_of(teacher, **change).state_dict()
            )


def test_presets_are_settings(teacher):
    for name in CMI_PRESETS:
        chosen = cmi_preset(name) | {'steps': 1, 'batch_size': 4, 'student': network(1)}
        assert (
            len(
                ContrastiveSynthesizer(
                    teacher, generator=Generator(DIGITS.shape, 8, 4), device='cpu', **chosen
                ).synthesize(4)
            )
            == 4
        )
    with pytest.raises(DFKDError, match='use cmi'):
        cmi_preset('best')


def test_a_foreign_network_without_batchnorm_is_summarised_before_its_classifier():
    domain = Domain('wide', (3, 24, 40), (0.5,) * 3, (0.3,) * 3, ('yes', 'no', 'perhaps'))
    teacher = Teacher(network(0, domain, norm=False), domain)
    synthesizer = synthesizer_of(teacher, feature_weight=0.0)
    assert (
        synthesizer.synthesize(12).images.shape == (12, 3, 24, 40)
        and synthesizer.features == 5
    )
