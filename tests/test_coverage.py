"""Coverage: neighbours, precision, recall, coverage and area, by hand and against the plain
formulas.
"""

import math

import pytest
import torch
from cases import each

from dfkd_nb.lab.coverage import (
    coverage,
    density,
    enclosed_area,
    k_nearest,
    neighbour_distances,
    precision_recall,
    principal_plane,
)
from dfkd_nb.toolbox.errors import DFKDError


def line(*at):
    return torch.tensor([[float(v), 0.0] for v in at])


def test_measures_by_hand():
    real = line(*range(10))
    assert coverage(real, line(0.5), 1) == 0.2 and density(real, line(0.5), 1) == 2.0
    assert density(real, line(0.5), 2) == 1.0  # in two balls of two neighbours each
    assert (
        precision_recall(real, line(-20, 30), 1) == (0.0, 1.0)
        and coverage(real, line(-20, 30), 1) == 0.0
    )
    assert precision_recall(real, line(3, 4), 1) == (1.0, 0.4)
    assert coverage(real, real, 1) == 1.0


def test_distances_match_the_plain_ones_and_skip_oneself():
    a, b = torch.randn(1203, 3), torch.randn(40, 3)
    plain = (a[:, None] - b[None]).double().norm(dim=2).sort(1)
    assert torch.allclose(neighbour_distances(a, b, 4), plain.values[:, :4], atol=1e-6)
    assert torch.equal(k_nearest(a, b, 4)[1], plain.indices[:, :4])
    own = (
        torch.cdist(a.double(), a.double(), compute_mode='donot_use_mm_for_euclid_dist')
        .fill_diagonal_(math.inf)
        .sort(1)
        .values[:, :2]
    )
    assert torch.equal(neighbour_distances(a, neighbours=2), own)
    twins = torch.cat([b, b])
    assert (neighbour_distances(twins)[:, 0] == 0).all()  # a copy is a neighbour


def test_a_pool_that_misses_half_of_the_data_covers_less():
    a, b = torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(0))
    half = b[b[:, 0] > 0]
    same = b[: len(half)]
    assert coverage(a, half) < coverage(a, same) - 0.1
    assert precision_recall(a, half)[1] < precision_recall(a, same)[1]
    plane = principal_plane(a)
    assert enclosed_area(half, plane) < enclosed_area(b, plane)


def test_the_plane_is_that_of_the_real_points():
    real = torch.randn(200, 5) * torch.tensor([9.0, 1.0, 5.0, 1.0, 1.0])
    plane = principal_plane(real)
    spots = plane(torch.eye(5)) - plane(torch.zeros(1, 5))
    assert spots[0, 0].abs() > 0.95 and spots[2, 1].abs() > 0.95
    assert enclosed_area(line(0, 1, 2)) == 0.0
    assert abs(enclosed_area(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])) - 2) < 1e-9


@each(
    'call, message',
    [
        (lambda: coverage(line(0, 1, 2), line(0), 3), '3 neighbours among 2 points'),
        (
            lambda: coverage(line(0, 1, 2), torch.zeros(2, 3), 1),
            'embed both with the same network',
        ),
        (lambda: coverage(line(0, 1, 2), torch.zeros(0, 2), 1), 'N at least 1'),
        (lambda: density(line(0, math.nan), line(0), 1), 'NaN'),
        (lambda: principal_plane(line(0, 1)), '3 or more'),
    ],
)
def test_points_that_cannot_be_compared_are_refused(call, message):
    with pytest.raises(DFKDError, match=message) as error:
        call()
    assert '\n' not in str(error.value)
