"""Model folding: what merging computes, what the repair restores, refusals."""

import copy
import warnings

import pytest
import torch
from torch import nn

from dfkd_nb.applications import model_folding
from dfkd_nb.applications.batchnorm import reestimate_batchnorm
from dfkd_nb.applications.filters import find_filters
from dfkd_nb.applications.model_folding import (
    cluster_rows,
    fold_filters,
    group_norms,
    merge_rows,
    variance_repair,
)
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError

DIGITS = DOMAINS['digits']
RNG = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=RNG)


class Residual(nn.Module):
    "A stream of channels that three convolutions write, and a convolution with a bias."

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.inner = nn.Conv2d(channels, 8, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, channels, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        inner = self.inner_norm(self.inner(x)).relu()
        x = (x + self.outer_norm(self.outer(inner))).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    "No two channels alike, BatchNorm included."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                value.copy_(0.2 + torch.rand(value.shape, generator=rng))
        for value in network.parameters():
            if value.ndim > 1:
                value.sub_(0.7)
    return network.eval()


def logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(DIGITS.normalize(IMAGES))


def doubled(order: list[int] | None = None) -> tuple[nn.Module, nn.Module]:
    "A network, and one in which every inner filter stands twice, its readers halved."
    small = randomized(Residual())
    large = copy.deepcopy(small)
    twice = torch.arange(8).repeat(2) if order is None else torch.tensor(order)
    with torch.no_grad():
        for layer in (large.inner, large.inner_norm):
            for name, value in layer.named_parameters():
                setattr(layer, name, nn.Parameter(value[twice]))
        for name in ('running_mean', 'running_var'):
            large.inner_norm.register_buffer(
                name, getattr(large.inner_norm, name)[twice].clone()
            )
        large.outer.weight = nn.Parameter(large.outer.weight[:, twice] / 2)
    large.inner.out_channels = large.outer.in_channels = 16
    large.inner_norm.num_features = 16
    return small, large


@pytest.mark.parametrize('repair', ['none', 'closed-form'])
def test_filters_that_stand_twice_are_merged_exactly(repair: str) -> None:
    small, large = doubled()
    assert torch.allclose(logits(large), logits(small), atol=1e-4)
    filters = find_filters(large, DIGITS, layers=['inner'])
    folded = fold_filters(large, filters, 0.5, repair)
    assert folded.inner.out_channels == 8
    scale = float(logits(small).abs().max())
    assert float((logits(folded) - logits(small)).abs().max()) < 1e-5 * scale


def test_the_order_of_filters_does_not_matter() -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).remainder(8)
    small, large = doubled(order.tolist())
    filters = find_filters(large, DIGITS, layers=['inner'])
    folded = fold_filters(large, filters, 0.5)
    assert torch.allclose(logits(folded), logits(small), rtol=1e-4, atol=1e-4)


def test_nothing_removed_is_the_same_to_the_bit() -> None:
    network = randomized(Residual())
    filters = find_filters(network, DIGITS)
    for repair in ('none', 'closed-form'):
        folded = fold_filters(network, filters, 0.0, repair)
        state = folded.state_dict()
        for name, value in network.state_dict().items():
            assert torch.equal(value, state[name])


def test_what_is_merged_by_hand() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]])
    clusters = torch.tensor([1, 1, 0])
    assert merge_rows(rows, clusters).tolist() == [[5.0, 5.0], [2.0, 4.0]]
    assert merge_rows(rows, clusters, mean=False).tolist() == [[5.0, 5.0], [4.0, 8.0]]
    assert merge_rows(rows[:, 0], clusters).tolist() == [5.0, 2.0]


@pytest.mark.parametrize(
    ('count', 'cosine', 'factor'),
    [(2, 0.5, 1.1547), (3, 0.0, 1.7321), (4, 0.25, 1.5119), (5, 1.0, 1.0), (1, 1.0, 1.0)],
)
def test_factors_by_hand(count: int, cosine: float, factor: float) -> None:
    between = torch.full((count, count), cosine).fill_diagonal_(1.0).double()
    values, vectors = torch.linalg.eigh(between)
    rows = vectors * values.clamp_min(0).sqrt()
    # lengths do not count
    rows = rows * torch.arange(1, count + 1)[:, None]
    found = variance_repair(rows, torch.zeros(count, dtype=torch.long))
    assert found.tolist() == pytest.approx([factor], abs=1e-4)


def test_opposite_filters_do_not_explode() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    found = variance_repair(rows, torch.tensor([0, 0, 1]))
    assert found.tolist() == [2.0, 1.0]


def test_the_repair_restores_the_variance_of_white_inputs() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=rng)
    clusters = torch.tensor([0, 0, 0, 1, 1, 1])
    x = torch.randn(200_000, 4, generator=rng)
    channels = x @ torch.nn.functional.normalize(weight, dim=1).T
    merged = x @ merge_rows(torch.nn.functional.normalize(weight, dim=1), clusters).T
    factor = variance_repair(weight, clusters)
    assert channels.var(0).tolist() == pytest.approx([1.0] * 6, abs=0.02)
    assert (merged.var(0) < 0.9).any()
    assert (merged * factor).var(0).tolist() == pytest.approx([1.0] * 2, abs=0.02)


def test_a_stream_is_merged_in_all_layers_that_write_and_read_it() -> None:
    network = randomized(Residual())
    filters = find_filters(network, DIGITS, layers=['outer'])
    group = group_norms(network, filters)['outer']
    assert set(group.entries) == {'stem_norm', 'outer_norm'}
    assert group.after == {'stem': 'stem_norm', 'outer': 'outer_norm'}
    folded = fold_filters(network, filters, 0.5)
    assert folded.stem.out_channels == folded.outer.out_channels == 3
    assert folded.inner.in_channels == 3 and folded.head.in_features == 12
    assert logits(folded).isfinite().all()


def test_repair_on_images_is_re_estimation() -> None:
    network = randomized(Residual())
    filters, images = find_filters(network, DIGITS), ImageSet(IMAGES, None, DIGITS)
    folded = fold_filters(network, filters, 0.5, 'images', images)
    plain = fold_filters(network, filters, 0.5, 'none')
    assert not torch.equal(logits(folded), logits(plain))
    reestimate_batchnorm(plain, images, batch_size=256)
    assert torch.equal(logits(folded), logits(plain))


def test_clusters_are_numbered_without_gaps_and_repeat_by_seed() -> None:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    found = cluster_rows(rows, 7, seed=1)
    assert found.unique().tolist() == list(range(7))
    assert torch.equal(found, cluster_rows(rows, 7, seed=1))
    assert cluster_rows(rows, 20).tolist() == list(range(20))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        # two different rows make two clusters, whatever was asked
        assert len(cluster_rows(rows[:2].repeat(4, 1), 5).unique()) == 2


def test_the_network_that_was_given_is_left_alone() -> None:
    network = randomized(Residual())
    before = copy.deepcopy(network.state_dict())
    fold_filters(network, find_filters(network, DIGITS), 0.5)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'fraction': 1.0}, 'give one from 0'),
        ({'fraction': 0.5, 'repair': 'magic'}, "unknown repair 'magic'"),
        ({'fraction': 0.5, 'repair': 'images'}, 'give both or neither'),
        ({'fraction': 0.5, 'images': IMAGES}, 'give both or neither'),
    ],
)
def test_bad_settings_are_told(settings: dict, words: str) -> None:
    network = randomized(Residual())
    filters = find_filters(network, DIGITS, layers=['inner'])
    with pytest.raises(DFKDError, match=words):
        fold_filters(network, filters, **settings)


def test_layers_that_cannot_be_merged_are_told() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    filters = find_filters(network.eval(), DIGITS)
    with pytest.raises(DFKDError, match="'1' is a PReLU"):
        fold_filters(network, filters, 0.5)
    grouped = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    filters = find_filters(grouped.eval(), DIGITS)
    with pytest.raises(DFKDError, match='go in blocks'):
        model_folding.fold_filters(grouped, filters, 0.5)
