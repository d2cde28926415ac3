"Attention transfer: the term by hand, the layers it reads, and a run that goes on."

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dfkd_nb import DOMAINS, Distiller, Teacher, build_model, load_data, load_teacher
from dfkd_nb.foundations.attention import (
    AttentionTransfer,
    attention_loss,
    attention_map,
    last_of_each_size,
)
from dfkd_nb.generators.contrastive import ContrastiveSynthesizer
from dfkd_nb.generators.generators import Generator
from dfkd_nb.toolbox.errors import DFKDError


@pytest.fixture(scope='module')
def teacher() -> Teacher:
    return load_teacher('cifar10-resnet20')


def distiller(teacher: Teacher | None, **settings: object) -> Distiller:
    torch.manual_seed(0)
    student = build_model('resnet8')
    images = load_data('cifar10-mini', limit=64)
    given = {'steps': 4, 'batch_size': 16, 'learning_rate': 0.01} | settings
    return Distiller(teacher, student, images, **given)  # type: ignore[arg-type]


def test_a_map_says_where_not_how_strongly_nor_in_which_channel() -> None:
    features = torch.rand(3, 5, 4, 4)
    shuffled = 7 * features[:, torch.randperm(5)]
    torch.testing.assert_close(attention_map(features), attention_map(shuffled))
    torch.testing.assert_close(attention_map(features).norm(dim=1), torch.ones(3))
    moved = features.roll(1, 3)
    assert attention_loss([features], [moved]) > 1e-4


def test_the_sum_over_layers_is_of_means() -> None:
    one, two = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
    expected = 1 - 0.5**0.5
    assert attention_loss([one], [two]).item() == pytest.approx(expected)
    both = attention_loss([one, one], [two, two])
    assert both.item() == pytest.approx(2 * expected)


@pytest.mark.parametrize('folded', [True, False])
def test_the_term_of_a_step_is_that_of_both_networks(
    teacher: Teacher, folded: bool
) -> None:
    made = distiller(teacher, attention_weight=250.0, fold_teacher=folded)
    student = copy.deepcopy(made.student).train()
    seen: dict[str, list[torch.Tensor]] = {}
    # a ResNet-8 has one block a stage, a ResNet-20 three
    ends = {'student': [f'blocks.{i}' for i in (0, 1, 2)]}
    ends['teacher'] = [f'blocks.{i}' for i in (2, 5, 8)]
    losses = made.step()
    # the same batch again, with hooks of our own on the ends of the stages
    again = distiller(teacher, attention_weight=250.0)
    images, _ = again.sampler.sample(16, again.generator)
    x = again.normalized(images)
    for key, network in (('student', student), ('teacher', teacher.model.eval())):
        for stage in ends[key]:

            def keep(m: object, i: object, out: torch.Tensor, k: str = key) -> None:
                seen.setdefault(k, []).append(out.detach())

            hook = network.get_submodule(stage).register_forward_hook(keep)
            with torch.no_grad():
                copy.deepcopy(network)(x)
            hook.remove()
    expected = attention_loss(seen['student'], seen['teacher'])
    torch.testing.assert_close(losses['attention'], expected, rtol=1e-3, atol=1e-7)
    whole = losses['distillation'] + 250.0 * losses['attention']
    torch.testing.assert_close(losses['loss'], whole)


def test_it_draws_the_maps_together(teacher: Teacher) -> None:
    ends = {}
    for weight in (0.0, 2000.0):
        made = distiller(teacher, steps=25, attention_weight=weight)
        made.run()
        pair = AttentionTransfer(
            made.student, teacher.model, teacher.domain, torch.device('cpu')
        )
        x = teacher.domain.normalize(load_data('cifar10-mini', limit=64).images)
        with torch.no_grad(), pair.reading(made.student.eval(), teacher.model):
            made.student(x), teacher.model(x)
            ends[weight] = pair.loss().item()
    assert ends[2000.0] < 0.85 * ends[0.0]


def test_no_hook_stays(teacher: Teacher) -> None:
    made = distiller(teacher, attention_weight=1.0)
    made.step()
    for network in (made.student, teacher):
        assert not any(module._forward_hooks for module in network.modules())


def test_it_goes_on_to_the_same_bits(teacher: Teacher) -> None:
    whole = distiller(teacher, attention_weight=250.0)
    whole.run()
    first = distiller(teacher, attention_weight=250.0)
    first.run(2)
    second = distiller(teacher, attention_weight=250.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.student.state_dict().values(), second.student.state_dict().values()
        )
    )
    other = distiller(teacher, attention_weight=1.0)
    with pytest.raises(DFKDError, match=r'attention_weight \(was 250.0, now 1.0\)'):
        other.load_state_dict(first.state_dict())


def test_what_cannot_be_meant(teacher: Teacher) -> None:
    with pytest.raises(DFKDError, match='attention_weight -1.0: give 0 or more'):
        distiller(teacher, attention_weight=-1.0)
    with pytest.raises(DFKDError, match='there is no teacher'):
        distiller(None, attention_weight=1.0)
    with pytest.raises(DFKDError, match='with attention_weight cannot be compiled'):
        distiller(teacher, attention_weight=1.0, compile=True)
    assert not distiller(teacher, attention_weight=1.0, compile='auto', steps=10**6).compile
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    made = Distiller(
        Teacher(flat, teacher.domain),
        build_model('resnet8'),
        load_data('cifar10-mini', limit=64),
        steps=1,
        batch_size=16,
        attention_weight=1.0,
    )
    with pytest.raises(DFKDError, match='they have .*: set it to 0'):
        made.step()


@pytest.mark.parametrize('kept', [True, False])
def test_one_head_for_all_batches_where_it_is_kept(kept: bool) -> None:
    domain = DOMAINS['digits']
    synthesizer = ContrastiveSynthesizer(
        Teacher(build_model('digits-net', 10, 1), domain),
        generator=Generator((1, 8, 8), latent_size=8, width=4),
        steps=1,
        batch_size=4,
        class_weight=1.0,
        keep_head=kept,
        learning_rate=1e-6,
    )
    synthesizer.synthesize(4)
    before = [weight.clone() for weight in synthesizer.head.parameters()]
    weights = {name: weight.clone() for name, weight in synthesizer.weights.items()}
    synthesizer.synthesize(4)
    after = synthesizer.head.parameters()
    near = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after))
    assert near is kept
    # the generator begins anew in both
    assert not all(
        torch.allclose(weights[k], w, atol=1e-4) for k, w in synthesizer.weights.items()
    )


def test_blocks_go_before_layers() -> None:
    x = torch.rand(2, 3, 32, 32)
    found = last_of_each_size(build_model('wrn16-1'), x)
    # not the normalisation at the beginning of the next block, nor the last one
    assert found == {(32, 32): 'blocks.1', (16, 16): 'blocks.3', (8, 8): 'blocks'}
    conv = nn.Conv2d(3, 4, 3, padding=1)
    flat = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
    assert last_of_each_size(flat, x) == {(32, 32): '1', (16, 16): '2'}
