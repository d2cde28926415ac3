"""Quantisation: the simulation against PyTorch's arithmetic, integers against the
simulation, files, byte kernels, resuming to the bit.
"""

import platform
import warnings

import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfkd_nb.applications import quantization
from dfkd_nb.applications.integer_networks import (
    compile_x86,
    load_integers,
    pack_int4,
    save_integers,
    to_integers,
    unpack_int4,
)
from dfkd_nb.applications.quantization import (
    QuantizedNetwork,
    calibrate,
    finetune_quantized,
    input_ranges,
    layer_inputs,
    quantize,
    ranges_from_batchnorm,
    signal_to_noise,
)
from dfkd_nb.applications.quantization_graph import capture_graph
from dfkd_nb.toolbox.core import (
    import_torchvision,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError, DFKDWarning
from dfkd_nb.toolbox.evaluation import evaluate
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher

pytest.importorskip('torchao')
DIGITS = DOMAINS['digits']


def network(seed=0, channels=6):
    "Two convolutions whose BatchNorms have seen something."
    torch.manual_seed(seed)
    first = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
    second = nn.Conv2d(channels, channels, 3, 2, 1, bias=False)
    bodies = [
        first,
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        second,
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    ]
    model = nn.Sequential(
        *bodies, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )
    with torch.no_grad():
        model[-1].weight.mul_(8)
        for bn in (model[1], model[4]):
            bn.weight.uniform_(0.5, 2)
            bn.bias.normal_()
        for _ in range(50):
            model(DIGITS.normalize(pictures(32)))
    return model.eval()


def pictures(n, seed=0, shape=(1, 8, 8)):
    return torch.randint(
        256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


@pytest.fixture(scope='module')
def four(teacher):
    return quantize(teacher, pictures(64), 4)


def test_a_captured_network_is_the_same_for_any_batch(teacher):
    graph = capture_graph(teacher, DIGITS)
    for n in (1, 2, 7):
        x = DIGITS.normalize(pictures(n))
        torch.testing.assert_close(graph(x), teacher(x))


def inverted():
    "Two of MobileNetV2's blocks, one of them with a shortcut."
    block = import_torchvision().models.mobilenetv2.InvertedResidual
    stem = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)]
    return nn.Sequential(*stem, block(8, 8, 1, 4), block(8, 12, 2, 4), *head)


@pytest.mark.parametrize('name', ['resnet8', 'wrn16-1', 'inverted'])
def test_residual_wide_and_inverted_networks(name):
    torch.manual_seed(0)
    fresh = inverted() if name == 'inverted' else build_model(name, 10, 3)
    with torch.no_grad():
        for _ in range(8):
            fresh(torch.randn(8, 3, 32, 32))
    model = Teacher(fresh, DOMAINS['cifar10'])
    images = pictures(4, 1, (3, 32, 32))
    x = DOMAINS['cifar10'].normalize(images)
    quantized = quantize(model, pictures(8, shape=(3, 32, 32)), 8, observer='min-max')
    with torch.no_grad():
        error = (quantized(x) - model(x)).norm() / model(x).norm()
        assert 0 < error < 0.2, error
        # floats: what torchao folds must not change them
        entering = layer_inputs(quantized, images)
        hooked = {}
        layers = {
            k: v
            for k, v in model.model.named_modules()
            if isinstance(v, (nn.Conv2d, nn.Linear))
        }
        for k, v in layers.items():
            v.register_forward_pre_hook(
                lambda module, inputs, k=k: hooked.__setitem__(k, inputs[0].clone())
            )
        model(x)
        for k, value in entering.items():
            torch.testing.assert_close(value, hooked[k], rtol=1e-3, atol=1e-3)
        if name == 'resnet8':  # the others take long: BatchNorm in front, and many layers
            torch.testing.assert_close(
                to_integers(quantized)(x), quantized(x), rtol=1e-3, atol=1e-3
            )
            assert ranges_from_batchnorm(
                QuantizedNetwork(model, DOMAINS['cifar10'], 8), samples=8
            ).calibrated
    convolutions = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert len(signal_to_noise(quantized, images)) == convolutions


def test_weights_and_inputs_have_as_many_levels_as_asked_for(teacher, four):
    whole = to_integers(four)
    widths = [
        v.max().item() - v.min().item() + 1
        for v in whole.state_dict().values()
        if v.dtype == torch.int8
    ]
    assert widths[0] > 16 and widths[1] <= 16 and widths[2] > 16  # 8 bits at both ends
    rounded = layer_inputs(four, pictures(64, 2), rounded=True)
    assert (
        len(rounded['3'].unique())
        <= 16
        < len(layer_inputs(four, pictures(64, 2))['3'].unique())
    )


def test_the_first_layer_by_hand(teacher):
    "Extremes of the images give the range; PyTorch's own rounding gives what enters."
    images = pictures(64)
    quantized = quantize(teacher, images, 8, observer='min-max')
    x = DIGITS.normalize(images)
    low, high = input_ranges(quantized)['0']
    step = (x.max() - x.min()) / 255
    torch.testing.assert_close(torch.tensor(high - low), 255 * step)
    expected = torch.fake_quantize_per_tensor_affine(
        x, float(step), int((-x.min() / step).round()), 0, 255
    )
    torch.testing.assert_close(
        layer_inputs(quantized, images, rounded=True)['0'], expected, atol=1e-5, rtol=0
    )


def test_weights_of_a_channel_by_hand(teacher, four):
    bn, convolution = teacher.model[4], teacher.model[3]
    folded = (
        convolution.weight
        * (bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None, None]
    )
    step = folded.abs().amax((1, 2, 3)) / 7.5
    stored = [v for v in to_integers(four).state_dict().values() if v.dtype == torch.int8][
        1
    ]
    expected = (folded / step[:, None, None, None]).round().clamp(-8, 7)
    # ties may fall either way
    assert (stored - expected).abs().max() <= 1 and (
        stored == expected
    ).float().mean() > 0.98


def test_six_decibels_a_bit(teacher):
    quantized = [
        quantize(teacher, pictures(64), 8, activation_bits=bits, observer='min-max')
        for bits in (4, 5, 6)
    ]
    ratios = [signal_to_noise(network, pictures(64, 1))['3'] for network in quantized]
    assert all(4.5 < b - a < 7.5 for a, b in zip(ratios, ratios[1:]))


def test_without_images_the_range_is_batchnorms(teacher):
    """The largest of so many normal draws of each channel, rectified.

    Three to five standard deviations above the mean.
    """
    bn = teacher.model[1]
    high = input_ranges(
        ranges_from_batchnorm(
            QuantizedNetwork(teacher, DIGITS, 8, observer='min-max'), samples=1024
        )
    )['3'][1]
    assert (bn.bias + 2.5 * bn.weight).max() < high < (bn.bias + 6 * bn.weight).max()


def test_calibration_repeats_itself(teacher, four):
    again = quantize(teacher, ImageSet(pictures(64), None, DIGITS), 4)
    x = DIGITS.normalize(pictures(5, 3))
    assert torch.equal(again(x), four(x)) and input_ranges(again) == input_ranges(four)
    other = input_ranges(calibrate(again, pictures(64) // 4))
    assert other != input_ranges(four)
    again(10 * x)
    assert input_ranges(again) == other, 'passing images through is no calibration'


@pytest.mark.parametrize('observer', ['histogram', 'min-max'])
def test_a_new_calibration_forgets_the_old_one(teacher, observer):
    """On noise and then on images is on images alone, bit for bit; from BatchNorm alone
    likewise, and after fine-tuning.
    """
    noise, images = pictures(64), pictures(64, 1) // 3 + 50
    twice = quantize(teacher, noise, 4, observer=observer)
    once = quantize(teacher, images, 4, observer=observer)
    assert input_ranges(twice) != input_ranges(once), 'these images ask for other ranges'
    calibrate(twice, images)
    assert_same(twice, once)
    assert_same(
        ranges_from_batchnorm(twice),
        ranges_from_batchnorm(QuantizedNetwork(teacher, DIGITS, 4, observer=observer)),
    )
    # its steps are learned from now on
    finetune_quantized(teacher, twice, images, steps=1, learning_rate=1e-9).run()
    assert input_ranges(calibrate(twice, images)).keys() == input_ranges(once).keys()
    for name, (low, high) in input_ranges(twice).items():
        assert (low, high) == pytest.approx(input_ranges(once)[name], rel=1e-5, abs=1e-6)


def assert_same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(
        torch.equal(first[k], second[k]) for k in first
    )


def test_a_calibration_that_fails_leaves_nothing_half_done(teacher):
    class Broken(ImageSet):
        def fetch(self, indices):
            if int(indices[0]):
                raise OSError('the disk is gone')
            return super().fetch(indices)

    network = quantize(teacher, pictures(64), 4)
    with pytest.raises(OSError):
        calibrate(network, Broken(pictures(64, 1), None, DIGITS), batch_size=32)
    with pytest.raises(DFKDError, match='does not know its ranges'):
        network(DIGITS.normalize(pictures(2)))
    assert_same(calibrate(network, pictures(64)), quantize(teacher, pictures(64), 4))


def test_other_calibration_images_make_another_file(teacher, tmp_path):
    steps = []
    for number, images in enumerate((pictures(64), pictures(64) // 3 + 50)):
        save_integers(
            tmp_path / f'{number}.safetensors', to_integers(quantize(teacher, images, 8))
        )
        steps.append(load_tensors(tmp_path / f'{number}.safetensors')[0]['input_steps'])
    assert (steps[0] != steps[1]).all(), "every layer's step comes from the images"


def scaled(lowest):
    """One function, whatever `lowest` is.

    Channels between the last layers are scaled by 1 to `lowest`, and back.
    """
    torch.manual_seed(0)
    layers = [
        nn.Linear(64, 64, bias=False),
        nn.Linear(64, 64, bias=False),
        nn.Linear(64, 10, bias=False),
    ]
    scale = torch.logspace(0, torch.tensor(lowest).log10().item(), 64)
    with torch.no_grad():
        layers[1].weight.mul_(scale[:, None])
        layers[2].weight.div_(scale)
    return Teacher(nn.Sequential(nn.Flatten(), *layers), DIGITS, 'scaled')


def test_a_collapse_is_warned_of(teacher):
    with pytest.warns(
        DFKDWarning,
        match="'scaled', weights of 4 bits and inputs of 8, .*finetune_quantized",
    ):
        quantize(scaled(1e-5), pictures(64), 4, activation_bits=8)
    with pytest.warns(DFKDWarning, match='multiply intensities'):
        quantize(teacher, pictures(64) // 128, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error', DFKDWarning)
        quantize(scaled(1.0), pictures(64), 4, activation_bits=8)
        quantize(scaled(1e-5), pictures(15), 4)  # too few to tell


def test_a_double_network_is_quantised_as_floats(teacher):
    "In double precision the same answers: the simulation is one in float32."
    double = Teacher(network().double(), DIGITS, 'tiny')
    x = DIGITS.normalize(pictures(5, 3))
    torch.testing.assert_close(
        quantize(double, pictures(64), 4)(x), quantize(teacher, pictures(64), 4)(x)
    )


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_packing_is_undone(values):
    whole = torch.tensor(values, dtype=torch.int8)
    packed = pack_int4(whole)
    assert packed.dtype == torch.uint8 and len(packed) == (len(values) + 1) // 2
    assert torch.equal(unpack_int4(packed, tuple(whole.shape)), whole)


@pytest.mark.parametrize(
    'options',
    [
        {'bits': 8},
        {'bits': 4},
        {'bits': 3, 'activation_bits': 5, 'end_bits': 3, 'granularity': 'per-tensor'},
    ],
)
def test_a_file_gives_the_same_bits_back(teacher, tmp_path, options):
    whole = to_integers(quantize(teacher, pictures(64), **options))
    size = save_integers(tmp_path / 'a.safetensors', whole, {'model': 'tiny'})
    again = load_integers(tmp_path / 'a.safetensors', network(9), DIGITS)
    x = DIGITS.normalize(pictures(20, 4))
    assert torch.equal(again(x), whole(x)) and again.settings == whole.settings
    assert size == (tmp_path / 'a.safetensors').stat().st_size


def test_fewer_bits_are_fewer_bytes(tmp_path):
    big = Teacher(network(channels=64), DIGITS)
    sizes = {
        bits: save_integers(tmp_path / f'{bits}', to_integers(quantize(big, None, bits)))
        for bits in (8, 4)
    }
    weights = 64 * 64 * 9
    assert abs((sizes[8] - sizes[4]) - weights / 2) < 500


def test_foreign_files(teacher, four, tmp_path):
    save_integers(tmp_path / 'a.safetensors', to_integers(four))
    with pytest.raises(DFKDError, match='another architecture'):
        load_integers(tmp_path / 'a.safetensors', network(channels=7), DIGITS)
    from dfkd_nb.toolbox.networks import save_weights

    save_weights(tmp_path / 'b.safetensors', network())
    with pytest.raises(DFKDError, match='holds no quantised network'):
        load_integers(tmp_path / 'b.safetensors', network(), DIGITS)


def test_fine_tuning_lowers_the_loss_and_keeps_the_levels(teacher):
    quantized = quantize(teacher, pictures(64), 3)
    distiller = finetune_quantized(
        teacher, quantized, pictures(64), steps=60, learning_rate=1e-3
    )
    distiller.run(log_every=20)
    assert distiller.history[-1]['loss'] < distiller.history[0]['loss']
    assert len(layer_inputs(quantized, pictures(16), rounded=True)['3'].unique()) <= 8
    x = DIGITS.normalize(pictures(20, 4))
    torch.testing.assert_close(
        to_integers(quantized)(x), quantized(x).detach(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize('learn_ranges', [True, False])
def test_fine_tuning_resumes_to_the_same_bits(teacher, tmp_path, learn_ranges):
    test = ImageSet(pictures(30, 5), torch.arange(30) % 10, DIGITS)

    def begin():
        quantized = quantize(teacher, pictures(64), 4)
        images = ImageSet(pictures(64), None, DIGITS)
        return finetune_quantized(
            teacher,
            quantized,
            images,
            steps=12,
            learning_rate=1e-3,
            learn_ranges=learn_ranges,
            batch_size=16,
        )

    whole = begin().run(log_every=4)
    first = begin().run(until=5, log_every=4)
    evaluate(first.student, test)  # looking does not change it
    save_checkpoint(tmp_path / 'c.pt', first.state_dict())
    second = begin()
    second.load_state_dict(load_checkpoint(tmp_path / 'c.pt'))
    second.run(log_every=4)
    for a, b in zip(
        whole.student.state_dict().values(), second.student.state_dict().values()
    ):
        assert torch.equal(a, b)
    assert whole.history == second.history
    fresh = dict(begin().student.named_parameters())
    moved = [
        k
        for k, v in whole.student.named_parameters()
        if k.endswith('scale') and not torch.equal(v, fresh[k])
    ]
    assert bool(moved) == learn_ranges


@pytest.mark.skipif(
    platform.machine().lower() not in ('x86_64', 'amd64'),
    reason='byte kernels of oneDNN are for x86',
)
def test_integer_kernels_give_the_same_outputs(teacher):
    whole = to_integers(quantize(teacher, pictures(64), 8, activation_bits=7, end_bits=7))
    fast, x = compile_x86(whole, pictures(8, 6)), DIGITS.normalize(pictures(8, 6))
    assert (fast(x) - whole(x)).norm() < 0.1 * whole(x).norm()
    with pytest.raises(DFKDError, match='compile it again'):
        fast(x[:3])
    with pytest.raises(DFKDError, match='overflows'):
        compile_x86(whole, pictures(8, 6), tolerance=-1.0)


@each('bits', [0, 1, 9, 16, 4.0, True, '4'])
def test_numbers_of_bits_that_are_not_supported(teacher, bits):
    for name in ('bits', 'activation_bits', 'end_bits'):
        with pytest.raises(DFKDError, match='from 2 to 8'):
            QuantizedNetwork(teacher, DIGITS, **{name: bits})


def test_what_cannot_be_quantised(teacher, four):
    class DataDependent(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x) if x.mean() > 0 else self.net(-x)

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

        def forward(self, x):
            return self.head((self.conv(x) + self.conv(x)).mean((2, 3)))

    class Bare(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10]

    cases = [
        (
            lambda: quantize(Teacher(DataDependent(), DIGITS, 'dependent'), pictures(4)),
            "'dependent' cannot be traced",
        ),
        (lambda: quantize(Teacher(Bare(), DIGITS), pictures(4)), 'nothing to quantise'),
        (lambda: quantize(teacher, pictures(0)), 'no images to calibrate on'),
        (lambda: quantize(teacher, pictures(4, shape=(1, 9, 9))), 'do not fit the domain'),
        (
            lambda: quantize(
                teacher, ImageSet(pictures(4, shape=(3, 32, 32)), None, DOMAINS['cifar10'])
            ),
            'resize them',
        ),
        (
            lambda: quantize(
                Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), DIGITS), None
            ),
            'has no BatchNorm.*dfkd invert',
        ),
        (lambda: quantize(teacher, DIGITS.normalize(pictures(4))), 'give uint8'),
        (
            lambda: quantize(Teacher(Doubled(), DIGITS, 'doubled'), pictures(4)),
            "'doubled' .ValueError in .*: .*export",
        ),
        (
            lambda: QuantizedNetwork(teacher, DIGITS, observer='guess'),
            "unknown observer 'guess'",
        ),
        (
            lambda: QuantizedNetwork(teacher, DIGITS, granularity='all'),
            "unknown granularity 'all'",
        ),
        (
            lambda: QuantizedNetwork(teacher, DIGITS)(torch.zeros(1, 1, 8, 8)),
            'does not know its ranges',
        ),
        (
            lambda: to_integers(QuantizedNetwork(teacher, DIGITS)),
            'does not know its ranges',
        ),
        (
            lambda: finetune_quantized(
                teacher, QuantizedNetwork(teacher, DIGITS), pictures(4)
            ),
            'does not know its ranges',
        ),
        (
            lambda: compile_x86(to_integers(four), pictures(4)),
            'no kernels for weights of 4 bits',
        ),
    ]
    for work, message in cases:
        with pytest.raises(DFKDError, match=message) as caught:
            work()
        assert '\n' not in str(caught.value)


def test_an_assertion_without_text_says_where(teacher, monkeypatch):
    def annotate(*_):
        raise AssertionError

    monkeypatch.setattr(quantization, 'x86_quantizer', annotate)
    with pytest.raises(
        DFKDError, match='AssertionError in annotate.: call each layer once'
    ) as caught:
        QuantizedNetwork(teacher, DIGITS)
    assert '\n' not in str(caught.value)


def test_the_teacher_stays_as_it_was(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    finetune_quantized(
        teacher, quantize(teacher, pictures(64), 4), pictures(64), steps=3
    ).run()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_an_activation_that_is_called_twice():
    class Thrifty(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(
                [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)]
            )
            self.relu, self.head = nn.ReLU6(), nn.Linear(4, 10)

        def forward(self, x):
            first = self.relu(self.convs[0](x))
            return self.head((self.relu(self.convs[1](first)) + first).mean((2, 3)))

    torch.manual_seed(0)
    model = Teacher(Thrifty(), DIGITS)
    quantized, x = quantize(model, pictures(32), 8), DIGITS.normalize(pictures(8))
    assert list(input_ranges(quantized)) == ['convs.0', 'convs.1', 'head']
    assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_a_linear_network_can_be_calibrated():
    torch.manual_seed(0)
    domain = Domain('toy', (1, 4, 4), (0.5,), (0.5,), ('a', 'b'))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    quantized = quantize(Teacher(model, domain), pictures(32, shape=(1, 4, 4)), 8)
    assert list(input_ranges(quantized)) == ['1', '3']
