"""Timed variants compute the same thing.

Losses, gradients, and what a whole round or step leaves.
"""

import argparse
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_nb.dreams.layers import batchnorm_layers
from dfkd_nb.generators.generators import Generator
from dfkd_nb.lab import timing
from dfkd_nb.lab.bench import add_arguments, run
from dfkd_nb.lab.speed import fresh_teacher
from dfkd_nb.lab.speed_methods import (
    DISTILLATION_VARIANTS,
    SYNTHESIS_VARIANTS,
    DistillationStep,
    UpsamplingGenerator,
    convolve_upsampled,
    make_round,
    upsampling_kernel,
)
from dfkd_nb.lab.timing import check_agreement, describe, interleaved_times, stopwatch
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.folding import fold_batchnorm
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher


@pytest.fixture(scope='module')
def teacher():
    return fresh_teacher('resnet8')


@pytest.fixture(scope='module')
def rounds(teacher):
    torch.manual_seed(0)
    generator = UpsamplingGenerator((3, 32, 32), 32, 4)
    student = build_model('resnet8')
    latents = torch.randn(6, 32)
    return [
        make_round(variant, teacher, student, generator, latents, 2)
        for variant in SYNTHESIS_VARIANTS
    ]


@pytest.fixture(scope='module')
def training_steps(teacher):
    torch.manual_seed(0)
    pictures = torch.randint(256, (6, 3, 32, 32)).to(torch.uint8)
    student = build_model('resnet8')
    return [
        DistillationStep(variant, teacher, student, pictures)
        for variant in DISTILLATION_VARIANTS
        if variant != 'compiled'
    ]


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


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 8, 8), (3, 20, 28)])
def test_both_generators_are_chapter_tens(shape):
    torch.manual_seed(1)
    generator = UpsamplingGenerator(shape, 8, 3).double()
    latents = torch.randn(4, 8, dtype=torch.float64)
    wanted = Generator.forward(generator, latents)
    for generator.transposed in (False, True):
        torch.testing.assert_close(generator(latents), wanted)


def test_rounds_begin_equal(rounds):
    errors = check_agreement(rounds)
    assert all(
        e['loss_error'] <= 1e-5 for variant, e in errors.items() if variant != 'bfloat16'
    )
    assert all(
        e['gradient_error'] < 0.01 for variant, e in errors.items() if variant != 'bfloat16'
    )


def test_rounds_end_equal_and_repeat(rounds):
    wanted = rounds[0]().float()
    for variant in rounds[:5]:
        images = variant()
        assert (
            images.dtype == torch.uint8 and (images.float() - wanted).abs().mean() < 0.5
        ), variant.name
        # a second round starts where the first did
        assert torch.equal(images, variant()), variant.name


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


def test_a_step_leaves_the_same_student(training_steps):
    for training_step in training_steps:
        training_step()
    wanted = torch.cat(
        [p.flatten() for p in training_steps[0].distiller.student.parameters()]
    )
    for training_step in training_steps[1:5]:
        got = torch.cat([p.flatten() for p in training_step.distiller.student.parameters()])
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


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
            'synthesis': 'synthesis-resnet8-width4-4.json',
            'distillation': 'distillation-resnet8-4.json',
        }[what]
    )
    assert (
        found['what'] == what
        and found['clock'] == 'processor'
        and found['floor_seconds'] > 0
    )
    assert describe(found).splitlines()[0] in capsys.readouterr().out


def test_bench_refuses_what_it_cannot_do():
    with pytest.raises(DFKDError, match='memory of synthesis'):
        bench(['--what', 'synthesis', '--memory'])
    with pytest.raises(DFKDError, match="no variant 'compiled'"):
        bench(['--what', 'synthesis', '--compile'])
    with pytest.raises(DFKDError, match='unknown variant'):
        make_round(
            'guess',
            fresh_teacher('resnet8'),
            build_model('resnet8'),
            UpsamplingGenerator((3, 32, 32), 8, 2),
            torch.randn(2, 8),
        )
