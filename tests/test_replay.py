"""Replay: the buffer against plain Python, its properties, drawn frequencies against
probabilities, resuming to the bit.
"""

import copy
import dataclasses
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIGITS

from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import AlternatingTrainer
from dfkd_nb.generators.generators import Generator
from dfkd_nb.generators.methods import ssd_kd
from dfkd_nb.generators.replay import ReplayPool, importance_weights, sampling_probabilities
from dfkd_nb.generators.replay_explorer import draw_buffer, replay_explorer
from dfkd_nb.generators.ssd_kd import modulated_class_term, modulation, ssd_kd_preset
from dfkd_nb.generators.synthesizer import GeneratorSynthesizer
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.core import load_checkpoint, save_checkpoint
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.teachers import Teacher


def network(seed=0):
    "A network that is confident."
    model = tiny.network(seed)
    with torch.no_grad():
        model[-1].weight.mul_(8)
    return model


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


def forgetful(model):
    "With dropout before the last layer: in training mode it draws from the global streams."
    return torch.nn.Sequential(*model[:-1], torch.nn.Dropout(0.4), model[-1])


def pictures(n, seed=0):
    return torch.randint(
        256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def filled(n=5, size=5, priorities=None, **options):
    "A buffer about which no network was asked."
    pool = ReplayPool(DIGITS, size, **options)
    given = None if priorities is None else torch.tensor(priorities)
    pool.insert(pictures(n), torch.arange(n) % 10, torch.linspace(0.2, 0.9, n), given)
    return pool


# --- the formulas -------------------------------------------------------------------------

fractions = st.floats(0, 1)
many = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=40)


# class and confidence
made = st.lists(st.tuples(st.integers(0, 3), fractions), min_size=1, max_size=20)


@given(made, st.lists(st.integers(0, 9), min_size=4, max_size=4), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_modulation_is_equation_3(images, counts, gamma):
    size = max(sum(counts), 1)
    classes = torch.tensor([c for c, _ in images])
    confidences = torch.tensor([p for _, p in images], dtype=torch.float64)
    phi = modulation(classes, confidences, torch.tensor(counts), size, gamma)
    for value, (c, p) in zip(phi.tolist(), images):
        assert value == pytest.approx((1 - counts[c] / size) * (1 - p) ** gamma, abs=1e-6)
        assert 0 <= value <= 1
    difficulty, diversity, neither = (
        modulation(classes, confidences, torch.tensor(counts), size, gamma, *which)
        for which in ((True, False), (False, True), (False, False))
    )
    torch.testing.assert_close(difficulty * diversity, phi)
    assert (neither == 1).all()


@given(fractions, fractions, st.integers(0, 100), st.integers(0, 100), st.floats(0.01, 5))
@settings(max_examples=60, deadline=None)
def test_modulation_falls_with_confidence_and_with_frequency(p, q, few, more, gamma):
    p, q, few, more = min(p, q), max(p, q), min(few, more), max(few, more)
    counts, size = torch.tensor([few, more]), 200
    zero = torch.zeros(2, dtype=torch.long)
    confident = modulation(zero, torch.tensor([p, q]).double(), counts, size, gamma)
    assert confident[0] >= confident[1]
    often = modulation(
        torch.tensor([0, 1]), torch.tensor([p, p]).double(), counts, size, gamma
    )
    assert often[0] >= often[1]


@given(many, st.floats(0, 2), st.floats(1e-4, 1))
@settings(max_examples=80, deadline=None)
def test_probabilities_are_equation_6(priorities, alpha, epsilon):
    found = sampling_probabilities(torch.tensor(priorities), alpha, epsilon)
    mass = [(abs(d) + epsilon) ** alpha for d in torch.tensor(priorities).tolist()]
    assert found.tolist() == pytest.approx([m / sum(mass) for m in mass], rel=1e-9)
    assert float(found.sum()) == pytest.approx(1, abs=1e-9)
    assert (found > 0).all(), 'epsilon keeps everything drawable'
    order = torch.tensor(priorities).argsort()
    assert (found[order].diff() >= -1e-15).all(), (
        'a larger priority is not drawn less often'
    )
    assert torch.allclose(
        sampling_probabilities(torch.tensor(priorities), 0.0, epsilon),
        torch.full_like(found, 1 / len(found)),
    )


@given(many, st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_weights_undo_the_preference(priorities, beta):
    probabilities = sampling_probabilities(torch.tensor(priorities))
    weights = importance_weights(probabilities, len(probabilities), beta)
    assert weights.tolist() == pytest.approx(
        [(len(priorities) * p) ** -beta for p in probabilities.tolist()], rel=1e-9
    )
    assert float((probabilities * weights).sum()) <= 1 + 1e-9, (
        'on average never more than 1 (Jensen)'
    )
    full = importance_weights(probabilities, len(probabilities), 1.0)
    assert torch.allclose(probabilities * full, torch.full_like(full, 1 / len(full))), (
        'beta = 1: every image counts alike'
    )


# --- a reference in plain Python ----------------------------------------------------------


class PlainPool:
    "The same buffer with lists and loops: oldest first, no tensors but the images."

    def __init__(self, size, alpha, beta, epsilon, normalised):
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.epsilon = epsilon
        self.normalised = normalised
        self.slots, self.next = [], 0

    def add(self, rows):
        for row in rows:
            if len(self.slots) < self.size:
                self.slots.append(row)
            else:
                self.slots[self.next] = row
            self.next = (self.next + 1) % self.size

    def probabilities(self):
        mass = [(abs(row['priority']) + self.epsilon) ** self.alpha for row in self.slots]
        return [m / sum(mass) for m in mass]

    def draw(self, tickets):
        chosen, probabilities = [], self.probabilities()
        for ticket in tickets:
            below, index = 0.0, 0
            while index < len(probabilities) - 1 and below + probabilities[index] <= ticket:
                below, index = below + probabilities[index], index + 1
            chosen.append(index)
        return chosen

    def report(self, chosen, distances):
        probabilities, n = self.probabilities(), len(self.slots)
        weights = [(n * p) ** -self.beta for p in probabilities]
        if self.normalised:
            weights = [w / max(weights) for w in weights]
        heard = {}
        for index, distance in zip(chosen, distances):
            heard.setdefault(index, []).append(weights[index] * distance)
        for index, values in heard.items():
            self.slots[index]['priority'] = sum(values) / len(values)


def divergence(teacher_logits, student_logits):
    p, q = teacher_logits.double().softmax(1), student_logits.double().softmax(1)
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize('normalised', [False, True])
def test_the_buffer_follows_plain_python(teacher, normalised):
    student, size = network(1), 12
    pool = ReplayPool(
        DIGITS,
        size,
        teacher,
        student,
        alpha=0.7,
        beta=0.5,
        epsilon=0.01,
        normalised=normalised,
    )
    plain = PlainPool(size, 0.7, 0.5, 0.01, normalised)
    generator, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    noise = torch.Generator().manual_seed(4)
    for index in range(12):
        fresh = pictures(5, index)
        pool.add(fresh, torch.zeros(5, dtype=torch.long))
        with torch.no_grad():
            teacher_logits = teacher.predict(fresh)
            student_logits = student(DIGITS.normalize(fresh))
        rows = zip(
            fresh,
            teacher_logits.argmax(1).tolist(),
            teacher_logits.softmax(1).amax(1).tolist(),
            divergence(teacher_logits, student_logits).tolist(),
        )
        plain.add(
            [
                {'image': i, 'class': c, 'confidence': p, 'priority': d}
                for i, c, p, d in rows
            ]
        )
        for _ in range(3):
            images, labels = pool.sample(20, generator)
            chosen = plain.draw(
                torch.rand(20, generator=twin, dtype=torch.float64).tolist()
            )
            assert torch.equal(
                images, torch.stack([plain.slots[i]['image'] for i in chosen])
            )
            assert labels.tolist() == [plain.slots[i]['class'] for i in chosen]
            logits = torch.randn(2, 20, 10, generator=noise)
            pool.update(logits[0], logits[1])
            plain.report(chosen, divergence(logits[1], logits[0]).tolist())
        assert pool.probabilities.tolist() == pytest.approx(plain.probabilities(), rel=1e-4)
        assert pool.priorities.tolist() == pytest.approx(
            [row['priority'] for row in plain.slots], rel=1e-4, abs=1e-6
        )
        assert pool.confidences.tolist() == pytest.approx(
            [row['confidence'] for row in plain.slots], rel=1e-5
        )
        assert pool.counts.tolist() == [
            sum(row['class'] == k for row in plain.slots) for k in range(10)
        ]
        assert len(pool) == len(plain.slots) == min(size, 5 * (index + 1))


@given(st.lists(st.integers(1, 17), min_size=1, max_size=8), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_size_is_constant_and_the_oldest_go_first(portions, size):
    pool, everything = ReplayPool(DIGITS, size), []
    for index, n in enumerate(portions):
        images = pictures(n, index)
        classes = torch.randint(10, (n,), generator=torch.Generator().manual_seed(index))
        pool.insert(images, classes, torch.rand(n))
        everything += [(int(c), image.sum().item()) for c, image in zip(classes, images)]
        kept = everything[-size:]
        assert len(pool) == len(kept) == len(pool.images) == len(pool.labels)
        assert sorted(
            zip(pool.labels.tolist(), pool.images.sum((1, 2, 3)).tolist())
        ) == sorted(kept)
        assert pool.counts.tolist() == torch.bincount(pool.labels, minlength=10).tolist()
        assert pool.added == len(everything)


# --- drawing ------------------------------------------------------------------------------


@pytest.mark.parametrize('alpha', [0.0, 0.6, 2.0])
def test_drawn_frequencies_are_the_probabilities(alpha):
    size, draws = 40, 40_000
    pool = ReplayPool(DIGITS, size, alpha=alpha, epsilon=0.01)
    pool.insert(
        pictures(size),
        torch.arange(size) % 10,
        torch.rand(size),
        torch.linspace(0.3, 3, size),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws // 1000):
        pool.sample(1000, generator)
    expected = draws * pool.probabilities
    assert pool.sample_counts.sum() == draws and expected.min() > 5
    chi_square = float(((pool.sample_counts - expected).square() / expected).sum())
    assert abs(chi_square - (size - 1)) < 4 * math.sqrt(2 * (size - 1)), (
        'mean K - 1, variance 2 (K - 1)'
    )


def test_the_statistical_test_can_fail():
    pool = filled(40, 40, torch.linspace(0.05, 3, 40).tolist(), alpha=0.6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        pool.sample(1000, generator)
    wrong = 40_000 * sampling_probabilities(pool.priorities, 0.5, pool.epsilon)
    assert float(
        ((pool.sample_counts - wrong).square() / wrong).sum()
    ) > 39 + 10 * math.sqrt(78)


def test_no_number_below_one_draws_beyond_the_last_image():
    pool = filled(3, 3, [1.0, 1.0, 0.0], epsilon=1e-12)
    pool.sample(200_000, torch.Generator().manual_seed(1))
    assert int(pool.last_indices.max()) <= 2 and int(pool.last_indices.min()) >= 0


def test_sample_counts_add_whole_numbers(monkeypatch):
    "A sum of floats depends on its order, and a GPU has none."
    added = []
    plain = torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor, 'cumsum', lambda x, dim: added.append(x) or plain(x, dim)
    )
    size = 20_000
    pool = ReplayPool(DIGITS, size)
    pool.insert(
        pictures(1).expand(size, -1, -1, -1),
        torch.zeros(size).long(),
        torch.ones(size),
        torch.linspace(0, 9, size),
    )
    pool.sample(64, torch.Generator().manual_seed(0))
    (widths,) = added
    assert not widths.is_floating_point()
    torch.testing.assert_close(
        widths.double() / 2**53, pool.probabilities, rtol=1e-9, atol=0
    )
    assert 0 <= 2**53 - int(widths.sum()) <= size, (
        'what rounding takes is far below the smallest width'
    )
    lengths, numbers = (
        widths.tolist(),
        torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    for index, ticket in zip(pool.last_indices.tolist(), (numbers * 2**53).long().tolist()):
        assert sum(lengths[:index]) <= ticket < sum(lengths[: index + 1])


def test_without_priorities_every_image_comes_once_before_any_comes_twice():
    pool = filled(10, 10, [float(i) for i in range(10)], prioritised=False)
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 4):
        for _ in range(2):
            pool.sample(5, generator)
            pool.update(
                torch.randn(5, 10, generator=generator),
                torch.randn(5, 10, generator=generator),
            )
        assert pool.sample_counts.tolist() == [n] * 10
    assert pool.probabilities.tolist() == pytest.approx([0.1] * 10)
    assert torch.equal(pool.weights(torch.arange(10)), torch.ones(10))


# --- priorities ---------------------------------------------------------------------------


def test_duplicates_share_the_mean_and_the_rest_keeps_its_priority():
    pool = filled(priorities=[1.0, 2.0, 3.0, 4.0, 5.0])
    pool.set_priorities(torch.tensor([3, 1, 3]), torch.tensor([8.0, 0.5, 10.0]))
    assert pool.priorities.tolist() == [1.0, 0.5, 3.0, 9.0, 5.0]
    pool.set_priorities(
        torch.tensor([0, 2, 2]), torch.tensor([float('nan'), float('inf'), 7.0])
    )
    assert pool.priorities.tolist() == [1.0, 0.5, 7.0, 9.0, 5.0]


def test_duplicates_are_weighed_by_the_probabilities_they_were_drawn_with():
    pool = filled(priorities=[1.0, 2.0, 3.0, 4.0, 5.0], beta=1.0)
    pool.sample(200, torch.Generator().manual_seed(0))
    chosen, weights = pool.last_indices.clone(), pool.weights(torch.arange(5))
    teacher_logits, student_logits = torch.randn(
        2, 200, 10, generator=torch.Generator().manual_seed(1)
    )
    apart = divergence(teacher_logits, student_logits)
    pool.update(student_logits, teacher_logits)
    for i in range(5):
        assert float(pool.priorities[i]) == pytest.approx(
            float(weights[i] * apart[chosen == i].mean()), rel=1e-4
        )


def test_first_priorities(teacher):
    fresh = pictures(6)
    alone = ReplayPool(DIGITS, 6, teacher)
    alone.add(fresh)
    assert alone.priorities.tolist() == [1.0] * 6
    alone.set_priorities(torch.tensor([2]), torch.tensor([4.0]))
    alone.add(fresh[:2])
    assert alone.priorities.tolist() == [4.0, 4.0, 4.0, 1.0, 1.0, 1.0], 'the largest so far'
    student = network(1).train()
    watched = ReplayPool(DIGITS, 6, teacher, student)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    watched.add(fresh)
    assert student.training and all(
        torch.equal(v, before[k]) for k, v in student.state_dict().items()
    )
    with torch.no_grad():
        expected = divergence(
            teacher.predict(fresh), student.eval()(DIGITS.normalize(fresh))
        )
    assert watched.priorities.tolist() == pytest.approx(
        expected.tolist(), rel=1e-4, abs=1e-6
    )


def test_networks_of_other_scales_and_precisions(teacher):
    other = dataclasses.replace(DIGITS, mean=(0.6,), std=(0.15,))
    fresh, found = pictures(6), []
    for domain, precision in (
        (other, torch.float32),
        (other, torch.float64),
        (DIGITS, torch.float32),
    ):
        pool = ReplayPool(
            DIGITS, 6, teacher, network(1).to(precision), student_domain=domain
        )
        pool.add(fresh)
        found.append(pool.priorities.tolist())
    with torch.no_grad():
        expected = divergence(teacher.predict(fresh), network(1)(other.normalize(fresh)))
    assert found[0] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert found[2] != pytest.approx(found[0], rel=0.1)


def test_fixed_point_softens_alpha():
    """With distances that stand still, priorities settle at P ~ KL^(alpha / (1 + alpha
    beta)).
    """
    apart, alpha, beta = torch.logspace(-2, 1, 8), 0.6, 0.5
    for normalised in (False, True):
        pool = ReplayPool(
            DIGITS, 8, alpha=alpha, beta=beta, epsilon=1e-9, normalised=normalised
        )
        pool.insert(pictures(8), torch.arange(8), torch.ones(8), apart)
        indices = torch.arange(8)
        for _ in range(80):
            pool.set_priorities(indices, pool.weights(indices) * apart)
        expected = apart.double() ** (alpha / (1 + alpha * beta))
        assert pool.probabilities.tolist() == pytest.approx(
            (expected / expected.sum()).tolist(), rel=1e-4
        )


def test_a_loss_may_be_weighed(teacher):
    plain, weighing = (
        ReplayPool(DIGITS, 8, teacher, network(1), beta=1.0, weighs_loss=on)
        for on in (False, True)
    )
    for pool in (plain, weighing):
        pool.add(pictures(8))
        pool.sample(5, torch.Generator().manual_seed(0))
    assert plain.loss_weights is None
    assert torch.equal(weighing.loss_weights, weighing.weights(weighing.last_indices))
    assert weighing.loss_weights.tolist() == pytest.approx(
        (1 / (8 * weighing.probabilities[weighing.last_indices])).tolist(), rel=1e-5
    )


# --- the term -----------------------------------------------------------------------------


def inputs(logits):
    return LossInputs(
        torch.zeros(len(logits), 1, 8, 8),
        logits,
        torch.zeros(len(logits), dtype=torch.long),
    )


def test_the_term_weighs_the_teachers_own_class():
    pool = filled(5, 5)
    logits = (
        3 * torch.randn(7, 10, generator=torch.Generator().manual_seed(0)).double()
    ).requires_grad_()
    value = modulated_class_term(pool, 2.0)(inputs(logits))
    confidences, classes = logits.softmax(1).max(1)
    phi = torch.tensor(
        [
            (1 - float(pool.counts[c]) / 5) * (1 - p) ** 2
            for c, p in zip(classes, confidences.tolist())
        ]
    ).double()
    expected = (phi * F.cross_entropy(logits, classes, reduction='none')).mean()
    torch.testing.assert_close(value, expected)
    (slope,) = torch.autograd.grad(value, logits)
    # phi is a number: no gradient passes it
    torch.testing.assert_close(slope, torch.autograd.grad(expected, logits)[0])
    through = modulated_class_term(pool, 2.0, through=True)(inputs(logits))
    torch.testing.assert_close(through, value)
    assert torch.autograd.grad(through, logits)[0].norm() > slope.norm(), (
        'raising the confidence pays twice'
    )
    plain = modulated_class_term(pool, 2.0, difficulty=False, diversity=False)(
        inputs(logits)
    )
    torch.testing.assert_close(plain, F.cross_entropy(logits, classes))


def test_the_term_counts_what_the_buffer_holds_now(teacher):
    pool = ReplayPool(DIGITS, 4, teacher)
    term, logits = modulated_class_term(pool, difficulty=False), torch.eye(10)[:1] * 2
    empty = float(term(inputs(logits)))
    # nothing is frequent in an empty buffer
    assert empty == pytest.approx(float(F.cross_entropy(logits, torch.tensor([0]))))
    pool.insert(pictures(4), torch.tensor([0, 0, 0, 1]), torch.ones(4))
    assert float(term(inputs(logits))) == pytest.approx(empty / 4)


# --- keeping ------------------------------------------------------------------------------


def trainer(teacher, size=20, seed=0, **options):
    student = forgetful(network(seed + 1))
    pool = ReplayPool(DIGITS, size, teacher, student, **options)
    shared = {'batch_size': 8, 'device': 'cpu', 'seed': seed}
    distiller = Distiller(
        teacher,
        student,
        pool,
        steps=24,
        learning_rate=0.05,
        augment=Augment(1, False),
        **shared,
    )
    terms = {'modulated': (1.0, modulated_class_term(pool))}
    generator = Generator((1, 8, 8), 4, 4)
    weights = {'feature_weight': 1.0, 'adversarial_weight': 1.0, 'terms': terms}
    synthesizer = GeneratorSynthesizer(
        teacher,
        generator=generator,
        steps=3,
        latent_learning_rate=0.01,
        student=student,
        **weights,
        **shared,
    )
    return AlternatingTrainer(synthesizer, distiller, rounds=6, steps_per_round=4)


@pytest.mark.parametrize(
    'options', [{}, {'prioritised': False}, {'weighs_loss': True, 'normalised': True}]
)
def test_a_trainer_resumes_to_the_bit(teacher, tmp_path, options):
    torch.manual_seed(0)
    whole = trainer(teacher, **options)
    for index in range(42):
        if index in (13, 26):
            save_checkpoint(tmp_path / f'{index}.pt', whole.state_dict())
        whole.step()
    assert whole.finished
    for index in (13, 26):
        torch.manual_seed(99)
        second = trainer(teacher, **options)
        second.load_state_dict(load_checkpoint(tmp_path / f'{index}.pt'))
        for _ in range(42 - index):
            second.step()
        for a, b in zip(
            whole.student.state_dict().values(), second.student.state_dict().values()
        ):
            assert torch.equal(a, b)
        for name in (
            'images',
            'labels',
            'confidences',
            'priorities',
            'sample_counts',
            'counts',
            'probabilities',
            'max_priority',
        ):
            assert torch.equal(getattr(whole.pool, name), getattr(second.pool, name)), name


@pytest.mark.parametrize(
    'options', [{}, {'prioritised': False}, {'weighs_loss': True, 'normalised': True}]
)
def test_a_batch_that_waits_for_its_report_is_kept(teacher, tmp_path, options):
    "A state that is taken between `sample` and `report`."
    first = ReplayPool(DIGITS, 9, teacher, network(1), **options)
    first.add(pictures(9))
    generator = torch.Generator().manual_seed(0)
    for index in range(2):  # the second time with priorities that differ
        first.sample(6, generator)
        logits = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(index))
        if index:
            save_checkpoint(tmp_path / 'pool.pt', first.state_dict())
        first.update(*logits)
    second = ReplayPool(DIGITS, 9, teacher, network(1), **options)
    second.load_state_dict(load_checkpoint(tmp_path / 'pool.pt'))
    if options.get('weighs_loss'):
        assert torch.equal(second.loss_weights, first.loss_weights)
    second.update(*logits)
    assert torch.equal(first.priorities, second.priorities) and torch.equal(
        first.max_priority, second.max_priority
    )
    with pytest.raises(DFKDError, match=r'alpha \(was 0.6, now 0.5\)'):
        ReplayPool(DIGITS, 9, **options | {'alpha': 0.5}).load_state_dict(
            first.state_dict()
        )


def test_one_file_holds_the_buffer(teacher, tmp_path):
    pool = trainer(teacher, size=9, alpha=0.3, normalised=True).run(until=12).pool
    pool.save(tmp_path / 'pool.safetensors')
    again = ReplayPool.load(tmp_path / 'pool.safetensors', teacher)
    for name in (
        'images',
        'labels',
        'confidences',
        'priorities',
        'sample_counts',
        'counts',
        'probabilities',
        'max_priority',
    ):
        assert torch.equal(getattr(pool, name), getattr(again, name)), name
    assert (again.size, again.added, again.alpha, again.normalised, again.weighs_loss) == (
        9,
        pool.added,
        0.3,
        True,
        False,
    )
    assert torch.equal(ImageSet.load(tmp_path / 'pool.safetensors').labels, pool.labels)
    oldest = pool.added % 9
    again.add(pictures(1))
    assert torch.equal(again.images[oldest], pictures(1)[0])
    pool.fetch(torch.arange(3)), next(pool.batches(4))
    ImageSet(pool.images, pool.labels, DIGITS).save(tmp_path / 'images.safetensors')
    with pytest.raises(DFKDError, match='no replay buffer'):
        ReplayPool.load(tmp_path / 'images.safetensors')


def test_the_buffer_in_numbers():
    pool = filled(4, 4, [1.0, 1.0, 1.0, 1.0])
    found = pool.describe()
    assert (
        found['images'] == 4
        and found['classes'] == pytest.approx(4)
        and found['effective'] == pytest.approx(4)
    )
    assert found['confidence'] == pytest.approx(0.55) and found['priority'] == 1


@each(
    'mistake, says',
    [
        (lambda: ReplayPool(DIGITS, 0), 'give 1 or more'),
        (lambda: ReplayPool(DIGITS, 5, epsilon=0.0), 'an epsilon above 0'),
        (lambda: ReplayPool(DIGITS, 5, alpha=-1.0), 'give 0 or more'),
        (lambda: ReplayPool(DIGITS, 5, temperature=0.0), 'give a positive one'),
        (lambda: ReplayPool(DIGITS, 5, beta=math.nan), 'give 0 or more'),
        (
            lambda: ReplayPool(
                DIGITS, 5, student_domain=dataclasses.replace(DIGITS, shape=(1, 9, 9))
            ),
            'mean and std only',
        ),
        (lambda: filled().sample(0, torch.Generator()), 'draw 1 or more'),
        (lambda: filled().ask_student(pictures(1)), 'give the pool a student'),
        (
            lambda: filled().insert(pictures(2), torch.zeros(2).long(), torch.ones(3)),
            r'confidences of shape \(3,\)',
        ),
        (
            lambda: filled().insert(
                pictures(2), torch.zeros(2).long(), torch.ones(2), torch.ones(2, 1)
            ),
            r'priorities of shape \(2, 1\)',
        ),
        (
            lambda: filled().set_priorities(torch.tensor([5]), torch.ones(1)),
            'a buffer that holds 5',
        ),
        (
            lambda: filled().set_priorities(torch.tensor([-1]), torch.ones(1)),
            'count from 0',
        ),
        (
            lambda: modulation(
                torch.tensor([0]), torch.ones(1), torch.ones(2), 2, math.nan
            ),
            'give 0 or more',
        ),
        (lambda: ReplayPool(DIGITS, 5).add(pictures(2)), 'give the pool a teacher'),
        (lambda: ReplayPool(DIGITS, 5).sample(2, torch.Generator()), 'add some first'),
        (lambda: ReplayPool(DIGITS, 5).describe(), 'add images first'),
        (
            lambda: filled().insert(
                torch.rand(2, 1, 8, 8), torch.zeros(2).long(), torch.ones(2)
            ),
            'give uint8',
        ),
        (
            lambda: filled().insert(pictures(0), torch.zeros(0).long(), torch.ones(0)),
            'give one or more',
        ),
        (
            lambda: filled().insert(pictures(2), torch.tensor([0, 10]), torch.ones(2)),
            '0 to 9',
        ),
        (
            lambda: filled().update(torch.zeros(2, 10), torch.zeros(2, 10)),
            'sample one first',
        ),
        (
            lambda: filled().set_priorities(torch.tensor([0, 1]), torch.ones(1)),
            'give one of each',
        ),
        (lambda: filled().load_state_dict({'size': 7}), 'same size'),
        (lambda: setattr(filled(), 'labels', torch.zeros(5)), "teacher's predictions"),
        (
            lambda: modulation(torch.tensor([0]), torch.ones(1), torch.ones(2), 2, -1.0),
            'give 0 or more',
        ),
        (
            lambda: modulation(torch.tensor([0]), torch.ones(2), torch.ones(2), 2),
            'one of each',
        ),
        (lambda: modulated_class_term(filled(), -1.0), 'give 0 or more'),
    ],
)
def test_mistakes_are_told_in_one_line(mistake, says):
    with pytest.raises(DFKDError, match=says) as error:
        mistake()
    assert '\n' not in str(error.value)


def test_a_report_belongs_to_its_batch(teacher):
    pool = filled()
    pool.sample(3, torch.Generator().manual_seed(0))
    with pytest.raises(DFKDError, match='batch of 3 images'):
        pool.update(torch.zeros(2, 10), torch.zeros(2, 10))
    with pytest.raises(DFKDError, match='both the same classes'):
        pool.update(torch.zeros(3, 10), torch.zeros(3, 9))
    pool.update(torch.zeros(3, 10), torch.zeros(3, 10))
    with pytest.raises(DFKDError, match='sample one first'):
        pool.update(torch.zeros(3, 10), torch.zeros(3, 10))
    with pytest.raises(DFKDError, match='mixup_alpha'):
        Distiller(
            teacher,
            network(1),
            filled(),
            steps=1,
            batch_size=2,
            mixup_alpha=0.2,
            device='cpu',
        )


# --- all of it ----------------------------------------------------------------------------

GENERATOR = Generator((1, 8, 8), 4, 4)
SMALL = {
    'batch_size': 8,
    'steps': 2,
    'augment': None,
    'momentum': None,
    'reset_first_layer_at': None,
}


def together(teacher, student, **changes):
    synthesizer = (
        SMALL | {'generator': Generator((1, 8, 8), 4, 4)} | changes.pop('synthesizer', {})
    )
    settings = {
        'size': 12,
        'rounds': 4,
        'steps_per_round': 2,
        'device': 'cpu',
        'synthesizer': synthesizer,
        'distiller': {'batch_size': 8},
    }
    return ssd_kd(teacher, student, **settings | changes)


def test_the_settings_are_the_papers():
    assert (
        ssd_kd_preset() == ssd_kd_preset('ssd-kd-5')
        and ssd_kd_preset()['steps'] == 5
        and ssd_kd_preset('ssd-kd-2')['steps'] == 2
    )
    assert (
        ssd_kd_preset()['labels'] == 'teacher'
        and ssd_kd_preset('ssd-kd', 'resnet34')['adversarial_weight'] == 1.33
    )
    with pytest.raises(DFKDError, match='unknown preset'):
        ssd_kd_preset('ssd-kd-3')


@pytest.mark.parametrize('init', ['meta', 'sequential', 'scratch'])
def test_parts_come_together(teacher, init):
    trainer = together(
        teacher,
        network(1),
        synthesizer={'init': init},
        warmup_rounds=1,
        gamma=2.0,
        pool={'alpha': 0.3},
    )
    weights = trainer.synthesizer.objective.weights
    assert (
        weights['modulated'] == 0.4
        and weights['class'] == 0
        and weights['adversarial'] == 1.1
        and weights['features'] == 10
    )
    assert (
        trainer.synthesizer.student is trainer.student is trainer.pool.student
        and trainer.pool.alpha == 0.3
    )
    trainer.run()
    assert (
        trainer.finished
        and trainer.pool.added == 32
        and len(trainer.pool) == 12
        and trainer.pool.sample_counts.sum() > 0
    )
    assert (
        trainer.synthesizer.history[-1]['modulated'] >= 0
        and trainer.synthesizer.history[-1]['adversarial'] <= 0
    )


def test_ssd_kd_resumes_to_the_bit_from_anywhere(teacher, tmp_path):
    "With all that a meta-generator remembers, and a student with dropout on its own scale."
    domain = dataclasses.replace(DIGITS, mean=(0.6,), std=(0.15,))

    def trainer():
        synthesizer = {
            'momentum': 0.1,
            'reset_first_layer_at': 2,
            'augment': Augment(1, False),
            'seed': 3,
        }
        shared = {'pool': {'weighs_loss': True}, 'warmup_rounds': 1}
        student = forgetful(network(1))
        built = ssd_kd(
            teacher,
            student,
            size=12,
            rounds=4,
            steps_per_round=2,
            device='cpu',
            **shared,
            distiller={'batch_size': 8, 'domain': domain},
            synthesizer=SMALL | synthesizer | {'generator': copy.deepcopy(GENERATOR)},
        )
        assert (
            built.synthesizer.seed == 3
            and built.synthesizer.student_domain is built.pool.student_domain is domain
        )
        return built

    whole = trainer().run()
    for until in (1, 3, 5, 7, 10, 13):
        part, resumed = trainer(), trainer()
        for _ in range(until):
            part.step()
        save_checkpoint(tmp_path / 'trainer.pt', part.state_dict())
        torch.manual_seed(99)
        resumed.load_state_dict(load_checkpoint(tmp_path / 'trainer.pt'))
        resumed.run()
        for name in ('images', 'priorities', 'sample_counts'):
            assert torch.equal(getattr(resumed.pool, name), getattr(whole.pool, name)), (
                until,
                name,
            )
        states = (trainer.student.state_dict().values() for trainer in (resumed, whole))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True)), until
        assert resumed.synthesizer.history == whole.synthesizer.history


def test_a_picture_of_the_buffer(teacher):
    with pytest.raises(DFKDError, match='add images first'):
        draw_buffer(ReplayPool(DIGITS, 3))
    picture = draw_buffer(filled(), (600, 200))
    assert (
        picture.shape == (3, 200, 600)
        and picture.dtype == torch.uint8
        and picture.float().std() > 10
    )


def test_the_explorer_turns_what_runs(teacher):
    pytest.importorskip('ipywidgets')
    settings = {
        'size': 12,
        'rounds': 3,
        'steps_per_round': 2,
        'device': 'cpu',
        'distiller': {'batch_size': 8},
    }
    play = replay_explorer(
        teacher,
        lambda: network(1),
        synthesizer=SMALL | {'generator': Generator((1, 8, 8), 4, 4)},
        **settings,
    )
    assert play.trainer.round == 1 and bytes(play.picture.value).startswith(b'\x89PNG')
    before, even = bytes(play.picture.value), play.trainer.pool.probabilities.max()
    play.alpha.value = 2.0
    assert (
        play.trainer.pool.alpha == 2.0
        and bytes(play.picture.value) != before
        and play.trainer.pool.probabilities.max() > even
    )
    play.gamma.value, play.beta.value = 4.0, 0.0
    logits = torch.eye(10)[:2] * 3
    _, term = play.trainer.synthesizer.objective.terms['modulated']
    torch.testing.assert_close(
        term(inputs(logits)), modulated_class_term(play.trainer.pool, 4.0)(inputs(logits))
    )
    for _ in range(4):
        play.step()
    assert play.trainer.finished and 'round 3 of 3' in play.status.value
    play.again.click()
    assert play.trainer.round == 1 and play.trainer.pool.alpha == 2.0
