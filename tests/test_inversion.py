"""DeepInversion's contract: repeats, resumes, stops, refuses, and never hands out its own
memory.
"""

import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import each
from tiny import DIGITS, used
from torch import nn

from dfkd_nb.dreams import inversion
from dfkd_nb.dreams.extractor import FeatureExtractor, fuse_statistics
from dfkd_nb.dreams.image_batch import resolution_stages, target_classes
from dfkd_nb.dreams.inversion import DeepInversion, deepinversion_preset
from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.dreams.statistics import Statistics
from dfkd_nb.foundations.optimization import learning_rate_at
from dfkd_nb.lab.explorers import DeepInversionExplorer
from dfkd_nb.toolbox.core import load_checkpoint, same_device, save_checkpoint
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.figures import FilmStrip
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher


def network(channels=1, classes=10, norm=True):
    """Two convolutions whose BatchNorm layers have seen something.

    Enough for every contract, and fast.
    """
    torch.manual_seed(0)
    norms = (
        [nn.BatchNorm2d(6), nn.BatchNorm2d(8)] if norm else [nn.Identity(), nn.Identity()]
    )
    model = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        norms[0],
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, 1),
        norms[1],
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    return used(model, (channels, 8, 8), 30)


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


def make(teacher, **settings):
    return DeepInversion(
        teacher, **{'steps': 12, 'batch_size': 4, 'device': 'cpu'} | settings
    )


def test_the_same_seed_dreams_the_same_and_another_does_not(teacher):
    a = make(teacher).synthesize(8)
    b = make(teacher).synthesize(8)
    c = make(teacher, seed=1).synthesize(8)
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, c.images)


def test_what_comes_out_is_a_labelled_image_set(teacher):
    images = make(teacher).synthesize(7, classes=['3', 5])
    assert (
        isinstance(images, ImageSet)
        and images.images.dtype == torch.uint8
        and images.images.shape == (7, 1, 8, 8)
    )
    assert images.labels.tolist() == [3, 5, 3, 5, 3, 5, 3]


def test_targets_are_balanced_by_default(teacher):
    assert make(teacher).synthesize(20).labels.bincount().tolist() == [2] * 10


def test_batches_are_even_and_bounded(teacher):
    synthesizer = make(teacher, batch_size=8)
    synthesizer.start(17)
    assert synthesizer.plan.sizes == [6, 6, 5]


def test_the_loss_falls(teacher):
    synthesizer = make(
        teacher,
        steps=60,
        batch_size=20,
        jitter=0,
        flip=False,
        tv_l2=2.5e-5,
        feature_weight=10.0,
    )
    synthesizer.synthesize(20, log_every=1)
    assert synthesizer.history[-1]['total'] < 0.6 * synthesizer.history[0]['total']
    assert synthesizer.history[-1]['class'] < synthesizer.history[0]['class']
    assert set(synthesizer.history[0]) == {
        'batch',
        'step',
        'total',
        'class',
        'tv_l2',
        'l2',
        'features',
    }


def test_every_batch_begins_with_its_own_noise(teacher):
    images = make(teacher, steps=1, batch_size=4).synthesize(8, [3]).images
    assert not torch.equal(images[:4], images[4:])


def test_the_rate_follows_its_schedule_in_every_stage(teacher):
    synthesizer, rates = make(teacher, stages=[(4, 3), (8, 2)], schedule='cosine'), []
    synthesizer.start(4)
    for _ in range(5):
        synthesizer.image_batch = synthesizer.image_batch or synthesizer._next_batch()
        dream = synthesizer.image_batch
        synthesizer.step()
        rates.append(dream.optimizer.param_groups[0]['lr'])
    expected = [
        learning_rate_at(step, updates, 'cosine')
        for updates in (3, 2)
        for step in range(updates)
    ]
    assert [rate / rates[0] for rate in rates] == pytest.approx(
        [factor / expected[0] for factor in expected]
    )


def test_presets_differ_in_weights_alone(teacher):
    a, b, c = (
        make(teacher, **deepinversion_preset(m)).settings
        for m in ('noise', 'deepdream', 'deepinversion')
    )
    assert all(
        k.startswith('weight of ') for k in a if a[k] != c.get(k) or b.get(k) != c.get(k)
    )
    assert make(teacher, **deepinversion_preset('noise')).loss.names == ['total', 'class']
    assert make(teacher, **deepinversion_preset('deepdream')).loss.names == [
        'total',
        'class',
        'tv_l2',
        'l2',
    ]


def test_the_teacher_is_not_changed(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    make(teacher).synthesize(4)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_images_are_copies(teacher):
    synthesizer = make(teacher, batch_size=4)
    seen = []
    synthesizer.synthesize(8, callback=lambda now: seen.append(now.images), log_every=4)
    # not one tensor, six times over
    assert [bool((a != b).any()) for a, b in pairwise(seen)].count(True) >= 4
    first = synthesizer.images
    first.images.zero_()
    first.labels.zero_()
    assert synthesizer.images.images.any() and synthesizer.images.labels.any()


def test_images_asked_for_too_late_are_refused(teacher):
    kept = []
    make(teacher).synthesize(4, callback=kept.append, log_every=3)
    with pytest.raises(DFKDError, match='inside the callback'):
        kept[0].images  # noqa: B018
    assert kept[-1].images.shape == (4, 1, 8, 8)  # the finished ones stay


def test_callback_is_told_where_it_stands(teacher):
    rows = []
    make(teacher).synthesize(
        8,
        callback=lambda now: rows.append(
            (now.batch, now.batches, now.step, now.steps, now.labels.tolist())
        ),
        log_every=6,
    )
    assert rows == [
        (0, 2, 6, 12, [0, 1, 2, 3]),
        (0, 2, 12, 12, [0, 1, 2, 3]),
        (1, 2, 6, 12, [4, 5, 6, 7]),
        (1, 2, 12, 12, [4, 5, 6, 7]),
    ]


def test_callback_that_returns_true_stops_and_run_goes_on(teacher):
    synthesizer = make(teacher)
    assert (
        len(synthesizer.synthesize(8, callback=lambda now: now.batch == 1, log_every=4))
        == 4
    )
    assert not synthesizer.finished
    assert torch.equal(
        synthesizer.run(log_every=4).images, make(teacher).synthesize(8).images
    )


class Interrupted(Exception):
    "What the callback raises."


@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'stages': [(4, 5), (8, 7)]},
        {'schedule': 'cosine', **deepinversion_preset('noise')},
    ],
    ids=['plain', 'stages', 'noise'],
)
def test_resumes_to_the_same_bits_wherever_it_was_cut(teacher, tmp_path, settings):
    whole = make(teacher, **settings)
    wanted = whole.synthesize(10, log_every=3)
    for cut in range(1, 13, 3):
        path, calls = tmp_path / f'{cut}.pt', []

        def callback(now, calls=calls, cut=cut):
            calls.append(now.step)
            if len(calls) == cut:
                raise Interrupted

        with pytest.raises(Interrupted):
            make(teacher, **settings).synthesize(
                10, checkpoint=path, callback=callback, log_every=3
            )
        again = make(teacher, **settings)
        found = again.synthesize(10, checkpoint=path, log_every=3)
        assert torch.equal(found.images, wanted.images) and torch.equal(
            found.labels, wanted.labels
        )
        assert again.history == whole.history
        assert torch.equal(
            make(teacher, **settings).synthesize(10, checkpoint=path).images, wanted.images
        )  # finished: read, not made again


def test_resumes_after_a_kill(teacher, tmp_path):
    "SIGKILL between two updates; the file holds what was saved last."
    script = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
torch.set_num_threads({torch.get_num_threads()})
from test_inversion import make, network, DIGITS
from dfkd_nb.toolbox.teachers import Teacher
def callback(now):
    if (now.batch, now.step) == (1, 8): os.kill(os.getpid(), signal.SIGKILL)
make(Teacher(network(), DIGITS, 'tiny')).synthesize(
    8,
    checkpoint={str(tmp_path / 'c.pt')!r},
    callback=callback,
    log_every=1,
    save_every=0.,
)
"""
    assert subprocess.run([sys.executable, '-c', script]).returncode == -9
    assert load_checkpoint(tmp_path / 'c.pt')['batch'] == 1
    assert torch.equal(
        make(teacher).synthesize(8, checkpoint=tmp_path / 'c.pt').images,
        make(teacher).synthesize(8).images,
    )
    assert [path.name for path in tmp_path.iterdir()] == ['c.pt']


def test_state_dict_goes_through_a_checkpoint_of_somebody_else(teacher, tmp_path):
    synthesizer = make(teacher)
    synthesizer.start(8)
    for _ in range(17):
        synthesizer.step()
    save_checkpoint(
        tmp_path / 'run.pt', {'phase': 'synthesis', 'state': synthesizer.state_dict()}
    )
    synthesizer.run()
    other = make(teacher)
    other.start(8)
    other.load_state_dict(load_checkpoint(tmp_path / 'run.pt')['state'])
    assert torch.equal(other.run().images, synthesizer.images.images)


def test_deadline_stops_cleanly(teacher, tmp_path):
    path = tmp_path / 'c.pt'
    some = make(teacher).synthesize(40, checkpoint=path, deadline=time.monotonic() - 1)
    assert len(some) == 0 and path.is_file()
    assert torch.equal(
        make(teacher).synthesize(40, checkpoint=path).images,
        make(teacher).synthesize(40).images,
    )


@pytest.mark.parametrize(
    'change, message',
    [
        ({'learning_rate': 0.2}, 'learning_rate'),
        ({'feature_weight': 5.0}, 'weight of features'),
        ({'seed': 3}, 'seed'),
    ],
)
def test_checkpoint_of_other_settings_is_refused_and_kept(
    teacher, tmp_path, change, message
):
    path = tmp_path / 'c.pt'
    make(teacher).synthesize(4, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(DFKDError, match=message):
        make(teacher, **change).synthesize(4, checkpoint=path)
    with pytest.raises(DFKDError, match='other images'):
        make(teacher).synthesize(5, checkpoint=path)
    with pytest.raises(DFKDError, match='another teacher'):
        make(Teacher(build_model('digits-net', 10, 1), DIGITS)).synthesize(
            4, checkpoint=path
        )
    assert path.read_bytes() == before


@pytest.mark.parametrize('content', [b'', b'not a checkpoint'])
def test_damaged_and_foreign_checkpoints_are_refused_and_kept(teacher, tmp_path, content):
    path = tmp_path / 'c.pt'
    path.write_bytes(content)
    with pytest.raises(DFKDError):
        make(teacher).synthesize(4, checkpoint=path)
    assert path.read_bytes() == content
    save_checkpoint(path, {'kind': 'something else'})
    with pytest.raises(DFKDError, match='not written by a synthesis'):
        make(teacher).synthesize(4, checkpoint=path)


def test_nan_says_which_term_and_keeps_what_is_finished(teacher, tmp_path):
    def poison(inputs: LossInputs):
        return inputs.x.mean() * (float('nan') if now['batch'] else 1.0)

    now = {'batch': 0}
    synthesizer = make(teacher, terms={'poison': (1.0, poison)})
    with pytest.raises(
        DFKDError, match="'poison' is nan at step 1 of batch 2.*lower learning_rate"
    ) as caught:
        synthesizer.synthesize(
            8,
            callback=lambda progress: (
                now.update(batch=progress.step == progress.steps) and None
            ),
            checkpoint=tmp_path / 'c.pt',
        )
    assert '\n' not in str(caught.value)
    assert len(synthesizer.images) == 4
    assert len(load_checkpoint(tmp_path / 'c.pt')['images'][0]) == 4


def test_stages_grow_by_nearest_neighbours(teacher):
    synthesizer = make(
        teacher,
        stages=[(4, 3), (8, 1)],
        clip=False,
        learning_rate=1e-12,
        jitter=0,
        flip=False,
    )
    synthesizer.start(4)
    for _ in range(3):
        synthesizer.step()
    small = synthesizer.image_batch.x.detach().clone()
    assert small.shape == (4, 1, 4, 4) and synthesizer.image_batch.images().shape == (
        4,
        1,
        8,
        8,
    )
    seen = synthesizer.image_batch.augmented()
    assert seen.shape == (4, 1, 8, 8) and torch.equal(
        seen, small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    assert synthesizer.image_batch.optimizer.state == {}  # a new Adam for new pixels


@pytest.mark.parametrize(
    'shape, classes',
    [((1, 8, 8), 10), ((3, 12, 20), 3), ((4, 9, 9), 1), ((2, 16, 16), 100)],
)
def test_any_shape_any_number_of_classes_any_normalisation(shape, classes):
    channels = shape[0]
    domain = Domain(
        'odd',
        shape,
        tuple(0.1 * (i + 1) for i in range(channels)),
        tuple(0.5 + i for i in range(channels)),
        tuple(map(str, range(classes))),
    )
    images = make(Teacher(network(channels, classes), domain), steps=3).synthesize(5)
    assert images.images.shape == (5, *shape) and int(images.labels.max()) < classes


def test_clipping_keeps_pixels_printable(teacher):
    low, high = DIGITS.limits()
    for clip in (True, False):
        synthesizer = make(teacher, clip=clip, learning_rate=1.0)
        synthesizer.start(4)
        for _ in range(3):
            synthesizer.step()
        x = DIGITS.from_pixels(synthesizer.image_batch.x)
        assert bool(((x >= low - 1e-6) & (x <= high + 1e-6)).all()) == clip


def test_without_batchnorm_it_says_what_to_do_and_takes_measured_statistics():
    plain = Teacher(network(norm=False), DIGITS)
    with pytest.raises(DFKDError, match='no BatchNorm'):
        make(plain)
    assert len(make(plain, **deepinversion_preset('deepdream')).synthesize(4)) == 4
    measured = Statistics.measure(
        plain, 0.2 * torch.randn(64, 1, 8, 8), layers=['model.0', 'model.3'], at='output'
    )
    synthesizer = make(plain, statistics=measured, steps=30, class_weight=0.0, tv_l2=0.0)
    assert not synthesizer.loss.extractor.fused
    synthesizer.synthesize(4, log_every=1)
    assert synthesizer.history[-1]['features'] < synthesizer.history[0]['features']


def test_hooks_and_fused_layers_agree(teacher):
    x = torch.randn(6, 1, 8, 8)
    statistics = Statistics.from_batchnorm(teacher)
    fused = FeatureExtractor(teacher, statistics)
    hooked = FeatureExtractor(teacher, statistics)
    hooked.fused, hooked.network = False, teacher
    (a, m, _), (b, k, _) = fused(x), hooked(x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name in k:
        torch.testing.assert_close(m[name], k[name], rtol=1e-4, atol=1e-5)


def test_statistics_named_inside_the_wrapped_network(teacher):
    inner = Statistics.from_batchnorm(teacher.model)
    assert torch.equal(
        make(teacher, statistics=inner).synthesize(4).images,
        make(teacher).synthesize(4).images,
    )


def test_bfloat16_stays_close(teacher):
    a, b = make(teacher, steps=1, precision='bfloat16'), make(teacher, steps=1)
    for synthesizer in (a, b):
        synthesizer.synthesize(4)
    assert a.history[0]['total'] == pytest.approx(b.history[0]['total'], rel=0.05)


BAD = {
    'steps': ({'steps': 0}, 'steps is 0'),
    'batch': ({'batch_size': 0}, 'batch_size is 0'),
    'learning rate': ({'learning_rate': -1.0}, 'learning_rate is -1'),
    'no learning': ({'learning_rate': 0.0}, 'give more than 0'),
    'nan weight': ({'tv_l2': float('nan')}, 'tv_l2 is nan'),
    'negative weight': ({'feature_weight': -1.0}, 'feature_weight'),
    'jitter': ({'jitter': -1}, 'jitter -1'),
    'seed': ({'seed': -1}, 'seed -1'),
    'schedule': ({'schedule': 'sometimes'}, 'unknown schedule'),
    'precision': ({'precision': 'float8'}, 'unknown precision'),
    'half on the CPU': ({'precision': 'float16'}, 'needs CUDA'),
    'device': ({'device': 'abacus'}, 'unknown device'),
    'last stage': ({'stages': [(4, 10)]}, 'the last stage'),
    'empty stage': ({'stages': [(4, 0), (8, 1)]}, '0 steps'),
    'tiny stage': ({'stages': [(1, 1), (8, 1)]}, '1 x 1'),
    'nothing to want': (deepinversion_preset('noise') | {'class_weight': 0.0}, 'no term'),
}


@each('settings, message', BAD.values(), ids=BAD)
def test_bad_settings_are_one_clear_line(teacher, settings, message):
    with pytest.raises(DFKDError, match=message) as caught:
        make(teacher, **settings)
    assert '\n' not in str(caught.value)


@each(
    'n, classes, message',
    [
        (0, None, '0 images'),
        (4, 10, 'class 10'),
        (4, ['x'], "'x'"),
        (4, [-1], '-1'),
        (4, [], 'no target class'),
        (4, [0.5], '0.5'),
    ],
)
def test_bad_targets_are_one_clear_line(teacher, n, classes, message):
    with pytest.raises(DFKDError, match=message):
        make(teacher).synthesize(n, classes)


def test_a_stage_too_small_for_the_network():
    class Fussy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4 * 36, 10)

        def forward(self, x):
            return self.fc(self.bn(self.conv(x)).flatten(1))

    with pytest.raises(DFKDError, match='4 x 4 pixels'), pytest.warns(UserWarning):
        make(Teacher(Fussy(), DIGITS), stages=[(4, 1), (8, 1)])


def test_stages_and_targets_by_hand():
    assert resolution_stages(None, 7, (8, 8)) == [((8, 8), 7)]
    assert resolution_stages([(4, 1), ((8, 8), 2)], 7, (8, 8)) == [((4, 4), 1), ((8, 8), 2)]
    assert target_classes(4, '7', DIGITS).tolist() == [7, 7, 7, 7]
    assert target_classes(3, torch.tensor([2, 1]), DIGITS).tolist() == [2, 1, 2]


def next_batch(synthesizer):
    while not synthesizer.batch_done:
        synthesizer.step()
    return synthesizer.pop()


def test_a_batch_at_a_time_without_a_plan(teacher):
    "Whole batches without end, classes in turn; `pop` hands each over once."
    synthesizer = make(teacher)
    with pytest.raises(DFKDError, match='no batch is complete'):
        synthesizer.pop()
    batches = [next_batch(synthesizer) for _ in range(3)]
    images = make(teacher).synthesize(12)
    assert torch.equal(torch.cat([batch.images for batch in batches]), images.images)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), images.labels)
    assert not synthesizer.batch_done and len(synthesizer.images) == 0
    synthesizer.start(4)
    next_batch(synthesizer)
    with pytest.raises(DFKDError, match='all planned images are made'):
        synthesizer.step()


def test_a_round_has_random_noise_of_its_own(teacher):
    synthesizer = make(teacher)
    first = next_batch(synthesizer)
    rounds = []
    for index in (0, 1):
        synthesizer.begin_round(index, competing=bool(index))
        rounds.append(next_batch(synthesizer))
    assert torch.equal(first.images, make(teacher).synthesize(4).images)
    assert torch.equal(rounds[0].labels, torch.tensor([4, 5, 6, 7]))  # classes go on
    assert torch.equal(rounds[1].labels, torch.tensor([8, 9, 0, 1]))
    again = make(teacher, seed=100_003 * 0 + 1).synthesize(4, [8, 9, 0, 1])
    assert torch.equal(rounds[1].images, again.images)  # seed * 100_003 + round


def test_a_round_resumes_to_the_same_bits(teacher):
    "In the middle of its second batch, with the first not yet taken."
    whole, other = make(teacher), make(teacher)
    whole.begin_round(3, True)
    for _ in range(17):
        whole.step()
    other.load_state_dict(whole.state_dict())
    for synthesizer in (whole, other):
        for _ in range(12):
            synthesizer.step()
    for _ in range(2):
        one, two = whole.pop(), other.pop()
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    assert not whole.batch_done and not other.batch_done


def test_film_is_small_and_needs_nothing():
    frames = [torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8) for _ in range(16)]
    page = FilmStrip(frames, range(16), titles=list('abcdefghij'))._repr_html_()
    assert len(page) < 600_000 and 'http' not in page and page.count('<span') == 10
    with pytest.raises(DFKDError):
        FilmStrip(frames, [1])


def test_explorer_without_a_browser(teacher):
    ipywidgets = pytest.importorskip('ipywidgets')
    inputs = DeepInversionExplorer(
        teacher, images=4, steps=20, log_every=2, device='cpu', jitter=0
    )
    assert isinstance(inputs.widget, ipywidgets.Widget) and not inputs.running
    inputs.classes.value = (3, 7)
    inputs.sliders['features'].value = 1.0
    inputs.go.click()  # start
    for _ in range(600):
        if inputs.inversion.history:
            break
        time.sleep(0.05)
    inputs.sliders['tv_l2'].value = 0.1  # while it runs
    inputs.go.click()  # stop
    inputs.wait()
    assert inputs.error is None and not inputs.running and inputs.go.description == 'start'
    stopped = inputs.inversion.steps_done
    assert 0 < stopped <= 20 and inputs.picture.value[:8] == b'\x89PNG\r\n\x1a\n'
    assert inputs.inversion.plan.targets.tolist() == [3, 7, 3, 7]
    inputs.go.click()  # on to the end
    inputs.wait()
    assert inputs.inversion.finished and '20 of 20' in inputs.status.value
    assert inputs.inversion.objective.weights['features'] == 1.0
    inputs.sliders['features'].value = 0.0
    inputs.again.click()  # from noise, without the feature term
    inputs.wait()
    assert inputs.inversion.finished and 'features' not in inputs.inversion.history[0]


def test_explorer_shows_an_error_instead_of_dying(teacher):
    pytest.importorskip('ipywidgets')
    inputs = DeepInversionExplorer(teacher, steps=2, device='cpu')
    for slider in inputs.sliders.values():
        slider.value = 0.0
    inputs.go.click()
    inputs.wait()
    assert isinstance(inputs.error, DFKDError) and 'no term' in inputs.status.value


def test_explorer_without_ipywidgets(teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(DFKDError, match='pip install'):
        DeepInversionExplorer(teacher)


def test_bench_command(tmp_path, capsys):
    from dfkd_nb.lab.commands import main

    assert main(['bench', '--batch', '2', '--rounds', '1', '--out', str(tmp_path)]) == 0
    found = json.loads((tmp_path / 'resnet20-2.json').read_text())
    assert list(found['variants']) == ['plain', 'frozen', 'one-pass', 'folded', 'package']
    assert all(row['loss_error'] <= 1e-5 for row in found['variants'].values())
    assert 'floor' in capsys.readouterr().out
    assert main(['bench', '--batch', '0']) == 2


# units of the pixel range


class Scaled(nn.Module):
    "A network with its normalisation inside: it takes 0 to 255."

    def __init__(self, model, domain):
        super().__init__()
        self.net = model
        self.register_buffer('mean', torch.tensor(domain.mean)[:, None, None])
        self.register_buffer('std', torch.tensor(domain.std)[:, None, None])

    def forward(self, x):
        return self.net((x / 255 - self.mean) / self.std)


@pytest.mark.parametrize(
    'settings',
    [
        {},
        deepinversion_preset('deepdream'),
        {'stages': [(4, 4), (8, 4)], 'schedule': 'cosine', 'clip': False},
    ],
)
def test_two_descriptions_of_one_network_dream_alike(teacher, settings):
    """Its domain says how to scale, or the network does it itself.

    The same noise, steps, priors and images.
    """
    wide = Domain('wide', DIGITS.shape, (0.0,), (1 / 255,), DIGITS.classes)
    inside = Teacher(Scaled(teacher.model, DIGITS), wide)
    quick = {'steps': 10, 'tv_l2': 0.1, 'l2': 0.01} | settings
    a, b = make(teacher, **quick), make(inside, **quick)
    one, other = (
        synthesizer.synthesize(8, log_every=1).images.int() for synthesizer in (a, b)
    )
    assert (one - other).abs().max() <= 1
    assert one.float().std() > 20  # neither is black nor grey
    for row, twin in zip(a.history, b.history):
        assert row == pytest.approx(twin, rel=1e-2, abs=1e-4)


def test_terms_see_pixel_units(teacher):
    views = []

    def record(inputs):
        views.append(inputs.x.detach().clone())
        return inputs.x.sum()

    make(teacher, steps=3, learning_rate=5.0, terms={'record': (1e-9, record)}).synthesize(
        4
    )
    assert views[-1].min() == -2 and views[-1].max() == 2  # clipped at black and at white


def test_the_optimiser_is_adam_with_the_papers_betas(teacher):
    "Four updates by hand, in pixel units."
    synthesizer = make(
        teacher,
        steps=4,
        batch_size=4,
        jitter=0,
        flip=False,
        clip=False,
        feature_weight=0.0,
        tv_l2=0.0,
        l2=0.0,
    )
    synthesizer.start(4)
    x = synthesizer._next_batch().x.detach().clone().double()
    net, targets = Teacher(teacher.model, DIGITS).double(), torch.arange(4)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, 5):
        x.requires_grad_()
        slope = torch.autograd.grad(
            nn.functional.cross_entropy(net(DIGITS.from_pixels(x)), targets), x
        )[0]
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope.square()
        x = (
            x
            - 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        ).detach()
        synthesizer.step() if step < 4 else None
    seen = synthesizer.image_batch.x.detach()
    synthesizer.step()
    assert (seen - x).abs().max() <= 0.11  # one step behind
    assert (
        synthesizer._finished[0].float()
        - DIGITS.to_uint8(DIGITS.from_pixels(x.float())).float()
    ).abs().max() <= 1


def shifts(synthesizer, samples=200):
    """Where a marked pixel of the batch in hand is seen.

    Largest shift down or right, and share of mirrored looks.
    """
    dream = synthesizer.image_batch or synthesizer._next_batch()
    size = dream.x.shape[-1]
    with torch.no_grad():
        dream.x.zero_()
        dream.x[..., size // 2, size // 2] = 1
        dream.x[..., size // 2 - 1, size // 2] = 2
        # right of the first one, unless mirrored
        dream.x[..., size // 2, size // 2 + 1] = 3
    far, mirrored = 0, 0
    for _ in range(samples):
        seen = dream.augmented()[0, 0]
        row, column = (seen == 1).nonzero()[0].tolist()
        far = max(far, min((row - size // 2) % size, (size // 2 - row) % size))
        mirrored += int((seen == 3).nonzero()[0][1] != (column + 1) % size)
    return far, mirrored / samples


def test_jitter_is_in_pixels_of_the_full_size(teacher):
    "Half of it at half the size."
    for size, wanted in ((8, 2), (4, 1)):
        synthesizer = make(teacher, stages=[(size, 2), (8, 2)], jitter=2)
        synthesizer.start(4)
        assert shifts(synthesizer)[0] == wanted


@pytest.mark.parametrize('flip, low, high', [(True, 0.35, 0.65), (False, 0.0, 0.0)])
def test_every_second_view_is_mirrored_or_none(teacher, flip, low, high):
    synthesizer = make(teacher, flip=flip)
    synthesizer.start(4)
    assert low <= shifts(synthesizer)[1] <= high


def test_the_scaler_of_half_precision_is_kept_up(teacher):
    """It doubles after a good update, and halves, skipping the update, after one with an
    infinite gradient.
    """
    synthesizer = make(teacher)
    synthesizer.start(4)
    dream = synthesizer._next_batch()
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0, growth_interval=1)
    dream.step(dream.x.square().sum(), scaler)
    assert scaler.get_scale() == 8.0
    before = dream.x.detach().clone()
    dream.step((dream.x * float('inf')).sum(), scaler)
    assert scaler.get_scale() == 4.0 and torch.equal(dream.x, before)


def test_a_compiled_update_is_the_update(teacher, monkeypatch):
    """Two sizes, a student and a term.

    With a backend that needs no C++ compiler; how often it was asked to compile shows that
    it was.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    plain = torch.compile
    monkeypatch.setattr(
        torch,
        'compile',
        lambda function, **words: plain(function, backend=backend, **words),
    )
    torch.manual_seed(3)
    torch._dynamo.reset()
    quick = {
        'stages': [(4, 2), (8, 2)],
        'batch_size': 6,
        'student': build_model('digits-net', 10, 1),
    }
    quick |= {
        'terms': {'rival': (0.1, lambda inputs: inputs.student_logits.square().mean())}
    }
    compiled, eager = make(teacher, compile=True, **quick), make(teacher, **quick)
    for synthesizer in (compiled, eager):
        synthesizer.synthesize(6, log_every=1)
    assert len(graphs) == 2  # one whole graph a size
    for row, wanted in zip(compiled.history, eager.history, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
    assert (compiled.images.images.int() - eager.images.images.int()).abs().max() <= 1


# layers and devices


class Excite(nn.Module):
    "Squeeze and excite, with a layer called fc."

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).sigmoid()[..., None, None]


class Excited(nn.Module):
    "Its classifier fc comes after another fc."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.se = Excite()
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.se(self.norm(self.conv(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    'embedding, layer',
    [('classifier', 'fc'), ('fc', 'fc'), ('se.fc', 'se.fc'), ('norm', 'norm')],
)
@pytest.mark.parametrize(
    'path', ['fused', 'fused, named inside', 'hooked', 'hooked, named inside', 'plain']
)
def test_the_layer_is_found_by_its_exact_name_on_every_path(path, embedding, layer):
    torch.manual_seed(0)
    teacher = Teacher(used(Excited(), DIGITS.shape), DIGITS)
    x = torch.randn(5, *DIGITS.shape)
    named = teacher.model if 'inside' in path else teacher
    where = ['norm'] if 'inside' in path else ['model.norm']
    statistics = {
        'fused': lambda: Statistics.from_batchnorm(named),
        'hooked': lambda: Statistics.measure(named, x, where, at='output'),
        'plain': lambda: None,
    }[path.split(',')[0]]()
    record = FeatureExtractor(teacher, statistics, embedding=embedding)
    assert record.fused == path.startswith('fused')
    entered = []
    hook = teacher.model.get_submodule(layer).register_forward_pre_hook(
        lambda module, inputs: entered.append(inputs[0])
    )
    wanted = teacher(x)
    hook.remove()
    logits, _, seen = record(x)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(
        seen, entered[0] if entered[0].ndim == 2 else entered[0].mean((2, 3))
    )


def test_a_device_by_another_name_is_the_same_device(teacher, monkeypatch):
    assert make(teacher, device='cpu:0').teacher is teacher  # nothing is copied
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    cuda, first, second, cpu = map(torch.device, ('cuda', 'cuda:0', 'cuda:1', 'cpu'))
    assert same_device(cuda, second) and same_device(second, cuda) and same_device(cpu, cpu)
    assert not any(
        same_device(a, b)
        for a, b in ((cuda, first), (first, second), (cpu, first), (cpu, cuda))
    )


def test_a_teacher_elsewhere_is_copied_not_moved(teacher, monkeypatch):
    monkeypatch.setattr(inversion, 'same_device', lambda a, b: False)
    synthesizer = make(teacher)
    assert (
        synthesizer.teacher is not teacher
        and synthesizer.teacher.model is not teacher.model
    )
    with torch.no_grad():
        synthesizer.teacher.model[0].weight.zero_()
    assert teacher.model[0].weight.any()


# whose fault it is


def test_a_term_that_fails_says_so_itself(teacher):
    def broken(inputs):
        raise ValueError('my own mistake')

    with pytest.raises(ValueError, match='^my own mistake$') as caught:
        make(teacher, terms={'mine': (1.0, broken)}).synthesize(4)
    assert not isinstance(caught.value, DFKDError)


def test_a_batch_too_small_for_the_network_is_said():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Linear(4, 10),
    )
    with pytest.raises(
        DFKDError,
        match='a batch of 1 is too small for this network.*synthesize more images',
    ):
        make(
            Teacher(nn.Sequential(*layers), DIGITS), feature_weight=0.0, batch_size=1
        ).synthesize(1)


# randomness, progress


def test_a_term_that_draws_goes_on_where_it_stood(teacher, tmp_path):
    "Its numbers come from PyTorch's, NumPy's and Python's own streams."

    def noisy(inputs):
        return (
            inputs.x
            * (torch.rand_like(inputs.x) + random.random() + float(np.random.rand()))
        ).mean()

    def synthesizer():
        return make(teacher, terms={'noisy': (5.0, noisy)})

    def begin():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)

    begin()
    whole = synthesizer().synthesize(8)
    for cut in (1, 3, 5):
        path, calls = tmp_path / f'{cut}.pt', []

        def callback(now, calls=calls, cut=cut):
            calls.append(now)
            if len(calls) == cut:
                raise Interrupted

        begin()
        with pytest.raises(Interrupted):
            synthesizer().synthesize(8, checkpoint=path, callback=callback, log_every=4)
        torch.rand(7), np.random.rand(), random.random()  # another process, other draws
        assert torch.equal(
            synthesizer().synthesize(8, checkpoint=path).images, whole.images
        )


def test_progress_counts_pixels_not_updates(teacher, monkeypatch):
    "Four updates at half the size are one at full size."
    bars, fractions = [], []
    monkeypatch.setenv('DFKD_PROGRESS', '1')

    def progress(**settings):
        bars.append(plain(**settings))
        return bars[-1]

    plain = inversion.progress
    monkeypatch.setattr(inversion, 'progress', progress)
    synthesizer = make(teacher, stages=[(4, 4), (8, 3)])
    synthesizer.start(8)
    for _ in range(5):  # four at half the size, one at full size
        synthesizer.step()
    assert synthesizer.pixel_steps_done == 2 * 64
    amounts = []
    plain_update = plain(total=1).__class__.update
    monkeypatch.setattr(
        plain(total=1).__class__,
        'update',
        lambda bar, n=1: (amounts.append(n), plain_update(bar, n))[1],
    )
    synthesizer.run(
        callback=lambda now: fractions.append(now.fraction) and None, log_every=1
    )
    assert bars[0].total == 2 * 4 * 64 and bars[0].initial == 2 * 64
    assert amounts == [64, 64, 16, 16, 16, 16, 64, 64, 64]
    assert fractions == [3 / 4, 1, 1 / 16, 2 / 16, 3 / 16, 1 / 4, 2 / 4, 3 / 4, 1]


# teachers in other forms

FORMS = {
    'float64': lambda net: net.double(),
    'half': lambda net: net.half(),
    'bfloat16': lambda net: net.to(torch.bfloat16),
    'compiled': lambda net: torch.compile(net, backend='eager'),
    'parallel': nn.DataParallel,
}
BATCH = torch.export.Dim('batch', min=1, max=512)
SEALED = {
    'script': torch.jit.script,
    'trace': lambda net: torch.jit.trace(net, torch.randn(2, *DIGITS.shape)),
    'export': (
        lambda net: torch.export.export(
            net, (torch.randn(2, *DIGITS.shape),), dynamic_shapes=({0: BATCH},)
        ).module()
    ),
}


@pytest.mark.parametrize('form', FORMS)
def test_a_teacher_in_another_form_dreams_the_same(teacher, form):
    dreamed = make(
        Teacher(FORMS[form](network()), DIGITS), steps=5, learning_rate=0.3
    ).synthesize(4)
    plain = make(teacher, steps=5, learning_rate=0.3).synthesize(4)
    close = (dreamed.images.int() - plain.images.int()).abs() <= (
        60 if form in ('half', 'bfloat16') else 1
    )
    assert close.float().mean() > 0.99


def test_a_teacher_made_double_afterwards_still_dreams(teacher):
    settings = {
        'student': build_model('digits-net', 10, 1),
        'embedding': 'classifier',
        'stages': [(4, 2), (8, 3)],
    }
    synthesizer = make(Teacher(teacher.model, DIGITS).double(), **settings)
    assert synthesizer.synthesize(4).images.float().std() > 20


@pytest.mark.parametrize('form', SEALED)
@pytest.mark.filterwarnings('ignore')
def test_a_sealed_teacher_says_what_to_do_and_dreams_without_statistics(teacher, form):
    sealed = Teacher(SEALED[form](network()), DIGITS)
    asked = (
        lambda: make(sealed),
        lambda: Statistics.measure(sealed, torch.randn(4, *DIGITS.shape)),
        lambda: make(sealed, feature_weight=0.0, embedding='classifier'),
    )
    for ask in asked:
        with pytest.raises(
            DFKDError, match='(cannot|can) be read.*give the network it was made from'
        ) as caught:
            ask()
        assert '\n' not in str(caught.value)
    images = make(sealed, feature_weight=0.0, batch_size=2).synthesize(2).images
    assert (
        images.int()
        - make(teacher, feature_weight=0.0, batch_size=2).synthesize(2).images.int()
    ).abs().max() <= 1


@pytest.mark.parametrize('form', ['compiled', 'parallel'])
def test_statistics_of_a_wrapped_network_have_its_own_names(form):
    net, x = network(), torch.randn(6, *DIGITS.shape)
    wrapped, right = FORMS[form](network()), Statistics.measure(net, x)
    for found in (Statistics.measure(wrapped, x), fuse_statistics(wrapped)(x)[1]):
        assert (
            list(found)
            == list(right)
            == list(Statistics.from_batchnorm(wrapped))
            == ['1', '4']
        )
        for name in right:
            torch.testing.assert_close(
                tuple(v.detach() for v in found[name]), right[name], rtol=1e-4, atol=1e-5
            )
