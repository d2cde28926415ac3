"""The teacher's forward passes run on a private copy without BatchNorm, unseen by all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.optimization import RunningMeans, build_optimizer
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.folding import FoldedTeacher, fold_batchnorm
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.networks import BatchCounters
from dfkd_nb.toolbox.teachers import Teacher

TOY = Domain('toy', (3, 8, 8), (0.5,) * 3, (0.25,) * 3, ('a', 'b', 'c'))
SHORT: dict[str, Any] = {'steps': 6, 'batch_size': 8, 'learning_rate': 0.05}


def stirred(network: nn.Module) -> nn.Module:
    "With statistics and weights as after training."
    torch.manual_seed(3)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight.data, layer.running_var):
                values.uniform_(0.5, 1.5)
            for values in (layer.bias.data, layer.running_mean):
                values.uniform_(-0.5, 0.5)
    return network


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return stirred(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
    )


def images(count: int = 20) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % 3, TOY)


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_distiller_asks_a_folded_copy_and_leaves_the_teacher_alone() -> None:
    teacher = Teacher(network(7), TOY)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    seen: list[Tensor] = []
    learner = Distiller(teacher, network(1), images(), device='cpu', **SHORT)
    learner.run(until=2)
    assert learner.teacher is teacher and learner.folded is not None
    assert learner.folded.reason == '' and learner.folded.copy is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in learner.folded.copy.modules())
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    assert all(v.is_contiguous() for v in teacher.state_dict().values())
    torch.testing.assert_close(learner.teacher_logits(X), teacher(X), rtol=1e-4, atol=1e-5)
    # nobody saves it
    assert not [k for k in learner.state_dict() if 'fold' in k or 'teacher' in k]
    # who hooks a layer sees what passes
    teacher.model[1].register_forward_hook(lambda m, given, out: seen.append(out))
    learner.run(until=4)
    assert len(seen) == 2


def test_the_copy_saves_what_it_should() -> None:
    "With and without it a student learns the same, up to rounding."
    ends = []
    for fold in (True, False):
        learner = Distiller(
            Teacher(network(7), TOY),
            network(1),
            images(),
            device='cpu',
            fold_teacher=fold,
            **SHORT,
        )
        ends.append(torch.cat([p.flatten() for p in learner.run().student.parameters()]))
        assert (learner.folded is None) == (not fold)
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)
    assert not ends[0].equal(ends[1])


def test_a_change_of_the_weights_is_seen() -> None:
    teacher = Teacher(network(7), TOY)
    fast = FoldedTeacher(teacher)
    first = fast(X)
    with torch.no_grad():
        teacher.model[1].running_mean.add_(1.0)
    assert fast(X).equal(teacher(X)) and fast.copy is None
    torch.testing.assert_close(fast(X), teacher(X), rtol=1e-4, atol=1e-5)
    assert fast.reason == '' and not torch.allclose(fast(X), first, atol=1e-2)
    # a live network is never folded
    for _ in range(3):
        with torch.no_grad():
            teacher.model[4].bias.add_(1.0)
        assert fast(X).equal(teacher(X))
    # weights that were put elsewhere
    teacher.model[0].weight.data = teacher.model[0].weight.data * 2
    assert fast(X).equal(teacher(X))


class Bare(nn.Module):
    "Answers like a teacher and is none."

    def __init__(self) -> None:
        super().__init__()
        self.model, self.domain = network(), TOY

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Winding(nn.Module):
    "Cannot be traced."

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body(x) + 1


class Twice(nn.Module):
    "Cannot be folded: one convolution, two norms."

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        stirred(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.conv(self.one(self.conv(x))))
        return self.fc(x.mean((2, 3)))


class Views(nn.Module):
    "Wants the usual order in memory."

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).view(-1, 64))


def trained() -> Any:
    teacher = Teacher(network(), TOY)
    teacher.requires_grad_(True)
    return teacher


def hooked() -> Any:
    teacher = Teacher(network(), TOY)
    teacher.model[1].register_forward_hook(lambda m, given, out: 2 * out)
    return teacher


def compiled() -> Any:
    teacher = Teacher(network(), TOY)
    teacher.model.compile(backend='eager')
    return teacher


def halved() -> Any:
    return Teacher(network(), TOY).to(torch.bfloat16)


def scripted() -> Any:
    return Teacher(torch.jit.script(network().eval()), TOY)


REASONS = {
    'no teacher': (Bare, 'no plain Teacher'),
    'no BatchNorm': (
        lambda: Teacher(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), TOY),
        'no BatchNorm',
    ),
    'BatchNorm first': (
        lambda: Teacher(nn.Sequential(nn.BatchNorm2d(3), *network()), TOY).eval(),
        '',
    ),
    'only BatchNorm first': (
        lambda: Teacher(
            nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3)), TOY
        ),
        'follows',
    ),
    'untraceable': (lambda: Teacher(Winding(), TOY), 'cannot be traced'),
    'called twice': (lambda: Teacher(Twice(), TOY), 'logits would change'),
    'views': (lambda: Teacher(Views(), TOY), 'cannot be traced'),
    'trained': (trained, 'may be trained'),
    'hooks': (hooked, 'hooks'),
    'compiled': (compiled, 'compiled'),
    'half precision': (halved, 'bfloat16'),
    'TorchScript': (scripted, 'TorchScript'),
}


@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning')
@pytest.mark.parametrize('name', REASONS)
def test_what_cannot_be_folded_answers_itself(name: str) -> None:
    make, reason = REASONS[name]
    teacher = make()
    x = X.to(next(teacher.parameters()).dtype)
    fast = FoldedTeacher(teacher)
    answer = fast(x)
    if reason:
        assert reason in fast.reason and fast.copy is None
        assert answer.equal(teacher(x))
    else:
        assert fast.reason == ''
        torch.testing.assert_close(answer, teacher(x), rtol=1e-4, atol=1e-5)


def test_double_precision_stays() -> None:
    teacher = Teacher(network(), TOY).double()
    fast, x = FoldedTeacher(teacher), X.double()
    torch.testing.assert_close(fast(x), teacher(x), rtol=1e-12, atol=1e-12)
    assert fast.reason == ''


def test_half_precision_weights_are_converted_once_to_the_same_bits() -> None:
    "`autocast` would convert them at each call; outside of it the teacher answers."
    teacher = Teacher(network(), TOY)
    fast, plain = FoldedTeacher(teacher, torch.bfloat16), FoldedTeacher(teacher)
    assert fast(X).equal(teacher(X))
    with torch.autocast('cpu', torch.bfloat16):
        answer = fast(X)
        assert plain(X).equal(teacher(X))
    folded = fold_batchnorm(teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert answer.equal(folded(X)) and answer.dtype == torch.bfloat16
    assert fast.copy is not None
    assert next(fast.copy.parameters()).dtype == torch.bfloat16


# --- what else makes a step short ---------------------------------------------------------


def test_counters_are_what_each_layer_would_have_counted() -> None:
    shared = nn.BatchNorm2d(4)
    torch.manual_seed(0)
    one = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        shared,
        shared,
        nn.BatchNorm2d(4, momentum=None),
    )
    one[0].extra = nn.BatchNorm2d(4)  # which nothing calls
    other = copy.deepcopy(one)
    counters = BatchCounters(other)
    for step in range(4):
        for net in (one, other):
            net.train()
            net[1].train(step != 2)  # one layer rests for a while
        x = torch.randn(2, 3, 8, 8)
        one(x)
        with counters.added_at_once():
            other(x)
    found = other.state_dict()
    assert all(v.equal(found[k]) for k, v in one.state_dict().items())
    assert counters.layers == [other[1]]
    with pytest.raises(RuntimeError), counters.added_at_once():
        other(torch.randn(2, 5, 8, 8))
    assert int(other[1].num_batches_tracked) == 3  # still there


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_fused_updates_are_those_of_plain_sgd(momentum: float) -> None:
    "Also for a weight whose first gradient comes late, and in channels-last memory."
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        weights = [
            nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=layout))
            for layer, layout in enumerate((torch.contiguous_format, torch.channels_last))
        ] + [nn.Parameter(torch.randn(5))]
        optimizer = build_optimizer(weights, None, 0.1, momentum, 1e-2, fused=fused)
        assert optimizer.param_groups[0]['fused'] is (True if fused else None)
        for step in range(4):
            optimizer.zero_grad()
            total = sum((w * w.detach().sin()).sum() for w in weights[: 2 + (step > 1)])
            total.backward()  # type: ignore[union-attr]
            optimizer.step()
        ends.append(torch.cat([w.detach().flatten() for w in weights]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_means_stay_on_the_device_until_they_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    means = RunningMeans()
    with monkeypatch.context() as patch:
        for name in ('item', 'tolist', '__float__', 'cpu'):
            patch.setattr(Tensor, name, lambda self: pytest.fail('was read'))
        for value in range(300):
            means.add({'loss': torch.tensor(float(value))})
        assert len(means._waiting['loss']) < means.block
    assert means.take() == {'loss': 149.5} and means.take() == {}


def test_a_state_with_sums_of_an_earlier_version_is_taken_up() -> None:
    learner = Distiller(Teacher(network(7), TOY), network(1), images(), **SHORT)
    learner.run(until=2, log_every=1)
    state = learner.state_dict()
    state['sums'], state['summed'] = {'loss': torch.tensor(6.0)}, 2
    learner.load_state_dict(state)
    assert learner._means.take() == {'loss': 3.0}


def test_nothing_is_folded_where_nothing_can_be() -> None:
    "A wide network keeps the BatchNorm that follows a sum."
    wide = Teacher(stirred(build_model('wrn16-1', 3)), TOY)
    fast = FoldedTeacher(wide)
    torch.testing.assert_close(fast(X), wide(X), rtol=1e-4, atol=1e-4)
    assert fast.copy is not None
    left = [m for m in fast.copy.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == 7


class Row(nn.Module):
    "Cannot be folded, and flattens with `view`, which wants the usual order in memory."

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().view(len(x), -1))


def test_a_teacher_gets_its_images_in_an_order_that_it_takes() -> None:
    "Whatever order the student likes best."
    torch.manual_seed(0)
    learner = Distiller(Teacher(Row(), TOY), network(1), images(), device='cpu', **SHORT)
    assert learner.memory_format == torch.channels_last
    assert learner.run(until=2).done == 2
    x = X.contiguous(memory_format=torch.channels_last)
    assert learner.teacher is not None
    assert learner.teacher_logits(x).equal(learner.teacher(X))
