"""Same seed, same run: what a student learns depends on its seed and its images alone.

Nothing that ran before matters. And what is handed in stays what it was: sets have no
state, students keep their layout, teachers their device.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dfkd_nb.foundations.distillation import Distiller, distill, train
from dfkd_nb.foundations.optimization import learning_rate_at
from dfkd_nb.toolbox.core import RandomStreams, same_device
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import load_data
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError, DFKDWarning
from dfkd_nb.toolbox.evaluation import evaluate
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.sources import as_source
from dfkd_nb.toolbox.teachers import Teacher

TOY = Domain('toy', (3, 8, 8), (0.5,) * 3, (0.25,) * 3, ('a', 'b', 'c'))
SHORT: dict[str, Any] = {
    'steps': 6,
    'batch_size': 8,
    'learning_rate': 0.05,
    'device': 'cpu',
}


def images(count: int = 20, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % 3, TOY)


def network(seed: int = 0, dropout: float = 0.0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


@pytest.fixture(scope='module')
def teacher() -> Teacher:
    "One that knows digits."
    torch.manual_seed(0)
    data = load_data('digits', 'train')
    settings: dict[str, Any] = {
        'steps': 100,
        'batch_size': 64,
        'learning_rate': 0.1,
        'device': 'cpu',
    }
    return Teacher(
        train(build_model('digits-net', 10, 1), data, **settings).student, data.domain
    )


def weights(model: nn.Module) -> list[Tensor]:
    return [v.clone() for v in model.state_dict().values()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# --- same seed, same run ------------------------------------------------------------------


def test_one_set_serves_two_runs_with_equal_bits() -> None:
    teacher = Teacher(network(7), TOY)
    data = images()
    students = [network(1), network(1), network(1)]
    distill(teacher, students[0], data, seed=0, **SHORT)
    distill(teacher, students[1], data, seed=0, **SHORT)
    distill(teacher, students[2], data, seed=1, **SHORT)
    assert equal(students[0], students[1]) and not equal(students[0], students[2])


def test_two_consumers_of_one_set_do_not_touch_each_other() -> None:
    teacher, data = Teacher(network(7), TOY), images()
    alone = distill(teacher, network(1), data, **SHORT).student
    one = Distiller(teacher, network(1), data, **SHORT)
    other = Distiller(teacher, network(2), data, **SHORT | {'batch_size': 3})
    for _ in range(6):
        one.step()
        other.step()
    assert equal(alone, one.student)


def test_dropout_depends_on_the_seed_and_on_nothing_drawn_before() -> None:
    teacher, students = Teacher(network(7), TOY), []
    for stirred, seed in ((0, 0), (99, 0), (0, 1)):
        student = network(1, dropout=0.5)
        torch.manual_seed(stirred)
        torch.rand(stirred)
        before = torch.get_rng_state()
        distill(teacher, student, images(), seed=seed, **SHORT)
        # and the caller's stream was not touched
        assert torch.equal(before, torch.get_rng_state())
        students.append(student)
    assert equal(students[0], students[1]) and not equal(students[0], students[2])


def noisy(batch_size: int, generator: torch.Generator) -> Tensor:
    # from the global stream, as careless code does
    return torch.rand(batch_size, 3, 8, 8)


@pytest.mark.parametrize(
    'source', [images(), noisy], ids=['set', 'draws from the global stream']
)
@pytest.mark.parametrize('stop', [1, 4])
def test_a_student_with_dropout_resumes_to_the_same_bits(source: Any, stop: int) -> None:
    teacher = Teacher(network(7), TOY)
    straight = distill(teacher, network(1, 0.5), source, **SHORT)
    half = Distiller(teacher, network(1, 0.5), source, **SHORT).run(until=stop)
    state = copy.deepcopy(half.state_dict())
    torch.rand(17)  # the new process has drawn other numbers
    resumed = Distiller(teacher, network(5, 0.5), source, **SHORT | {'seed': 3})
    resumed.load_state_dict(state)
    resumed.run()
    assert equal(straight.student, resumed.student) and straight.history == resumed.history


def test_streams_nest_and_survive_errors() -> None:
    streams = RandomStreams(1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ValueError), streams:
        with streams:
            torch.rand(4)
        raise ValueError
    assert torch.equal(torch.rand(3), expected)
    with streams:
        after = torch.rand(2)
    assert torch.equal(torch.rand(6, generator=torch.Generator().manual_seed(1))[4:], after)


def test_rows_are_means_of_their_updates_also_when_every_changes() -> None:
    teacher = Teacher(network(7), TOY)
    single = Distiller(teacher, network(1), images(), **SHORT)
    losses = [float(single.step()['loss']) for _ in range(6)]
    mixed = Distiller(teacher, network(1), images(), **SHORT)
    mixed.run(until=2, log_every=5)  # two updates that no row has yet
    state = copy.deepcopy(mixed.state_dict())
    again = Distiller(teacher, network(1), images(), **SHORT)
    again.load_state_dict(state)
    again.run(log_every=3)
    assert [row['loss'] for row in again.history] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-6
    )
    changed = Distiller(teacher, network(1), images(), **SHORT)
    changed.run(until=2, log_every=4)
    changed.run(log_every=3)
    changed = Distiller(teacher, network(1), images(), **SHORT)
    changed.run(until=4, log_every=3)  # a row after 3, one update waits
    changed.run(log_every=5)  # the row after 5 holds updates 4 and 5
    assert [row['loss'] for row in changed.history] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:5]) / 2, losses[5]], rel=1e-6
    )


# --- an update, exactly -------------------------------------------------------------------


def test_an_update_is_nesterov_sgd_on_a_student_in_training_mode() -> None:
    """Three updates against PyTorch's own optimiser, written out.

    Mode, momentum, decay, smoothing and schedule.
    """
    data, student = images(8), network(1)
    reference = copy.deepcopy(student).double()
    optimizer = torch.optim.SGD(
        reference.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True
    )
    sampler, generator = data.sampler(), torch.Generator().manual_seed(0)
    for step in range(3):
        x, y = sampler.sample(8, generator)
        optimizer.param_groups[0]['lr'] = 0.05 * learning_rate_at(step, 3, 'cosine')
        loss = F.cross_entropy(
            reference.train()(TOY.normalize(x).double()), y, label_smoothing=0.2
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student.eval()
    train(
        student,
        data,
        steps=3,
        batch_size=8,
        learning_rate=0.05,
        label_smoothing=0.2,
        device='cpu',
    )
    for mine, theirs in zip(weights(student), weights(reference), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), atol=1e-6, rtol=1e-5)


def test_half_precision_scales_steps_and_updates_in_this_order() -> None:
    class Recorder:
        "What a gradient scaler is asked for."

        def __init__(self) -> None:
            self.calls: list[str] = []

        def scale(self, loss: Tensor) -> Tensor:
            self.calls.append('scale')
            return loss

        def step(self, optimizer: torch.optim.Optimizer) -> None:
            self.calls.append('step')
            optimizer.step()

        def update(self) -> None:
            self.calls.append('update')

    learner = Distiller(Teacher(network(7), TOY), network(1), images(), **SHORT)
    learner.scaler = recorder = Recorder()  # type: ignore[assignment]
    learner.step()
    learner.step()
    assert recorder.calls == ['scale', 'step', 'update'] * 2


@pytest.mark.parametrize('schedule', ['constant', 'cosine', 'one-cycle', 'steps'])
def test_a_single_update_changes_the_student(schedule: str) -> None:
    student = network(1)
    before = copy.deepcopy(student)
    distill(
        Teacher(network(7), TOY),
        student,
        images(),
        **SHORT | {'steps': 1, 'schedule': schedule},
    )
    assert not torch.equal(next(student.parameters()), next(before.parameters()))


# --- two networks, two normalisations -----------------------------------------------------


def test_each_network_sees_the_images_on_its_own_scale(teacher: Teacher) -> None:
    "The teacher in the loop answers as it does outside, also to mixed images."
    data = load_data('digits', limit=64)
    raw = dataclasses.replace(data.domain, mean=(0.0,), std=(1.0,))
    torch.manual_seed(0)
    student = build_model('digits-net', 10, 1)
    learner = Distiller(
        teacher, student, data, domain=raw, steps=4, batch_size=16, device='cpu'
    )
    x, _ = learner.prepare(data.images, None)
    assert torch.equal(x, data.images / 255) or torch.allclose(
        x, data.images / 255, atol=1e-6
    )
    inside, outside = learner.teacher_logits(x), teacher.predict(data.images)
    assert torch.allclose(inside, outside, atol=1e-4) and torch.equal(
        inside.argmax(1), outside.argmax(1)
    )
    mixing = Distiller(
        teacher,
        copy.deepcopy(student),
        data,
        domain=raw,
        mixup_alpha=0.4,
        steps=4,
        batch_size=16,
        device='cpu',
    )
    generator = mixing.generator.get_state()
    mixed, _ = mixing.prepare(data.images[:16], None)
    mixing.generator.set_state(generator)
    same = Distiller(
        teacher,
        copy.deepcopy(student),
        data,
        mixup_alpha=0.4,
        steps=4,
        batch_size=16,
        device='cpu',
    )
    same.generator.set_state(generator)
    usual, _ = same.prepare(data.images[:16], None)
    assert torch.allclose(
        mixing.teacher_logits(mixed), same.teacher_logits(usual), atol=1e-4
    )


def test_normalisations_convert_exactly() -> None:
    other = dataclasses.replace(TOY, mean=(0.1,) * 3, std=(1 / 255,) * 3)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    assert torch.allclose(
        TOY.renormalize(TOY.normalize(pixels), other), other.normalize(pixels), rtol=1e-12
    )
    x = TOY.normalize(pixels)
    assert TOY.renormalize(x, dataclasses.replace(TOY, name='twin')) is x


# --- the caller's objects stay the caller's -----------------------------------------------


class Flat(nn.Module):
    """PyTorch's tutorial network.

    It flattens with `view`, which wants the usual order in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().view(len(x), -1))


@pytest.mark.parametrize('make', [Flat, network])
def test_a_student_works_and_saves_afterwards_as_before(
    make: Callable[[], nn.Module], tmp_path: Any
) -> None:
    torch.manual_seed(0)
    student, x = make(), torch.randn(4, 3, 8, 8)
    distill(Teacher(network(7), TOY), student, images(), **SHORT)
    assert student(x).shape == (4, 3)
    assert all(v.is_contiguous() for v in student.state_dict().values())
    save_file(student.state_dict(), tmp_path / 'student.safetensors')
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_channels_last_is_used_where_the_student_takes_it() -> None:
    teacher = Teacher(network(7), TOY)
    assert (
        Distiller(teacher, network(1), images(), **SHORT).memory_format
        == torch.channels_last
    )
    assert (
        Distiller(teacher, Flat(), images(), **SHORT).memory_format
        == torch.contiguous_format
    )


def test_devices_are_compared_by_what_they_mean() -> None:
    assert same_device(torch.device('cpu'), torch.device('cpu', 0)) and not same_device(
        torch.device('cpu'), torch.device('meta')
    )


# --- meaning is checked where it can be ---------------------------------------------------


def test_a_permuted_network_is_told_as_such_and_a_poor_one_is_not(teacher: Teacher) -> None:
    plain, teacher, data = teacher, copy.deepcopy(teacher), load_data('digits')
    last = [m for m in teacher.model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        order = torch.tensor([3, 4, 5, 6, 7, 8, 9, 0, 1, 2])
        last.weight.copy_(last.weight[order].clone())
        last.bias.copy_(last.bias[order].clone())
    with pytest.warns(DFKDWarning, match='classes look permuted') as caught:
        assert evaluate(teacher, data) < 0.1
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert evaluate(plain, data) > 0.9
        for seed in range(5):
            torch.manual_seed(seed)
            evaluate(build_model('digits-net', 10, 1), data)


def test_two_classes_that_are_confused_do_not_make_a_permutation() -> None:
    """Two of ten classes mostly answered as each other, the others at random.

    A poor network, not a permuted one.
    """
    labels = torch.arange(10).repeat_interleave(10)
    predictions = torch.arange(100) % 10
    predictions[:6], predictions[10:16] = 1, 0
    data = ImageSet(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), labels, DOMAINS['digits'])

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(predictions, 10).float()

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        evaluate(Fixed(), data)


def test_labels_in_another_order_are_refused_and_can_be_renumbered(
    teacher: Teacher,
) -> None:
    data = load_data('digits', limit=100)
    order = torch.arange(10).flip(0)
    other = dataclasses.replace(
        data.domain, name='reversed', classes=tuple(data.domain.classes[k] for k in order)
    )
    turned = ImageSet(data.images, order.argsort()[data.labels], other)
    with pytest.raises(
        DFKDError, match=r"class 0 of 'reversed' and class 9 of 'digits': .*relabel"
    ):
        evaluate(teacher, turned)
    with pytest.raises(DFKDError, match='relabel'):
        Distiller(
            teacher,
            build_model('digits-net', 10, 1),
            turned,
            steps=1,
            label_weight=1.0,
            device='cpu',
        )
    # the student's classes against its teacher's
    with pytest.raises(DFKDError, match='relabel'):
        Distiller(
            teacher,
            build_model('digits-net', 10, 1),
            data,
            domain=other,
            steps=1,
            device='cpu',
        )
    assert evaluate(teacher, turned.relabel(teacher.domain)) == evaluate(teacher, data)
    with pytest.raises(DFKDError, match="no class 'a'"):
        images().relabel(teacher.domain)
    big = DOMAINS['imagenet']  # two of its classes share a name, twice
    big.check_classes(
        dataclasses.replace(big, name='again', classes=tuple(list(big.classes)))
    )


BATCH = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    (
        'bytes as floats',
        lambda: Teacher(network(), TOY).predict(BATCH * 255),
        'divide by 255',
    ),
    (
        'normalised',
        lambda: Teacher(network(), TOY).predict((BATCH - 0.5) / 0.1),
        'normalised already',
    ),
    ('overshoot', lambda: Teacher(network(), TOY).predict(BATCH + 0.1), 'clamp'),
    ('NaN', lambda: Teacher(network(), TOY).predict(BATCH / 0), 'NaN or infinity'),
    (
        'drawn bytes',
        lambda: distill(
            Teacher(network(), TOY), network(1), lambda n, g: BATCH * 255, **SHORT
        ),
        'divide by 255',
    ),
    (
        'loader',
        lambda: as_source(DataLoader(TensorDataset(BATCH))),
        'ImageSet.collect',
    ),  # type: ignore[arg-type]
    ('dataset', lambda: as_source(TensorDataset(BATCH)), 'domain='),
    ('list', lambda: as_source([BATCH]), 'domain='),  # type: ignore[arg-type]
    ('none', lambda: as_source(None, TOY), 'no images in a NoneType'),  # type: ignore[arg-type]
    ('module', lambda: as_source(network(), TOY), 'no images in a Sequential'),  # type: ignore[arg-type]
    (
        'evaluate loader',
        lambda: evaluate(network(), DataLoader(TensorDataset(BATCH))),
        'ImageSet.collect',
    ),  # type: ignore[arg-type]
    ('evaluate none', lambda: evaluate(network(), None), 'no images in a NoneType'),  # type: ignore[arg-type]
    ('evaluate tensor', lambda: evaluate(network(), BATCH), 'no labels'),  # type: ignore[arg-type]
    (
        'evaluate size',
        lambda: evaluate(Teacher(network(), TOY), load_data('cifar10-mini', limit=5)),
        r'resize_images\(images',
    ),
    ('one class', lambda: evaluate(network(classes=1), _one_class()), 'has one class'),
    ('collect none', lambda: ImageSet.collect(None, TOY), 'no images in a NoneType'),
    ('collect text', lambda: ImageSet.collect(['x.png'], TOY), 'is a str'),
    ('collect empty', lambda: ImageSet.collect([], TOY), 'no images to collect'),
    (
        'collect normalised',
        lambda: ImageSet.collect([BATCH * 4 - 2], TOY),
        'normalised already',
    ),
    ('collect ints', lambda: ImageSet.collect([BATCH.long()], TOY), 'int64'),
    ('collect labels', lambda: ImageSet.collect([(BATCH, [1, 2])], TOY), '2 labels'),
]


def _one_class() -> ImageSet:
    domain = dataclasses.replace(TOY, classes=('a',))
    return ImageSet(images(4).images, torch.zeros(4, dtype=torch.long), domain)


def test_wrong_meaning_is_one_line() -> None:
    for name, attempt, words in REFUSED:
        with pytest.raises(DFKDError, match=words) as caught:
            attempt()
        assert '\n' not in str(caught.value), name


def test_images_are_collected_from_what_users_hold() -> None:
    from PIL import Image

    data = images(6)
    pairs = [
        (Image.fromarray(x.permute(1, 2, 0).numpy()), int(y))
        for x, y in zip(data.images, data.labels, strict=True)
    ]
    loader = DataLoader(TensorDataset(data.images / 255, data.labels), batch_size=4)
    for items in (pairs, loader, TensorDataset(data.images, data.labels)):
        found = ImageSet.collect(items, TOY)
        assert torch.equal(found.images, data.images) and torch.equal(
            found.labels, data.labels
        )
    assert ImageSet.collect(list(data.images), TOY, limit=4).labels is None
    assert len(ImageSet.collect(loader, TOY, limit=3)) == 3


def test_a_folder_of_dreams_keeps_its_size(tmp_path: Any) -> None:
    """Thirty-two pixels stay thirty-two where the classes tell the domain; otherwise it is
    said what was taken.
    """
    from PIL import Image

    for name in DOMAINS['cifar10'].classes:
        (tmp_path / 'known' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path / 'known' / name / '0.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_data(f'folder:{tmp_path / "known"}').domain == DOMAINS['cifar10']
    (tmp_path / 'other' / 'thing').mkdir(parents=True)
    Image.new('RGB', (32, 32)).save(tmp_path / 'other' / 'thing' / '0.png')
    with pytest.warns(DFKDWarning, match='give domain='):
        load_data(f'folder:{tmp_path / "other"}')
