"""Methods that came after the papers': an averaged generator, noise layers behind label
vectors, a filter before the student. Values by hand, and rows that differ in one part.
"""

import math

import pytest
import torch
from cases import each
from tiny import DIGITS, network

from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import AlternatingTrainer, GrowingPool
from dfkd_nb.generators.ema import EmaSynthesizer
from dfkd_nb.generators.generators import METHODS, Generator
from dfkd_nb.generators.methods import build_method
from dfkd_nb.generators.synthesizer import GeneratorSynthesizer
from dfkd_nb.toolbox.core import load_checkpoint, save_checkpoint
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.teachers import Teacher

SMALL = {'rounds': 4, 'warmup_rounds': 1, 'steps_per_round': 3, 'synthesis_steps': 2}
SMALL |= {'generator_width': 4, 'latent_size': 8, 'synthesis_batch_size': 6}
SMALL |= {'batch_size': 6, 'padding': 1, 'flip': False}


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


def same(one, two):
    return one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


def trained(teacher, method, **changes):
    "A method's trainer after its last step."
    student = network(1)
    row = SMALL | changes
    return build_method(method, teacher, student, scale='quick', device='cpu', **row).run()


def weights_of(trainer):
    return torch.cat([v.flatten().float() for v in trainer.student.state_dict().values()])


# --- the averaged generator (MAD) ---


def averaged(teacher, **settings):
    generator = Generator(DIGITS.shape, 8, 4)
    defaults = {'steps': 2, 'batch_size': 6, 'device': 'cpu', 'generator': generator}
    torch.manual_seed(0)
    return EmaSynthesizer(teacher, **defaults | METHODS['dafl'] | settings)


def live(synthesizer):
    "The generator's tensors as they are, copied."
    now = synthesizer.weights | synthesizer.buffers
    return {k: v.detach().clone() for k, v in now.items()}


def test_without_decay_the_average_is_the_generator(teacher):
    synthesizer = averaged(teacher, ema_decay=0.0)
    start = live(synthesizer)
    for _ in range(3):
        synthesizer.step()
        assert same(synthesizer.ema, live(synthesizer))
    changed = {k for k, v in live(synthesizer).items() if not v.equal(start[k])}
    assert {'linear.weight', 'norm.running_mean', 'norm.num_batches_tracked'} <= changed


def test_with_all_decay_the_average_stays(teacher):
    synthesizer = averaged(teacher, ema_decay=1.0)
    start = live(synthesizer)
    for _ in range(4):
        synthesizer.step()
        if synthesizer.batch_done:
            synthesizer.pop()
    floats = {k: v for k, v in start.items() if v.is_floating_point()}
    assert same(floats, {k: synthesizer.ema[k] for k in floats})
    # a counter has no mean
    assert int(synthesizer.ema['norm.num_batches_tracked']) == 4


def test_a_generator_that_rests_is_approached_geometrically(teacher):
    synthesizer = averaged(teacher, ema_decay=0.95)
    start = {k: torch.zeros_like(v) for k, v in synthesizer.ema.items()}
    synthesizer.ema = {k: v.clone() for k, v in start.items()}
    for _ in range(20):
        synthesizer._average()
    assert 0.95**20 == pytest.approx(0.3585, abs=5e-5)
    for name in ('linear.weight', 'norm.running_var'):
        expected = (1 - 0.95**20) * live(synthesizer)[name]
        torch.testing.assert_close(synthesizer.ema[name], expected, rtol=1e-5, atol=1e-7)


def test_the_average_moves_with_every_step_of_the_generator(teacher):
    "Not with every batch: that would be another horizon."
    synthesizer = averaged(teacher, ema_decay=0.5, steps=3)
    expected = live(synthesizer)['linear.weight']
    for _ in range(3):
        synthesizer.step()
        expected = 0.5 * expected + 0.5 * live(synthesizer)['linear.weight']
    assert synthesizer.batch_done
    torch.testing.assert_close(synthesizer.ema['linear.weight'], expected)


@each('method', ['dafl', 'zskt', 'dfq'])
def test_without_a_share_of_the_average_the_row_is_its_base(teacher, method):
    base = trained(teacher, method, warmup_rounds=0)
    without = trained(teacher, f'{method}-ema', warmup_rounds=0, ema_share=0.0)
    assert weights_of(without).equal(weights_of(base))
    assert without.distiller.history == base.distiller.history
    half = trained(teacher, f'{method}-ema', warmup_rounds=0)
    assert not weights_of(half).equal(weights_of(base))
    assert same(half.synthesizer.weights, base.synthesizer.weights) == (method == 'dafl')


def test_half_of_the_images_are_the_averaged_generators(teacher):
    synthesizer = averaged(teacher, learning_rate=0.1)
    for _ in range(2):
        synthesizer.step()
    draw = torch.Generator().manual_seed(5)
    images = synthesizer.sample_images(6, draw)
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(3, 8, generator=draw), torch.randn(3, 8, generator=draw)
    with torch.no_grad():
        now = synthesizer.generate(latents[0], train=False)
        network = synthesizer.generator
        network.load_state_dict(synthesizer.ema)
        old = network(latents[1])
    torch.testing.assert_close(images, torch.cat([now, old]))
    assert not torch.allclose(old, synthesizer.generate(latents[1], train=False), atol=1e-3)
    # asking for images moves nothing
    assert int(synthesizer.ema['norm.num_batches_tracked']) == 2


def test_the_average_is_resumed(teacher, tmp_path):
    whole = averaged(teacher)
    for _ in range(5):
        whole.step()
        if whole.batch_done:
            whole.pop()
    save_checkpoint(tmp_path / 'state.pt', whole.state_dict())
    other = averaged(teacher)
    other.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    assert same(other.ema, whole.ema)
    for synthesizer in (whole, other):
        synthesizer.step()
    assert same(other.ema, whole.ema)
    plain = GeneratorSynthesizer(teacher, steps=2, device='cpu', class_weight=1.0)
    with pytest.raises(DFKDError, match='not saved by an EmaSynthesizer'):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(DFKDError, match=r'ema_decay \(was 0.95, now 0.9\)'):
        averaged(teacher, ema_decay=0.9).load_state_dict(whole.state_dict())


@each(
    ('change', 'message'),
    [
        ({'ema_decay': 1.5}, 'give numbers from 0 to 1'),
        ({'ema_share': -0.1}, 'give numbers from 0 to 1'),
        ({'ema_decay': math.nan}, 'give numbers from 0 to 1'),
        ({'init': 'scratch'}, 'use sequential'),
    ],
)
def test_averages_that_cannot_work_are_told(teacher, change, message):
    with pytest.raises(DFKDError, match=message):
        averaged(teacher, **change)


def test_a_pool_never_asks_the_average(teacher):
    synthesizer, pool = averaged(teacher), GrowingPool(DIGITS)
    distiller = Distiller(teacher, network(1), pool, steps=2, batch_size=4, device='cpu')
    with pytest.raises(DFKDError, match="set pool to 'none'"):
        AlternatingTrainer(synthesizer, distiller, rounds=1, steps_per_round=2)
