"""Always Be Dreaming: what each loss teaches, the dreamer's terms, resuming, refusals."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dfkd_nb.applications.always_be_dreaming import (
    ABDDistiller,
    abd_generator,
    abd_losses,
    add_classes_abd,
    blur_term,
    class_weights,
    gaussian_divergence,
    own_class_term,
)
from dfkd_nb.applications.class_growth import extend_classifier
from dfkd_nb.applications.continual import generated_images
from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.generators.generators import balance_term
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.networks import in_eval_mode
from dfkd_nb.toolbox.teachers import Teacher

DIGITS = DOMAINS['digits']
RNG = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (24, 1, 8, 8), dtype=torch.uint8, generator=RNG)


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(build_model('digits-net', 10, 1).eval(), DIGITS)


def step(teacher: Teacher, **settings) -> ABDDistiller:
    letters = replace(DIGITS, classes=('a', 'b'))
    new = ImageSet(IMAGES, torch.arange(24) % 2, letters)
    dreams = ImageSet(IMAGES.flip(0), torch.arange(24) % 10, DIGITS)
    usual = {'steps': 6, 'batch_size': 8, 'learning_rate': 0.05, 'device': 'cpu'}
    return add_classes_abd(teacher, new, dreams, **usual | settings)


def losses(features, old_features=None, new=3, **settings):
    torch.manual_seed(1)
    head, old_head = nn.Linear(5, 6), nn.Linear(5, 4)
    labels = torch.tensor([4, 5, 4, 0, 1, 3])
    old_features = features.detach() if old_features is None else old_features
    found = abd_losses(features, old_features, head, old_head, labels, new, **settings)
    return found, head


def test_what_each_loss_teaches() -> None:
    features = torch.randn(6, 5, generator=RNG).requires_grad_()
    found, head = losses(features, torch.zeros(6, 5))
    gradients = {
        name: torch.autograd.grad(
            loss, [features, head.weight, head.bias], retain_graph=True, allow_unused=True
        )
        for name, loss in found.items()
    }
    by_features, by_weight, by_bias = gradients['local']
    assert by_features[:3].abs().sum() > 0 and by_features[3:].abs().sum() == 0
    assert by_weight[:4].abs().sum() == 0 and by_weight[4:].abs().sum() > 0
    assert by_bias[:4].abs().sum() == 0
    by_features, by_weight, _ = gradients['head']
    assert by_features is None and (by_weight.abs().sum(1) > 0).all()
    by_features, by_weight, by_bias = gradients['keep']
    assert (by_features.abs().sum(1) > 0).all() and by_weight is by_bias is None


def test_the_losses_by_hand() -> None:
    features = torch.randn(6, 5, generator=RNG)
    old = torch.randn(6, 5, generator=RNG)
    found, head = losses(features, old, feature_weight=0.3)
    torch.manual_seed(1)
    _, old_head = nn.Linear(5, 6), nn.Linear(5, 4)
    scores = head(features).log_softmax(1)
    labels = [4, 5, 4, 0, 1, 3]
    every = sum(-scores[i, y] * (1 / 3 if y > 3 else 2 / 3) for i, y in enumerate(labels))
    assert found['head'].item() == pytest.approx(every.item() / 6, rel=1e-5)
    among = head(features)[:3, 4:].log_softmax(1)
    local = -sum(among[i, y - 4] for i, y in enumerate(labels[:3])) / 3
    assert float(found['local']) == pytest.approx(float(local) / 3, rel=1e-5)
    moved = ((features - old) @ old_head.weight.T).square().sum(1).mean()
    assert float(found['keep']) == pytest.approx(0.3 * float(moved) / 4, rel=1e-4)


def test_an_unchanged_network_has_nothing_to_keep(teacher: Teacher) -> None:
    distiller = step(teacher)
    with in_eval_mode(distiller.student):
        batch, labels = IMAGES[:8], torch.full((8,), 10)
        _, terms = distiller.loss(batch, labels)
    assert float(terms['keep']) == 0.0 and float(terms['head']) > 0
    distiller.student.train()
    assert float(distiller.loss(batch, labels)[1]['keep']) > 0


def test_weights_by_hand() -> None:
    assert class_weights(8, 10).tolist() == pytest.approx([0.8] * 8 + [0.2] * 2)
    assert class_weights(5, 10).tolist() == [0.5] * 10
    for old, total in ((0, 2), (3, 3)):
        with pytest.raises(DFKDError, match='old and new ones'):
            class_weights(old, total)


def inputs(logits: torch.Tensor, x: torch.Tensor | None = None) -> LossInputs:
    count = len(logits)
    x = torch.zeros(count, 1, 6, 6) if x is None else x
    return LossInputs(x, logits, torch.zeros(count, dtype=torch.long))


def test_terms_of_the_dreamer_by_hand() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert float(gaussian_divergence(one, one, zero, one)) == pytest.approx(0.5, abs=1e-4)
    wide = gaussian_divergence(zero, one, zero, 4 * one)
    assert float(wide) == pytest.approx(math.log(2) + 1 / 8 - 1 / 2, abs=1e-4)
    # 1 + mean p log p / log K: 0 for even classes, 1 for a single one
    even, single = torch.eye(4) * 50, torch.eye(4)[:1].expand(4, 4) * 50
    found = [1 + float(balance_term(inputs(v))) / math.log(4) for v in (even, single)]
    assert found == pytest.approx([0.0, 1.0], abs=1e-5)
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    by_hand = math.log(1 + math.exp(-2 / 10))
    assert float(own_class_term(10.0)(inputs(logits))) == pytest.approx(by_hand, abs=1e-5)
    assert float(own_class_term()(inputs(logits))) == pytest.approx(math.log(2), abs=1e-2)


def test_smoothness_is_the_distance_from_a_blurred_image() -> None:
    blur, logits = blur_term(), torch.zeros(1, 2)
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    dot = torch.zeros(1, 1, 9, 9).index_fill(2, torch.tensor([4]), 1.0)
    assert float(blur(inputs(logits, torch.ones(1, 3, 6, 6)))) < 1e-10
    # symmetric weights keep a ramp but for two columns at each end
    assert 0 < float(blur(inputs(logits, ramp))) < 0.2
    line = torch.tensor([-2.0, -1, 0, 1, 2]).square().mul(-0.5).exp()
    line = line / line.sum()
    by_hand = ((1 - line[2]) ** 2 + 2 * line[1] ** 2 + 2 * line[0] ** 2) / 9
    assert float(blur(inputs(logits, dot))) == pytest.approx(float(by_hand), rel=1e-4)


def test_the_dreamer_learns_and_is_carried_on(teacher: Teacher) -> None:
    settings = {'batch_size': 16, 'device': 'cpu', 'width': 8, 'latent_size': 16}
    first = abd_generator(teacher, **settings)
    first.synthesize(16 * 30)
    rows = first.history
    assert rows[-1]['gaussian'] < 0.7 * rows[0]['gaussian']
    weights = first.generator.state_dict()
    second = abd_generator(teacher, generator=first.generator, **settings)
    again = second.generator.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in weights.items())
    dreams = generated_images(first, 20)
    assert torch.equal(dreams.labels, teacher.predict(dreams.images).argmax(1))


def test_a_step_resumes_to_the_same_bits(teacher: Teacher) -> None:
    whole, broken = step(teacher), step(teacher)
    whole.run()
    broken.run(until=3)
    state = copy.deepcopy(broken.state_dict())
    again = step(teacher)
    again.load_state_dict(state)
    again.run()
    for a, b in zip(
        whole.student.state_dict().values(), again.student.state_dict().values()
    ):
        assert torch.equal(a, b)
    with pytest.raises(DFKDError):
        step(teacher, feature_weight=0.2).load_state_dict(state)


def test_a_step_teaches_new_classes(teacher: Teacher) -> None:
    before = copy.deepcopy(teacher.model.state_dict())
    distiller = step(teacher, steps=40)
    first = distiller.step()
    distiller.run()
    assert distiller.domain.num_classes == 12
    with in_eval_mode(distiller.student):
        _, terms = distiller.loss(IMAGES, 10 + torch.arange(24) % 2)
    assert float(terms['local']) < float(first['local'])
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())


def test_what_a_step_needs_is_told(teacher: Teacher) -> None:
    letters = replace(DIGITS, classes=('a', 'b'))
    new = ImageSet(IMAGES, torch.arange(24) % 2, letters)
    with pytest.raises(DFKDError, match='have no labels'):
        add_classes_abd(teacher, new, ImageSet(IMAGES, None, DIGITS), steps=1)
    with pytest.raises(DFKDError, match='need images of old classes'):
        add_classes_abd(teacher, new, None, steps=1)
    student, domain = extend_classifier(teacher, ['a'])
    some = ImageSet(IMAGES, torch.full((24,), 10), domain)
    dreams = ImageSet(IMAGES, torch.zeros(24, dtype=torch.long), DIGITS)
    with pytest.raises(DFKDError, match='is not linear'):
        ABDDistiller(teacher, student, some, dreams, domain=domain, head='0', steps=1)
