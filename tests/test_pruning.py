"""Pruning's contract: what a removal computes, what importance estimates, tables, files,
exports, resuming, refusals.
"""

import copy
import functools
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from dfkd_nb.applications import filter_groups, latency
from dfkd_nb.applications.batchnorm import reestimate_batchnorm
from dfkd_nb.applications.export import export_network, network_cost
from dfkd_nb.applications.filter_groups import FilterGates
from dfkd_nb.applications.filters import (
    ConvShape,
    PrunableFilters,
    conv_shapes,
    find_filters,
    remove_filters,
    removed_filters,
)
from dfkd_nb.applications.importance import (
    filter_importance,
    fisher_direction,
    gate_gradients,
    rank_agreement,
)
from dfkd_nb.applications.integer_networks import to_integers
from dfkd_nb.applications.latency import (
    LatencyTable,
    compare_latencies,
    interleaved_latencies,
    linear_fit,
)
from dfkd_nb.applications.pruning import (
    PruningDistiller,
    PruningPlan,
    fraction_recovered,
    load_pruned,
    prune_filters,
    save_pruned,
)
from dfkd_nb.applications.quantization import quantize
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.lab.recipes import Recipe
from dfkd_nb.lab.runs import Run
from dfkd_nb.toolbox.core import load_tensors, save_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError, DFKDWarning
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher, load_teacher

DIGITS, CIFAR = DOMAINS['digits'], DOMAINS['cifar10']


def network(name='digits-net', seed=0):
    "A network whose BatchNorms are far from where they begin."
    torch.manual_seed(seed)
    domain = DIGITS if name in ('digits-net', 'flat') else CIFAR
    if name == 'flat':  # each filter becomes 16 inputs of the linear layer, as in VGG
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1),
            nn.ReLU6(),
            nn.Flatten(),
            nn.Linear(96, 9),
            nn.Linear(9, 10),
        )
    else:
        model = build_model(name, 10, domain.channels)
    with torch.no_grad():
        for _ in range(10 if name == 'digits-net' else 2):
            model(torch.randn(16, *domain.shape))
    return model.eval(), domain


@pytest.fixture(scope='module')
def digits():
    model, domain = network()
    return Teacher(model, domain, 'tiny'), find_filters(model, domain)


@pytest.fixture(scope='module')
def pool():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (120, 1, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageSet(images, torch.randint(10, (120,), generator=rng), DIGITS)


def some(filters: PrunableFilters, seed=0):
    "PrunableFilters kept at random, the first of each layer among them."
    rng = torch.Generator().manual_seed(seed)
    kept = {
        name: torch.rand(group.count, generator=rng) > 0.4
        for name, group in filters.groups.items()
    }
    for still in kept.values():
        still[0] = True
    return kept


# removal


@pytest.mark.parametrize(
    'name', ['digits-net', 'resnet20', 'wrn16-1', 'mobilenetv2', 'resnet18', 'flat']
)
def test_removal_is_what_closed_gates_compute(name):
    model, domain = network(name)
    filters, model = find_filters(model, domain), model.double()
    kept = some(filters)
    small = remove_filters(model, filters, kept)
    x = torch.randn(2, *domain.shape, dtype=torch.double)
    with torch.no_grad():
        with FilterGates(
            model, filters.groups.values(), {k: v.double() for k, v in kept.items()}
        ):
            masked = model(x)
        assert torch.allclose(
            small(x), masked, rtol=1e-9, atol=1e-9 * float(masked.abs().max())
        )
        assert not torch.allclose(model(x), masked), (
            'the gates are gone again, and they mattered'
        )
    assert list(conv_shapes(small.float(), domain).values()) == filters.remaining_shapes(
        kept
    ), 'sizes are as the table is asked'


SMALL = Domain('small', (3, 8, 8), (0.5,) * 3, (0.5,) * 3, tuple('abcd'))


def layers(inputs, outputs, **settings):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, **settings), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class StandIn(nn.Module):
    "What other libraries' networks are made of, in small."

    def __init__(self, kind):
        super().__init__()
        self.kind, wide = kind, {'kernel_size': 3, 'padding': 1}
        self.stem, self.fc = layers(3, 16, kernel_size=1), nn.Linear(16, 4)
        self.a, self.c = layers(16, 24, kernel_size=1), layers(24, 16, kernel_size=1)
        self.b = layers(24, 24, groups=6 if kind != 'uneven' else 12, **wide)
        self.b2 = layers(24, 24, groups=4, **wide)
        self.extra = (
            layers(24, 36, groups=12, **wide)
            if kind == 'uneven'
            else layers(8, 8, groups=8, **wide)
        )
        self.narrow, self.back = layers(16, 8, kernel_size=1), layers(36, 24, kernel_size=1)
        self.b3 = layers(24, 24, groups=6, **wide)
        self.skip, self.gate = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.stem(x)
        if self.kind == 'grouped':  # ResNeXt, RegNet
            x = x + self.c(self.b(self.a(x)))
        elif self.kind == 'two groupings':  # of 4 and of 6 channels: they meet at 12
            x = x + self.c(self.b2(self.b(self.a(x))))
        elif self.kind == 'excitation':  # RegNet-Y
            x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid() + self.c(
                self.b(self.a(x))
            )
        elif self.kind == 'uneven':
            x = x + self.c(self.back(self.extra(self.a(x))))
        elif self.kind == 'ghost':  # GhostNet: cheap copies, cut to size
            first = self.narrow(x)
            x = x + torch.cat([first, self.extra(first)], 1)[:, :16]
        elif self.kind == 'ghost cut':  # more copies than are needed
            first = self.narrow(x)
            x = x[:, :12] + torch.cat([first, self.extra(first)], 1)[:, :12]
            return self.fc(torch.cat([x, x[:, :4]], 1).mean((2, 3)))
        elif self.kind == 'branches':  # FastViT, MobileOne: a BatchNorm beside convolutions
            x = self.skip(x) + self.gate(x) + self.c(self.a(x))
        elif self.kind == 'shuffle':  # ShuffleNet
            x = self.b(self.a(x)).unflatten(1, (6, 4)).transpose(1, 2).flatten(1, 2)
            x = self.c(self.b3(x))
        return self.fc(x.mean((2, 3)))


KINDS = ('grouped', 'two groupings', 'excitation', 'uneven', 'ghost', 'branches', 'shuffle')


@functools.cache
def stand_in(kind):
    torch.manual_seed(0)
    model = StandIn(kind).eval()
    return find_filters(model, SMALL), model.double()


@pytest.mark.parametrize('kind', KINDS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_any_choice_of_what_is_removable_can_be_removed(kind, seed):
    filters, model = stand_in(kind)
    rng, kept = torch.Generator().manual_seed(seed), {}
    for name, group in filters.groups.items():
        part = torch.rand(group.num_blocks, generator=rng) > torch.rand(1, generator=rng)
        part[torch.randint(group.num_blocks, (1,), generator=rng)] = True
        kept[name] = part[group.blocks]
    small = remove_filters(model, filters, kept)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double, generator=rng)
    with torch.no_grad():
        with FilterGates(
            model, filters.groups.values(), {k: v.double() for k, v in kept.items()}
        ):
            masked = model(x)
        assert torch.allclose(
            small(x), masked, rtol=1e-9, atol=1e-9 * float(masked.abs().max())
        )
    assert list(conv_shapes(small, SMALL).values()) == filters.remaining_shapes(kept)
    assert {type(layer) for layer in small.modules()} <= {
        type(layer) for layer in model.modules()
    }


def test_a_grouped_convolution_goes_by_whole_groups(tmp_path):
    filters, model = stand_in('grouped')
    blocks = {
        name: group.blocks.bincount().tolist() for name, group in filters.groups.items()
    }
    assert sorted(blocks.values()) == [[1] * 16, [4] * 6], (
        'six groups of four filters, and the stream'
    )
    name = next(n for n, sizes in blocks.items() if sizes == [4] * 6)
    assert [
        g.blocks.bincount().tolist() for g in stand_in('two groupings')[0].groups.values()
    ].count([12, 12]) == 1
    kept = filters.keep_all()
    kept[name][[0, 1, 2]] = False
    for act in (
        lambda: remove_filters(model, filters, kept),
        lambda: load_pruned(tmp_path / 'part.safetensors', StandIn('grouped'), SMALL),
    ):
        save_pruned(tmp_path / 'part.safetensors', model, 'x', removed_filters(kept), SMALL)
        with pytest.raises(
            DFKDError,
            match=r"filter 0 of '.*' cannot be removed alone: .*all of \[0, 1, 2, 3\]",
        ) as error:
            act()
        assert '\n' not in str(error.value)
    worth = {
        n: torch.rand(g.count, generator=torch.Generator().manual_seed(0))
        for n, g in filters.groups.items()
    }
    planned = prune_filters(
        filters, PruningPlan(0.4, filters_per_removal=4, group_size=1), lambda kept: worth
    )
    gone = (~planned[name]).view(6, 4)
    assert gone.any() and (gone.all(1) == gone.any(1)).all(), 'a plan takes whole groups'
    sums = worth[name].view(6, 4).sum(1)
    assert sums[gone.all(1)].max() <= sums[~gone.all(1)].min(), 'the least important ones'
    assert remove_filters(model, filters, planned)(
        torch.randn(1, 3, 8, 8).double()
    ).shape == (1, 4)
    table = LatencyTable(seconds=0.0)
    table.measure_all(filters, 2, passes=1)  # sizes that exist only
    grouped = {key for key in table.measured if key.groups > 1}
    assert {(key.outputs, key.groups) for key in grouped} == {
        (4 * n, n) for n in range(2, 7)
    }


def test_acceptance_tries_more_than_every_second_filter(monkeypatch):
    """A grouped convolution that nobody recognises.

    Without every second filter it runs, without others it does not.
    """
    monkeypatch.setattr(filter_groups, '_removed_by_groups', lambda layer: False)
    found = find_filters(StandIn('grouped').eval(), SMALL)
    assert list(found.groups) == ['c.0'] and {'a.0', 'b.0'} <= set(found.excluded)


def test_what_is_refused_and_why():
    left = stand_in('uneven')[0].excluded
    assert any(
        "'extra.0' has 12 groups that make 36 of 24 channels" in reason
        for reason in left.values()
    )
    with pytest.raises(
        DFKDError,
        match="no filter of StandIn can be removed: '.*': the network would not work",
    ) as error:
        find_filters(StandIn('ghost cut').eval(), SMALL)
    assert '\n' not in str(error.value)
    with (
        pytest.raises(DFKDError, match='another network'),
        FilterGates(nn.Linear(2, 2), stand_in('grouped')[0].groups.values(), {}),
    ):
        pass


def test_the_padded_stream_is_left_alone():
    teacher = load_teacher('cifar10-resnet20')
    filters = find_filters(teacher, teacher.domain)
    assert (
        list(filters.excluded) == ['conv']
        and len(filters.groups) == 9
        and filters.total == 3 * (16 + 32 + 64)
    )
    with pytest.raises(DFKDError, match="'conv' cannot be removed"):
        find_filters(teacher, teacher.domain, layers=['conv'])
    with pytest.raises(DFKDError, match="no filters to remove in 'fc'"):
        find_filters(teacher, teacher.domain, layers=['fc'])
    assert list(
        find_filters(teacher, teacher.domain, layers=['blocks.1.conv1']).groups
    ) == ['blocks.1.conv1']


def test_what_layers_added_up_lose_counts_as_often(digits):
    model, domain = network('wrn16-1')
    filters = find_filters(model, domain)
    shared = [name for name in filters.groups if filters.coupled(name) > 1]
    assert shared, 'shortcuts add layers up'
    name = shared[0]
    kept = filters.keep_all()
    kept[name][0] = False
    small = remove_filters(model, filters, kept)
    lost = sum(k.outputs for k in filters.shapes.values()) - sum(
        k.outputs for k in conv_shapes(small, domain).values()
    )
    assert (
        lost == filters.coupled(name)
        and filters.removed_fraction(kept) == lost / filters.total
    )
    weight = filters.coupled(name)
    worth = {layer: torch.ones(len(still)) for layer, still in filters.keep_all().items()}
    worth[name] = torch.zeros(len(worth[name]))  # the cheapest
    plan = PruningPlan(0.9, filters_per_removal=2 * weight, group_size=1)
    left = plan.remove(filters, filters.keep_all(), worth)
    assert int((~left[name]).sum()) == 2 and filters.removed_fraction(
        left
    ) * filters.total == pytest.approx(2 * weight)


def test_removal_leaves_the_original_alone(digits):
    teacher, filters = digits
    before = copy.deepcopy(teacher.state_dict())
    small = remove_filters(teacher, filters, some(filters))
    assert all(p.requires_grad for p in small.parameters()) and not any(
        p.requires_grad for p in teacher.parameters()
    )
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


class Twice(nn.Module):
    "One convolution, used twice."

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.b(self.b(self.a(x)).relu()).mean((2, 3)))


class Tied(Twice):
    "Two convolutions that share their weights."

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x)).relu()).mean((2, 3)))


class Hidden(nn.Module):
    "Its gradient cannot be followed."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 10)

    def forward(self, x):
        with torch.no_grad():
            return self.fc(self.b(self.a(x)).mean((2, 3)))


@each(
    'model, text',
    [
        (Twice(), "'b' is used more than once"),
        (Tied(), 'shares its weights with'),
        (Hidden(), 'cannot trace|can be removed'),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            'no convolution that another layer reads',
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10)),
            'cannot trace',
        ),
        (nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), 'can be removed'),
    ],
)
def test_networks_that_cannot_be_pruned(model, text):
    with pytest.raises(DFKDError, match=text) as error:
        find_filters(model, DIGITS)
    assert '\n' not in str(error.value)


def test_a_shared_layer_does_not_keep_the_others(digits):
    class Mixed(Tied):
        def __init__(self):
            super().__init__()
            self.d, self.e = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, x):
            return super().forward(self.e(self.d(x)))

    filters = find_filters(Mixed(), DIGITS)
    assert list(filters.groups) == ['d'] and 'b' in ' '.join(filters.excluded)


# importance


def test_gates_know_each_image_and_the_weights(digits, pool):
    teacher, filters = digits
    x, y = DIGITS.normalize(pool.images[:6]), pool.labels[:6]

    def loss(logits, labels):
        return nn.functional.cross_entropy(logits, labels, reduction='sum')

    together = gate_gradients(teacher, filters, x, lambda a: loss(a, y))
    for i in range(6):
        alone = gate_gradients(
            teacher, filters, x[i : i + 1], lambda a, i=i: loss(a, y[i : i + 1])
        )
        for name in alone:
            assert torch.allclose(together[name][i], alone[name][0], atol=1e-5)
    model = copy.deepcopy(teacher.model).requires_grad_(True)
    loss(model(x), y).backward()
    assert torch.allclose(
        together['3'].sum(0),
        (model[6].weight * model[6].weight.grad).sum((0, 2, 3)),
        atol=1e-4,
    )


def test_importance_by_hand():
    "One image, one linear output: a channel's mean times its weight."
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 10, bias=False),
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        model[3].weight.zero_()
        model[3].weight[0] = torch.tensor([1.0, 1.0])
    filters = find_filters(model, DIGITS)
    images = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    a = float(DIGITS.normalize(images).mean())
    found = filter_importance(
        model, filters, [(images, torch.tensor([0]))], 'cross-entropy'
    )['0']
    # of the cross-entropy by the first logit, 3 a
    slope = math.exp(3 * a) / (math.exp(3 * a) + 9) - 1
    assert torch.allclose(
        found, torch.tensor([(slope * a) ** 2, (slope * 2 * a) ** 2]), rtol=1e-3
    )


def test_the_divergence_from_oneself_has_no_first_order(digits, pool):
    teacher, filters = digits
    exact = copy.deepcopy(teacher.model).double()
    x = DIGITS.normalize(pool.images[:50]).double()
    expected = exact(x).detach()

    def divergence(logits):
        return nn.functional.kl_div(
            logits.log_softmax(1), expected.log_softmax(1), log_target=True, reduction='sum'
        )

    assert all(
        g.abs().max() < 1e-12
        for g in gate_gradients(exact, filters, x, divergence).values()
    )


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=10, deadline=None)
def test_the_direction_has_the_covariance_of_drawn_labels(seed, classes):
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 1, classes, generator=rng, dtype=torch.double)
    draws = fisher_direction(a.expand(4000, -1), b.expand(4000, -1), rng)
    p, q = a.softmax(1)[0], b.softmax(1)[0]
    # minus the gradient of each label's cross-entropy
    labels = torch.eye(classes, dtype=torch.double) - q
    assert torch.allclose(
        draws.T @ draws / 4000, (p[:, None] * labels).T @ labels, atol=0.06
    )


def test_importance_refuses_and_repeats(digits, pool):
    teacher, filters = digits
    first, again = (
        filter_importance(teacher, filters, pool.batches(60), seed=3) for _ in range(2)
    )
    assert all(torch.equal(first[k], again[k]) for k in first) and math.isclose(
        rank_agreement(first, again), 1
    )
    kept = some(filters)
    partly = filter_importance(teacher, filters, pool.batches(60), kept=kept)
    assert all(
        (partly[k][~kept[k]] == 0).all() and (partly[k][kept[k]] > 0).any() for k in kept
    )
    for arguments, text in (
        ({'criterion': 'magnitude'}, 'unknown criterion'),
        ({'square': 'both'}, 'unknown square'),
    ):
        with pytest.raises(DFKDError, match=text):
            filter_importance(teacher, filters, pool.batches(60), **arguments)
    with pytest.raises(DFKDError, match='needs labelled images'):
        filter_importance(teacher, filters, [(pool.images, None)], 'cross-entropy')
    with pytest.raises(DFKDError, match='no images'):
        filter_importance(teacher, filters, [])
    assert math.isclose(rank_agreement(first, {k: -v for k, v in first.items()}), -1)


def test_filters_are_ranked_by_sets_and_by_batches_alike(digits, pool):
    teacher, filters = digits
    expected = filter_importance(teacher, filters, pool.batches(100))
    loader = torch.utils.data.DataLoader(
        list(zip(pool.images / 255, pool.labels)), batch_size=100
    )
    for images in (pool, pool.images, loader):
        found = filter_importance(teacher, filters, images)
        assert all(torch.allclose(found[k], expected[k], rtol=1e-4) for k in expected)
    double = Teacher(copy.deepcopy(teacher.model).double(), DIGITS)
    assert rank_agreement(filter_importance(double, filters, pool), expected) > 0.99


def test_what_filters_cannot_be_ranked_by(digits, pool):
    teacher, filters = digits
    normalised = [(DIGITS.normalize(pool.images[:9]), pool.labels[:9])]
    for images, text in (
        (normalised, 'normalised already.*denormalize'),
        (torch.utils.data.DataLoader(normalised, batch_size=None), 'normalised already'),
        ([(255.0 * torch.rand(2, 1, 8, 8), None)], 'divide by 255'),
        ([(pool.images[0], 3)], r'give \(N, 1, 8, 8\)'),
        (torch.utils.data.TensorDataset(pool.images, pool.labels), r'give \(N, 1, 8, 8\)'),
        ([Image.new('L', (8, 8))], 'use ImageSet.collect'),
        (pool.images / 255, 'give uint8'),
        (None, 'no images in a NoneType: give an ImageSet'),
        (torch.nn.Identity(), 'no images in a Identity: give an ImageSet'),
    ):
        with pytest.raises(DFKDError, match=text) as error:
            filter_importance(teacher, filters, images)
        assert '\n' not in str(error.value)
        assert not any(len(m._forward_pre_hooks) for m in teacher.modules()), (
            'no gate stays'
        )


def test_a_teacher_of_another_normalisation_sees_the_same_images(digits, pool):
    "Its first layer's weights take the other scale in, so that its logits stay."
    teacher, filters = digits
    other = replace(DIGITS, mean=(0.0,), std=(1.0,))

    class Rescaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(teacher.model)

        def forward(self, x):
            return self.net(other.renormalize(x, DIGITS))

    expected = filter_importance(teacher.model, filters, pool, teacher=teacher)
    found = filter_importance(
        teacher.model, filters, pool, teacher=Teacher(Rescaled(), other)
    )
    assert all(
        torch.allclose(found[k], expected[k], rtol=1e-3, atol=1e-7) for k in expected
    )


# latency


def test_the_clock_waits_for_the_device_that_computes(monkeypatch):
    waited = []
    monkeypatch.setattr(
        torch.cuda, 'synchronize', lambda device=None: waited.append(device)
    )
    latency.shortest_call(lambda: None, seconds=0.0, device='cuda:1')
    assert set(waited) == {torch.device('cuda:1')}


def test_a_clock_that_stands_still_measures_nothing(monkeypatch):
    # the second call seems to take no time
    ticks = iter([0.0, 0.0, 1.0, 1.0, 1.0, 2.0, *map(float, range(2, 99))])
    monkeypatch.setattr(latency.time, 'thread_time', lambda: next(ticks))
    assert latency.shortest_call(lambda: None, seconds=1.0) == 1000.0


def keyed(inputs, outputs, groups=1):
    return ConvShape(inputs, outputs, '3', '1', '8', groups)


def test_interpolation_and_depthwise():
    table = LatencyTable(channel_step=4)
    table.measured = {keyed(a, b): float(a * b) for a in (4, 8) for b in (4, 8)}
    assert table(keyed(6, 8)) == 48 and table(keyed(6, 5)) == 30 and table(keyed(0, 8)) == 0
    table.measured[keyed(4, 4, 4)], table.measured[keyed(8, 8, 8)] = 1.0, 3.0
    assert table(keyed(6, 6, 6)) == 2.0
    assert keyed(8, 8, 8).without(2, 2) == keyed(6, 6, 6) and keyed(8, 6).without(
        1, 2
    ) == keyed(7, 4)


def test_a_table_is_kept_and_belongs_to_its_machine(tmp_path):
    table = LatencyTable(seconds=0.0)
    assert table(ConvShape(2, 3, '1x3', '2x1', '8x6')) > 0, (
        'kernels, strides and maps need not be square'
    )
    table.remeasure()
    table.save(path := tmp_path / 'table.json')
    again = LatencyTable.load(path)
    assert again.measured == table.measured and again.machine == table.machine
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {'machine': 'abacus'}))
    other = LatencyTable.load(path)
    assert other(next(iter(table.measured))) > 0
    with pytest.raises(DFKDError, match="table of 'abacus'"):
        other(keyed(2, 2))


@each(
    'change',
    [
        lambda text: text[: len(text) // 2],
        lambda text: '{}',
        lambda text: '[1]',
        lambda text: text.replace('table 1', 'table 9'),
        lambda text: text.replace('"8"', '"8xx"'),
        lambda text: text.replace('"3", ', ''),
        lambda text: text.replace('3, 5', '3, -5'),
    ],
)
def test_damaged_tables(tmp_path, change):
    table = LatencyTable(seconds=0.0)
    table.measured = {ConvShape(3, 5, '3', '1', '8'): 0.5}
    table.save(path := tmp_path / 'table.json')
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(DFKDError, match='truncated or no latency table'):
        LatencyTable.load(path)
    with pytest.raises(DFKDError, match='cannot read'):
        LatencyTable.load(tmp_path / 'none.json')


def test_a_line_and_a_fraction():
    assert linear_fit([1.0, 2.0, 4.0], [5.0, 7.0, 11.0]) == pytest.approx((2, 3, 1))
    assert linear_fit([1.0, 2.0, 3.0], [1.0, 3.0, 1.0])[2] == pytest.approx(0)
    with pytest.raises(DFKDError, match='three or more'):
        linear_fit([1.0, 2.0], [1.0, 2.0])
    assert fraction_recovered(0.2, 0.5, 0.8) == pytest.approx(0.5) and math.isnan(
        fraction_recovered(0.5, 0.6, 0.5)
    )


def test_the_table_is_compared_with_networks(digits):
    teacher, filters = digits
    sums, measured = compare_latencies(teacher, filters, LatencyTable(seconds=0.0), 3, 2)
    assert (
        len(sums) == len(measured) == 3 and min(sums + measured) > 0 and sums[0] < sums[-1]
    )


def test_networks_take_turns(digits):
    teacher, _ = digits
    deep, threads = build_model('resnet20', 10, 1).train(), torch.get_num_threads()
    times = interleaved_latencies([teacher.model, deep, teacher.model], DIGITS, rounds=20)
    assert times[1] > 2 * max(times[0], times[2]), (
        'twenty layers take longer than four, whenever they are asked'
    )
    assert deep.training and torch.get_num_threads() == threads, 'everything is as it was'
    assert all(
        int(layer.num_batches_tracked) == 0
        for layer in deep.modules()
        if isinstance(layer, nn.BatchNorm2d)
    )
    for arguments in (([], DIGITS), ([deep], DIGITS, 1, 0)):
        with pytest.raises(DFKDError, match='1 or more of each'):
            interleaved_latencies(*arguments)


# plans


@given(st.floats(0.05, 0.6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_plan_is_kept(fraction, group_size, per_removal, seed):
    filters = TINY
    rng = torch.Generator().manual_seed(seed)
    worth = {
        name: torch.rand(group.count, generator=rng)
        for name, group in filters.groups.items()
    }
    kept = prune_filters(
        filters,
        PruningPlan(fraction, filters_per_removal=per_removal, group_size=group_size),
        lambda kept: worth,
    )
    removed = filters.removed_fraction(kept)
    assert fraction <= removed <= fraction + group_size / filters.total + 1e-9
    for name, still in kept.items():
        assert still.any(), 'a layer keeps at least one filter'
        if not still.all():
            assert worth[name][still].min() >= worth[name][~still].max(), (
                'the least important go first'
            )


TINY = find_filters(*network())


@functools.cache
def twenty():
    return find_filters(*network('resnet20'))


@pytest.mark.parametrize('fraction', [0.01, 0.1, 0.5])
def test_a_fraction_is_met_or_the_difference_is_logged(fraction):
    "ResNet-20's 336 removable filters: groups of 16 are 4.8 % of them."
    filters = twenty()
    with warnings.catch_warnings():
        warnings.simplefilter('error', DFKDWarning)
        kept = prune_filters(
            filters,
            PruningPlan(fraction),
            lambda kept: {k: v / len(v) for k, v in kept.items()},
        )
    assert (
        fraction <= filters.removed_fraction(kept) <= 1.1 * fraction + 0.5 / filters.total
    )
    assert (
        PruningPlan(fraction).size_of_groups(filters)
        == {0.01: 1, 0.1: 2, 0.5: 16}[fraction]
    )
    if fraction < 0.5:
        with pytest.warns(
            DFKDWarning,
            match=rf'% of the filters are removed instead of {fraction:.1%}: .*16 filters',
        ):
            prune_filters(
                filters,
                PruningPlan(fraction, group_size=16),
                lambda kept: {k: v / len(v) for k, v in kept.items()},
            )


def test_plans_that_cannot_be(digits):
    for arguments, text in (
        ({'fraction': 1.5}, 'between 0 and 1'),
        ({'fraction_of': 'size'}, 'unknown fraction_of'),
        ({'group_size': 0}, '1 or more'),
        ({'latency_weight': -1.0}, '0 or more'),
        ({'fraction_of': 'latency'}, 'no table'),
    ):
        with pytest.raises(DFKDError, match=text):
            PruningPlan(**arguments)
    with pytest.raises(DFKDError, match='all that can be removed'):
        prune_filters(
            TINY,
            PruningPlan(0.95, group_size=16),
            lambda kept: {k: v.float() for k, v in kept.items()},
        )


def test_latency_moves_the_choice():
    "At equal importance, the ranking that looks at the clock removes where the clock runs."
    table = LatencyTable()
    slow = {'0': 9.0, '3': 1.0, '6': 1.0}
    for name, key in TINY.shapes.items():
        for inputs in range(1, key.inputs + 1):
            for outputs in range(1, key.outputs + 1):
                table.measured[key._replace(inputs=inputs, outputs=outputs)] = (
                    slow[name] * outputs * inputs / key.inputs
                )
    worth = {name: torch.full((group.count,), 1.0) for name, group in TINY.groups.items()}
    aware = PruningPlan(
        0.05, filters_per_removal=2, group_size=2, latency_weight=10.0, latency_table=table
    ).remove(TINY, TINY.keep_all(), worth)
    assert removed_filters(aware).keys() == {'0'}
    reached = PruningPlan(0.3, 'latency', 4, 2, 1.0, table)
    assert (
        reached.removed_fraction(TINY, prune_filters(TINY, reached, lambda kept: worth))
        >= 0.3
    )


# learning


def distiller(teacher, pool, **changes):
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    plan = PruningPlan(0.5, filters_per_removal=16, group_size=2)
    arguments = {
        'filters': TINY,
        'plan': plan,
        'removal_interval': 3,
        'importance_batches': 1,
        'steps': 16,
        'batch_size': 30,
    }
    return PruningDistiller(
        teacher,
        student,
        copy.deepcopy(pool),
        **arguments | {'learning_rate': 0.01, 'device': 'cpu'} | changes,
    )


def test_closed_gates_learn_like_the_smaller_network(digits, pool):
    teacher, filters = digits
    kept = some(filters)
    settings_ = {'steps': 5, 'batch_size': 30, 'learning_rate': 0.05, 'device': 'cpu'}
    small = remove_filters(teacher, filters, kept)
    Distiller(teacher, small, copy.deepcopy(pool), **settings_).run()
    masked = distiller(
        teacher, pool, plan=PruningPlan(0.5, filters_per_removal=1), **settings_
    )
    masked.mask_filters(kept)
    masked.plan = PruningPlan(1e-6)  # has been reached
    masked.run()
    small.eval()
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(masked.pruned_network().eval()(x), small(x), atol=1e-4)


def hooks(model):
    "All hooks on a network and its layers."
    kinds = (
        '_forward_hooks',
        '_forward_pre_hooks',
        '_backward_hooks',
        '_backward_pre_hooks',
    )
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_the_student_carries_no_hooks(digits, pool):
    teacher, _ = digits
    learner = distiller(teacher, pool)
    assert hooks(learner.student) == 0
    learner.run(until=4)
    x, kept = torch.randn(4, 1, 8, 8), {k: v.float() for k, v in learner.kept.items()}
    assert hooks(learner.student) == 0 and any(not v.all() for v in learner.kept.values())
    with torch.no_grad():
        learner.student.eval()
        alone = learner.student(x)
        with FilterGates(learner.student, TINY.groups.values(), kept):
            assert torch.equal(learner.student(x), alone), (
                'the gates are closed already, in the weights'
            )

    def stop(*_):
        raise RuntimeError('out of memory')

    learner.teacher.forward = stop
    for act in (
        learner.step,
        learner.importance,
        lambda: filter_importance(teacher, TINY, pool, teacher=learner.teacher),
    ):
        with pytest.raises(RuntimeError, match='out of memory'):
            act()
        assert hooks(learner.student) == hooks(teacher) == 0
    del learner.teacher.forward
    with pytest.raises(DFKDError, match='remove_parametrizations'):
        computed = copy.deepcopy(learner.student)
        nn.utils.parametrizations.weight_norm(computed[3])
        PruningDistiller(
            teacher,
            computed,
            pool,
            filters=TINY,
            plan=PruningPlan(0.5),
            steps=1,
            device='cpu',
        )


def test_pruning_resumes_to_the_same_bits(digits, pool):
    teacher, _ = digits
    whole = distiller(teacher, pool).run()
    half = distiller(teacher, pool).run(until=7)
    state = copy.deepcopy(half.state_dict())
    rest = distiller(teacher, pool)
    rest.load_state_dict(state)
    rest.run()
    assert whole.reached and removed_filters(whole.kept) == removed_filters(
        rest.kept
    ) != removed_filters(half.kept)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, rest.student.state_dict()[name])
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(
            whole.pruned_network().eval()(x), whole.student.eval()(x), atol=1e-5
        )
    with pytest.raises(DFKDError, match='1 or more of each'):
        distiller(teacher, pool, removal_interval=0)


# files


def test_saved_and_loaded(tmp_path, digits):
    teacher, filters = digits
    kept = some(filters)
    small = remove_filters(teacher, filters, kept).eval()
    save_pruned(
        path := tmp_path / 'small.safetensors',
        small,
        'digits-net',
        removed_filters(kept),
        DIGITS,
        {'x': 'y'},
    )
    again, about = load_pruned(path)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(x), small(x)) and about['x'] == 'y'
    assert json.loads(about['removed']) == removed_filters(kept)
    tensors, metadata = load_tensors(path)

    def fails(text, **changes):
        save_tensors(
            tmp_path / 'bad.safetensors',
            tensors,
            {k: v for k, v in (metadata | changes).items() if v},
        )
        with pytest.raises(DFKDError, match=text):
            load_pruned(tmp_path / 'bad.safetensors')

    fails('does not say which filters', removed='')
    fails('damaged list', removed='[1')
    fails('does not fit this network', removed='{}')
    fails("no convolution 'x'", removed='{"x": [0]}')
    fails('leave at least one', removed=json.dumps({'0': list(range(16))}))
    fails('not known here', domain='mars')
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DFKDError, match='truncated'):
        load_pruned(path)


def test_exports_predict_alike(tmp_path, digits):
    teacher, filters = digits
    small = remove_filters(teacher, filters, some(filters))
    errors = export_network(small, DIGITS, tmp_path)
    assert set(errors) == {'torch.export', 'ONNX'} and max(errors.values()) < 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / 'network.onnx'))
    assert session.run(None, {'images': torch.zeros(7, 1, 8, 8).numpy()})[0].shape == (
        7,
        10,
    ), 'batches of any size'


def test_what_cannot_be_exported_is_told_in_one_plain_line(tmp_path, digits, pool):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(digits[0].model)

        def forward(self, x):
            return self.net(x) if x.mean() > 0 else self.net(-x)

    whole = to_integers(quantize(digits[0], pool, 8))
    for model, text in (
        (whole, 'IntegerNetwork cannot be exported .*save_integers'),
        (Branch(), 'take branches on pixels out of its forward'),
    ):
        with pytest.raises(DFKDError, match=text) as error:
            export_network(model, DIGITS, tmp_path)
        assert str(error.value).isprintable(), 'no colours of a terminal, one line'


# BatchNorm


def seen_by(model, x):
    "What enters each BatchNorm, in training mode: all images in one batch."
    found, model = [], copy.deepcopy(model).train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in norms:
        layer.register_forward_pre_hook(
            lambda layer, inputs: found.append(
                inputs[0].double().transpose(0, 1).flatten(1)
            )
        )
    with torch.no_grad():
        model(x)
    return found


def test_batchnorm_is_reestimated_as_the_moments_of_all_images(digits, pool):
    model = copy.deepcopy(digits[0].model).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(7.0)
    before, x = copy.deepcopy(model.state_dict()), DIGITS.normalize(pool.images).double()
    model.train()
    model[1].eval()  # modes are restored one by one
    assert reestimate_batchnorm(model, pool, batch_size=len(pool)) is model
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer, entered in zip(norms, seen_by(model, x), strict=True):
        torch.testing.assert_close(layer.running_mean, entered.mean(1))
        torch.testing.assert_close(layer.running_var, entered.var(1))
        assert int(layer.num_batches_tracked) == 1 and layer.momentum == 0.1
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.rpartition('.')[2] for k in changed} <= {
        'running_mean',
        'running_var',
        'num_batches_tracked',
    }
    assert (
        model.training and model[0].training and not model[1].training and hooks(model) == 0
    )
    # 120 images in 18 batches, the last of which has 6
    reestimate_batchnorm(model, pool, batch_size=7)
    torch.testing.assert_close(norms[0].running_mean, seen_by(model, x)[0].mean(1))
    torch.testing.assert_close(norms[0].running_var, seen_by(model, x)[0].var(1))
    assert int(norms[0].num_batches_tracked) == 18


def test_batchnorm_is_measured_exactly_far_from_zero(pool):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(128, 10)
    )
    with torch.no_grad():
        model[0].bias.fill_(3000.0)  # mean over standard deviation
    reestimate_batchnorm(model, pool, batch_size=50)
    exact = (
        (model[0].double())(DIGITS.normalize(pool.images).double())
        .transpose(0, 1)
        .flatten(1)
    )
    torch.testing.assert_close(
        model[1].running_var.double(), exact.var(1), rtol=1e-3, atol=0
    )


def test_reestimation_leaves_nothing_half_done(digits, pool):
    model = copy.deepcopy(digits[0].model)
    before = copy.deepcopy(model.state_dict())

    class Broken(ImageSet):
        def fetch(self, indices):
            if int(indices[0]):
                raise OSError('the disk is gone')
            return super().fetch(indices)

    with pytest.raises(OSError):
        reestimate_batchnorm(model, Broken(pool.images, None, DIGITS), batch_size=50)
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and hooks(model) == 0
    )
    cases = (
        (model, pool.images, None, 'give domain='),
        (model, pool.subset(1), None, 'two or more'),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            pool,
            None,
            'nothing to re-estimate',
        ),
        (model, pool, CIFAR, 'resize them'),
        (model, None, DIGITS, 'no images in a NoneType'),
    )
    for network, images, domain, text in cases:
        with pytest.raises(DFKDError, match=text):
            reestimate_batchnorm(network, images, domain)


def test_costs_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(128, 10)
    )
    cost = network_cost(model, DIGITS, 0.0)
    assert (cost.parameters, cost.flops) == (
        18 + 1290,
        2 * (64 * 18 + 1280),
    ) and cost.milliseconds > 0


# runs

QUICK = {
    'evaluations': 3,
    'test_limit': 100,
    'steps': 6,
    'images': 40,
    'importance_images': 40,
    'batch_size': 20,
}
QUICK |= {
    'fractions': [0.4],
    'sources': {'static': 'noise', 'real': 'digits'},
    'images_from': 'noise',
    'labelled_data': 'digits',
}
QUICK |= {'timed_networks': 0}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    Run(
        Recipe.load('digits-teacher'),
        'quick',
        {'epochs': 2.0, 'evaluations': 1},
        out=out,
        device='cpu',
        quiet=True,
    ).start()
    return out


def begin(root, **changes) -> Run:
    return Run(
        Recipe.load('digits-pruning'),
        'quick',
        QUICK | changes,
        out=root,
        device='cpu',
        quiet=True,
        save_every=0.0,
    )


@each(
    'changes, text',
    [
        ({'fractions': '0.4, many'}, 'give a number'),
        ({'fractions': '1.4'}, 'give at most'),
        ({'sources': 'noise'}, 'NAME = '),
        ({'rankings': 'speed'}, "'rankings' is 'speed'"),
        ({'fractions': '0.99'}, 'all that can be removed'),
    ],
)
def test_runs_that_cannot_be(root, changes, text):
    with pytest.raises(DFKDError, match=text):
        begin(root, seed=7, **changes).start(fresh=True)
