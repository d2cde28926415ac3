"""The meta-generator: gradients of a start, what a batch begins from, momentum's side, and
runs that go on to the same bits.
"""

import copy

import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIGITS, used
from torch import nn

from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.dreams.statistics import Statistics
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import AlternatingTrainer, GrowingPool
from dfkd_nb.generators.generators import Generator, Pixels
from dfkd_nb.generators.meta import (
    META_UPDATES,
    MetaSynthesizer,
    adapt,
    fast_preset,
    meta_gradients,
)
from dfkd_nb.generators.synthesizer import GeneratorSynthesizer
from dfkd_nb.toolbox.core import import_torchvision, load_checkpoint, save_checkpoint
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.teachers import Teacher

SHAPE = (1, 8, 8)


def network(seed=0):
    "Two convolutions whose BatchNorm has seen something."
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return used(model)


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


PLAIN = {'steps': 3, 'batch_size': 6, 'learning_rate': 0.01, 'latent_learning_rate': 0.1}
PLAIN |= {'class_weight': 1.0, 'feature_weight': 1.0, 'labels': 'sampled', 'device': 'cpu'}


def synthesizer(teacher, kind=MetaSynthesizer, pixels=False, **changes):
    torch.manual_seed(3)
    generator = Pixels(SHAPE) if pixels else Generator(SHAPE, 5, 3)
    return kind(teacher, **{'generator': generator, **PLAIN} | changes)


def valley(curvature, centre):
    return lambda weights: 0.5 * (curvature * (weights['theta'] - centre).square()).sum()


@settings(max_examples=15, deadline=None)
@given(
    st.floats(0.1, 3.0),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.integers(1, 5),
    st.floats(0.01, 0.3),
)
def test_gradients_of_a_valley(curvature, centre, begun, steps, rate):
    "In one dimension all four are known."
    start = {'theta': torch.tensor([begun], dtype=torch.float64)}
    found = {
        kind: float(gradient['theta'])
        for kind, gradient in meta_gradients(
            valley(curvature, centre), start, steps, rate
        ).items()
    }
    rho, slope = 1 - rate * curvature, curvature * (begun - centre)
    assert found['exact'] == pytest.approx(slope * rho ** (2 * steps), rel=1e-9, abs=1e-12)
    assert found['fomaml'] == pytest.approx(slope * rho**steps, rel=1e-9, abs=1e-12)
    assert found['fomaml-sum'] == pytest.approx(
        slope * sum(rho**j for j in range(steps)), rel=1e-9, abs=1e-12
    )
    assert found['reptile'] == pytest.approx(
        rate * found['fomaml-sum'], rel=1e-6, abs=1e-12
    )


def test_exact_gradient_against_finite_differences():
    random = torch.Generator().manual_seed(0)
    shapes = {'latents': (4, 3), 'inner': (3, 5), 'outer': (5, 2)}
    start = {
        name: torch.randn(shape, generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }

    def loss(weights):
        images = torch.tanh(weights['latents'] @ weights['inner']) @ weights['outer']
        return images.mean(0).square().sum() + (images.var(0) - 1).square().sum()

    found = meta_gradients(loss, start, 4, 0.02)['exact']
    for name, weight in start.items():
        away = torch.zeros_like(weight)
        away.view(-1)[1] = 1e-6
        after = [
            loss(adapt(loss, start | {name: weight + sign * away}, 4, 0.02)[0])
            for sign in (1, -1)
        ]
        assert float(found[name].view(-1)[1]) == pytest.approx(
            float(after[0] - after[1]) / 2e-6, rel=1e-5, abs=1e-7
        )


def test_one_step_reptile_is_the_gradient_times_the_rate():
    start = {'theta': torch.tensor([1.0, -2.0], dtype=torch.float64)}
    found = meta_gradients(
        valley(torch.tensor([2.0, 0.5], dtype=torch.float64), 0.3), start, 1, 0.1
    )
    torch.testing.assert_close(
        found['reptile']['theta'], 0.1 * found['fomaml-sum']['theta']
    )
    with pytest.raises(DFKDError, match='give 1 or more'):
        adapt(valley(1.0, 0.0), start, 0, 0.1)


def test_one_step_sum_is_the_plain_generator(teacher):
    one = synthesizer(teacher, steps=1)
    other = synthesizer(teacher, GeneratorSynthesizer, steps=1)
    assert torch.equal(one.synthesize(24).images, other.synthesize(24).images)
    assert all(
        torch.equal(one.meta_weights[name], weight)
        for name, weight in other.weights.items()
    )


def inner_gradients(m):
    """Run one batch; the gradients that its inner steps used, and what it began and ended
    with.
    """
    m.begin_batch()
    begun = {name: weight.detach().clone() for name, weight in m.weights.items()}
    used = []
    for _ in range(m.steps):
        m.step()
        used.append({name: weight.grad.clone() for name, weight in m.weights.items()})
    return (
        begun,
        used,
        {name: weight.detach().clone() for name, weight in m.weights.items()},
    )


def test_the_sum_is_the_sum(teacher):
    m = synthesizer(teacher)
    _, used, _ = inner_gradients(m)
    for name, weight in m.meta_weights.items():
        torch.testing.assert_close(weight.grad, sum(gradients[name] for gradients in used))


def test_the_last_is_taken_at_the_adapted_weights(teacher):
    "Eq. 9: not the gradient of the last inner step, which was taken before that step."
    m = synthesizer(teacher, meta_update='fomaml')
    _, used, ended = inner_gradients(m)
    images = m.generate(m.latents)
    total, _, _ = m.compute_loss(images, m.targets)
    expected = dict(zip(m.weights, torch.autograd.grad(total, list(m.weights.values()))))
    for name, weight in m.meta_weights.items():
        torch.testing.assert_close(weight.grad, expected[name])
    assert any(
        not torch.allclose(used[-1][name], weight.grad)
        for name, weight in m.meta_weights.items()
    )
    assert m.steps_done == 3 and m.steps_left == 0


def test_reptile_is_the_difference(teacher):
    m = synthesizer(teacher, meta_update='reptile')
    begun, _, ended = inner_gradients(m)
    for name, weight in m.meta_weights.items():
        assert torch.equal(weight.grad, begun[name] - ended[name])


def test_a_batch_cannot_touch_the_meta_weights(teacher):
    m = synthesizer(teacher)
    before = {name: weight.clone() for name, weight in m.meta_weights.items()}
    m.step()
    m.step()
    assert all(torch.equal(before[name], weight) for name, weight in m.meta_weights.items())
    assert {weight.data_ptr() for weight in m.weights.values()}.isdisjoint(
        weight.data_ptr() for weight in m.meta_weights.values()
    )
    m.step()
    m.pop()
    m.begin_batch()
    assert all(
        torch.equal(weight, m.meta_weights[name]) for name, weight in m.weights.items()
    )


def test_what_a_batch_begins_from(teacher):
    again = synthesizer(teacher, init='sequential')
    again.synthesize(6)
    ended = {name: weight.detach().clone() for name, weight in again.weights.items()}
    again.begin_batch()
    assert all(torch.equal(weight, ended[name]) for name, weight in again.weights.items())
    assert not again.optimizer.state  # a new batch's Adam knows nothing
    anew = synthesizer(teacher, init='scratch')
    anew.synthesize(6)
    anew.begin_batch()
    assert not any(
        torch.equal(weight, ended[name])
        for name, weight in anew.weights.items()
        if weight.ndim > 1
    )
    assert not again.meta_weights and not anew.meta_weights


def test_meta_step_sizes(teacher):
    m = synthesizer(teacher, latent_reuse=None)
    assert [group['lr'] for group in m.meta_optimizer.param_groups] == pytest.approx(
        [0.03, 0.3]
    )
    m = synthesizer(
        teacher, meta_learning_rate=0.5, meta_latent_learning_rate=0.2, latent_reuse=4
    )
    assert [group['lr'] for group in m.meta_optimizer.param_groups] == [0.5, 0.2]
    assert all(group['betas'] == (0.5, 0.999) for group in m.meta_optimizer.param_groups)


def test_latents_that_are_reused(teacher):
    """The learned codes are the start of each batch of a life; then new ones are drawn, and
    the weights' Adam goes on.
    """
    m = synthesizer(teacher, latent_reuse=2)
    seen = []
    for _ in range(5):
        m.begin_batch()
        seen.append(m.latents.detach().clone())
        assert torch.equal(m.latents, m.meta_latents)
        while m.steps_left:
            m.step()
        m.pop()
    near = [float((b - a).abs().mean()) for a, b in zip(seen, seen[1:])]
    assert near[0] < 0.5 < near[1] and near[2] < 0.5 < near[3]
    steps = [
        float(m.meta_optimizer.state[weight]['step']) for weight in m.meta_weights.values()
    ]
    assert (
        steps == [5.0] * len(steps)
        and float(m.meta_optimizer.state[m.meta_latents]['step']) == 1.0
    )
    # a life of 1: drawn anew
    assert not torch.equal(
        *[synthesizer(teacher).synthesize(12).images[i : i + 6] for i in (0, 6)]
    )


def test_momentum_weighs_the_new_batch(teacher):
    """The paper's m: 0.1 of the new batch.

    The other side, 0.9, would pull nine times as hard.
    """
    m = synthesizer(teacher, momentum=0.1, class_weight=0.0)
    m.synthesize(6)
    old = m.running.moments
    best = {name: (mean + 1.0, var + 1.0) for name, (mean, var) in old.items()}
    name = next(iter(old))
    leaf = best[name][0].clone().requires_grad_()
    inputs = LossInputs(
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 10),
        torch.zeros(1, dtype=torch.long),
        best | {name: (leaf, best[name][1])},
    )
    term = m.objective.terms['features'][1]
    slope = torch.autograd.grad(term(inputs), leaf)[0].norm()
    assert float(slope) == pytest.approx(0.1, rel=1e-4)
    m._batch_finished({'moments': m.extractor.statistics.join(best).tensor})
    torch.testing.assert_close(m.running.moments[name][0], old[name][0] + 0.1)


def test_first_batch_is_evaluated_by_itself_and_the_kept_iterate_is_accumulated(teacher):
    with_it, without = synthesizer(teacher, momentum=0.1), synthesizer(teacher)
    assert torch.equal(with_it.synthesize(6).images, without.synthesize(6).images)
    assert with_it.history == without.history
    kept = Statistics(with_it.running.moments)
    true = Statistics.from_batchnorm(teacher)
    assert float(true.distance(kept).sum()) == pytest.approx(
        with_it.history[0]['features'], rel=1e-5
    )
    assert not torch.equal(with_it.synthesize(6).images, without.synthesize(6).images)


def test_relative_statistics_take_momentum_too(teacher):
    m = synthesizer(teacher, momentum=0.1, feature_scale='relative')
    m.synthesize(12)
    assert m.running.batches == 2


def test_first_layers_begin_anew(teacher):
    for init in ('meta', 'sequential'):
        m = synthesizer(teacher, init=init, reset_first_layer_at=2)
        m.synthesize(6)
        before = {
            name: weight.detach().clone()
            for name, weight in (m.meta_weights or m.weights).items()
        }
        m.begin_batch()
        assert float(m.weights['linear.weight'].detach().std()) == pytest.approx(
            0.02, rel=0.2
        )
        assert (
            not m.weights['linear.bias'].any()
            and not m.weights['norm.bias'].any()
            and not (m.weights['norm.weight'].abs() > 0.1).any()
        )
        assert torch.equal(m.weights['last.weight'], before['last.weight'])
        kept = m.weights['linear.weight'].detach().clone()
        m.synthesize(6)
        m.begin_batch()
        # once
        assert not torch.equal(m.weights['linear.weight'], kept) and m.batches == 2


def test_buffers_go_on_and_generating_in_eval_mode_uses_them(teacher):
    m = synthesizer(teacher)
    m.synthesize(12)
    assert int(m.buffers['norm.num_batches_tracked']) == 6
    before = {name: buffer.clone() for name, buffer in m.buffers.items()}
    latents = torch.randn(4, 5)
    images = m.generate(latents, train=False)
    assert all(torch.equal(before[name], buffer) for name, buffer in m.buffers.items())
    # each image by itself
    torch.testing.assert_close(images[:2], m.generate(latents[:2], train=False))
    # the module lends its form only
    assert not any(
        buffer.any() for name, buffer in m.network.named_buffers() if 'tracked' in name
    )


SWITCHES = [
    *({'meta_update': meta} for meta in META_UPDATES),
    *({'meta_update': meta, 'latent_reuse': 2, 'momentum': 0.1} for meta in META_UPDATES),
    *(
        {'meta_update': meta, 'latent_reuse': None, 'reset_first_layer_at': 2}
        for meta in META_UPDATES
    ),
    {'init': 'sequential', 'momentum': 0.1, 'reset_first_layer_at': 2},
    {'init': 'scratch'},
    {'init': 'sequential', 'pixels': True},
    {'init': 'scratch', 'pixels': True},
    {'pixels': True, 'latent_reuse': None},
]


@pytest.mark.parametrize('switches', SWITCHES, ids=str)
@each('cut', [3, 4, 5])
def test_resume(teacher, tmp_path, switches, cut):
    """After a batch, and after one and two updates of the next.

    Through a file, to the same bits.
    """

    def go(m, updates):
        made = []
        for _ in range(updates):
            m.step()
            if not m.steps_left:
                made.append(m.pop().images)
        return torch.cat(made) if made else None

    first, second = synthesizer(teacher, **switches), synthesizer(teacher, **switches)
    go(first, cut)
    save_checkpoint(tmp_path / 'state.pt', first.state_dict())
    second.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    assert torch.equal(go(first, 9 - cut), go(second, 9 - cut))
    assert first.history == second.history
    for name, weight in first.meta_weights.items():
        assert torch.equal(weight, second.meta_weights[name])
    assert torch.equal(first.meta_latents, second.meta_latents)


def test_a_live_state_is_not_shared(teacher):
    first = synthesizer(teacher, momentum=0.1, latent_reuse=None)
    second = synthesizer(teacher, momentum=0.1, latent_reuse=None)
    first.synthesize(6)
    first.step()
    second.load_state_dict(first.state_dict())
    kept = copy.deepcopy(first.state_dict())
    second.step()
    for name, weight in first.meta_weights.items():
        assert torch.equal(weight, kept['meta_weights'][name])
    second.step()
    assert torch.equal(first.meta_latents, kept['meta_latents']) and torch.equal(
        first.latents, kept['latents']
    )
    for name, gradient in first.summed_gradients.items():
        assert torch.equal(gradient, kept['summed_gradients'][name])


def test_states_of_others_are_refused(teacher):
    state = synthesizer(teacher).state_dict()
    for changes in (
        {'meta_update': 'fomaml'},
        {'momentum': 0.1},
        {'latent_reuse': 3},
        {'init': 'sequential'},
        {'meta_learning_rate': 1.0},
    ):
        with pytest.raises(DFKDError, match='other settings'):
            synthesizer(teacher, **changes).load_state_dict(state)
    with pytest.raises(DFKDError, match='not saved by a MetaSynthesizer'):
        synthesizer(teacher).load_state_dict(
            synthesizer(teacher, GeneratorSynthesizer, init='sequential').state_dict()
        )


@each(
    'changes, words',
    [
        ({'meta_update': 'maml'}, "unknown meta_update 'maml': use fomaml-sum, fomaml"),
        ({'init': 'never'}, "unknown init 'never'"),
        ({'latent_reuse': 0}, 'give 1 or more batches'),
        ({'latent_reuse': 3, 'latent_learning_rate': 0.0}, 'latent_learning_rate above 0'),
        ({'meta_learning_rate': 0.0}, 'meta_learning_rate 0.0: give a positive one'),
        ({'meta_latent_learning_rate': -1.0}, 'meta_latent_learning_rate -1.0'),
        ({'momentum': 0.0}, 'weight of the new batch'),
        ({'momentum': 1.5}, 'weight of the new batch'),
        ({'reset_first_layer_at': 0}, 'batches count from 1'),
        ({'pixels': True}, 'latent_reuse=None'),
        (
            {'init': 'sequential', 'latent_reuse': 2},
            "nothing is meta-learned with init='sequential'",
        ),
        ({'init': 'scratch', 'meta_learning_rate': 0.1}, "or set init='meta'"),
        ({'meta_latent_learning_rate': 0.1}, 'set latent_reuse to 2 or more'),
        ({'meta_learning_rate': float('nan')}, 'give a positive one'),
    ],
)
def test_what_cannot_work_is_told(teacher, changes, words):
    with pytest.raises(DFKDError) as error:
        synthesizer(teacher, **changes)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_presets():
    assert [fast_preset(f'fast-{k}')['steps'] for k in (2, 5, 10)] == [2, 5, 10]
    assert fast_preset('fast-5', 'resnet34')['adversarial_weight'] == 1.33
    for bad in (('fast-3',), ('fast-5', 'vgg19')):
        with pytest.raises(DFKDError, match='unknown'):
            fast_preset(*bad)


def test_a_trainer_with_a_preset(teacher):
    """The paper's loop: meta-batches, a growing pool, a student that competes after the
    warm-up.
    """
    student = network(1)
    small = {'batch_size': 6, 'augment': None, 'device': 'cpu'}
    m = MetaSynthesizer(
        teacher,
        generator=Generator(SHAPE, 5, 3),
        student=student,
        **fast_preset('fast-2') | small,
    )
    distiller = Distiller(
        teacher,
        student,
        GrowingPool(DIGITS, newest_first=False),
        steps=4,
        batch_size=4,
        device='cpu',
    )
    trainer = AlternatingTrainer(
        m, distiller, rounds=3, steps_per_round=2, warmup_rounds=1
    ).run()
    assert trainer.finished and m.batches == 3 and m.running.batches == 3
    assert 'adversarial' not in m.history[0] and 'adversarial' in m.history[2]


def test_better_starts(teacher):
    """After some batches the first look at a new one costs less than at first, and less
    than fresh weights do.
    """
    m = synthesizer(teacher, batch_size=32, generator=Generator(SHAPE, 8, 8))
    m.step()
    first = m.best['loss']
    while m.steps_left:
        m.step()
    m.pop()
    m.synthesize(960)
    m.step()
    assert m.best['loss'] < 0.7 * first


def test_foreign_network():
    """torchvision's MobileNetV3 at 40 pixels with 7 classes; a generator of a size that no
    power of two reaches.
    """
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(
        weights=None, num_classes=7, width_mult=0.25
    )
    with torch.no_grad():
        model.train()
        for _ in range(3):
            model(torch.randn(8, 3, 40, 40))
    domain = Domain(
        'seven', (3, 40, 40), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), tuple('abcdefg')
    )
    chosen = PLAIN | {'steps': 2, 'batch_size': 4, 'meta_update': 'fomaml', 'momentum': 0.1}
    m = MetaSynthesizer(
        Teacher(model.eval(), domain), generator=Generator((3, 40, 40), 6, 4), **chosen
    )
    images = m.synthesize(8)
    assert images.images.shape == (8, 3, 40, 40) and int(images.labels.max()) < 7


def test_weights_without_gradient_stay(teacher):
    class Odd(Generator):
        def __init__(self):
            super().__init__(SHAPE, 5, 3)
            self.unused = nn.Parameter(torch.ones(2))

    for meta in META_UPDATES:
        m = synthesizer(teacher, generator=Odd(), meta_update=meta)
        m.synthesize(12)
        assert torch.equal(m.meta_weights['unused'], torch.ones(2))
