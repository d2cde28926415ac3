"""Networks, teachers and distillation.

Counts from the papers, foreign networks, exact resumption, errors worth reading.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dfkd_nb.foundations.distillation import (
    Distiller,
    distill,
    distillation_loss,
    soften,
    train,
)
from dfkd_nb.foundations.optimization import learning_rate_at
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.core import (
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
    seed_everything,
)
from dfkd_nb.toolbox.data import EpochSampler, ImageSet
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.evaluation import evaluate
from dfkd_nb.toolbox.models import (
    MODELS,
    CifarBlock,
    CifarResNet,
    WideBlock,
    WideResNet,
    build_model,
    count_parameters,
)
from dfkd_nb.toolbox.networks import in_eval_mode, load_weights, save_weights
from dfkd_nb.toolbox.sources import as_source
from dfkd_nb.toolbox.teachers import (
    Teacher,
    copy_blocks_from_teacher,
    load_teacher,
    shipped_weights,
)

TOY = Domain('toy', (1, 8, 8), (0.5,), (0.5,), ('a', 'b', 'c'))


def images(
    count: int = 24, domain: Domain = TOY, seed: int = 0, labels: bool = True
) -> ImageSet:
    "Random bytes with labels that can be learned: which third of the picture is brightest."
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(
        0, 256, (count, *domain.shape), generator=generator, dtype=torch.uint8
    )
    known = torch.randint(0, domain.num_classes, (count,), generator=generator)
    return ImageSet(pixels, known if labels else None, domain)


def tiny(seed: int = 0, classes: int = 3, channels: int = 1) -> nn.Module:
    "A network of a few dozen weights, with BatchNorm and dropout."
    seed_everything(seed)
    layers = [
        nn.Conv2d(channels, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(36, classes),
    ]
    return nn.Sequential(*layers)


def same(one: nn.Module, other: nn.Module) -> bool:
    "Equal to the bit, buffers included."
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_line(call: Callable[[], Any], *words: str) -> None:
    "`call` raises a DFKDError of one line that holds all words."
    with pytest.raises(DFKDError) as caught:
        call()
    message = str(caught.value)
    assert '\n' not in message and ':' in message, message
    for word in words:
        assert word in message, message


# --- networks -----------------------------------------------------------------------------

# He et al. (2016), table 6, rounded; the others as the data-free papers' code builds them
# for ten classes
COUNTS = {
    'wrn16-1': (175_066, 13),
    'wrn16-2': (691_674, 13),
    'wrn40-1': (563_930, 37),
    'wrn40-2': (2_243_546, 37),
    'resnet18': (11_173_962, 20),
    'resnet34': (21_282_122, 36),
    'vgg11': (9_231_114, 8),
}
ROUNDED = {'resnet20': 0.27, 'resnet32': 0.46, 'resnet44': 0.66, 'resnet56': 0.85}


@each('name', COUNTS)
def test_parameters_and_batchnorm_layers_are_the_papers(name: str) -> None:
    with torch.device('meta'):
        model = build_model(name)
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (count_parameters(model), layers) == COUNTS[name]


@each('name', ROUNDED)
def test_cifar_resnets_have_the_published_size(name: str) -> None:
    with torch.device('meta'):
        model = build_model(name)
    depth = int(name.removeprefix('resnet'))
    assert round(count_parameters(model) / 1e6, 2) == ROUNDED[name]
    weighted = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    assert weighted == depth, 'every layer with weights counts, and shortcuts have none'


@pytest.mark.parametrize('channels', [1, 3])
@each('name', MODELS)
def test_every_network_takes_grey_and_colour(name: str, channels: int) -> None:
    with torch.device('meta'):
        model = build_model(name, 7, channels).eval()
    assert model(torch.zeros(2, channels, 32, 32, device='meta')).shape == (2, 7)


def test_cifar_stem_keeps_every_place() -> None:
    with torch.device('meta'):
        model = build_model('resnet18').eval()
    seen = []
    model.layer1.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape)
    )
    model(torch.zeros(1, 3, 32, 32, device='meta'))
    assert seen == [(1, 64, 32, 32)]


def test_weights_are_repeated_by_the_seed() -> None:
    models = []
    for seed in (0, 0, 1):
        seed_everything(seed)
        models.append(build_model('wrn16-1'))
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_torchvision_zoo_and_deeplab() -> None:
    with torch.device('meta'):
        assert count_parameters(build_model('torchvision:resnet18', 1000)) == 11_689_512
        net = build_model('torchvision:deeplabv3_resnet50', 21).eval()
        assert net(torch.zeros(1, 3, 64, 64, device='meta'))['out'].shape == (1, 21, 64, 64)


@each(
    'call, words',
    [
        (lambda: build_model('resnet19'), ('resnet19', 'resnet20')),
        (lambda: build_model('torchvision:resnet19'), ('resnet19', 'resnet18')),
        (lambda: build_model('torchvision:fasterrcnn_resnet50_fpn'), ('classifier',)),
        (lambda: build_model('torchvision:resnet18', 10, 1), ('3 channels',)),
        (lambda: build_model('resnet20', 0), ('0 classes',)),
        (lambda: build_model('resnet20', pretrained=True), ('resnet20', 'load_teacher')),
        (lambda: CifarResNet(21, 10), ('21', '6n + 2')),
        (lambda: WideResNet(16, 0, 10), ('width 0',)),
        (lambda: load_teacher('cifar10-resnet21'), ('cifar10-resnet21', 'dfkd')),
    ],
)
def test_wrong_names_and_sizes(call: Callable[[], Any], words: tuple[str, ...]) -> None:
    one_line(call, *words)


# --- weights ------------------------------------------------------------------------------


@pytest.mark.parametrize('half', [True, False])
def test_weights_return(tmp_path: Path, half: bool) -> None:
    path, model = tmp_path / 'w.safetensors', tiny(0)
    save_weights(path, model, {'accuracy': '0.5'}, half)
    other = tiny(1)
    assert load_weights(path, other) == {'accuracy': '0.5'}
    for key, value in model.state_dict().items():
        expected = (
            value.half().to(value.dtype) if half and value.is_floating_point() else value
        )
        assert torch.equal(other.state_dict()[key], expected)


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / 'w.safetensors'
    save_weights(path, tiny(0, classes=4))
    model, before = tiny(1), tiny(1)
    one_line(lambda: load_weights(path, model), 'does not fit', '5.weight')
    assert same(model, before)


def test_weights_without_counters_are_welcome(tmp_path: Path) -> None:
    path = tmp_path / 'w.safetensors'
    save_tensors(
        path, {k: v for k, v in tiny(0).state_dict().items() if 'num_batches' not in k}
    )
    model = tiny(1)
    load_weights(path, model)
    assert torch.equal(model[0].weight, tiny(0)[0].weight)


def test_weights_too_large_or_damaged(tmp_path: Path) -> None:
    path, model = tmp_path / 'w.safetensors', tiny()
    model[0].weight.data[0] = 1e6
    one_line(lambda: save_weights(path, model), '0.weight', 'half=False')
    save_weights(path, model, half=False)
    path.write_bytes(path.read_bytes()[:100])
    one_line(lambda: load_weights(path, tiny()), 'truncated')
    one_line(lambda: load_weights(tmp_path / 'none.safetensors', tiny()), 'no file')


@pytest.mark.parametrize('name', shipped_weights())
def test_shipped_teacher_opens(name: str) -> None:
    teacher = load_teacher(name)
    logits = teacher.predict(torch.zeros(2, *teacher.domain.shape, dtype=torch.uint8))
    assert logits.shape == (2, teacher.domain.num_classes) and logits.dtype == torch.float32


# --- teachers -----------------------------------------------------------------------------


class Foreign(nn.Module):
    "A network of somebody else's, which answers in its own way."

    def __init__(self, answer: Callable[[Tensor], Any], classes: int = 3) -> None:
        super().__init__()
        self.head, self.answer = nn.Linear(64, classes), answer

    def forward(self, pixel_values: Tensor) -> Any:
        assert pixel_values.shape[-1] == 8, (
            f"Input height ({pixel_values.shape[-1]}) doesn't match model (8)"
        )
        return self.answer(self.head(pixel_values.flatten(1)))


class Tokens(nn.Module):
    "A transformer without a convolution or a BatchNorm."

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x[:, 0]).mean(1))


@each(
    'model',
    [
        Foreign(lambda logits: logits),
        Foreign(lambda logits: {'logits': logits}),
        Foreign(lambda logits: {'out': logits, 'aux': None}),
        Foreign(lambda logits: (logits, None)),
        Foreign(lambda logits: SimpleNamespace(logits=logits)),
        nn.Conv2d(1, 3, 1),
        Tokens(),
        torch.jit.trace(tiny().eval(), torch.zeros(2, 1, 8, 8)),
        tiny().bfloat16(),
        tiny().double(),
    ],
    ids=[
        'tensor',
        'logits',
        'out',
        'tuple',
        'attribute',
        'segmenter',
        'transformer',
        'traced',
        'bfloat16',
        'float64',
    ],
)
def test_any_network_can_teach(model: nn.Module) -> None:
    teacher = Teacher(model, TOY)
    logits = teacher.predict(images().images, batch_size=7)
    assert logits.shape[:2] == (24, 3) and not logits.requires_grad
    x = TOY.normalize(images().images).requires_grad_()
    teacher(x).square().mean().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_the_original_is_left_alone() -> None:
    model = tiny()
    model[1].eval()
    modes, before = [m.training for m in model.modules()], deepcopy(model.state_dict())
    teacher = Teacher(model, TOY).train()
    teacher.predict(images().images)
    assert [m.training for m in model.modules()] == modes and all(
        p.requires_grad for p in model.parameters()
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m.training for m in teacher.modules())
    assert teacher.model is not model
    assert same(Teacher(teacher, TOY).model, model)


def test_predict_equals_forward_of_normalised_images() -> None:
    teacher, data = Teacher(tiny(), TOY), images()
    assert torch.allclose(
        teacher.predict(data.images, 5), teacher(TOY.normalize(data.images)), atol=1e-6
    )
    assert torch.allclose(
        teacher.predict(data.images), teacher.predict(data.images / 255), atol=1e-5
    )


def broken() -> nn.Module:
    "A network with one weight that is not a number."
    model = tiny()
    model[5].weight.data[0, 0] = torch.nan
    return model


def uncopyable() -> nn.Module:
    "A network that holds a tensor with a history."
    model = tiny()
    model.cached = model[5].weight * 2
    return model


@each(
    'make, domain, words',
    [
        (lambda: tiny(classes=4), TOY, ('4 outputs', '3 classes')),
        (lambda: tiny(channels=3), TOY, ('(1, 8, 8)', 'channels')),
        (
            lambda: Foreign(lambda x: x),
            Domain('big', (1, 9, 9), (0.5,), (0.5,), ('a', 'b', 'c')),
            ('(1, 9, 9)', 'size'),
        ),
        (lambda: Foreign(lambda x: None), TOY, ('NoneType', 'logits')),
        (lambda: Foreign(lambda x: x.argmax(1)), TOY, ('no outputs',)),
        (broken, TOY, ('NaN',)),
        (uncopyable, TOY, ('cannot be copied',)),
    ],
    ids=['classes', 'channels', 'size', 'nothing', 'no logits', 'nan', 'no copy'],
)
def test_a_network_that_cannot_teach(
    make: Callable[[], nn.Module], domain: Domain, words: tuple[str, ...]
) -> None:
    one_line(lambda: Teacher(make(), domain), *words)


def test_images_of_another_size() -> None:
    one_line(
        lambda: Teacher(tiny(), TOY).predict(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
        '(2, 3, 8, 8)',
        'toy',
    )


def test_eval_mode_is_given_back() -> None:
    model = tiny().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == modes


def test_shortcuts_by_hand() -> None:
    "What stands beside the convolutions, these being silent."
    x = torch.randn(2, 4, 6, 6)
    block = CifarBlock(4, 8, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2].relu()  # as many new channels on either side
    assert torch.equal(block(x.clone()), expected)
    wide = WideBlock(4, 8, 2).eval()
    nn.init.zeros_(wide.conv2.weight)
    wide.bn1.running_mean.fill_(0.5)
    torch.testing.assert_close(wide(x.clone()), wide.shortcut(wide.bn1(x).relu()))


# --- the loss -----------------------------------------------------------------------------

temperatures = st.floats(0.05, 50)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**30), temperature=temperatures, classes=st.integers(2, 30))
def test_gradient_is_the_difference_of_the_answers(
    seed: int, temperature: float, classes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(2, 3, classes, dtype=torch.float64, generator=generator) * 5
    )
    student.requires_grad_()
    loss = distillation_loss(student, teacher, temperature)
    (slope,) = torch.autograd.grad(loss, student)
    expected = (
        temperature * (soften(student, temperature) - soften(teacher, temperature)) / 3
    )
    assert torch.allclose(slope, expected, atol=1e-10)
    assert loss >= 0
    shifted = distillation_loss(student + 3, teacher - 2, temperature)
    assert torch.allclose(loss, shifted, rtol=1e-6, atol=1e-9), (
        'a constant added to all logits changes no answer'
    )


def test_loss_is_exact_where_probabilities_underflow() -> None:
    student, teacher = torch.tensor([[0.0, 500.0]]), torch.tensor([[500.0, 0.0]])
    assert distillation_loss(student, teacher, 1).item() == 500
    assert (
        distillation_loss(student.bfloat16(), teacher.bfloat16(), 1).dtype == torch.float32
    )


def test_loss_of_a_segmenter_is_the_mean_over_places() -> None:
    student, teacher = torch.randn(
        2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0)
    )
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (student, teacher)]
    assert torch.allclose(
        distillation_loss(student, teacher, 2), distillation_loss(*flat, 2)
    )


@pytest.mark.parametrize('temperature', [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    x = torch.zeros(1, 2)
    one_line(lambda: soften(x, temperature), 'temperature')
    one_line(lambda: distillation_loss(x, x, temperature), 'temperature')


@settings(deadline=None, max_examples=50)
@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(['constant', 'cosine', 'one-cycle', 'steps']),
)
def test_learning_rate_stays_within_its_peak(
    steps: int, warmup: float, schedule: str
) -> None:
    rates = [learning_rate_at(step, steps, schedule, warmup) for step in range(steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    rising = [rate for step, rate in enumerate(rates) if (step + 1) / steps < warmup]
    assert rising == sorted(rising)
    assert rising == pytest.approx(
        [(step + 1) / steps / warmup for step in range(len(rising))]
    )
    falling = rates[len(rising) :]
    assert falling == sorted(falling, reverse=True)


# --- the loop -----------------------------------------------------------------------------


def learner(seed: int = 0, student_seed: int = 0, **changes: Any) -> Distiller:
    "Everything that draws: augmentation, mixup, dropout, labels beside a teacher."
    chosen: dict[str, Any] = dict(
        steps=12,
        batch_size=10,
        learning_rate=0.05,
        warmup=0.2,
        label_weight=0.5,
        mixup_alpha=0.4,
    )
    chosen |= dict(augment=Augment(1, True), device='cpu', seed=seed) | changes
    return Distiller(Teacher(tiny(7), TOY), tiny(student_seed), images(), **chosen)


@pytest.mark.parametrize('cut', [1, 4, 5, 11])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, cut: int) -> None:
    straight = learner()
    seed_everything(3)  # of dropout
    straight.run(until=cut, log_every=5)
    save_checkpoint(
        tmp_path / 'c.pt', straight.state_dict() | {'random': torch.get_rng_state()}
    )
    straight.run(log_every=5)
    resumed = learner(seed=9, student_seed=9)
    state = load_checkpoint(tmp_path / 'c.pt')
    resumed.load_state_dict(state)
    torch.set_rng_state(state['random'])
    resumed.run(log_every=5)
    assert same(resumed.student, straight.student)
    assert resumed.history == straight.history and [
        row['step'] for row in straight.history
    ] == [5, 10, 12]


def test_a_checkpoint_from_before_gradient_scaling_opens() -> None:
    state = learner().run(until=3).state_dict()
    del state['scaler']
    other = learner(seed=1)
    other.load_state_dict(deepcopy(state))
    assert other.done == 3


def test_seeds_repeat() -> None:
    runs = []
    for seed in (0, 0, 1):
        run = learner(seed=seed)
        seed_everything(0)
        runs.append(run.run().student)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_history_is_the_mean_of_its_updates() -> None:
    one, other = learner(), learner()
    seed_everything(0)
    single = [float(one.step()['loss']) for _ in range(12)]
    seed_everything(0)
    rows = other.run(log_every=5).history
    assert [row['loss'] for row in rows] == pytest.approx(
        [sum(single[:5]) / 5, sum(single[5:10]) / 5, sum(single[10:]) / 2]
    )


def test_a_deadline_and_a_callback_stop_cleanly() -> None:
    assert learner().run(deadline=0.0).done == 0
    assert learner().run(callback=lambda run: run.done >= 4, log_every=2).done == 4


def test_any_source_of_images_teaches_the_same() -> None:
    pixels = images().images
    students = []
    for source in (ImageSet(pixels, None, TOY), pixels):
        student = tiny()
        seed_everything(0)
        distill(Teacher(tiny(7), TOY), student, source, steps=5, batch_size=8, device='cpu')
        students.append(student)
    assert same(*students)
    drawn = distill(
        Teacher(tiny(7), TOY),
        tiny(),
        lambda n, g: torch.rand(n, 1, 8, 8, generator=g),
        steps=5,
        batch_size=8,
        device='cpu',
    )
    assert drawn.done == 5 and drawn.sampler.state_dict() == {}


def test_learning_from_labels_works() -> None:
    data = images(60)
    pixels = data.images.clone()
    for image, label in zip(pixels, data.labels):
        image[:, :, 2 * int(label) : 2 * int(label) + 3] = 255
    marked, student = ImageSet(pixels, data.labels, TOY), tiny()
    train(student, marked, steps=120, batch_size=20, learning_rate=0.05, device='cpu')
    assert evaluate(student, marked) > 0.9


def frozen() -> nn.Module:
    return tiny().requires_grad_(False)


SHORT: dict[str, Any] = dict(steps=2, batch_size=4, device='cpu')


@each(
    'call, words',
    [
        (lambda: learner(steps=0), ('0 steps',)),
        (lambda: learner(temperature=0.0), ('temperature',)),
        (lambda: learner(learning_rate=-1.0), ('learning_rate',)),
        (lambda: learner(warmup=2.0), ('warmup',)),
        (lambda: learner(mixup_alpha=-1.0), ('mixup_alpha',)),
        (lambda: learner(schedule='cosinus'), ('cosinus', 'cosine')),
        (lambda: learner(precision='float8'), ('float8', 'bfloat16')),
        (lambda: learner(device='tpu'), ('tpu', 'cuda')),
        (
            lambda: Distiller(None, tiny(), images(labels=False), **SHORT),
            ('neither a teacher nor labels',),
        ),
        (lambda: Distiller(tiny(), tiny(), images(), **SHORT), ('Teacher(model, domain)',)),  # type: ignore[arg-type]
        (
            lambda: Distiller(Teacher(tiny(), TOY), tiny(classes=4), images(), **SHORT),
            ('4 outputs',),
        ),
        (
            lambda: Distiller(Teacher(tiny(), TOY), tiny(channels=3), images(), **SHORT),
            ('(1, 8, 8)',),
        ),
        (
            lambda: Distiller(Teacher(tiny(), TOY), frozen(), images(), **SHORT),
            ('requires_grad',),
        ),
        (
            lambda: Distiller(
                Teacher(tiny(), TOY), tiny(), images(domain=DOMAINS['cifar10']), **SHORT
            ),
            ('(3, 32, 32)', 'resize'),
        ),
        (
            lambda: Distiller(
                Teacher(tiny(), TOY),
                tiny(),
                images(labels=False),
                label_weight=1.0,
                **SHORT,
            ),
            ('no labels',),
        ),
        (
            lambda: Distiller(
                Teacher(tiny(), TOY), tiny(), images().images.float(), **SHORT
            ),
            ('uint8',),
        ),
        (
            lambda: Distiller(Teacher(tiny(), TOY), tiny(), 'images', **SHORT),
            ('str', 'ImageSource'),
        ),  # type: ignore[arg-type]
        (lambda: as_source(images().images), ('domain',)),
        (lambda: len(as_source(lambda n, g: torch.rand(n, 1, 8, 8), TOY)), ('no number',)),
        (
            lambda: learner(learning_rate=1e12, warmup=0.0).run(log_every=4),
            ('the loss is', 'lower learning_rate'),
        ),
    ],
)
def test_what_cannot_work_says_so(call: Callable[[], Any], words: tuple[str, ...]) -> None:
    one_line(call, *words)


def test_labels_of_another_domain_are_noticed() -> None:
    ten = Domain('ten', (1, 8, 8), (0.5,), (0.5,), tuple('0123456789'))
    data = ImageSet(images().images, torch.full((24,), 9), ten)
    one_line(
        lambda: Distiller(Teacher(tiny(), TOY), tiny(), data, label_weight=1.0, **SHORT),
        'label 9',
    )
    assert Distiller(Teacher(tiny(), TOY), tiny(), data, **SHORT).run().done == 2, (
        'without labels only the pixels count'
    )


def test_accuracy_leaves_no_trace() -> None:
    model, data = tiny().train(), images()
    model[1].eval()
    modes, before = [m.training for m in model.modules()], deepcopy(model.state_dict())
    with torch.no_grad():
        model.eval()
        expected = float(
            (model(TOY.normalize(data.images)).argmax(1) == data.labels).float().mean()
        )
        model.train()
        model[1].eval()
    assert evaluate(model, data, batch_size=7) == pytest.approx(expected)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    one_line(lambda: evaluate(tiny(classes=4), data), '(24, 4)', '3 classes')
    one_line(lambda: evaluate(model, images(labels=False)), 'no labels')


def test_bfloat16_learns_too() -> None:
    run = learner(precision='bfloat16').run(log_every=6)
    assert all(p.dtype == torch.float32 for p in run.student.parameters())
    assert run.history[-1]['loss'] < float('inf')


def test_saved_weights_hold_names_only(tmp_path: Path) -> None:
    save_weights(tmp_path / 'w.safetensors', tiny(), {'model': 'tiny'})
    tensors, metadata = load_tensors(tmp_path / 'w.safetensors')
    assert metadata == {'model': 'tiny'} and set(tensors) == set(tiny().state_dict())


@pytest.mark.parametrize(
    'student,teacher',
    [
        ('resnet14', 'resnet20'),
        ('resnet18', 'resnet34'),
        ('wrn16-1', 'wrn40-1'),
        ('resnet8', 'resnet8'),
    ],
)
def test_a_student_takes_over_blocks_in_order(student: str, teacher: str) -> None:
    torch.manual_seed(0)
    small, large = build_model(student), build_model(teacher)
    with torch.no_grad():
        for number, value in enumerate(large.state_dict().values()):
            value.fill_(number)  # every tensor can be told by its number
    assert copy_blocks_from_teacher(small, large) == 1.0
    first = [float(v.flatten()[0]) for v in small.state_dict().values()]
    # each from another place, in the teacher's order
    assert first == sorted(first) and len(set(first)) == len(first)
    with torch.no_grad():
        for value in small.state_dict().values():
            value.zero_()
    # what was taken over is a copy
    assert float(list(large.state_dict().values())[-1].flatten()[0]) > 0


def test_inheriting_leaves_what_has_no_partner() -> None:
    small, large = build_model('resnet14', 7), build_model('resnet20', 10)
    before = small.get_parameter('fc.weight').clone()
    share = copy_blocks_from_teacher(small, Teacher(large, DOMAINS['cifar10']))
    assert 0.99 < share < 1 and small.get_parameter('fc.weight').equal(before)
    with pytest.raises(DFKDError, match='no part of .* begin from random weights'):
        copy_blocks_from_teacher(
            build_model('digits-net', 10, 1), build_model('mobilenetv2')
        )


def test_a_source_hears_what_came_of_its_batch_and_weighs_it() -> None:
    class Listening(EpochSampler):
        wants_update = True
        heard: list[tuple[Tensor, Tensor]] = []

        def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
            self.heard.append((student_logits, teacher_logits))
            self.loss_weights = torch.zeros(len(student_logits))

    torch.manual_seed(0)
    teacher = Teacher(build_model('digits-net', 10, 1), DOMAINS['digits'])
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
    images_set = ImageSet(images, None, DOMAINS['digits'])
    source = Listening(images_set)
    images_set.sampler = lambda: source  # type: ignore[method-assign]
    distiller = Distiller(
        teacher,
        build_model('digits-net', 10, 1),
        images_set,
        steps=3,
        batch_size=8,
        device='cpu',
    )
    losses = [float(distiller.step()['distillation']) for _ in range(3)]
    assert losses == [0.0] * 3 and len(source.heard) == 3
    known = teacher.predict(images)
    for from_student, from_teacher in source.heard:
        assert from_student.shape == (8, 10) and not from_student.requires_grad
        apart = [
            torch.cdist(logits, known).min(1).values
            for logits in (from_student, from_teacher)
        ]
        assert apart[0].min() > 0.1 and apart[1].max() < 1e-3, (
            "the student's logits come first"
        )
    with pytest.raises(DFKDError, match='mixup_alpha is 1.0, but a Listening'):
        Distiller(
            teacher,
            build_model('digits-net', 10, 1),
            images_set,
            steps=3,
            mixup_alpha=1.0,
            device='cpu',
        )


def test_labels_count_by_their_weight() -> None:
    found = learner(label_weight=0.3).step()
    assert float(found['loss']) == pytest.approx(
        float(found['distillation'] + 0.3 * found['labels']), rel=1e-5
    )


def test_weights_of_a_loss() -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 10)
    teacher = torch.randn(4, 10)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    each = torch.stack(
        [distillation_loss(student[i : i + 1], teacher[i : i + 1], 3.0) for i in range(4)]
    )
    torch.testing.assert_close(
        distillation_loss(student, teacher, 3.0, weights), (each * weights).mean()
    )
    torch.testing.assert_close(
        distillation_loss(student, teacher, 3.0, torch.ones(4)),
        distillation_loss(student, teacher, 3.0),
    )
    with pytest.raises(DFKDError, match='give one an image'):
        distillation_loss(student, teacher, 3.0, weights[:2])
