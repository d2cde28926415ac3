"""What people do with the parts that nobody meant.

Other precisions, hooks, foreign states, odd settings: it works, or one line says what to
do. Never a traceback of somebody else's, never a number that is wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DIGITS, network, stirred
from torch import Tensor, nn

from dfkd_nb.applications import continual, segmentation
from dfkd_nb.applications.class_growth import extend_classifier
from dfkd_nb.applications.class_sets import renumber_labels
from dfkd_nb.applications.continual_metrics import task_accuracies
from dfkd_nb.applications.filters import find_filters, remove_filters
from dfkd_nb.applications.importance import filter_importance
from dfkd_nb.applications.segmentation_data import SegmentationSet, draw_scenes
from dfkd_nb.applications.transfer import fidelity
from dfkd_nb.dreams.extractor import fuse_statistics
from dfkd_nb.dreams.metadata import Metadata
from dfkd_nb.dreams.statistics import Statistics, Watch
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import GrowingPool
from dfkd_nb.generators.contrastive import ContrastiveSynthesizer
from dfkd_nb.generators.meta import MetaSynthesizer
from dfkd_nb.generators.synthesizer import GeneratorSynthesizer
from dfkd_nb.lab.commands import main
from dfkd_nb.lab.observations import observe
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.checkpoints import fit_checkpoint, read_checkpoint
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError, DFKDWarning
from dfkd_nb.toolbox.evaluation import evaluate, predict_logits
from dfkd_nb.toolbox.folding import fold_batchnorm
from dfkd_nb.toolbox.teachers import Teacher

QUICK: dict[str, Any] = {
    'steps': 3,
    'batch_size': 8,
    'learning_rate': 0.02,
    'device': 'cpu',
}


def pictures(count: int = 40, domain: Domain = DIGITS, seed: int = 0) -> ImageSet:
    "Random bytes, of every class as many."
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *domain.shape), generator=rng).to(torch.uint8)
    return ImageSet(pixels, torch.arange(count) % domain.num_classes, domain)


def one_line(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(DFKDError) as caught:
        call()
    text = str(caught.value)
    assert '\n' not in text and all(word in text for word in words), text


@pytest.fixture(scope='module')
def teacher() -> Teacher:
    return Teacher(network(0), DIGITS)


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


class Segmenter(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1)
        )


def narrow() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10)
    )


def learned(
    who: Teacher, student: nn.Module, source: Any, **settings: Any
) -> tuple[float, Tensor]:
    "The last loss, and all that the student has become."
    done = Distiller(who, student, source, **QUICK | settings).run(log_every=1)
    return done.history[-1]['loss'], torch.cat(
        [v.flatten().float() for v in done.student.state_dict().values()]
    )


@pytest.mark.parametrize('labels', [0.0, 0.5])
@pytest.mark.parametrize('who', ['student', 'teacher', 'images', 'all'])
def test_networks_and_images_of_double_precision_learn_alike(
    teacher: Teacher, who: str, labels: float
) -> None:
    def source(n: int, rng: torch.Generator) -> Tensor:
        pixels = torch.rand(n, 1, 8, 8, generator=rng)
        return pixels.double() if who in ('images', 'all') else pixels

    given: Any = pictures() if labels else source
    student, tutor = network(5), teacher
    usual = learned(tutor, network(5), given, label_weight=labels)
    if who in ('student', 'all'):
        student = double(student)
    if who in ('teacher', 'all'):
        tutor = copy.deepcopy(teacher).double()
    found = learned(tutor, student, given, label_weight=labels)
    assert found[0] == pytest.approx(usual[0], rel=1e-4)
    torch.testing.assert_close(found[1], usual[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_a_student_of_half_precision_learns_and_is_evaluated(
    teacher: Teacher, kind: torch.dtype
) -> None:
    loss, _ = learned(teacher, network(5).to(kind), pictures(), label_weight=0.5)
    assert loss == pytest.approx(
        learned(teacher, network(5), pictures(), label_weight=0.5)[0], rel=0.02
    )
    model, data = network(5), pictures()
    assert abs(evaluate(model, data) - evaluate(model.to(kind), data)) <= 0.1


def test_mixed_precision_begins_from_single_precision(teacher: Teacher) -> None:
    one_line(
        lambda: learned(teacher, double(network(5)), pictures(), precision='bfloat16'),
        'float64',
        'student.float()',
    )


def test_all_that_ask_a_network_ask_it_in_its_own_precision(teacher: Teacher) -> None:
    data, new = pictures(), dataclasses.replace(DIGITS, name='new', classes=('a', 'b'))
    model = network(5)
    assert evaluate(double(model), data) == evaluate(model, data)
    torch.testing.assert_close(
        predict_logits(double(model), data, DIGITS).float(),
        predict_logits(model, data, DIGITS),
    )
    assert (
        fidelity(teacher, double(model), data)['agreement']
        == fidelity(teacher, model, data)['agreement']
    )
    assert task_accuracies(double(model), DIGITS, {'old': data}) == task_accuracies(
        model, DIGITS, {'old': data}
    )
    long = copy.deepcopy(teacher).double()
    torch.testing.assert_close(observe(data, long).logits, observe(data, teacher).logits)
    for who in (teacher, long):
        learner = continual.add_classes(
            who, pictures(20, new), old=data, row_init='fitted', **QUICK
        )
        assert learner.run().done == 3
    wide = stirred(
        nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.Flatten(),
            nn.Linear(96, 10),
        )
    )
    filters = find_filters(wide, DIGITS)
    usual = filter_importance(wide, filters, data, 'kl', teacher)
    for name, value in filter_importance(
        double(wide), filters, data, 'kl', teacher
    ).items():
        torch.testing.assert_close(value, usual[name], rtol=1e-3, atol=1e-6)
    scenes = draw_scenes(6, (16, 16))
    assert segmentation.mean_iou(double(Segmenter()), scenes) == pytest.approx(
        segmentation.mean_iou(Segmenter(), scenes), abs=1e-3
    )
    generates = Teacher(Segmenter(), scenes.domain)
    for label_weight in (0.0, 1.0):
        distiller = segmentation.SegmentationDistiller(
            generates, double(Segmenter()), scenes, label_weight=label_weight, **QUICK
        )
        assert distiller.run().done == 3


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def doubled(norm: nn.Module) -> None:
    plain = norm.forward
    norm.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    'after': lambda norm: norm.register_forward_hook(lambda _, given, out: 3 * out),
    'before': lambda norm: norm.register_forward_pre_hook(
        lambda _, given: (3 * given[0] + 1,)
    ),
    'gradient': lambda norm: norm.register_full_backward_hook(
        lambda _, given, out: (3 * given[0],)
    ),
    'own forward': doubled,
    'before, a subclass': lambda norm: (
        norm.register_forward_pre_hook(lambda _, given: (3 * given[0] + 1,)),
        norm.__setattr__('__class__', type('Other', (nn.BatchNorm2d,), {})),
    ),
}


@pytest.mark.parametrize('kind', CHANGES)
def test_the_fused_path_keeps_what_was_put_on_a_batchnorm(kind: str) -> None:
    model = stirred(Normed()).eval()
    CHANGES[kind](model.norm)
    who = Teacher(model, DIGITS)
    for network_ in (fuse_statistics(who), copy.deepcopy(fuse_statistics(who))):
        x, again = (
            torch.randn(
                6, 1, 8, 8, generator=torch.Generator().manual_seed(0)
            ).requires_grad_()
            for _ in range(2)
        )
        with Watch(who) as watch:
            plain = who(x)
        fused, moments = network_(again)
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
        for name, pair in watch.moments.items():
            for mine, theirs in zip(moments[name], pair, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        for logits in (plain, fused):
            logits.square().sum().backward()
        torch.testing.assert_close(again.grad, x.grad, rtol=1e-4, atol=1e-5)


class Twice(Normed):
    "One convolution, two BatchNorm layers after it."

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.middle(self.conv(x)))
        return self.fc(self.second(self.middle(x)).mean((2, 3)))


def test_batchnorm_is_folded_only_where_the_logits_stay() -> None:
    hooked, plain = (stirred(Normed()).eval() for _ in range(2))
    hooked.norm.register_forward_hook(lambda _, given, out: 3 * out)
    for model in (hooked, stirred(Twice()).eval()):
        one_line(
            lambda model=model: fold_batchnorm(Teacher(model, DIGITS)),
            'cannot be folded',
            'as it is',
        )
    assert fold_batchnorm(Teacher(plain, DIGITS)).predict(pictures().images).shape == (
        40,
        10,
    )


MANY = dataclasses.replace(DIGITS, name='many', classes=tuple(f'c{i}' for i in range(20)))
SHUFFLED = dataclasses.replace(DIGITS, name='shuffled', classes=tuple('1023456789'))


def test_labels_are_numbers_of_the_networks_own_classes(teacher: Teacher) -> None:
    filters = find_filters(wide := narrow(), DIGITS)
    beyond, shuffled = pictures(40, MANY), pictures(200, SHUFFLED)
    one_line(lambda: evaluate(teacher, beyond), 'label 19', '10 classes')
    one_line(lambda: evaluate(network(5), beyond, domain=DIGITS), 'label 19', '10 classes')
    one_line(
        lambda: filter_importance(wide, filters, beyond, 'cross-entropy'),
        'label 19',
        '10 classes',
    )
    one_line(
        lambda: filter_importance(wide, filters, beyond.batches(100), 'cross-entropy'),
        'labels from 0 to 19',
    )
    one_line(lambda: filter_importance(wide, filters, shuffled, 'cross-entropy'), 'relabel')
    one_line(
        lambda: Metadata.measure(teacher, shuffled, clusters=1, components=2),
        "'1' is class 0",
        'relabel',
    )
    scenes = draw_scenes(4, (16, 16))
    more = dataclasses.replace(scenes.domain, name='more', classes=tuple('abcdefghij'))
    foreign = SegmentationSet(scenes.images, scenes.masks + 4, more)
    one_line(
        lambda: segmentation.mean_iou(Segmenter(), foreign, domain=scenes.domain),
        'label 9',
        '6 classes',
    )
    losses = continual.continual_loss('oracle-classify')
    student, domain = extend_classifier(teacher, ['new'])
    new = renumber_labels(
        pictures(20, dataclasses.replace(DIGITS, name='n', classes=('new',))), domain
    )
    one_line(
        lambda: continual.ContinualDistiller(
            teacher, student, new, beyond, domain=domain, losses=losses, **QUICK
        ),
        'label 19',
    )


def test_a_domain_of_lists_is_the_domain_of_tuples() -> None:
    for whole in (list, torch.tensor):
        mean, std = (
            whole(v) if whole is list else whole(v, dtype=torch.float64)
            for v in (DIGITS.mean, DIGITS.std)
        )
        assert Domain('digits', [1, 8, 8], mean, std, list('0123456789')) == DIGITS  # type: ignore[arg-type]
    good: dict[str, Any] = {
        'name': 'own',
        'shape': (1, 8, 8),
        'mean': (0.3,),
        'std': (0.3,),
        'classes': ('a', 'b'),
    }
    wrong: dict[str, Any] = {
        'std': (float('nan'),),
        'mean': 0.3,
        'shape': (8,),
        'classes': 'ab',
    }
    for key, value in (*wrong.items(), ('std', (float('inf'),)), ('mean', ('x',))):
        one_line(lambda key=key, value=value: Domain(**good | {key: value}), "domain 'own'")


@pytest.mark.parametrize(
    'what',
    [
        lambda x: (x, None),
        lambda x: x.numpy(),
        lambda x: None,
        lambda x: x[:0],
        lambda x: x.to('meta'),
    ],
)
def test_a_function_of_images_returns_images(
    teacher: Teacher, what: Callable[[Tensor], Any]
) -> None:
    one_line(
        lambda: learned(
            teacher, network(5), lambda n, rng: what(torch.rand(n, 1, 8, 8, generator=rng))
        ),
        'returned a',
        '(N, C, H, W)',
    )


def test_settings_that_cannot_be_meant(teacher: Teacher) -> None:
    nan = float('nan')
    for name, value in [
        ('temperature', nan),
        ('learning_rate', nan),
        ('label_weight', nan),
        ('mixup_alpha', nan),
        ('momentum', -1.0),  # fmt: skip
        ('momentum', 1.0),
        ('weight_decay', -1.0),
        ('label_smoothing', 2.0),
        ('warmup', nan),
    ]:
        one_line(
            lambda name=name, value=value: learned(
                teacher, network(5), pictures(), **{name: value}
            ),
            name,
            'give',
        )
    one_line(
        lambda: Distiller(teacher, network(5), pictures(), **QUICK).run(log_every=0),
        'every is 0',
    )
    one_line(lambda: evaluate(network(5), pictures(), batch_size=0), 'batches of 0')
    one_line(lambda: list(pictures().batches(0)), 'batches of 0')
    scenes = draw_scenes(4, (16, 16))
    one_line(
        lambda: segmentation.mean_iou(Segmenter(), scenes, batch_size=0), 'batches of 0'
    )
    flat = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 10)
    )
    one_line(
        lambda: learned(teacher, flat, pictures(), batch_size=1),
        'too small for BatchNorm',
        'batch_size',
    )
    filters = find_filters(wide := narrow(), DIGITS)
    for kept in (torch.ones(5, dtype=torch.bool), torch.ones(4, dtype=torch.long)):
        one_line(lambda kept=kept: remove_filters(wide, filters, {'0': kept}), '4 booleans')


class LinearGenerator(nn.Module):
    def __init__(self, latent_shape: Any = (8,), pair: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.latent_shape, self.pair, self.linear = latent_shape, pair, nn.Linear(8, 64)

    def forward(self, z: Tensor) -> Any:
        images = self.linear(z).view(-1, 1, 8, 8).sigmoid()
        return (images, z) if self.pair else images


@pytest.mark.parametrize(
    'kind', [GeneratorSynthesizer, MetaSynthesizer, ContrastiveSynthesizer]
)
def test_a_generator_of_any_precision_generates(
    teacher: Teacher, kind: type[GeneratorSynthesizer]
) -> None:
    def made(generator: nn.Module) -> Tensor:
        return (
            kind(teacher, generator=generator, class_weight=1.0, batch_size=4, device='cpu')
            .synthesize(8)
            .images
        )

    usual, given = made(LinearGenerator()), LinearGenerator().double()
    # float64 from float32: the same weights
    assert made(given).equal(usual) and given.linear.weight.dtype == torch.float64
    for precision in (torch.float16, torch.bfloat16):
        assert made(LinearGenerator().to(precision)).shape == usual.shape
    one_line(lambda: made(LinearGenerator(8)), 'latent_shape 8', '(8,)')
    one_line(lambda: made(LinearGenerator(pair=True)), 'returns a tuple')


CHANGED: dict[str, Any] = {
    'steps': 9,
    'batch_size': 4,
    'learning_rate': 0.1,
    'weight_decay': 0.0,
    'momentum': 0.5,
    'temperature': 2.0,
    'schedule': 'constant',
    'warmup': 0.5,
    'mixup_alpha': 0.3,
    'label_weight': 0.7,
    'label_smoothing': 0.1,
    'augment': Augment(1),
    'domain': dataclasses.replace(DIGITS, mean=(0.0,)),
}


def untouched(learner: Any, state: Any, *words: str) -> None:
    "The state is refused, and what it would have changed is as before."
    before = copy.deepcopy(learner.state_dict())
    one_line(lambda: learner.load_state_dict(state), *words)
    after = learner.state_dict()
    for part in ('student', 'weights'):
        assert all(v.equal(after[part][k]) for k, v in before.get(part, {}).items())


@pytest.mark.parametrize('name', CHANGED)
def test_a_student_goes_on_with_the_same_settings_only(teacher: Teacher, name: str) -> None:
    settings: dict[str, Any] = QUICK | {'label_weight': 0.5}
    saved = Distiller(teacher, network(5), pictures(), **settings).run(until=2).state_dict()
    word = 'mean' if name == 'domain' else name
    untouched(
        Distiller(teacher, network(6), pictures(), **settings | {name: CHANGED[name]}),
        saved,
        'other settings',
        f'{word} (was ',
    )


def test_a_state_of_something_else_is_refused_before_anything_changes(
    teacher: Teacher,
) -> None:
    def learner(student: nn.Module | None = None, source: Any = None) -> Distiller:
        return Distiller(
            teacher,
            student or network(6),
            pictures() if source is None else source,
            **QUICK,
        )

    def grown() -> GrowingPool:
        pool = GrowingPool(DIGITS)
        pool.add(pictures().images, pictures().labels)  # type: ignore[arg-type]
        return pool

    def make_synthesizer(kind: type[GeneratorSynthesizer]) -> GeneratorSynthesizer:
        return kind(
            teacher,
            generator=LinearGenerator(),
            class_weight=1.0,
            batch_size=4,
            device='cpu',
            init='scratch',
        )

    half = learner(network(5)).run(until=2).state_dict()
    untouched(learner(), {}, 'not saved by a Distiller')
    untouched(
        learner(),
        make_synthesizer(GeneratorSynthesizer).state_dict(),
        'not saved by a Distiller',
    )
    untouched(
        learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), half, 'another student'
    )
    untouched(learner(source=pictures(10)), half, '40 images, there are 10')
    untouched(learner(source=pictures(100)), half, '40 images, there are 100')
    untouched(learner(source=grown()), half, 'GrowingPool')
    drawn = (
        learner(source=lambda n, rng: torch.rand(n, 1, 8, 8, generator=rng))
        .run(until=2)
        .state_dict()
    )
    untouched(learner(), drawn, 'ImageSet')
    for kind in (GeneratorSynthesizer, MetaSynthesizer, ContrastiveSynthesizer):
        untouched(make_synthesizer(kind), half, 'not saved by')
        untouched(make_synthesizer(kind), {}, 'not saved by')
    untouched(
        make_synthesizer(ContrastiveSynthesizer),
        make_synthesizer(GeneratorSynthesizer).state_dict(),
        'ContrastiveSynthesizer',
    )


def test_weights_of_a_compiled_network_are_its_weights(tmp_path: Path) -> None:
    weights = network(0).state_dict()
    for before in ('_orig_mod.', 'module.', 'module._orig_mod.', '_orig_mod.module.'):
        torch.save({f'{before}{k}': v for k, v in weights.items()}, tmp_path / 'weights.pt')
        read = network(1)
        fit_checkpoint(read, read_checkpoint(tmp_path / 'weights.pt'))
        assert all(v.equal(weights[k]) for k, v in read.state_dict().items())


def test_statistics_know_what_a_teachers_images_look_like(teacher: Teacher) -> None:
    data = pictures()
    normalised, whole = DIGITS.normalize(data.images), data.images.float()
    usual = Statistics.measure(teacher, data)
    one_line(lambda: Statistics.measure(teacher, whole), '0 to 255', 'domain.normalize')
    with pytest.warns(DFKDWarning, match='not normalised') as said:
        Statistics.measure(teacher, whole / 255)
    assert len(said) == 1
    raw = dataclasses.replace(DIGITS, name='raw', mean=(0.0,), std=(1 / 255,))
    unit = dataclasses.replace(DIGITS, name='unit', mean=(0.0,), std=(1.0,))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for mine, theirs in zip(
            Statistics.measure(teacher, normalised).values(), usual.values(), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        Statistics.measure(Teacher(network(0), raw), whole)
        Statistics.measure(Teacher(network(0), unit), whole / 255)
        Statistics.measure(teacher, torch.zeros(4, 1, 8, 8))


@pytest.mark.parametrize(
    'words',
    [
        ['--nope'],
        ['--steps', '0'],
        ['--threads', '-1'],
        ['--batch', '0'],
        ['--what', 'nothing'],
    ],
)
def test_the_benchmark_says_in_one_line_what_it_does_not_take(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['bench', *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith('dfkd: error: ') and said.count('\n') == 1
