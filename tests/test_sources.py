"""Images in other programs' hands: data sets, loaders, folders and tables, in and out.

And an optimiser and callbacks of the user's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from cases import each
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from dfkd_nb import (
    DOMAINS,
    Callback,
    DFKDError,
    Distiller,
    Domain,
    ImageSet,
    Teacher,
    as_source,
    distill,
    evaluate,
    load_data,
    train,
)
from dfkd_nb.toolbox import sources

PETS = Domain('pets', (3, 8, 8), (0.5,) * 3, (0.25,) * 3, ('cat', 'dog', 'owl'))


def pictures(count: int = 9, domain: Domain = PETS, labelled: bool = True) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    shape = (count, *domain.shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % domain.num_classes
    return ImageSet(images, labels if labelled else None, domain)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)
    )


def same_images(one: ImageSet, other: ImageSet) -> bool:
    "The same images with the same labels, in whatever order."

    def rows(images: ImageSet) -> list[tuple[int, bytes]]:
        assert images.labels is not None
        pairs = zip(images.labels.tolist(), images.images, strict=True)
        return sorted((label, bytes(image.flatten().tolist())) for label, image in pairs)

    return one.domain == other.domain and rows(one) == rows(other)


def test_a_set_is_a_dataset() -> None:
    data = pictures()
    x, labels = next(iter(DataLoader(data, batch_size=len(data))))
    assert torch.equal(x, PETS.normalize(data.images)) and torch.equal(labels, data.labels)
    assert len(list(data)) == len(data)
    with pytest.raises(IndexError):
        data[len(data)]
    only_images = next(iter(DataLoader(pictures(labelled=False), batch_size=4)))
    assert only_images.shape == (4, *PETS.shape)
    assert len(Subset(data, [2, 1])) == 2


def test_a_set_has_no_state_but_its_data() -> None:
    data = pictures()
    before = dict(vars(data))
    next(iter(DataLoader(data, shuffle=True)))
    data.sampler().sample(4, torch.Generator())
    assert vars(data).keys() == before.keys()
    assert all(vars(data)[k] is v for k, v in before.items())


@each('classes', [PETS.classes, ('crane', 'owl', 'crane'), ('a/b', '..', 'owl')])
def test_folders_give_back_what_went_in(tmp_path: Path, classes: tuple[str, ...]) -> None:
    data = pictures(domain=replace(PETS, classes=classes))
    folder = tmp_path / str(abs(hash(classes)))
    data.to_folder(folder)
    assert same_images(ImageSet.from_folder(folder, data.domain), data)
    with pytest.raises(DFKDError, match='not empty'):
        data.to_folder(folder)


def test_a_folder_of_some_classes_keeps_their_numbers(tmp_path: Path) -> None:
    some = pictures().subset(torch.tensor([2, 5, 8]))  # owls
    some.to_folder(tmp_path / 'owls')
    assert sorted(p.name for p in (tmp_path / 'owls').iterdir()) == ['owl']
    assert same_images(ImageSet.from_folder(tmp_path / 'owls', PETS), some)


def test_tables_give_back_what_went_in(tmp_path: Path) -> None:
    for domain in (PETS, DOMAINS['digits']):
        data, path = pictures(domain=domain), tmp_path / f'{domain.name}.parquet'
        data.to_parquet(path)
        again = ImageSet.from_parquet(path)
        assert torch.equal(again.images, data.images)
        assert torch.equal(again.labels, data.labels) and again.domain == domain
        assert (
            ImageSet.from_parquet(path, replace(domain, name='mine')).domain.name == 'mine'
        )


def test_tables_are_those_of_the_hub(tmp_path: Path) -> None:
    "`datasets` reads features of this form; its own note stands under this key."
    pictures().to_parquet(tmp_path / 'pets.parquet')
    schema = pq.read_schema(tmp_path / 'pets.parquet')
    features = json.loads(schema.metadata[b'huggingface'])['info']['features']
    assert features['image'] == {'_type': 'Image'}
    assert features['label'] == {'names': ['cat', 'dog', 'owl'], '_type': 'ClassLabel'}
    assert {field.name for field in schema.field('image').type} == {'bytes', 'path'}
    assert len(load_data(f'folder:{tmp_path}', domain=PETS)) == 9


def test_a_foreign_table_needs_a_domain(tmp_path: Path) -> None:
    path = tmp_path / 'pets.parquet'
    pictures().to_parquet(path)
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    with pytest.raises(DFKDError, match='give domain='):
        ImageSet.from_parquet(path)
    assert ImageSet.from_parquet(path, PETS).domain == PETS


def test_files_need_labels(tmp_path: Path) -> None:
    data = pictures(labelled=False)
    for write in (data.to_folder, data.to_parquet):
        with pytest.raises(DFKDError, match='no labels'):
            write(tmp_path / 'x')
    assert not list(tmp_path.iterdir())


class Stream(IterableDataset):
    "No length."

    def __iter__(self) -> Any:
        return iter([(torch.zeros(3, 8, 8), 0)])


def test_collections_teach_as_the_set_does() -> None:
    data, settings = pictures(), dict(steps=4, batch_size=4, device='cpu', domain=PETS)
    wanted = train(network(), data, **settings).history
    pairs = TensorDataset(data.images, data.labels)
    floats = TensorDataset(data.images / 255, data.labels)
    for source in (pairs, floats, DataLoader(floats, batch_size=2), list(pairs)):
        assert train(network(), source, **settings).history == wanted
    # of a loader around an ImageSet, whose items are normalised, the set itself is taken
    assert as_source(DataLoader(data)) is data
    student = network()
    teacher = Teacher(network(1), PETS)
    done = distill(teacher, student, floats, steps=2, batch_size=4, device='cpu')
    assert done.source.domain == PETS
    assert evaluate(teacher, DataLoader(floats)) == evaluate(teacher, data)
    assert evaluate(student, floats, domain=PETS) == evaluate(student, data)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: train(network(), TensorDataset(torch.zeros(4, 3, 8, 8)), steps=1), 'domain='),
    (lambda: as_source(Stream(), PETS), 'limit=N'),
    (lambda: as_source(DataLoader(Stream()), PETS), 'limit=N'),
    (lambda: as_source([(torch.zeros(3, 9, 9), 0)], PETS), 'do not fit the domain'),
    (lambda: as_source([(torch.full((3, 8, 8), 9.0), 0)], PETS), 'normalised already'),
    (lambda: as_source([(torch.full((3, 8, 8), 99.0), 0)], PETS), 'divide by 255'),
    (lambda: evaluate(network(), [(torch.zeros(3, 8, 8), 0)]), 'domain='),
    (lambda: evaluate(network(), [torch.zeros(3, 8, 8)], domain=PETS), 'no labels'),
    (lambda: as_source(7, PETS), 'no images in a int'),  # type: ignore[arg-type]
]


@each('attempt, words', REFUSED)
def test_what_cannot_be_known_is_asked_for(attempt: Callable[[], Any], words: str) -> None:
    with pytest.raises(DFKDError, match=words) as caught:
        attempt()
    assert '\n' not in str(caught.value)


def test_other_class_orders_and_large_sets_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = pictures()
    pairs = TensorDataset(data.images, data.labels)
    pairs.classes = ['dog', 'cat', 'owl']  # type: ignore[attr-defined]
    with pytest.raises(DFKDError, match="'dog' is class 0"):
        train(network(), pairs, steps=1, domain=PETS)
    monkeypatch.setattr(sources, 'MAX_IN_MEMORY', 100)
    with pytest.raises(DFKDError, match='in memory'):
        as_source(TensorDataset(data.images), PETS)


class Average(Callback):
    "A moving average of the weights; it draws, to see that streams resume."

    def __init__(self, student: nn.Module) -> None:
        self.weights = copy.deepcopy(student.state_dict())
        self.rows = 0
        self.drawn = torch.zeros(())

    def on_step(self, distiller: Distiller, losses: dict[str, torch.Tensor]) -> None:
        self.drawn = self.drawn + torch.rand(())
        for name, value in distiller.student.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 0.1)

    def on_log(self, distiller: Distiller, row: dict[str, float]) -> None:
        self.rows += 1

    def state_dict(self) -> dict[str, Any]:
        return {'weights': self.weights, 'rows': self.rows, 'drawn': self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = copy.deepcopy(state['weights'])
        self.rows, self.drawn = state['rows'], state['drawn']


def learner(optimizer: Any = None, **settings: Any) -> Distiller:
    student = network()
    usual: dict[str, Any] = dict(steps=12, batch_size=4, learning_rate=0.01, device='cpu')
    callbacks = settings.pop('callbacks', [Average(student)])
    words = usual | settings | {'callbacks': callbacks, 'optimizer': optimizer}
    return Distiller(None, student, pictures(), **words)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.003)


@each('optimizer', [None, 'sgd', 'adam', 'adamw', adamw])
def test_any_optimizer_and_callback_resume_to_the_same_bits(optimizer: Any) -> None:
    whole = learner(optimizer).run(log_every=3)
    first, second = learner(optimizer), learner(optimizer)
    state = copy.deepcopy(first.run(until=7, log_every=3).state_dict())
    second.load_state_dict(state)
    second.run(log_every=3)
    assert second.history == whole.history
    for a, b in zip(whole.callbacks, second.callbacks, strict=True):
        mine, theirs = a.state_dict(), b.state_dict()
        assert mine['rows'] == theirs['rows'] == 4 and mine['drawn'] == theirs['drawn']
        assert all(v.equal(theirs['weights'][k]) for k, v in mine['weights'].items())


def test_the_schedule_multiplies_the_optimizers_own_rates() -> None:
    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        groups = [{'params': [first], 'lr': 0.5}, {'params': others}]
        return torch.optim.SGD(groups, lr=0.1)

    run = learner(two_groups, steps=10, schedule='steps')
    rates = []
    run.callbacks[0].on_step = lambda d, losses: rates.append(  # type: ignore[method-assign]
        [group['lr'] for group in d.optimizer.param_groups]
    )
    run.run()
    assert rates[0] == [0.5, 0.1]
    assert rates[-1] == pytest.approx([0.005, 0.001])


def test_adamw_is_torchs() -> None:
    run = learner('adamw', momentum=0.8, weight_decay=0.02)
    assert type(run.optimizer) is torch.optim.AdamW
    assert run.optimizer.defaults['betas'] == (0.8, 0.999)
    assert run.optimizer.defaults['weight_decay'] == 0.02


def test_a_function_is_called_after_each_row_and_stops() -> None:
    calls: list[int] = []

    def stop(distiller: Distiller) -> bool:
        calls.append(distiller.done)
        return distiller.done >= 6

    assert learner(callbacks=[stop]).run(log_every=3).done == 6
    assert calls == [3, 6]


def test_callbacks_leave_the_bits_alone() -> None:
    plain = learner(callbacks=[]).run(log_every=3)
    watched = learner(callbacks=[lambda distiller: None]).run(log_every=3)
    assert plain.history == watched.history


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: learner('adamv'), "unknown optimizer 'adamv'"),
    (lambda: learner(lambda parameters: 3), 'made a int'),
    (lambda: learner(callbacks=[Average]), 'is no callback'),
    (lambda: learner(callbacks=[3]), 'is no callback'),
    (lambda: learner('adam').load_state_dict(learner().state_dict()), 'optimizer'),
    (lambda: learner(callbacks=[]).load_state_dict(learner().state_dict()), '1 callbacks'),
]


@each('attempt, words', WRONG)
def test_wrong_optimizers_and_callbacks(attempt: Callable[[], Any], words: str) -> None:
    with pytest.raises(DFKDError, match=words) as caught:
        attempt()
    assert '\n' not in str(caught.value)
