"""Timed variants compute the same thing.

Losses, gradients, and what a whole round or step leaves.
"""

import argparse
import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dfkd_nb.dreams.layers import batchnorm_layers
from dfkd_nb.generators.generators import (
    Generator,
    convolve_upsampled,
    upsampling_kernel,
)
from dfkd_nb.lab import mixed_precision, speed, timing
from dfkd_nb.lab.bench import BENCHMARKS, add_arguments, run
from dfkd_nb.lab.speed import INVERSION_VARIANTS, fresh_teacher, make_step
from dfkd_nb.lab.speed_methods import (
    DISTILLATION_VARIANTS,
    SYNTHESIS_VARIANTS,
    UpsamplingGenerator,
    make_round,
    make_student_step,
)
from dfkd_nb.lab.timing import check_agreement, describe, interleaved_times, stopwatch
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.folding import fold_batchnorm
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


@pytest.fixture(scope='module')
def teacher():
    return fresh_teacher('resnet8')


@pytest.fixture(scope='module')
def updates(teacher):
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [
        make_step(variant, teacher, pixels, torch.arange(6))
        for variant in INVERSION_VARIANTS
        if 'compiled' not in variant
    ]


def make_rounds(teacher):
    torch.manual_seed(0)
    generator, student = Generator((3, 32, 32), 32, 4), build_model('resnet8')
    return [
        make_round(variant, teacher, student, generator, 6, 2)
        for variant in SYNTHESIS_VARIANTS
        if 'compiled' not in variant
    ]


@pytest.fixture(scope='module')
def rounds(teacher):
    return make_rounds(teacher)


def make_training_steps(teacher):
    torch.manual_seed(0)
    pool = torch.randint(256, (6, 3, 32, 32)).to(torch.uint8)
    student = build_model('resnet8')
    return [
        make_student_step(variant, teacher, student, pool, 6)
        for variant in DISTILLATION_VARIANTS
        if 'compiled' not in variant
    ]


@pytest.fixture(scope='module')
def training_steps(teacher):
    return make_training_steps(teacher)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_a_doubled_map_need_not_be_made(height, width, inputs, outputs, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(
        2, inputs, height, width, generator=rng, dtype=torch.float64, requires_grad=True
    )
    weight = torch.randn(
        outputs, inputs, 3, 3, generator=rng, dtype=torch.float64, requires_grad=True
    )
    slow = F.conv2d(F.interpolate(x, scale_factor=2, mode='nearest'), weight, padding=1)
    quick = convolve_upsampled(x, weight)
    torch.testing.assert_close(quick, slow)
    push = torch.randn(slow.shape, generator=rng, dtype=torch.float64)
    pairs = [torch.autograd.grad((y * push).sum(), (x, weight)) for y in (slow, quick)]
    torch.testing.assert_close(*pairs)


def test_its_gradient_lies_in_memory_as_the_weight_does():
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(upsampling_kernel(weight).square().sum(), weight)
    # a fused Adam on the CPU takes it for granted
    assert gradient.stride() == weight.stride()


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 8, 8), (3, 21, 29), (1, 5, 7)])
def test_both_forms_of_the_generator_agree(shape):
    torch.manual_seed(1)
    plain, generator = UpsamplingGenerator(shape, 8, 3).double(), Generator(shape, 8, 3)
    # the same names: weights of either form fit the other
    generator.double().load_state_dict(plain.state_dict())
    latents = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    wanted = plain(latents)
    push = torch.rand_like(wanted)
    torch.testing.assert_close(generator(latents), wanted)
    found = []
    for network in (generator, plain):
        leaves = [*network.parameters(), latents]
        found.append(torch.autograd.grad((network(latents) * push).sum(), leaves))
    torch.testing.assert_close(*found)
    plain.transposed = True
    torch.testing.assert_close(plain(latents), wanted)


def test_the_generator_never_makes_the_doubled_map(monkeypatch):
    generator = Generator((3, 32, 32), 8, 3)
    monkeypatch.setattr(F, 'interpolate', lambda *a, **k: pytest.fail('a map was doubled'))
    assert generator(torch.randn(2, 8)).shape == (2, 3, 32, 32)


def test_names_of_the_generators_weights_are_those_of_older_files():
    names = Generator((3, 32, 32), 8, 3).state_dict().keys()
    assert {'linear.weight', 'blocks.0.0.weight', 'blocks.1.0.weight'} <= names
    assert len(names) == 21


def exact(variants):
    return [variant for variant in variants if 'bfloat16' not in variant.name]


def test_updates_begin_equal(updates):
    errors = check_agreement(updates)
    for variant in exact(updates):
        assert errors[variant.name]['loss_error'] <= 1e-5
        assert errors[variant.name]['gradient_error'] < 1e-4, variant.name


def test_some_updates_later_the_baseline_and_the_package_have_the_same_pixels(teacher):
    "Without shifts, which each draws for itself."
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, package = (
        make_step(name, teacher, pixels, torch.arange(6)) for name in ('plain', 'package')
    )
    plain.baseline.jitter, plain.baseline.flip = 0, False
    package.batch.jitter, package.batch.flip = 0, False
    for update in (plain, package):
        for _ in range(3):
            update()
    assert (plain.baseline.pixels - pixels).abs().mean() > 0.1
    # Adam's first steps are signs: where a gradient is nearly 0 they may differ
    apart = (plain.baseline.pixels - package.batch.x).abs()
    assert apart.mean() < 1e-3


def test_rounds_begin_equal(rounds):
    errors = check_agreement(rounds)
    for variant in exact(rounds):
        assert errors[variant.name]['loss_error'] <= 1e-5
        assert errors[variant.name]['gradient_error'] < 0.01, variant.name


def test_looking_at_a_round_does_not_use_up_its_latents(rounds):
    before = [variant.gradient() for variant in rounds[:3]]
    for variant, (losses, gradient) in zip(rounds, before):
        again = variant.gradient()
        assert torch.equal(again[0], losses) and torch.equal(again[1], gradient)


def test_rounds_end_equal_one_after_the_other(teacher):
    "Latents, classes, and what the meta-step leaves for the second round."
    rounds = exact(make_rounds(teacher))
    # in the second, Adam has made whole steps of what rounding left
    for bound in (0.1, 2.0):
        wanted = rounds[0]().float()
        for variant in rounds[1:]:
            images = variant()
            assert images.dtype == torch.uint8
            assert (images.float() - wanted).abs().mean() < bound, variant.name


def test_a_round_that_forgets_a_term_is_caught(rounds):
    wrong = copy.deepcopy(rounds[2])
    wrong.synthesizer.objective = wrong.synthesizer.objective.reweigh(features=0.0)
    with pytest.raises(DFKDError, match='would mean nothing'):
        check_agreement([rounds[0], wrong])


def test_training_steps_are_equal(training_steps):
    before = training_steps[0].gradient()[0]
    check_agreement(training_steps, 2e-5)
    # looking changes nothing that counts
    torch.testing.assert_close(training_steps[0].gradient()[0], before)


def test_a_step_leaves_the_same_student(teacher):
    "On the same images as they are, each by its own optimiser."
    students = []
    for variant in exact(make_training_steps(teacher)):
        if variant.name.startswith('plain'):
            variant.baseline.update(variant.still)
            students.append(variant.baseline.student)
        else:
            variant.distiller.augment = None
            variant.distiller.sampler.sample = lambda *_, still=variant.still: (still, None)
            variant()
            students.append(variant.distiller.student)
    first, *others = (
        torch.cat([p.flatten() for p in student.parameters()]) for student in students
    )
    assert len(others) >= 4
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-5)


def test_the_baseline_reads_its_images_from_files(training_steps):
    on_disk = sorted(Path(training_steps[0].folder.name).iterdir())
    assert len(on_disk) == 6
    with Image.open(on_disk[2]) as image:
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(found, training_steps[-1].still[2])
    assert training_steps[0]() > 0


def test_workers_that_no_clock_sees_are_refused():
    with pytest.raises(DFKDError, match='does not count 2 processes'):
        bench(['--what', 'distillation', '--workers', '2', '--clock', 'processor'])


def test_memory_is_that_of_a_process_of_its_own(monkeypatch):
    assert 5e7 < speed.peak_memory('resnet8', 2, variant='plain') < 5e9
    asked = []
    monkeypatch.setattr(speed, 'peak_memory', lambda *of: asked.append(of) or 10**9)
    found = speed.measure_memory('resnet8', 3)
    assert list(found) == ['peak', 'plain', 'idle', 'activations']
    assert ('resnet8', 3, 'cpu', 'plain') in asked and ('resnet8', 3, 'cpu') in asked
    assert found['idle'] < 10**9 and found['activations'] > 10**6


@pytest.mark.parametrize(('name', 'left'), [('resnet20', 0), ('wrn16-1', 7), ('vgg11', 0)])
def test_folding_keeps_the_logits_and_the_teacher(name, left):
    torch.manual_seed(0)
    network = build_model(name)
    for layer in batchnorm_layers(network).values():
        for values, low in (
            (layer.weight.data, 0.5),
            (layer.bias.data, -0.5),
            (layer.running_mean, -0.5),
            (layer.running_var, 0.5),
        ):
            values.uniform_(low, low + 1)
    whole = Teacher(network, DOMAINS['cifar10'])
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    lean, x = fold_batchnorm(whole), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(lean(x), whole(x), rtol=1e-4, atol=1e-4)
    assert len(batchnorm_layers(lean)) == left and lean.domain is whole.domain
    assert all(torch.equal(v, before[k]) for k, v in whole.state_dict().items())


def test_what_cannot_be_traced_is_told():
    class Winding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 10)

        def forward(self, x):
            return (
                self.layer(x.mean((2, 3))) if x.sum() > 0 else self.layer(-x.mean((2, 3)))
            )

    with pytest.raises(DFKDError, match='cannot be traced'):
        fold_batchnorm(Teacher(Winding(), DOMAINS['cifar10']))


def test_networks_to_time_leave_the_callers_streams_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = fresh_teacher('resnet8'), fresh_teacher('resnet8')
    assert torch.equal(torch.rand(1), expected)
    assert all(
        a.equal(b) for a, b in zip(one.state_dict().values(), two.state_dict().values())
    )


def test_a_gpu_is_waited_for_by_its_number_and_not_after_every_call(monkeypatch):
    """The device that computes is waited for, not the current one; several calls lie
    between two waits.
    """
    happened, now = [], [0.0]
    monkeypatch.setattr(
        torch.cuda, 'synchronize', lambda device=None: happened.append(device)
    )
    monkeypatch.setitem(timing.CLOCKS, 'wall', lambda: now[0])

    def work():
        happened.append('work')
        now[0] += 0.5

    place = torch.device('cuda:1')
    assert stopwatch(work, place) == 0.5
    assert happened == [place, *['work'] * 10, place]
    happened.clear()
    assert stopwatch(work, torch.device('cpu')) == 0.5 and happened == ['work']


def test_clocks():
    with pytest.raises(DFKDError, match='unknown clock'):
        stopwatch(lambda: None, torch.device('cpu'), 'sun')
    with pytest.raises(DFKDError, match='does not see a GPU'):
        stopwatch(lambda: None, torch.device('cuda'), 'processor')
    times = interleaved_times([_Idle('a'), _Idle('b')], 2, 0, 'processor')
    assert times['a']['speed'] == 1 and times['b']['seconds'] >= 0


def test_of_two_variants_the_one_that_takes_half_as_long_has_twice_the_speed(monkeypatch):
    monkeypatch.setattr(
        'dfkd_nb.lab.timing.stopwatch', lambda update, *_: {'a': 2.0, 'b': 1.0}[update.name]
    )
    times = interleaved_times([_Idle('a'), _Idle('b')], 3, 0)
    assert (times['a'], times['b']) == (
        {'seconds': 2.0, 'speed': 1.0},
        {'seconds': 1.0, 'speed': 2.0},
    )


def bench(words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


class _Idle:
    device = torch.device('cpu')

    def __init__(self, variant):
        self.name = variant

    def __call__(self):
        return sum(range(10_000))

    def gradient(self):
        return torch.ones(1), torch.ones(1)


@pytest.mark.parametrize('what', ['synthesis', 'distillation'])
def test_bench_keeps_what_it_measured(what, tmp_path, capsys):
    words = [
        '--what',
        what,
        '--model',
        'resnet8',
        '--student',
        'resnet8',
        '--batch',
        '4',
        '--rounds',
        '1',
        '--width',
        '4',
    ]
    assert (
        bench([*words, '--steps', '1', '--clock', 'processor', '--out', str(tmp_path)]) == 0
    )
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert (
        path.name
        == {
            'synthesis': 'synthesis-resnet8-resnet8-width4-4.json',
            'distillation': 'distillation-resnet8-resnet8-4.json',
        }[what]
    )
    assert (
        found['what'] == what
        and found['clock'] == 'processor'
        and found['floor_seconds'] > 0
    )
    assert describe(found).splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize(('what', 'unit'), [('images', 'an image'), ('pool', 'the pool')])
def test_bench_draws_a_line_through_sizes(what, unit, tmp_path, capsys):
    words = ['--what', what, '--model', 'resnet8', '--student', 'resnet8', '--steps', '1']
    words += ['--batch', '4', '--rounds', '1', '--sizes', '4', '8', '--out', str(tmp_path)]
    assert bench(words) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert [row['size'] for row in found['rows']] == [4, 8]
    rise = found['rows'][1]['seconds'] - found['rows'][0]['seconds']
    assert found['slope'] == pytest.approx(rise / 4)
    assert unit in capsys.readouterr().out


def test_bench_times_all_three(tmp_path, monkeypatch):
    asked = []

    def stand_in(name):
        def run(model, batch, variants, rounds, **options):
            asked.append((name, list(variants), sorted(options)))
            row = {'seconds': 1.0, 'speed': 1.0, 'loss_error': 0.0, 'gradient_error': 0.0}
            return {'what': name, 'model': model, 'batch': batch, 'rounds': rounds} | {
                'variants': {'plain': row},
                'floor_seconds': 0.1,
                'operations': 1,
                'peak': 10.0,
                'machine': timing.describe_machine(torch.device('cpu')),
                'student': '',
                'width': 1,
                'steps': 1,
            }

        return run

    for name, chosen in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, replace(chosen, run=stand_in(name)))
    assert bench(['--what', 'all', '--channels-last', '--out', str(tmp_path)]) == 0
    assert [name for name, *_ in asked] == ['inversion', 'synthesis', 'distillation']
    assert all({'plain', 'package'} <= set(variants) for _, variants, _ in asked)
    assert 'workers' in asked[2][2] and 'width' in asked[1][2]
    assert len(list(tmp_path.iterdir())) == 3


def test_bench_refuses_what_it_cannot_do():
    with pytest.raises(DFKDError, match='memory of synthesis'):
        bench(['--what', 'synthesis', '--memory'])
    with pytest.raises(DFKDError, match="no variant 'compiled'"):
        bench(['--what', 'pool', '--compile'])
    with pytest.raises(DFKDError, match='--sizes belongs to'):
        bench(['--sizes', '3'])
    with pytest.raises(DFKDError, match='unknown variant'):
        make_round(
            'guess',
            fresh_teacher('resnet8'),
            build_model('resnet8'),
            Generator((3, 32, 32), 8, 2),
            2,
        )


def test_bfloat16_is_judged_by_gradients_and_by_students(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(mixed_precision, 'digits_teacher', lambda: fresh_teacher('resnet8'))
    monkeypatch.setattr(
        mixed_precision,
        'student_accuracy',
        lambda teacher, precision, seed, rounds: asked.append((precision, seed)) or 0.5,
    )
    words = ['--what', 'precision', '--model', 'resnet8', '--student', 'resnet8']
    assert bench([*words, '--batch', '2', '--sizes', '3', '4', '--out', str(tmp_path)]) == 0
    found = json.loads((tmp_path / 'precision-resnet8-resnet8-2.json').read_text())
    assert asked == [(p, s) for p in ('float32', 'bfloat16') for s in (3, 4)]
    for row in found['gradients'].values():
        # another number of bits, the same direction
        assert 1e-4 < row['gradient_error'] < 0.5 and 0.9 < row['gradient_cosine'] < 1
    assert found['accuracies'] == {'float32': [0.5, 0.5], 'bfloat16': [0.5, 0.5]}
    assert 'cosine' in capsys.readouterr().out


def test_a_student_of_digits_learns_without_data():
    teacher = mixed_precision.digits_teacher(60)
    assert mixed_precision.student_accuracy(teacher, 'float32', 0, 6) > 0.12


def test_one_command_times_every_method_in_every_mode(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location('bench_gpu', TOOLS / 'bench_gpu.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert {'scratch', 'fast-5', 'adaptive', 'ssd-kd-10'} <= set(tool.methods())
    path = tmp_path / 'methods.json'
    small = ['--device', 'cpu', '--rounds', '1', '--calls', '1', '--warm-up', '1']
    small += ['--batch', '4', '--width', '2', '--teacher', 'resnet8']
    small += ['--student', 'resnet8']
    chosen = ['--methods', 'vanilla', 'fast-2', '--modes', 'eager', 'captured']
    assert tool.main([*small, *chosen, '--out', str(path)]) == 0
    rows = json.loads(path.read_text())['rows']
    timed = [(r['method'], r['part']) for r in rows if r.get('ms', 0) > 0]
    expected = [('vanilla', 'student'), ('fast-2', 'synthesis'), ('fast-2', 'student')]
    assert timed == expected
    assert sum('need a GPU' in row.get('error', '') for row in rows) == 2
    assert '(1.00x)' in capsys.readouterr().out
    # no row is begun after its time; no GPU is a line
    options = tool.read_options([*small, *chosen, '--minutes', '0', '--out', str(path)])
    assert all(row['error'] == 'the time was up' for row in tool.run(options)['rows'])
    if not torch.cuda.is_available():
        assert tool.main([]) == 2 and 'no GPU' in capsys.readouterr().err
