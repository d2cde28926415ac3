"Contracts of measured and running statistics that the chapter does not show."

import copy
import math

import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfkd_nb.dreams.moments import batch_moments
from dfkd_nb.dreams.priors import LossInputs, Objective
from dfkd_nb.dreams.running_statistics import RunningStatistics, running_feature_term
from dfkd_nb.dreams.statistics import Statistics, Watch, feature_loss, feature_term
from dfkd_nb.toolbox.core import load_checkpoint, save_checkpoint, save_tensors
from dfkd_nb.toolbox.errors import DFKDError

quick = settings(max_examples=15, deadline=None)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moments(seed=0, channels=(3, 2), dtype=torch.float64):
    def pair(i, c):
        return noise(c, seed=10 * seed + i, dtype=dtype), noise(
            c, seed=1000 + 10 * seed + i, dtype=dtype
        ).square()

    return {f'layer{i}': pair(i, c) for i, c in enumerate(channels)}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name])
    )


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 5),
    )
    for layer in (net[1], net[4]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return net.eval().requires_grad_(False).double()


# what few images tell


def test_errors_of_measured_statistics_are_those_of_the_scatter_between_images():
    "Images whose places are all alike: an image is worth one place, whatever its size."
    images = noise(4000, 1, 1, 1, dtype=torch.float32).expand(-1, 1, 6, 6)
    errors = {count: [] for count in (4, 64)}
    for count, found in errors.items():
        for seed in range(200):
            chosen = torch.randint(
                4000, (count,), generator=torch.Generator().manual_seed(seed)
            )
            mean, var = batch_moments(images[chosen])
            found.append((mean.item(), var.item() - 1))
        means, variances = torch.tensor(found).T
        # Var(m) / N, not Var(m) / (36 N)
        assert abs(means.square().mean() * count - 1) < 0.3
        # the bias, -Var(m) / N
        assert abs(variances.mean() + 1 / count) < 4 * (2 / count / 200) ** 0.5 + 0.05
    small, large = (
        torch.tensor(found)[:, 0].square().mean().sqrt() for found in errors.values()
    )
    assert 3 < small / large < 5.3  # one over the root of 16


def test_files_that_hold_no_statistics_are_refused(tmp_path):
    path = tmp_path / 'statistics.safetensors'
    good = {'a.mean': torch.zeros(2), 'a.var': torch.ones(2)}
    half, told = {'a.mean': torch.zeros(2)}, {'layers': '["a"]', 'at': 'input'}
    for tensors, about in (
        (good, {}),
        (good, {'layers': '["a"]'}),
        (good, {'layers': 'a', 'at': 'input'}),
        (half, told),
    ):
        save_tensors(path, tensors, about)
        with pytest.raises(DFKDError, match='holds no statistics'):
            Statistics.load(path)
    save_tensors(path, good, told)
    assert list(Statistics.load(path)) == ['a']


# running statistics


@quick
@given(st.floats(0.01, 1), st.integers(1, 6))
def test_accumulation_is_the_weighted_mean_that_it_says(momentum, batches):
    running, seen = RunningStatistics(momentum), [moments(seed) for seed in range(batches)]
    for batch in seen:
        running.update(batch)
    weights = [
        momentum * (1 - momentum) ** (batches - 1 - i)
        if i
        else (1 - momentum) ** (batches - 1)
        for i in range(batches)
    ]
    assert abs(sum(weights) - 1) < 1e-9 and running.batches == batches
    for name, pair in running.moments.items():
        for k in (0, 1):
            torch.testing.assert_close(
                pair[k], sum(w * batch[name][k] for w, batch in zip(weights, seen))
            )


def test_the_papers_momentum_is_that_of_batchnorm():
    "nn.BatchNorm's momentum weighs the new batch, and so does ours."
    layer, running = nn.BatchNorm2d(3, momentum=0.1).double(), RunningStatistics(0.1)
    for seed in range(4):
        x = noise(8, 3, 4, 4, seed=seed)
        if not seed:  # it begins at 0 and 1, we at the first batch
            layer.running_mean, layer.running_var = batch_moments(x)
        else:
            layer(x)
        mean, var = batch_moments(x)
        # it stores the unbiased one
        running.update({'a': (mean, var * (1 if not seed else 128 / 127))})
    torch.testing.assert_close(running.moments['a'][0], layer.running_mean)
    torch.testing.assert_close(running.moments['a'][1], layer.running_var)


def test_mixing_changes_nothing_and_updating_keeps_no_graph():
    running, batch = RunningStatistics(0.3), moments()
    for pair in batch.values():
        for v in pair:
            v.requires_grad_()
    running.update(batch)
    before = copy.deepcopy(running.state_dict())
    running.mix(moments(1))
    running.mix(batch)
    after = running.state_dict()
    assert after['batches'] == before['batches'] == 1
    for name, pair in running.moments.items():
        for v, old, given_ in zip(pair, before['moments'][name], batch[name]):
            assert (
                not v.requires_grad
                and torch.equal(v, old)
                and v.data_ptr() != given_.data_ptr()
            )


@pytest.mark.parametrize('momentum', [0.05, 0.1, 0.5, 1.0])
def test_the_weight_of_a_later_batch_is_the_momentum(momentum):
    statistics, running = Statistics(moments(9)), RunningStatistics(momentum)
    for weight in (1.0, momentum, momentum):
        batch = {
            name: tuple(v.requires_grad_() for v in pair)
            for name, pair in moments(int(100 * weight) + running.batches).items()
        }
        parts = [v for pair in batch.values() for v in pair]
        total, _ = feature_loss(running.mix(batch), statistics)
        for slope in torch.autograd.grad(total, parts):
            assert abs(slope.norm() - weight) < 1e-6
        running.update(moments(20 + running.batches))


def test_the_gradient_at_the_pixels_is_that_of_finite_differences():
    net = network()
    statistics, running = Statistics.from_batchnorm(net), RunningStatistics(0.2)
    term = running_feature_term(statistics, running)

    def loss(x):
        with Watch(net) as watch:
            logits = net(x)
        return term(
            LossInputs(x, logits, torch.zeros(len(x), dtype=torch.long), watch.moments)
        )

    for seed in range(3):
        x = noise(2, 2, 6, 5, seed=seed).requires_grad_()
        assert torch.autograd.gradcheck(loss, x)
        with torch.no_grad(), Watch(net) as watch:
            net(x)
        running.update(watch.moments)


def test_the_target_makes_up_for_what_was_accumulated():
    "The loss is 0 where the batch is at t + (1 - m) / m (t - a)."
    statistics, running, momentum = Statistics(moments(3)), RunningStatistics(0.25), 0.25
    running.update(
        {name: (mean + 0.1, var * 0.9) for name, (mean, var) in statistics.items()}
    )
    expected = {
        name: tuple(
            t + (1 - momentum) / momentum * (t - a)
            for t, a in zip(pair, running.moments[name])
        )
        for name, pair in statistics.items()
    }
    assert feature_loss(running.mix(expected), statistics)[0] < 1e-5
    assert feature_loss(expected, statistics)[0] > 0.1


def test_momentum_1_is_the_plain_term():
    statistics, running, batch = Statistics(moments(5)), RunningStatistics(1.0), moments(6)
    running.update(moments(7))
    x = torch.zeros(2, 1, 2, 2)
    inputs = LossInputs(x, torch.zeros(2, 5), torch.zeros(2), batch)
    for weight in (1.0, 10.0):
        assert torch.equal(
            running_feature_term(statistics, running, weight)(inputs),
            feature_term(statistics, weight)(inputs),
        )


def test_a_resumed_accumulation_goes_on_to_the_same_bits(tmp_path):
    whole = RunningStatistics(0.1)
    first = RunningStatistics(0.1)
    second = RunningStatistics(0.7)
    batches = [moments(seed, dtype=torch.float32) for seed in range(6)]
    for batch in batches:
        whole.update(batch)
    for batch in batches[:3]:
        first.update(batch)
    save_checkpoint(tmp_path / 'checkpoint.pt', {'running': first.state_dict()})
    second.load_state_dict(load_checkpoint(tmp_path / 'checkpoint.pt')['running'])
    first.update(batches[0])  # the copy has a life of its own
    for batch in batches[3:]:
        second.update(batch)
    assert second.momentum == 0.1 and second.batches == 6
    assert same(whole.moments, second.moments)
    empty = RunningStatistics()
    empty.load_state_dict(RunningStatistics(0.4).state_dict())
    assert empty.batches == 0 and empty.moments == {} and empty.momentum == 0.4


def test_damaged_batches_change_nothing():
    running = RunningStatistics()
    running.update(moments())
    before = running.state_dict()
    for value in (math.nan, math.inf):
        bad = moments(1)
        bad['layer1'][1][0] = value
        with pytest.raises(DFKDError, match="layer 'layer1'"):
            running.update(bad)
    after = running.state_dict()
    assert after['batches'] == 1 and same(before['moments'], after['moments'])


def begun():
    running = RunningStatistics()
    running.update(moments())
    return running


@each(
    ('call', 'words'),
    [
        (lambda: RunningStatistics(0.0), 'weight of the new batch'),
        (lambda: RunningStatistics(1.1), 'weight of the new batch'),
        (lambda: RunningStatistics(math.nan), 'weight of the new batch'),
        (lambda: RunningStatistics().update({}), 'moments of no layer'),
        (
            lambda: begun().mix({'layer0': moments()['layer0']}),
            "no moments of layer 'layer1'",
        ),
        (
            lambda: begun().update(moments(channels=(3, 4))),
            'has 4 channels, accumulated were 2',
        ),
        (
            lambda: running_feature_term(Statistics(moments()), begun())(
                LossInputs(*map(torch.zeros, ((2, 1, 2, 2), (2, 5), (2,))))
            ),
            'no features',
        ),
    ],
)
def test_running_statistics_refuse_in_one_line(call, words):
    with pytest.raises(DFKDError, match=words) as caught:
        call()
    assert '\n' not in str(caught.value)


def test_small_batches_have_noisy_statistics_and_running_ones_have_not():
    net = network()
    truth = Statistics.measure(net, noise(3000, 2, 6, 6, seed=1))
    running, single, mixed = RunningStatistics(0.1), [], []
    for seed in range(60):
        with torch.no_grad(), Watch(net) as watch:
            net(noise(4, 2, 6, 6, seed=100 + seed))
        single.append(truth.distance(watch.moments).sum().item())
        running.update(watch.moments)
        mixed.append(truth.distance(running.moments).sum().item())
    assert sum(mixed[20:]) < 0.5 * sum(single[20:])


def test_a_term_among_others():
    net, running = network(), RunningStatistics(0.1)
    term = running_feature_term(Statistics.from_batchnorm(net), running)
    objective = Objective(
        {'features': (10.0, term), 'mean': (1.0, lambda inputs: inputs.x.mean())}
    )
    x = noise(4, 2, 6, 6).requires_grad_()
    losses = []
    for _ in range(5):
        with Watch(net) as watch:
            logits = net(x)
        total, values = objective(LossInputs(x, logits, torch.zeros(4), watch.moments))
        losses.append(values['features'].item())
        (slope,) = torch.autograd.grad(total, x)
        x = (x - 0.05 * slope / slope.norm()).detach().requires_grad_()
    # the term itself accumulates nothing
    assert losses[-1] < losses[0] and running.batches == 0
