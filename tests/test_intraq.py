"""IntraQ: soft targets, the margin around class means, local views, and their state."""

import copy
import math

import pytest
import torch

from dfkd_nb.applications.intraq import (
    IntraQ,
    OccasionalView,
    class_margin_loss,
    class_spread,
    soft_class_loss,
    squared_feature_term,
)
from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.dreams.statistics import Statistics
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher

DIGITS = DOMAINS['digits']


@pytest.fixture(scope='module')
def teacher() -> Teacher:
    torch.manual_seed(0)
    network = build_model('digits-net', 10, 1).train()
    with torch.no_grad():  # running statistics that are not 0 and 1
        network(torch.randn(64, 1, 8, 8))
    return Teacher(network, DIGITS)


def intraq(teacher: Teacher, **settings: object) -> IntraQ:
    usual = {'steps': 4, 'batch_size': 20, 'learning_rate': 0.2, 'device': 'cpu'}
    return IntraQ(teacher, **usual | settings)


# the terms


def test_the_soft_target_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # 3/4 and 1/2
    targets, wanted = torch.tensor([0, 1]), torch.tensor([1.0, 0.7])
    found = float(soft_class_loss(logits, targets, wanted))
    assert found == pytest.approx((0.25**2 + 0.2**2) / 2, abs=1e-6)


def test_the_margin_by_hand() -> None:
    mean = torch.tensor([[1.0, 0.0]])
    for vector, penalty in (
        ([2.0, 0.0], 0.05),
        ([1.0, 1.0], 0.0),
        ([0.0, 3.0], 0.2),
        ([-1.0, 0.0], 1.2),
    ):
        found = float(class_margin_loss(torch.tensor([vector]), mean))
        assert found == pytest.approx(penalty, abs=1e-6)
    both = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    means = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # no image of the second class yet
    assert float(class_margin_loss(both, means)) == pytest.approx(0.025, abs=1e-6)


def test_between_the_margins_there_is_no_gradient() -> None:
    means = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    embedding = torch.tensor([[1.0, 1.0], [1.0, 0.0], [3.0, 1.0]], requires_grad=True)
    class_margin_loss(embedding[:1], means[:1]).backward()
    class_margin_loss(embedding[2:], means[2:]).backward()
    assert embedding.grad is not None and embedding.grad.abs().sum() == 0
    outside = torch.tensor([[1.0, 0.1]], requires_grad=True)
    class_margin_loss(outside, means[:1]).backward()
    assert outside.grad is not None and outside.grad.abs().sum() > 0
    everything = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    wide = class_margin_loss(everything, means[:1].expand(20, 2), (0.0, 2.0))
    assert float(wide) == 0


def test_squared_statistics_by_hand() -> None:
    zeros, ones = torch.zeros(2), torch.ones(2)
    statistics = Statistics({'a': (zeros, ones), 'b': (zeros, ones)})
    found = {
        'a': (torch.tensor([1.0, 2.0]), ones),  # 2.5
        'b': (zeros, torch.tensor([1.0, 4.0])),  # 4.5
    }
    x = torch.zeros(1, 1, 2, 2)
    inputs = LossInputs(x, torch.zeros(1, 2), torch.tensor([0]), found)
    assert float(squared_feature_term(statistics)(inputs)) == pytest.approx(3.5)


# the synthesizer


def test_wide_margins_and_hard_targets_leave_the_plain_objective(teacher: Teacher) -> None:
    plain = intraq(teacher, margin_weight=0.0, soft_fraction=0.0).synthesize(40)
    wide = intraq(teacher, margin=(0.0, 2.0), lowest_confidence=1.0).synthesize(40)
    assert torch.equal(plain.images, wide.images)
    narrow = intraq(
        teacher, margin=(0.5, 0.5), margin_weight=50.0, soft_fraction=0.0
    ).synthesize(40)
    assert torch.equal(plain.images[:20], narrow.images[:20])
    assert not torch.equal(plain.images[20:], narrow.images[20:])


def test_class_means_are_those_of_all_earlier_images(teacher: Teacher) -> None:
    synthesizer = intraq(teacher)
    images = synthesizer.synthesize(60, [0, 3, 3, 7])
    embedding, labels = teacher.embed(images.images), images.labels
    assert labels is not None
    means = synthesizer.class_means()
    for number in (0, 3, 7):
        own = embedding[labels == number].mean(0)
        assert torch.allclose(means[number], own, atol=1e-5)
    assert (means[1] == 0).all() and synthesizer.counts.tolist()[:4] == [15, 0, 0, 30]
    synthesizer.start(20)
    assert (synthesizer.class_means() == 0).all()


def test_the_first_batch_has_no_margin_and_later_ones_have(teacher: Teacher) -> None:
    synthesizer = intraq(teacher)
    synthesizer.start(40)
    seen = []
    for _ in range(2):
        synthesizer.step()
        assert synthesizer.image_batch is not None
        given = synthesizer.image_batch.target_embeddings
        assert given is not None
        seen.append(given)
        while synthesizer.image_batch is not None:
            synthesizer.step()
    assert (seen[0][:, :-1] == 0).all() and (seen[1][:, :-1] != 0).any(1).all()
    wanted = torch.cat([given[:, -1] for given in seen])
    assert ((wanted >= 0.95) & (wanted <= 1)).all()
    assert 8 < int((wanted < 1).sum()) < 32  # about half of 40


def test_a_lower_margin_drives_images_from_the_mean(teacher: Teacher) -> None:
    settings = {'steps': 60, 'view': None, 'statistics_weight': 0.1}
    near, far = (
        intraq(teacher, margin=(low, 2.0), margin_weight=20.0, **settings).synthesize(60)
        for low in (0.0, 0.6)
    )
    assert class_spread(teacher, far) > class_spread(teacher, near) + 0.05


def test_as_a_synthesizer_without_end(teacher: Teacher) -> None:
    synthesizer = intraq(teacher)
    for _ in range(2):
        while not synthesizer.batch_done:
            synthesizer.step()
        assert len(synthesizer.pop().images) == 20
    assert synthesizer.counts.sum() == 40


def test_resumed_in_the_second_batch_to_the_same_bits(teacher: Teacher) -> None:
    margin = 0.5, 0.5  # nearly every image has a penalty
    whole = intraq(teacher, margin=margin).synthesize(60)
    first = intraq(teacher, margin=margin)
    first.start(60)
    for _ in range(6):  # of 4 steps each
        first.step()
    state = copy.deepcopy(first.state_dict())
    second = intraq(teacher, margin=margin)
    second.start(60)
    second.load_state_dict(state)
    assert torch.equal(second.run().images, whole.images)


def test_a_state_of_others_changes_nothing(teacher: Teacher) -> None:
    synthesizer = intraq(teacher)
    synthesizer.synthesize(20)
    before = synthesizer.class_means()
    state = intraq(teacher, margin=(0.1, 0.9)).state_dict()
    with pytest.raises(DFKDError, match='other settings'):
        synthesizer.load_state_dict(state)
    assert torch.equal(synthesizer.class_means(), before)
    del state['class_counts']
    with pytest.raises(DFKDError, match='not saved by IntraQ'):
        synthesizer.load_state_dict(state)


def test_views_are_occasional_and_repeat() -> None:
    x = torch.rand(4, 3, 16, 16)

    def see(probability: float, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return OccasionalView(probability)(x, 0.0, generator)

    assert see(0.0, 0) is x
    assert not torch.equal(see(1.0, 0), x) and torch.equal(see(1.0, 0), see(1.0, 0))
    whole = sum(see(0.5, seed) is x for seed in range(100))
    assert 35 < whole < 65


def test_the_spread_of_a_class(teacher: Teacher) -> None:
    pixels = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    pixels[1] = pixels[0]
    same = ImageSet(pixels[:2], torch.tensor([5, 5]), DIGITS)
    assert class_spread(teacher, same) == pytest.approx(0.0, abs=1e-6)
    alone = ImageSet(pixels[2:], torch.tensor([0, 1]), DIGITS)
    assert math.isnan(class_spread(teacher, alone))
    with pytest.raises(DFKDError, match='no labels'):
        class_spread(teacher, ImageSet(pixels, None, DIGITS))


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'margin': (0.8, 0.05)}, 'two distances'),
        ({'margin': (0.0, 2.5)}, 'two distances'),
        ({'lowest_confidence': 1.2}, 'numbers from 0 to 1'),
        ({'soft_fraction': -0.1}, 'numbers from 0 to 1'),
    ],
)
def test_settings_out_of_range(teacher: Teacher, settings: dict, message: str) -> None:
    with pytest.raises(DFKDError, match=message):
        intraq(teacher, **settings)


def test_target_embeddings_are_refused(teacher: Teacher) -> None:
    with pytest.raises(DFKDError, match='leave target_embeddings out'):
        intraq(teacher).synthesize(20, target_embeddings=torch.zeros(20, 4))
