"""A data set in a file: crops, recovery, soft labels for views, students from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dfkd_nb.applications.distilled_data import (
    CropCurriculum,
    SoftLabelDistiller,
    SoftLabelledImages,
    add_soft_labels,
    load_soft_labels,
    recover_images,
    recovery,
    save_soft_labels,
)
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher

DOMAIN = DOMAINS['digits']
DEVICE = {'device': 'cpu'}


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def convolutional() -> Teacher:
    torch.manual_seed(0)
    return Teacher(build_model('digits-net', 10, 1), DOMAIN)


def some_images(count: int = 20) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    shape = (count, *DOMAIN.shape)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % 10, DOMAIN)


def soft(teacher: Teacher, views: int = 5) -> SoftLabelledImages:
    notes = {'method': 'a test'}
    return add_soft_labels(some_images(), teacher, views, flip=False, notes=notes)


@pytest.mark.parametrize(
    ('schedule', 'shares'),
    [
        ('cosine', (1.0, 0.8653, 0.54, 0.2147, 0.08)),
        ('linear', (1.0, 0.77, 0.54, 0.31, 0.08)),
        ('step', (1.0, 1.0, 1.0, 1.0, 0.08)),
    ],
)
def test_smallest_crops(schedule: str, shares: tuple[float, ...]) -> None:
    crops = CropCurriculum(schedule=schedule)
    found = [crops.share(quarter / 4) for quarter in range(5)]
    assert found == pytest.approx(shares, abs=1e-4)
    assert CropCurriculum(schedule=schedule, milestone=0).share(0) == 0.08
    assert CropCurriculum(milestone=0.5).share(0.5) == 0.08


def test_a_whole_image_stays_whole() -> None:
    x = torch.randn(3, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    seen = CropCurriculum(flip=False)(x, 0.0, generator)
    torch.testing.assert_close(seen, x, atol=1e-5, rtol=0)
    small = CropCurriculum(flip=False)(x, 1.0, generator)
    assert (small - x).abs().max() > 0.1


def test_a_curriculum_of_whole_images_is_plain_recovery() -> None:
    whole = CropCurriculum(smallest=1.0, flip=False)
    made = [
        recovery(convolutional(), steps=3, view=view, flip=False, jitter=0, **DEVICE)
        for view in (None, whole)
    ]
    for synthesizer in made:
        # what is drawn for crops must not shift what is drawn for noise
        synthesizer.start(10)
        synthesizer.step()
        assert synthesizer.image_batch is not None
    first, second = (s.image_batch.x.detach() for s in made if s.image_batch is not None)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_stopped_in_the_middle_and_resumed_to_the_same_bits() -> None:
    def maker() -> object:
        made = recovery(
            convolutional(),
            steps=6,
            view=CropCurriculum(flip=False),
            batch_size=10,
            **DEVICE,
        )
        made.start(20)
        return made

    whole, broken, other = maker(), maker(), maker()
    expected = whole.run()
    for _ in range(8):
        broken.step()
    other.load_state_dict(broken.state_dict())
    assert torch.equal(other.run().images, expected.images)
    changed = recovery(
        convolutional(), steps=6, view=CropCurriculum(0.5), batch_size=10, **DEVICE
    )
    changed.start(20)
    with pytest.raises(DFKDError, match='view'):
        changed.load_state_dict(broken.state_dict())


def test_images_of_all_classes_in_turn() -> None:
    images = recover_images(convolutional(), 2, steps=2, **DEVICE)
    assert images.labels is not None
    assert images.labels.tolist() == [*range(10), *range(10)]


def test_the_file_comes_back(tmp_path: Path) -> None:
    data = soft(convolutional())
    path = save_soft_labels(data, tmp_path)
    found = load_soft_labels(path)
    assert torch.equal(found.images.images, data.images.images)
    assert torch.equal(found.views, data.views)
    assert torch.equal(found.logits, data.logits)
    assert found.notes == {'method': 'a test'} and found.domain == data.domain
    card = (tmp_path / 'README.md').read_text()
    assert '20 synthetic images' in card and 'a test' in card
    # a program that knows nothing of soft labels reads images and labels
    assert len(ImageSet.from_parquet(path)) == 20


def test_stored_logits_are_those_of_the_stored_views() -> None:
    teacher = convolutional()
    data = soft(teacher)
    indices, which = torch.tensor([3, 7]), torch.tensor([4, 0])
    seen = DOMAIN.normalize(data.view(indices, which))
    codes = indices * data.num_views + which
    torch.testing.assert_close(
        data.logits_of_codes(codes), teacher(seen), atol=2e-3, rtol=2e-3
    )


def losses(distiller: SoftLabelDistiller) -> Tensor:
    return torch.stack([distiller.step()['loss'] for _ in range(3)])


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    network = linear()
    data = soft(Teacher(network, DOMAIN))
    settings = {'steps': 3, 'batch_size': 10, 'learning_rate': 1e-9} | DEVICE
    assert losses(SoftLabelDistiller(network, data, **settings)).max() < 1e-5
    assert losses(SoftLabelDistiller(linear(1), data, **settings)).min() > 1e-3


def test_a_student_resumes_to_the_same_bits() -> None:
    data = soft(convolutional())
    settings = {'steps': 8, 'batch_size': 10, 'optimizer': 'adamw', 'learning_rate': 1e-3}

    def fresh() -> SoftLabelDistiller:
        return SoftLabelDistiller(linear(1), data, **settings, **DEVICE)

    whole, broken, other = fresh(), fresh(), fresh()
    whole.run()
    broken.run(until=3)
    other.load_state_dict(broken.state_dict())
    other.run()
    for a, b in zip(whole.student.parameters(), other.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    images, views = some_images(), torch.zeros(20, 2, 4)
    with pytest.raises(DFKDError, match=r'give views \(N, M, 4\) and logits'):
        SoftLabelledImages(images, views, torch.zeros(20, 3, 10))
    with pytest.raises(DFKDError, match='give 1 or more'):
        add_soft_labels(images, convolutional(), views=0)
    with pytest.raises(DFKDError, match='give 1 or more'):
        recover_images(convolutional(), 0, **DEVICE)
    with pytest.raises(DFKDError, match='give images of its shape'):
        add_soft_labels(images, Teacher(build_model('resnet8'), DOMAINS['cifar10']))
    with pytest.raises(DFKDError, match='leave it out'):
        SoftLabelDistiller(linear(), soft(convolutional()), steps=1, mixup_alpha=0.5)
    with pytest.raises(DFKDError, match='shares from 0 to 1'):
        CropCurriculum(smallest=0)
    with pytest.raises(DFKDError, match='use cosine'):
        CropCurriculum(schedule='sine')
    plain = tmp_path / 'plain.parquet'
    images.to_parquet(plain)
    with pytest.raises(DFKDError, match='no soft labels'):
        load_soft_labels(plain)
