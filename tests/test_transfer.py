"Transfer: pools by two schemes, learning curves, fidelity, and what a dream is worth."

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd_nb.applications.transfer import (
    fidelity,
    learning_curve,
    teaching_values,
    two_schemes,
)
from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.lab.recipes import Recipe
from dfkd_nb.lab.tasks.synthesis import shards
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import load_data
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher

FAST = {
    'half_size_steps': 2,
    'full_size_steps': 1,
    'single_steps': 2,
    'jitter': 0,
    'flip': False,
    'device': 'cpu',
    'feature_weight': 0.0,
}


@pytest.fixture(scope='module')
def teacher():
    torch.manual_seed(0)
    return Teacher(build_model('digits-net', 10, 1), DOMAINS['digits'], 'untrained')


@pytest.fixture(scope='module')
def student():
    torch.manual_seed(1)
    return build_model('digits-net', 10, 1)


@pytest.fixture(scope='module')
def digits():
    return load_data('digits', 'test')


def test_each_scheme_makes_its_fraction(teacher):
    pool = two_schemes(teacher, 40, seed=3, **FAST)
    asked = {name: FAST[name] for name in ('jitter', 'flip', 'device', 'feature_weight')}
    single = DeepInversion(teacher, stages=[(8, 2)], seed=3 + 1, **asked).synthesize(20)
    multi = DeepInversion(teacher, stages=[(4, 2), (8, 1)], seed=3, **asked).synthesize(20)
    made = {tuple(image.flatten().tolist()) for image in pool.images}
    assert made == {
        tuple(image.flatten().tolist())
        for image in torch.cat([single.images, multi.images])
    }
    assert pool.labels.bincount().tolist() == [4] * 10
    first = {tuple(image.flatten().tolist()) for image in pool.images[:10]}
    ones = {tuple(image.flatten().tolist()) for image in single.images}
    assert 0 < len(first & ones) < 10, 'any first images hold both kinds'
    again = two_schemes(teacher, 40, seed=3, **FAST)
    assert torch.equal(pool.images, again.images) and torch.equal(pool.labels, again.labels)


@pytest.mark.parametrize('fraction', [0.0, 1.0])
def test_one_scheme_alone(teacher, fraction):
    assert len(two_schemes(teacher, 10, single_fraction=fraction, **FAST)) == 10


def test_fractions_of_a_recipe():
    recipe = Recipe.load('cifar10-transfer-schemes-both')
    settings = recipe.resolve(
        'quick', {'images': 300, 'synthesis_batch_size': 4096, 'single_fraction': 0.25}
    )
    assert shards(settings) == [(slice(0, 225), False), (slice(225, 300), True)]
    large = shards(recipe.resolve('quick', {'images': 10000, 'synthesis_batch_size': 4096}))
    sizes = [(place.stop - place.start, single) for place, single in large]
    assert sizes == [(4096, False), (904, False), (4096, True), (904, True)]


def test_learning_curve_repeats_itself_and_varies_only_what_it_says(teacher, digits):
    pool = ImageSet(digits.images[:60], None, digits.domain)
    asked = {'steps': 3, 'batch_size': 8, 'device': 'cpu'}

    def build():
        return build_model('digits-net', 10, 1)

    rows = learning_curve(
        teacher,
        build,
        pool,
        [10, 60],
        digits.subset(100),
        seeds=(0, 1),
        probe=pool,
        **asked,
    )
    assert [(row['images'], row['seed']) for row in rows] == [
        (10, 0),
        (60, 0),
        (10, 1),
        (60, 1),
    ]
    assert all({'accuracy', 'agreement', 'divergence'} <= set(row) for row in rows)
    assert rows == learning_curve(
        teacher,
        build,
        pool,
        [10, 60],
        digits.subset(100),
        seeds=(0, 1),
        probe=pool,
        **asked,
    )
    parts = []

    class Watched(ImageSet):
        def subset(self, which):
            parts.append(which.tolist())
            return super().subset(which)

    learning_curve(
        teacher,
        build,
        Watched(pool.images, None, pool.domain),
        [4, 10],
        digits.subset(10),
        seeds=(0, 1),
        **asked,
    )
    assert parts[0] == parts[1][:4] and parts[2] == parts[3][:4], (
        'a larger part holds the smaller one'
    )
    assert parts[1] != parts[3] and len(set(parts[1])) == 10, 'each seed draws its own'
    with pytest.raises(DFKDError, match='61 images asked of a pool of 60'):
        learning_curve(teacher, build, pool, [61], digits, **asked)


def test_fidelity_by_hand():
    domain = Domain('two', (1, 1, 1), (0.0,), (1.0,), ('a', 'b'))

    def linear(slope):
        layer = nn.Linear(1, 2, bias=False)
        layer.weight.data = torch.tensor([[slope], [0.0]])
        return nn.Sequential(nn.Flatten(), layer)

    images = torch.tensor([255, 0], dtype=torch.uint8).view(2, 1, 1, 1)
    found = fidelity(Teacher(linear(1.0), domain), linear(-3.0), images)
    # on white they say (e, 1) / (e + 1) and (1, e³) / (e³ + 1); on black both say a half
    p, q = (
        torch.tensor([slope, 0.0], dtype=torch.float64).softmax(0) for slope in (1.0, -3.0)
    )
    assert found['divergence'] == pytest.approx(
        float((p * (p / q).log()).sum()) / 2, abs=1e-6
    )
    assert found['agreement'] == 0.5  # at a tie both name the first
    with pytest.raises(DFKDError, match='at least one'):
        fidelity(Teacher(linear(1.0), domain), linear(1.0), images[:0])


def naive(teacher, student, images, probe, temperature=3.0):
    "One gradient an image, by the definition."
    student = copy.deepcopy(student).eval()

    def gradient(batch):
        x = teacher.domain.normalize(batch).double()
        teacher_log, student_log = (
            network(x).div(temperature).log_softmax(1) for network in (teacher, student)
        )
        loss = (
            F.kl_div(
                student_log,
                teacher_log.detach(),
                reduction='batchmean',
                log_target=True,
            )
            * temperature**2
        )
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))]
        )

    direction = gradient(probe)
    return torch.stack([gradient(image[None]) @ direction for image in images])


@pytest.mark.parametrize('batch_size', [250, 3])
def test_values_are_what_one_gradient_an_image_gives(teacher, student, digits, batch_size):
    images, probe = digits.images[:7], digits.images[100:120]
    expected = naive(doubled(teacher), doubled(student), images, probe)
    found = teaching_values(
        doubled(teacher), doubled(student), images, probe, batch_size=batch_size
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    # in single precision as well
    found = teaching_values(teacher, student, images, probe, batch_size=batch_size)
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )


def doubled(network):
    return copy.deepcopy(network).double()


def test_a_step_on_a_valuable_image_helps_elsewhere(teacher, student, digits):
    """In double precision: a step changes the probe's loss by 4e-7, which single precision
    does not resolve.
    """
    teacher, student = doubled(teacher), doubled(student)
    images, probe = digits.images[:20], digits.images[100:150]
    values = teaching_values(teacher, student, images, probe)
    assert values.dtype == torch.float64

    def seen(images):
        return teacher.domain.normalize(images).double()

    x = seen(probe)

    def after(image):
        "The probe's loss after one small step on one image."
        learner = copy.deepcopy(student).eval()
        teacher_log = teacher(seen(image[None])).div(3).log_softmax(1)
        student_log = learner(seen(image[None])).div(3).log_softmax(1)
        loss = (
            F.kl_div(student_log, teacher_log, reduction='batchmean', log_target=True) * 9
        )
        for weight, g in zip(
            learner.parameters(), torch.autograd.grad(loss, list(learner.parameters()))
        ):
            weight.data -= 1e-2 * g
        with torch.no_grad():
            student_log = learner(x).div(3).log_softmax(1)
            teacher_log = teacher(x).div(3).log_softmax(1)
            return float(
                F.kl_div(student_log, teacher_log, reduction='batchmean', log_target=True)
                * 9
            )

    changes = torch.tensor([after(image) for image in images], dtype=torch.double)
    assert torch.corrcoef(torch.stack([values, -changes]))[0, 1] > 0.9999, (
        'what an image is worth is what a step on it gains elsewhere'
    )


def test_the_student_is_left_as_it_was(teacher, student, digits):
    learner = copy.deepcopy(student).train()
    before = copy.deepcopy(learner.state_dict())
    teaching_values(teacher, learner, digits.images[:4], digits.images[4:8])
    fidelity(teacher, learner, digits.images[:4])
    assert all(torch.equal(before[k], v) for k, v in learner.state_dict().items())
    assert all(module.training for module in learner.modules())
    assert all(p.grad is None for p in learner.parameters())


def test_values_of_networks_with_operations_in_place(digits):
    domain = DOMAINS['cifar10']
    torch.manual_seed(0)
    teacher = doubled(Teacher(build_model('resnet8'), domain))
    student = doubled(build_model('wrn16-1'))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    found = teaching_values(teacher, student, images, images)
    expected = naive(teacher, student, images, images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_a_student_of_another_normalisation_is_asked_about_the_same_images(
    teacher, student, digits
):
    other = replace(teacher.domain, mean=(0.0,), std=(1.0,))
    images = digits.images[:9]
    probe = digits.images[100:120]

    class Rescaled(nn.Module):
        "Answers as `student` does, to images on the other scale."

        def __init__(self):
            super().__init__()
            self.net = doubled(student)

        def forward(self, x):
            return self.net(other.renormalize(x, teacher.domain))

    double = doubled(teacher)
    for measure in (fidelity, lambda *a, **k: teaching_values(*a, probe, **k)):
        found = measure(double, Rescaled(), images, domain=other)
        expected = measure(double, doubled(student), images)
        assert (
            found == pytest.approx(expected)
            if isinstance(found, dict)
            else torch.allclose(found, expected)
        )


def test_a_curve_leaves_the_random_streams_alone_and_needs_a_pool(teacher, digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    asked = {'steps': 1, 'batch_size': 8, 'device': 'cpu'}
    learning_curve(
        teacher,
        lambda: build_model('digits-net', 10, 1),
        digits.subset(20),
        [10],
        digits.subset(20),
        **asked,
    )
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(DFKDError, match='no pool in a list: give an ImageSet'):
        learning_curve(teacher, nn.Identity, [digits.images], [1], digits)
    for measure in (fidelity, lambda *a: teaching_values(*a, digits)):
        with pytest.raises(DFKDError, match='no images in a NoneType'):
            measure(teacher, build_model('digits-net', 10, 1), None)


def test_frozen_students_are_refused(teacher, student, digits):
    frozen = copy.deepcopy(student).requires_grad_(False)
    with pytest.raises(DFKDError, match='switch requires_grad on'):
        teaching_values(teacher, frozen, digits.images[:2], digits.images[:2])
