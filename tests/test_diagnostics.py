"""Diagnostics: any set of images, any network, every number checked against another way to
it, and pages that stand alone.
"""

import argparse
import copy
import dataclasses
import io
import json
import math
import warnings

import pytest
import torch
from PIL import Image
from tiny import DIGITS, used
from torch import nn

from dfkd_nb.lab.coverage import coverage_map, nearest_neighbours
from dfkd_nb.lab.diagnostics import class_histogram, difficulty, layer_distances, verify
from dfkd_nb.lab.observations import observe
from dfkd_nb.lab.reports import (
    add_arguments,
    inspect_images,
    inspect_run,
    json_numbers,
    run,
)
from dfkd_nb.lab.scores import frechet_distance, frechet_distance_squared, inception_score
from dfkd_nb.toolbox.core import import_torchvision
from dfkd_nb.toolbox.data import ImageSet, ImageSource
from dfkd_nb.toolbox.datasets import ImageFiles
from dfkd_nb.toolbox.domains import Domain, resize_images
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.evaluation import wilson_interval
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.networks import save_weights
from dfkd_nb.toolbox.teachers import Teacher


def network(channels=1, classes=10, norm=True, seed=0):
    "A small network whose BatchNorm layer has seen something."
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )
    return used(model, (channels, 8, 8), 30)


def pictures(count, domain=DIGITS, seed=0, labels=True):
    "Random bytes with labels in turn."
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        256, (count, *domain.shape), generator=generator, dtype=torch.uint8
    )
    return ImageSet(
        images, torch.arange(count) % domain.num_classes if labels else None, domain
    )


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


class Counting(ImageSource):
    "Says how many images were asked for at once."

    def __init__(self, images):
        super().__init__()
        self.inner = images
        self.labels = images.labels
        self.domain = images.domain
        self.most = 0

    def __len__(self):
        return len(self.inner)

    def fetch(self, indices):
        self.most = max(self.most, len(indices))
        return self.inner.fetch(indices)


# --- looking


def test_the_size_of_batches_changes_nothing_and_bounds_memory(teacher):
    source = Counting(pictures(23))
    a, b = observe(source, teacher, 7), observe(source.inner, teacher, 100)
    assert source.most == 7
    assert torch.allclose(a.logits, b.logits, atol=1e-5) and torch.allclose(
        a.embeddings, b.embeddings, atol=1e-5
    )
    assert a.embeddings.shape == (23, 6)


def test_images_in_files_are_measured_like_images_in_memory(teacher):
    images = pictures(6)

    def encode(x):
        buffer = io.BytesIO()
        Image.fromarray(x[0].numpy()).save(buffer, 'PNG')
        return buffer.getvalue()

    files = ImageFiles([encode(x) for x in images.images], images.labels, DIGITS)
    assert torch.equal(observe(files, teacher).logits, observe(images, teacher).logits)


def test_a_witness_may_have_its_own_size_channels_and_normalisation():
    other = Domain('other', (3, 12, 12), (0.2, 0.3, 0.4), (0.5, 0.6, 0.7), DIGITS.classes)
    verifier, images = Teacher(network(3), other, 'other'), pictures(5)
    seen = observe(images, verifier)
    wanted = verifier(other.normalize(resize_images(images.images, other)))
    assert torch.allclose(seen.logits, wanted, atol=1e-5)
    assert resize_images(images.images, other).shape == (5, 3, 12, 12)
    assert (
        0 <= resize_images(images.images, other).min()
        and resize_images(images.images, other).max() <= 1
    )


def test_what_was_seen_is_not_measured_twice(teacher):
    seen = observe(pictures(4), teacher)
    assert observe(seen, teacher) is seen
    assert observe(seen, Teacher(network(seed=1), DIGITS, 'b')) is not seen


# --- instruments


def test_accuracy_by_network_and_class_is_what_counting_gives(teacher):
    images, other = pictures(40), Teacher(network(seed=1), DIGITS, 'b')
    found = verify(images, {'a': teacher, 'b': other})
    right = other.predict(images.images).argmax(1) == images.labels
    assert found.accuracy['b'] == pytest.approx(right.float().mean().item())
    assert found.per_class['b'][3] == pytest.approx(
        right[images.labels == 3].float().mean().item()
    )
    low, high = found.numbers['b']['interval']
    assert 0 <= low <= found.accuracy['b'] <= high <= 1


def test_intervals_hold_the_fraction_and_shrink_with_the_number():
    for count in (1, 10, 1000):
        for right in {0, 1, count // 2, count}:
            low, high = wilson_interval(right, count)
            assert 0 <= low <= right / count + 1e-12 and right / count - 1e-12 <= high <= 1
    widths = [
        high - low for low, high in (wilson_interval(n // 2, n) for n in (10, 100, 1000))
    ]
    assert widths == sorted(widths, reverse=True)


def test_networks_of_another_task_have_no_say(teacher):
    with pytest.raises(DFKDError, match='7 classes'):
        verify(
            pictures(3),
            {
                'b': Teacher(
                    network(classes=7),
                    Domain('seven', (1, 8, 8), (0.5,), (0.5,), tuple('1234567')),
                )
            },
        )
    with pytest.raises(DFKDError, match='no labels'):
        verify(pictures(3, labels=False), {'a': teacher})


def certain(classes, scale=2000.0):
    "A network that names the brightest pixel, without any doubt."
    domain = Domain(
        'pixels', (1, 1, classes), (0.0,), (1.0,), tuple(map(str, range(classes)))
    )
    verifier = Teacher(
        nn.Sequential(nn.Flatten(), nn.Linear(classes, classes, bias=False)),
        domain,
        'certain',
    )
    verifier.model[1].weight.copy_(torch.eye(classes) * scale)
    return verifier


@pytest.mark.parametrize('classes', [2, 10, 1000])
def test_the_inception_score_of_certain_and_even_predictions_is_the_number_of_classes(
    classes,
):
    verifier = certain(classes)
    images = ImageSet(
        (torch.eye(classes) * 255).to(torch.uint8).view(classes, 1, 1, classes),
        None,
        verifier.domain,
    )
    assert inception_score(images, verifier).score == pytest.approx(classes, rel=1e-6)


def test_the_inception_score_is_bounded_and_says_so():
    verifier = certain(10)
    images = ImageSet(
        (torch.eye(10)[:4] * 255).to(torch.uint8).view(4, 1, 1, 10), None, verifier.domain
    )
    with pytest.warns(UserWarning, match='compare only sets of one size'):
        found = inception_score(images, verifier)
    assert (
        found.score == pytest.approx(4)
        and found.bound == 4
        and found.network == 'certain' in found.summary()
    )


def test_the_inception_score_leaves_the_global_generator_alone_and_repeats(teacher):
    images, state = pictures(30), torch.random.get_rng_state()
    a, b = (inception_score(images, teacher, splits=3) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert (a.score, a.std) == (b.score, b.std)
    assert 1 <= inception_score(images, teacher).score <= 10


@pytest.mark.parametrize('n, m, size', [(40, 50, 8), (10, 12, 30), (60, 9, 20)])
def test_the_distance_of_clouds_is_that_of_torchmetrics(n, m, size):
    import_torchvision()
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, size, generator=generator, dtype=torch.float64)
    y = 1.5 * torch.randn(m, size, generator=generator, dtype=torch.float64) + 0.3
    passing = nn.Identity()
    passing.num_features = size
    metric = FrechetInceptionDistance(passing)
    metric.update(x, real=True)
    metric.update(y, real=False)
    # its eigenvalues are the less exact ones
    assert sum(frechet_distance_squared(x, y)) == pytest.approx(
        metric.compute().item(), rel=1e-3
    )
    assert sum(frechet_distance_squared(x, y)) == pytest.approx(
        sum(frechet_distance_squared(y, x)), rel=1e-9
    )
    assert sum(frechet_distance_squared(x, x)) == pytest.approx(0, abs=1e-9)


def test_a_distance_comes_with_what_real_images_get(teacher):
    real = pictures(200)
    found = frechet_distance(real, pictures(50, seed=1), teacher)
    assert found.distance < 4 * found.floor  # both are noise of the same kind
    dark = ImageSet(real.images // 4, real.labels, DIGITS)
    assert frechet_distance(real, dark, teacher).distance > 10 * found.floor
    dreams, held_back = list(found.curve.values())[0]
    assert dreams > found.distance and held_back > found.floor  # fewer images are farther


def test_a_copy_is_its_own_neighbour(teacher):
    real = pictures(50)
    found = nearest_neighbours(real.subset(torch.tensor([7, 31])), real, teacher, k=2)
    assert found.indices[:, 0].tolist() == [7, 31]
    assert (
        found.distances[:, 0].abs().max() < 1e-6 and found.numbers['smallest_ratio'] < 1e-6
    )
    assert found.numbers['nearer_than_any_real'] == 1
    assert (found.real_distances > 0).all()  # nobody is compared with itself


def test_difficulty_keeps_its_digits_and_needs_no_labels():
    verifier = certain(3, scale=50)
    confident = ImageSet(
        torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 1, 1, 3), None, verifier.domain
    )
    found = difficulty(confident, verifier)
    assert found.values['dreams'].item() == pytest.approx(2 * math.exp(-50), rel=1e-5)
    assert found.numbers['groups']['dreams']['easy'] == 1


def test_a_student_like_its_teacher_differs_in_nothing(teacher):
    found = difficulty({'a': pictures(20)}, teacher, teacher)
    assert found.discrepancy['a'].abs().max() < 1e-9 and found.disagreement['a'] == 0
    other = Teacher(network(seed=3), DIGITS)
    p, q = (
        asked.predict(pictures(20).images).double().log_softmax(1)
        for asked in (teacher, other)
    )
    found = difficulty(pictures(20), teacher, other).discrepancy['dreams']
    assert (
        torch.allclose(found, (p.exp() * (p - q)).sum(1), atol=1e-5) and found.max() > 1e-3
    )


def test_histograms_count_every_image_once(teacher):
    found = class_histogram({'a': pictures(33), 'b': pictures(7)}, teacher).numbers[
        'groups'
    ]
    assert (found['a']['images'], found['b']['images']) == (33, 7)
    assert 1 <= found['a']['effective_classes'] <= 10
    assert (
        sum(difficulty(pictures(33), teacher).numbers['groups']['dreams']['histogram'])
        == 33
    )


def test_layers_do_not_depend_on_batches(teacher):
    a, b = (
        layer_distances(pictures(30), teacher, batch_size=n).distances['dreams']
        for n in (4, 30)
    )
    assert torch.allclose(a, b, rtol=1e-4) and len(a) == 1


def test_real_images_cover_themselves(teacher):
    real = observe(pictures(60), teacher)
    found = coverage_map(real, real, teacher)
    measures = found.measures['dreams']
    assert measures['precision'] == measures['recall'] == measures[
        'coverage'
    ] == 1 and measures['area'] == pytest.approx(1)
    assert 0 < found.explained <= 1 + 1e-9
    assert len(coverage_map(real, real, teacher, of_class=3).points['real']) == 6


# --- the page


def test_everything_is_measured_where_everything_is_given(teacher):
    report = inspect_images(
        pictures(20),
        teacher,
        pictures(60, seed=1),
        [Teacher(network(seed=1), DIGITS, 'b')],
        network(seed=2),
    )
    assert not report.missing and len(report.findings) == 8
    # the witness judges, not the one that dreamed
    assert report.findings['inception_score'].network == 'b'
    assert json.dumps(json_numbers(report.numbers), allow_nan=False)


def test_what_cannot_be_measured_is_listed_with_its_reason():
    silent = Teacher(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), DIGITS, 'silent')
    report = inspect_images(pictures(5, labels=False), silent, pictures(30))
    assert set(report.findings) == {'inception_score', 'classes', 'difficulty'}
    for name, word in {
        'verification': 'no labels',
        'coverage': 'linear',
        'layers': 'BatchNorm',
    }.items():
        assert word in report.missing[name]
    assert all(reason in repr(report) for reason in report.missing.values())


@pytest.mark.parametrize('count, real', [(1, 60), (2, 3), (3, 4)])
def test_hardly_any_images_make_a_page_all_the_same(teacher, count, real):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        report = inspect_images(pictures(count), teacher, pictures(real, seed=1))
    assert set(report.findings) | set(report.missing) == {
        'verification',
        'inception_score',
        'classes',
        'difficulty',
        'layers',
        'frechet',
        'coverage',
        'neighbours',
    }
    assert {'verification', 'classes', 'difficulty', 'layers'} <= set(report.findings)


def test_a_page_stands_alone(tmp_path, teacher):
    report = inspect_images(
        pictures(6, labels=False), teacher, title='<script>alert(1)</script>'
    )
    page = report.save(tmp_path / 'page').read_text()
    assert (
        '<script' not in page
        and 'http' not in page
        and page.count('data:image/png;base64') == len(report.findings)
    )
    assert (
        json.loads((tmp_path / 'page/report.json').read_text())['missing']['frechet']
        == 'it needs real images'
    )
    assert Image.open(tmp_path / 'page/report.png').width == 1200


def leave(root, task='dream', **settings):
    "What a run leaves."
    place = root / f'runs/{task}/quick'
    pictures(12).save(place / 'images.safetensors')
    torch.manual_seed(0)
    about = {'model': 'digits-net', 'domain': 'digits'}
    save_weights(
        root / 'runs/digits-teacher/full/weights.safetensors',
        build_model('digits-net', 10, 1),
        about,
    )
    save_weights(place / 'weights.safetensors', build_model('digits-net', 10, 1), about)
    settings = {'teacher': 'run:digits-teacher/full', 'test_data': 'digits'} | settings
    (place / 'result.json').write_text(
        json.dumps({'recipe': task, 'scale': 'quick', 'task': task, 'settings': settings})
    )
    return place


def test_a_run_is_inspected_with_its_own_teacher_data_and_student(tmp_path):
    report = inspect_run(leave(tmp_path, 'transfer'), limit=40)
    assert not report.missing and len(report.images) == 12
    assert 'disagreement' in report.findings['difficulty'].numbers['groups']['dreams']
    assert report.numbers['about']['settings']['test_data'] == 'digits'
    place = leave(tmp_path, 'dream', verifiers='run:digits-teacher/full, run:transfer')
    assert list(inspect_run(place, real='').findings['verification'].accuracy) == [
        'run:digits-teacher/full',
        'run:transfer',
    ]


def test_missing_real_images_are_no_reason_to_stop(tmp_path):
    report = inspect_run(leave(tmp_path, test_data='no-such-data'))
    assert 'no-such-data' in report.missing['real images'] and 'coverage' in report.missing


def test_a_folder_of_pictures_by_class_number_is_read(tmp_path, teacher):
    for i, label in enumerate((0, 7, 7)):
        (tmp_path / f'{label:04}').mkdir(exist_ok=True)
        Image.fromarray(pictures(3).images[i, 0].numpy()).save(
            tmp_path / f'{label:04}/{i:05}.png'
        )
    (tmp_path / 'manifest.json').write_text('{}')
    report = inspect_run(tmp_path, real='', teacher=teacher)
    assert report.images.labels.tolist() == [0, 7, 7]
    (tmp_path / 'manifest.json').write_text(
        '{"model": "cifar10-resnet20", "checkpoint": ""}'
    )
    assert inspect_run(tmp_path, real='').images.network.name == 'cifar10-resnet20'


def test_one_file_of_pictures_is_read(tmp_path, teacher):
    pq, pa = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
    buffer = io.BytesIO()
    Image.fromarray(pictures(1).images[0, 0].numpy()).save(buffer, 'PNG')
    table = pa.table(
        {'image': [{'bytes': buffer.getvalue(), 'path': 'a.png'}] * 3, 'label': [1, 2, 3]}
    )
    pq.write_table(table, tmp_path / 'images.parquet')
    found = inspect_run(tmp_path, real=str(tmp_path / 'images.parquet'), teacher=teacher)
    assert found.images.labels.tolist() == [1, 2, 3]


def test_folders_that_do_not_help_say_what_to_do(tmp_path, teacher):
    with pytest.raises(DFKDError, match='name the teacher'):
        inspect_run(tmp_path)
    with pytest.raises(DFKDError, match='no images at'):
        inspect_run(tmp_path / 'nothing', teacher=teacher)
    (place := leave(tmp_path)).joinpath('result.json').write_text('{"recipe":')
    with pytest.raises(DFKDError, match='run it again'):
        inspect_run(place)


def test_the_command_leaves_a_page(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    place = leave(tmp_path)
    assert (
        run(
            parser.parse_args(
                [str(place), '--real', '', '--verifier', 'run:digits-teacher/full']
            )
        )
        == 0
    )
    assert 'saved in' in capsys.readouterr().out
    assert sorted(p.name for p in (place / 'inspection').iterdir()) == [
        'report.html',
        'report.json',
        'report.png',
    ]
    with pytest.raises(DFKDError, match='4 real images'):
        run(parser.parse_args([str(place), '--limit', '1']))


# --- classes are matched by name

ORDER = torch.tensor([3, 4, 5, 6, 7, 8, 9, 0, 1, 2])


def named(order=None):
    "A domain whose classes have names, perhaps in another order."
    names = tuple('ant bee cat dog elk fox gnu hen ibex jay'.split())
    return dataclasses.replace(
        DIGITS,
        name='animals',
        classes=names if order is None else tuple(names[i] for i in order),
    )


def reordered(model, order):
    "The same network with its outputs in another order."
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[-1].weight.copy_(model[-1].weight[order])
        other[-1].bias.copy_(model[-1].bias[order])
    return other


def test_a_verifier_with_the_classes_in_another_order_finds_the_same():
    model, images = network(), pictures(40, named())
    usual = Teacher(model, named(), 'usual')
    other = Teacher(reordered(model, ORDER), named(ORDER), 'other')
    found = verify(images, {'usual': usual, 'other': other})
    assert (
        torch.equal(found.correct['usual'], found.correct['other'])
        and found.accuracy['usual'] > 0
    )
    same = difficulty(images, usual, other)
    assert (
        same.disagreement['dreams'] == 0 and float(same.discrepancy['dreams'].max()) < 1e-6
    )
    assert (
        difficulty(images, usual, Teacher(model, named(ORDER), 'wrong')).disagreement[
            'dreams'
        ]
        > 0.5
    )


def test_labels_of_two_sets_are_matched_by_name():
    model = Teacher(network(), named(), 'usual')
    real, dreams = pictures(60, named(), seed=1), pictures(40, named())
    # the same classes as another domain numbers them
    numbers = torch.argsort(ORDER)[real.labels]
    other = ImageSet(real.images, numbers, named(ORDER))
    assert not torch.equal(other.labels, real.labels)
    usual, mapped = (nearest_neighbours(dreams, some, model) for some in (real, other))
    assert usual.same_class == mapped.same_class
    maps = [coverage_map(some, dreams, model, of_class=3) for some in (real, other)]
    assert maps[0].numbers == maps[1].numbers and len(maps[0].points['real']) == 6


def test_classes_that_cannot_be_matched_are_refused():
    images = pictures(20, named())
    odd = dataclasses.replace(
        named(ORDER), name='odd', classes=('yak', *named(ORDER).classes[1:])
    )
    with pytest.raises(DFKDError, match="'odd' has no class 'dog'"):
        verify(images, {'odd': Teacher(network(), odd, 'odd')})
    # no name in common: one order is taken for granted
    held_out = dataclasses.replace(DIGITS, name='numbers')
    assert verify(
        images, {'numbers': Teacher(network(), held_out, 'numbers')}
    ).labels.equal(images.labels)


def test_one_class_is_enough_for_every_instrument():
    one = dataclasses.replace(DIGITS, name='one', classes=('cat',))
    teacher = Teacher(network(classes=1), one, 'one')
    dreams = pictures(12, one)
    real = pictures(20, one, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        report = inspect_images(
            dreams,
            teacher,
            real,
            student=Teacher(network(classes=1, seed=1), one, 'student'),
        )
    assert not report.missing and len(report.findings) == 8
    assert report.findings['inception_score'].score == pytest.approx(1) and report.findings[
        'verification'
    ].accuracy == {'one': 1.0}
    assert all(found.figure() for found in report.findings.values())
