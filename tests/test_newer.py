"""Methods that came after the papers': an averaged generator, noise layers behind label
vectors, a filter before the student. Values by hand, and rows that differ in one part.
"""

import math

import numpy as np
import pytest
import torch
from cases import each
from tiny import DIGITS, network

from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import AlternatingTrainer, GrowingPool, NoiseSynthesizer
from dfkd_nb.generators import methods
from dfkd_nb.generators.acceptance import AcceptedImages, accepted_of
from dfkd_nb.generators.ema import EmaSynthesizer
from dfkd_nb.generators.generators import METHODS, Generator
from dfkd_nb.generators.methods import build_method
from dfkd_nb.generators.mirror import (
    MirrorGenerator,
    MirrorSynthesizer,
    mirror_of,
    mirrored_layers,
)
from dfkd_nb.generators.nayer import NayerSynthesizer, label_vectors_of
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


# --- label vectors and noisy layers (NAYER) ---


def layered(teacher, **settings):
    generator = Generator(DIGITS.shape, 8, 4)
    defaults = {'steps': 3, 'batch_size': 20, 'device': 'cpu', 'generator': generator}
    defaults |= {'class_weight': 0.5, 'feature_weight': 10.0, 'momentum': 0.1}
    torch.manual_seed(0)
    return NayerSynthesizer(teacher, **defaults | settings)


def batch_of(synthesizer):
    "The next finished batch."
    while not synthesizer.batch_done:
        synthesizer.step()
    return synthesizer.pop()


def latents_of(synthesizer):
    "What the noisy layers make of the batch in hand."
    network, found = synthesizer.network, []
    hook = network.noise.register_forward_hook(lambda _, __, out: found.append(out))
    synthesizer.generate(synthesizer.latents)
    hook.remove()
    return found[0].detach()


def test_standardised_one_hot_vectors_by_hand():
    standard = torch.nn.BatchNorm1d(10)(torch.eye(10).repeat(4, 1)).detach()
    assert standard[0, 0].item() == pytest.approx(2.9998, abs=5e-5)
    assert standard[0, 1].item() == pytest.approx(-0.3333, abs=5e-5)
    assert standard[:10].square().sum(1).mean().item() == pytest.approx(9.999, abs=5e-4)


@each('kind', ['one-hot', 'random', 'classifier'])
def test_latents_begin_with_the_standard_deviation_of_their_vectors(teacher, kind):
    synthesizer = layered(
        teacher, label_vectors=kind, generator=Generator(DIGITS.shape, 4000, 4)
    )
    synthesizer.begin_batch()
    size = synthesizer.vectors.shape[1]
    assert size == {'one-hot': 10, 'random': 64, 'classifier': 6}[kind]
    standard = synthesizer.network.standardise(synthesizer.latents).detach()
    squares = standard.square().sum(1)
    assert squares.mean().item() == pytest.approx(size, rel=1e-2)
    latents = latents_of(synthesizer)
    assert latents.shape == (20, 4000)
    assert latents.std().item() == pytest.approx(size**0.5, rel=0.05)
    # two classes share a layer, two passes do not
    gram = latents @ latents.T / 4000
    torch.testing.assert_close(
        gram[:10, :10], standard[:10] @ standard[:10].T, atol=0.15 * size, rtol=0
    )
    assert gram[:10, 10:].abs().max() < 0.15 * size


def test_one_noisy_layer_makes_one_image_a_class(teacher):
    one = batch_of(layered(teacher, noise_group=20))
    # rows of a matrix product may differ in their last bit
    assert (one.images[:10].int() - one.images[10:].int()).abs().max() <= 1
    two = batch_of(layered(teacher))
    assert (two.images[:10].int() - two.images[10:].int()).abs().max() > 20


def test_without_fresh_noise_every_batch_begins_with_the_same_images(teacher, monkeypatch):
    def first_images(synthesizer):
        found = []
        for _ in range(2):
            synthesizer.begin_batch()
            found.append(synthesizer.generate(synthesizer.latents).detach())
            synthesizer.steps_left = 0
        return found

    one, two = first_images(layered(teacher))
    assert not one.equal(two)

    def no_noise(self):
        super(NayerSynthesizer, self)._begin_weights()

    monkeypatch.setattr(NayerSynthesizer, '_begin_weights', no_noise)
    one, two = first_images(layered(teacher))
    assert one.equal(two)


def test_every_batch_has_its_own_noise_and_its_own_adam(teacher):
    synthesizer = layered(teacher)
    seen = []
    for _ in range(3):
        synthesizer.step()
        weights = synthesizer.weights['noise.weight'].detach().clone()
        counts = {int(s['step']) for s in synthesizer.optimizer.state.values()}
        seen.append((weights, counts))
        batch_of(synthesizer)
    assert [counts for _, counts in seen] == [{1}] * 3
    assert not seen[0][0].equal(seen[1][0]) and not seen[1][0].equal(seen[2][0])


def test_a_generator_begins_anew_at_the_end_of_its_life(teacher):
    "The rest goes on from batch to batch; the first layer of the second life is fresh."

    def starts(life):
        synthesizer, found = layered(teacher, generator_life=life, learning_rate=0.02), []
        for _ in range(5):
            synthesizer.begin_batch()
            begun = synthesizer.weights['body.linear.weight'].detach().clone()
            found.append((begun, synthesizer.buffers['body.norm.num_batches_tracked'] + 0))
            batch_of(synthesizer)
        return found

    ends = starts(0)
    assert [int(count) for _, count in ends] == [0, 3, 6, 9, 12]
    twice = starts(2)
    assert [int(count) for _, count in twice] == [0, 3, 0, 3, 0]
    assert ends[1][0].equal(twice[1][0]) and not ends[2][0].equal(twice[2][0])
    assert not twice[0][0].equal(twice[2][0]) and not twice[2][0].equal(twice[4][0])


def test_all_classes_come_in_turn_and_the_rest_at_random(teacher):
    labels = batch_of(layered(teacher, batch_size=25)).labels
    assert labels[:20].tolist() == [*range(10), *range(10)]
    assert labels[20:].tolist() != [0, 1, 2, 3, 4]
    assert layered(teacher, batch_size=25).network.noise.weight.shape == (3, 8, 6)
    few = batch_of(layered(teacher, batch_size=6)).labels
    assert len(set(few.tolist())) < 6 or few.tolist() != [0, 1, 2, 3, 4, 5]


def test_running_statistics_are_those_of_the_last_iterate(teacher):
    "Even where another iterate of the batch was better."
    synthesizer = layered(teacher, steps=4, learning_rate=0.5)
    rows, losses = [], []
    keep = synthesizer._keep_best

    def note(evaluated):
        rows.append(evaluated.others['moments'].clone())
        losses.append(float(evaluated.losses[0]))
        keep(evaluated)

    synthesizer._keep_best = note
    batch_of(synthesizer)
    assert losses.index(min(losses)) < 3
    assert synthesizer.running.moments.tensor.equal(rows[-1])


@each('when', [1, 3, 4, 7])
def test_noise_layers_are_resumed(teacher, tmp_path, when):
    "In the middle of a batch, between two, and over the end of a life."
    whole = layered(teacher, generator_life=2)

    def go_on(synthesizer, steps):
        found = []
        for _ in range(steps):
            synthesizer.step()
            if synthesizer.batch_done:
                found.append(synthesizer.pop().images)
        return found

    go_on(whole, when)
    save_checkpoint(tmp_path / 'state.pt', whole.state_dict())
    rest = go_on(whole, 9)
    other = layered(teacher, generator_life=2)
    other.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    again = go_on(other, 9)
    assert len(rest) == 3 and all(a.equal(b) for a, b in zip(rest, again, strict=True))
    assert same(whole.weights, other.weights)
    with pytest.raises(DFKDError, match='with these label vectors'):
        layered(teacher, label_vectors='one-hot').load_state_dict(whole.state_dict())
    with pytest.raises(DFKDError, match=r'generator_life \(was 2, now 3\)'):
        layered(teacher, generator_life=3).load_state_dict(whole.state_dict())


def test_vectors_of_ones_own(teacher):
    "Such as a text encoder's."
    own = torch.arange(30.0).view(10, 3).sin()
    synthesizer = layered(teacher, label_vectors=own)
    assert synthesizer.vectors.equal(own) and len(batch_of(synthesizer).images) == 20
    rows = label_vectors_of(teacher, 'classifier')
    assert rows.equal(list(teacher.model.modules())[-1].weight)
    one, two = (label_vectors_of(teacher, 'random', 5, seed) for seed in (0, 1))
    assert one.shape == (10, 5) and not one.equal(two)


@each(
    ('change', 'message'),
    [
        ({'label_vectors': 'text'}, "use 'one-hot', 'random' or 'classifier'"),
        ({'label_vectors': torch.zeros(9, 4)}, 'one row a class'),
        ({'label_vectors': 'random', 'vector_size': 0}, 'give 1 or more'),
        ({'noise_group': 0}, 'give 1 or more of each'),
        ({'generator_life': -1}, 'give 0 or more batches'),
        ({'labels': 'teacher'}, "set labels to 'sampled'"),
        ({'latent_learning_rate': 0.1}, 'latent_learning_rate to 0'),
        ({'init': 'scratch'}, 'use sequential'),
    ],
)
def test_noise_layers_that_cannot_work_are_told(teacher, change, message):
    with pytest.raises(DFKDError, match=message):
        layered(teacher, **change)


def test_noise_layers_need_a_pool_and_choose_their_classes(teacher):
    with pytest.raises(DFKDError, match="set pool to 'grows'"):
        trained(teacher, 'nayer', pool='none')
    with pytest.raises(DFKDError, match='leave classes out'):
        layered(teacher).synthesize(10, classes=[3])
    trainer = trained(teacher, 'nayer', generator_life=2)
    assert len(trainer.pool) == 24 and trainer.synthesizer.vectors.shape == (10, 6)


# --- a generator that mirrors the teacher (CPNet) ---


def mirrored(teacher, **settings):
    defaults = {'steps': 3, 'batch_size': 20, 'device': 'cpu', 'class_weight': 0.5}
    return MirrorSynthesizer(
        teacher, generator=mirror_of(teacher, 8), **defaults | settings
    )


def test_the_last_layer_at_each_resolution_is_mirrored(teacher):
    "As a hook on every layer of a small network sees it."
    shapes, model = {}, teacher.model
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(
                lambda _, given, name=name: shapes.update({name: given[0].shape[1:]})
            )
    found = mirrored_layers(teacher)
    by_size = {shape[1:]: name for name, shape in shapes.items()}
    assert set(found) == set(by_size.values())
    sizes = [size for _, size, _ in found.values()]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    assert all(tuple(shapes[name]) == shape for name, shape in found.items())
    network = mirror_of(teacher, 8)
    entered = []
    for tap in network.taps:
        tap.register_forward_pre_hook(lambda _, given: entered.append(given[0].shape[1:]))
    assert network(torch.zeros(3, 8)).shape == (3, *DIGITS.shape)
    assert [tuple(shape) for shape in entered] == list(found.values())


def test_alignment_is_that_of_the_formula(teacher):
    "Maps collected by hooks of one's own, moments by torch."
    synthesizer = mirrored(teacher, alignment_weight=2.0)
    synthesizer.begin_batch()
    drawn, seen = [], {}
    body = synthesizer.network.body
    for tap in body.taps:
        tap.register_forward_pre_hook(lambda _, given: drawn.append(given[0].detach()))
    inside = synthesizer.teacher.model
    for name in synthesizer.mirrored:
        inside.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0]})
        )
    found = synthesizer.evaluate_batch(synthesizer.latents, synthesizer.targets)
    synthesizer.teacher(synthesizer.domain.normalize(found.images))
    wanted = 0.0
    for g, (name, t) in zip(drawn, ((n, seen[n]) for n in synthesizer.mirrored)):
        layer = inside.get_submodule(name)
        var, mean = (m[:, None, None] for m in torch.var_mean(t, (0, 2, 3), correction=0))
        own = (layer.running_var[:, None, None] + layer.eps).sqrt()
        target = (t - mean) / (var + layer.eps).sqrt() * own
        wanted += (g - target - layer.running_mean[:, None, None]).square().mean()
    names = synthesizer.loss_names
    assert found.losses[names.index('alignment')].item() == pytest.approx(
        wanted.item(), rel=1e-4
    )
    assert found.total.item() == pytest.approx(
        0.5 * found.losses[names.index('class')].item() + 2 * wanted.item(), rel=1e-4
    )


def test_alignment_reaches_the_generator_alone(teacher):
    "Each stage before the image; the targets hold still."
    synthesizer = mirrored(teacher, class_weight=0.0)
    synthesizer.begin_batch()
    total = synthesizer.evaluate_batch(synthesizer.latents, synthesizer.targets).total
    leaves = synthesizer.weights
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    reached = {k for k, g in zip(leaves, gradients) if g is not None and g.any()}
    assert any('noise' in k for k in reached) and any('linear' in k for k in reached)
    assert not any('body.last' in k for k in reached)


def test_weight_0_is_the_row_without_alignment(teacher):
    off = batch_of(mirrored(teacher, alignment_weight=0.0))
    plain = batch_of(layered(teacher, generator=mirror_of(teacher, 8), feature_weight=0.0))
    assert off.images.equal(plain.images)
    assert not off.images.equal(batch_of(mirrored(teacher, alignment_weight=5.0)).images)


def test_aligned_maps_come_nearer(teacher):
    synthesizer = mirrored(teacher, steps=30, learning_rate=0.01)
    synthesizer.begin_batch()
    losses = []
    for _ in range(30):
        synthesizer.step()
        losses.append(synthesizer.losses[-1].tolist()[-1])
    assert losses[-1] < 0.7 * losses[0]


@each(
    ('change', 'message'),
    [
        ({'alignment_weight': -1.0}, 'give 0 or more'),
        ({'alignment_weight': math.nan}, 'give 0 or more'),
        ({'generator': Generator(DIGITS.shape, 8, 4)}, 'build it with mirror_of'),
        ({'labels': 'teacher'}, "set labels to 'sampled'"),
    ],
)
def test_mirrors_that_cannot_work_are_told(teacher, change, message):
    with pytest.raises(DFKDError, match=message):
        MirrorSynthesizer(teacher, **{'generator': mirror_of(teacher, 8)} | change)


def test_a_teacher_without_maps_has_no_mirror():
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(DFKDError, match='BatchNorm layers over maps'):
        mirrored_layers(Teacher(flat, DIGITS))
    with pytest.raises(DFKDError, match='positive sizes'):
        MirrorGenerator(DIGITS.shape, [])


# --- a filter before the student (TA-DFKD) ---


def plain_mixture(losses, steps=10):
    "The same, image by image in plain Python."
    low, high = min(losses), max(losses)
    x = [(loss - low) / (high - low) for loss in losses]
    means, mean = np.quantile(x, [0.1, 0.9]).tolist(), sum(x) / len(x)
    variances = [sum((v - mean) ** 2 for v in x) / len(x) + 5e-4] * 2
    shares, rows = [0.5, 0.5], []
    for step in range(steps + 1):
        rows = []
        for v in x:
            parts = [
                s * math.exp(-((v - m) ** 2) / (2 * w)) / math.sqrt(w)
                for s, m, w in zip(shares, means, variances)
            ]
            rows.append([part / sum(parts) for part in parts])
        if step == steps:
            break
        for c in (0, 1):
            size = sum(row[c] for row in rows)
            shares[c] = size / len(x)
            means[c] = sum(row[c] * v for row, v in zip(rows, x)) / size
            spread = sum(row[c] * (v - means[c]) ** 2 for row, v in zip(rows, x))
            variances[c] = spread / size + 5e-4
    lower = means.index(min(means))
    highest = max(v for v, row in zip(x, rows) if row[lower] > 0.5)
    return [v <= highest for v in x]


def simulated():
    "Losses of a confident group and of others."
    draw = np.random.default_rng(0)
    parts = draw.exponential(0.05, 600), draw.uniform(0.2, 2, 424)
    return torch.tensor(np.concatenate(parts))


def test_accepted_losses_by_hand():
    losses = torch.tensor([0.0, 0.1, 0.1, 2.0, 2.1])
    assert accepted_of(losses).tolist() == [True] * 3 + [False] * 2
    batch = simulated()
    good = accepted_of(batch)
    assert good.double().mean().item() == pytest.approx(0.592, abs=5e-4)
    assert good.tolist() == plain_mixture(batch.tolist())
    # monotone
    assert batch[good].max() < batch[~good].min()
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    assert accepted_of(batch[order]).equal(good[order])
    # neither scale nor offset
    assert accepted_of(5 * batch + 3).equal(good)
    assert accepted_of(torch.full((6,), 0.7)).all()
    assert accepted_of(torch.tensor([2.0])).all() and accepted_of(batch, 0.0).all()


def test_the_lowest_losses_are_never_rejected():
    "Far below a narrow component the wide one would win."
    draw = np.random.default_rng(0)
    narrow, wide = draw.normal(0.5, 0.01, 400), draw.uniform(0.55, 2, 200)
    losses = torch.tensor(np.concatenate([[0.0, 0.2], narrow, wide]))
    good = accepted_of(losses)
    assert good[:402].sum() > 380 and good[0] and good[1] and not good.all()


@each('bad', [math.nan, math.inf])
def test_losses_that_are_not_finite_are_told(bad):
    with pytest.raises(DFKDError, match='not finite'):
        accepted_of(torch.tensor([0.0, bad]))


FILTERED = ['dfq', 'fast-2', 'ssd-kd-10', 'cmi', 'nayer', 'mirror', 'dafl-ema', 'adaptive']


@each('method', FILTERED)
def test_every_row_takes_a_filter(teacher, method):
    "Less reaches the student, and without a threshold nothing changes."
    changes = {'pool_size': 40, 'warmup_rounds': 0, 'synthesis_batch_size': 12}
    if method == 'adaptive':
        changes |= {'images': 24, 'rounds': 2, 'steps': 6, 'jitter': 1}
    base = trained(teacher, method, **changes)
    wrapped = trained(teacher, method, **changes, acceptance=1e-12)
    half = trained(teacher, method, **changes, acceptance=0.5)
    assert not isinstance(base.synthesizer, AcceptedImages)
    assert isinstance(half.synthesizer, AcceptedImages)
    assert 0 < half.synthesizer.share < 1
    assert not weights_of(half).equal(weights_of(base))
    if base.pool is not None:
        assert 0 < len(half.pool) < len(base.pool) and len(wrapped.pool) > len(half.pool)


def test_threshold_0_is_the_row_without_filter(teacher, monkeypatch):
    base = trained(teacher, 'dfq')
    off = trained(teacher, 'dfq-accept', acceptance=0.0)
    assert weights_of(off).equal(weights_of(base))
    # also where the filter is there and accepts all
    monkeypatch.setattr(methods, 'AcceptedImages', lambda *a: AcceptedImages(*a[:2], 0.0))
    through = trained(teacher, 'dfq-accept')
    assert through.synthesizer.share == 1
    assert weights_of(through).equal(weights_of(base))
    assert through.distiller.history == base.distiller.history


def known_batch(count):
    "A synthesizer whose images are known: image i is of intensity 8 i."
    noise = NoiseSynthesizer(DIGITS, batch_size=count)
    drawn = 8 * torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    noise.sample_images = lambda n, generator: drawn[:n].expand(-1, *DIGITS.shape).clone()
    return noise


def test_labels_and_logits_stay_with_their_images(teacher):
    filtered = AcceptedImages(known_batch(30), teacher)
    filtered.step()
    batch = filtered.pop()
    assert 0 < len(batch.images) < 30
    numbers = batch.images[:, 0, 0, 0] // 8
    drawn = known_batch(30).sample_images(30, torch.Generator())
    good = accepted_of(-teacher.predict(drawn).log_softmax(1).amax(1))
    assert numbers.tolist() == good.nonzero().flatten().tolist()
    assert numbers.max() > len(numbers)
    assert batch.labels.tolist() == (numbers.long() % 10).tolist()
    assert batch.teacher_logits is None
    with pytest.raises(DFKDError, match='no batch is finished'):
        filtered.pop()


def test_drawing_ends_with_a_full_batch(teacher):
    "After `attempts` draws the best of the rejected fill it."
    filtered = AcceptedImages(known_batch(20), teacher, attempts=2)
    images = filtered.sample_images(20, torch.Generator())[:, 0, 0, 0] // 8
    images = images.tolist()
    drawn = known_batch(20).sample_images(20, torch.Generator())
    losses = -teacher.predict(drawn).log_softmax(1).amax(1)
    good = accepted_of(losses)
    count = int(good.sum())
    assert 0 < count < 20 and filtered.judged == 40 and filtered.kept == 2 * count
    first = [i for i in range(20) if good[i]]
    accepted = (first + first)[:20]
    assert images[: len(accepted)] == accepted
    rest = sorted((float(losses[i]), i) for i in range(20) if not good[i])
    fill = [i for _, i in rest for _ in range(2)][: 20 - len(accepted)]
    assert images[len(accepted) :] == fill


def test_a_filter_is_resumed(teacher, tmp_path):
    def filtered(**settings):
        inner = averaged(teacher)
        return AcceptedImages(inner, teacher, **settings)

    whole = filtered()
    for _ in range(3):
        whole.step()
        if whole.batch_done:
            whole.pop()
    save_checkpoint(tmp_path / 'state.pt', whole.state_dict())
    other = filtered()
    other.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    assert (other.judged, other.kept) == (whole.judged, whole.kept) != (0, 0)
    for synthesizer in (whole, other):
        synthesizer.step()
    assert same(whole.weights, other.weights)
    assert whole.pop().images.equal(other.pop().images)
    with pytest.raises(DFKDError, match='set acceptance and acceptance_attempts back'):
        filtered(attempts=1).load_state_dict(whole.state_dict())
    with pytest.raises(DFKDError, match='not saved by an AcceptedImages'):
        other.load_state_dict(averaged(teacher).state_dict())


def test_filters_that_cannot_work_are_told(teacher):
    noise = NoiseSynthesizer(DIGITS)
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(DFKDError, match='give 0 for no filter, or less than 1'):
            AcceptedImages(noise, teacher, threshold)
    with pytest.raises(DFKDError, match='acceptance_attempts 0: give 1 or more'):
        AcceptedImages(noise, teacher, attempts=0)
    # what the other one has to say is passed on
    with pytest.raises(DFKDError, match="set pool to 'grows'"):
        trained(teacher, 'nayer', pool='none', acceptance=0.5)
    with pytest.raises(DFKDError, match='choose a pool'):
        trained(teacher, 'adaptive', pool='none', images=8, rounds=1, acceptance=0.5)
