"""Calibration without data: ZeroQ's distance, equalisation, absorption, bias correction."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd_nb.applications.data_free_calibration import (
    LayerPair,
    absorb_biases,
    bias_shift,
    correct_biases,
    equalize,
    find_pairs,
    image_distance,
    input_means,
    quantize_dfq,
    replace_relu6,
    zeroq_distance,
    zeroq_images,
)
from dfkd_nb.applications.quantization import QuantizedNetwork, quantize
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.teachers import Teacher

pytest.importorskip('torchao')
DIGITS = DOMAINS['digits']
IMAGES = torch.randint(
    256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    "No two channels alike."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                value.copy_(0.2 + torch.rand(value.shape, generator=rng))
        for value in network.parameters():
            if value.ndim > 1:
                value.sub_(0.7)
    return network.eval()


def chain(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    "Three convolutions in a row, the second one depthwise, and a classifier."
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 10),
    )
    return randomized(network)


def output(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(DIGITS.normalize(IMAGES))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


# ZeroQ


def test_the_distance_of_an_image_by_hand() -> None:
    x = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    mean, deviation = x.flatten(2).mean(2)[0], x.flatten(2).std(2)[0]
    assert float(image_distance(x, mean, deviation)) < 1e-9
    moved = mean + torch.tensor([1.0, -2.0])
    assert float(image_distance(x, moved, deviation)) == pytest.approx(5.0, abs=1e-4)
    wider = deviation + torch.tensor([3.0, 0.0])
    assert float(image_distance(x, mean, wider)) == pytest.approx(9.0, abs=1e-4)


def test_an_image_is_measured_by_itself() -> None:
    teacher = Teacher(chain(), DIGITS)
    x = DIGITS.normalize(IMAGES)
    whole = zeroq_distance(teacher, x)
    parts = torch.cat([zeroq_distance(teacher, part) for part in x.split([1, 9, 14])])
    assert whole.shape == (24,) and torch.allclose(whole, parts, rtol=1e-4)
    # right as a batch, wrong as images
    halves = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    found = image_distance(halves, torch.ones(1), torch.ones(1))
    assert found.tolist() == pytest.approx([2.0, 2.0], abs=1e-2)


def test_maps_of_one_place_have_no_deviation() -> None:
    x = torch.tensor([[1.0, 2.0]]).view(1, 2, 1, 1)
    assert float(image_distance(x, torch.zeros(2), torch.ones(2))) == 5.0


def test_images_come_nearer_and_repeat_by_seed() -> None:
    teacher = Teacher(chain(), DIGITS)
    images, history = zeroq_images(teacher, 4, 30, learning_rate=0.1, seed=3)
    assert images.images.shape == (4, 1, 8, 8) and images.images.dtype == torch.uint8
    assert history[-1] < 0.8 * history[0]
    again, _ = zeroq_images(teacher, 4, 30, learning_rate=0.1, seed=3)
    assert torch.equal(images.images, again.images)
    assert not any(layer._forward_pre_hooks for layer in teacher.modules())


# equalisation


def test_pairs_have_only_a_relu_between_them() -> None:
    pairs = find_pairs(chain(), DIGITS)
    assert pairs == [LayerPair('0', '1', '3', '4'), LayerPair('3', '4', '6', '7')]
    assert find_pairs(chain(nn.ReLU6), DIGITS) == []
    without = nn.Sequential(*[m for m in chain() if not isinstance(m, nn.ReLU)])
    assert find_pairs(without, DIGITS) == []


def ranges(network: nn.Sequential, first: int, second: int) -> tuple[torch.Tensor, ...]:
    norm = network[first + 1]
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    making = (network[first].weight.flatten(1) * slope[:, None]).abs().amax(1)
    weight = network[second].weight
    reading = weight if network[second].groups > 1 else weight.transpose(0, 1)
    return making, reading.flatten(1).abs().amax(1)


def test_equalising_changes_ranges_and_no_output() -> None:
    network = chain()
    with torch.no_grad():
        network[1].weight.mul_(torch.logspace(-2, 2, 6))
    before = copy.deepcopy(network.state_dict())
    equal = equalize(network, DIGITS, rounds=100, tolerance=1e-6)
    assert close(output(equal), output(network))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    for first, second in ((0, 3), (3, 6)):
        making, reading = ranges(equal, first, second)
        assert torch.allclose(making, reading, rtol=1e-3)
        making, reading = ranges(network, first, second)
        assert not torch.allclose(making, reading, rtol=0.5)


def test_a_pair_by_hand_without_batchnorm() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([8.0, 0.0]).view(2, 1, 1, 1))
        network[0].bias.copy_(torch.tensor([4.0, 3.0]))
        network[2].weight.fill_(2.0)
    equal = equalize(network, DIGITS)
    assert equal[0].weight.flatten().tolist() == pytest.approx([4.0, 0.0])
    # a channel that is never made keeps its bias
    assert equal[0].bias.tolist() == pytest.approx([2.0, 3.0])
    assert equal[2].weight[0].flatten().tolist() == pytest.approx([4.0, 2.0])
    assert close(output(equal), output(network))


@pytest.mark.parametrize('norm', [True, False], ids=['mean', 'bias'])
def test_absorbing_is_exact_above_the_constant(norm: bool) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, bias=not norm),
        nn.BatchNorm2d(3) if norm else nn.Identity(),
    )
    randomized(network)
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([900.0, 700.0, 800.0, 0.0]))
        network[1].weight.fill_(1.0)
    moved = absorb_biases(network, DIGITS)
    assert moved[1].bias.tolist() == pytest.approx([3.0, 3.0, 3.0, 0.0])
    with torch.no_grad():
        first = moved[:2](DIGITS.normalize(IMAGES))[:, :3]
    inside = (first >= 0).all(1)
    # a place of the second layer sees 3 x 3 of the first
    seen = -F.max_pool2d(-inside.float()[:, None], 3, 1)[:, 0] > 0
    assert 0.05 < float(seen.float().mean())
    change = (output(moved) - output(network)).abs().amax(1)
    assert float(change[seen].max()) < 1e-4 * float(output(network).abs().max())


# biases


def expected_relu(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    normal = torch.distributions.Normal(0.0, 1.0)
    ratio = mean / deviation
    return deviation * normal.log_prob(ratio).exp() + mean * normal.cdf(ratio)


def test_means_behind_a_relu_are_the_formulas() -> None:
    ones = torch.ones(3)
    by_hand = expected_relu(torch.tensor([0.0, 1.0, -1.0]), ones)
    assert by_hand.tolist() == pytest.approx([0.39894, 1.08332, 0.08332], abs=1e-5)
    network = chain()
    quantized = quantize(Teacher(network, DIGITS), None, 4)
    means = input_means(quantized, samples=60_000)
    for layer, norm in (('3', 1), ('6', 4)):
        found = expected_relu(network[norm].bias, network[norm].weight.abs())
        assert torch.allclose(means[layer], found, atol=0.02)
    on_images = input_means(quantized, IMAGES)
    with torch.no_grad():
        x = network[:3](DIGITS.normalize(IMAGES))
    assert torch.allclose(on_images['3'], x.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_a_corrected_mean_is_that_of_the_float_layer(groups: int) -> None:
    rng = torch.Generator().manual_seed(groups)
    weight = torch.randn(8, 4 // groups, 1, 1, generator=rng)
    rounded = (weight * 2).round() / 2
    mean, deviation = torch.randn(2, 4, generator=rng)
    deviation = deviation.abs() + 0.1
    drawn = mean + deviation * torch.randn(100_000, 4, generator=rng)
    x = drawn.relu()[:, :, None, None]
    exact, wrong = (
        F.conv2d(x, w, groups=groups).mean((0, 2, 3)) for w in (weight, rounded)
    )
    shift = bias_shift(weight, rounded, expected_relu(mean, deviation))
    assert float((wrong - exact).abs().max()) > 0.05
    assert float((wrong - shift - exact).abs().max()) < 0.01


def test_corrected_biases_bring_mean_outputs_back() -> None:
    teacher = Teacher(chain(), DIGITS)
    network = quantize(teacher, IMAGES, 2, activation_bits=8, end_bits=2)
    exact = output(teacher).mean(0)
    before = (output(network).mean(0) - exact).abs().mean()
    means = input_means(network, IMAGES)
    found = correct_biases(network, means)
    after = (output(network).mean(0) - exact).abs().mean()
    assert found is network and float(after) < 0.5 * float(before)


def test_without_rounding_no_bias_moves() -> None:
    weight = torch.randn(3, 2, 3, 3)
    assert float(bias_shift(weight, weight, torch.ones(2)).abs().max()) == 0


# refusals


def test_what_cannot_be_done_is_told() -> None:
    flat = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), DIGITS)
    with pytest.raises(DFKDError, match='has no BatchNorm to match'):
        zeroq_images(flat, 2, 2)
    with pytest.raises(DFKDError, match='nothing to equalise'):
        equalize(flat, DIGITS)
    with pytest.raises(DFKDError, match='give 1 or more'):
        zeroq_images(Teacher(chain(), DIGITS), 0)
    with pytest.raises(DFKDError, match='does not know its ranges'):
        input_means(QuantizedNetwork(chain(), DIGITS))
    with pytest.raises(DFKDError, match='give images'):
        input_means(quantize(flat, IMAGES, 8))


# the whole of DFQ


def test_without_its_bound_a_relu6_has_pairs() -> None:
    bounded = chain(nn.ReLU6)
    free = replace_relu6(bounded)
    assert find_pairs(free, DIGITS) == find_pairs(chain(), DIGITS)
    assert sum(type(layer) is nn.ReLU6 for layer in bounded.modules()) == 2
    assert not any(isinstance(layer, nn.ReLU6) for layer in free.modules())
    assert torch.equal(output(free), output(chain()))
    plain = chain()
    assert torch.equal(output(replace_relu6(Teacher(plain, DIGITS))), output(plain))


def test_dfq_in_one_call_is_its_steps() -> None:
    teacher = Teacher(chain(nn.ReLU6), DIGITS)
    found = quantize_dfq(teacher, 4, seed=1, activation_bits=8)
    equal = absorb_biases(equalize(chain(), DIGITS), DIGITS)
    steps = quantize(Teacher(equal, DIGITS), None, 4, 1, activation_bits=8)
    uncorrected = output(steps)
    correct_biases(steps, input_means(steps, seed=1))
    assert torch.equal(output(found), output(steps))
    assert not torch.equal(output(found), uncorrected)
    assert found.settings['activation_bits'] == 8
