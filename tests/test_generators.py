"""Generators: sizes, terms against definitions, batches that forget nothing, trainers that
resume to the same bits, networks of one's own.
"""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIGITS, network
from torch import nn

from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import AlternatingTrainer, GrowingPool
from dfkd_nb.generators.contrastive import ContrastiveSynthesizer
from dfkd_nb.generators.generators import (
    DISTANCES,
    METHODS,
    Generator,
    Pixels,
    activation_term,
    adversarial_term,
    balance_term,
)
from dfkd_nb.generators.meta import MetaSynthesizer
from dfkd_nb.generators.mirror import MirrorSynthesizer, mirror_of
from dfkd_nb.generators.replay import ReplayPool
from dfkd_nb.generators.synthesizer import GeneratorSynthesizer
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.core import import_torchvision, load_checkpoint, save_checkpoint
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import count_parameters
from dfkd_nb.toolbox.sources import DrawnImages
from dfkd_nb.toolbox.teachers import Teacher, load_teacher


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


def synthesizer_of(teacher, weights=METHODS['dafl'], **settings):
    generator = settings.pop('generator', None) or Generator(teacher.domain.shape, 8, 4)
    defaults = {'steps': 3, 'batch_size': 6, 'device': 'cpu'}
    return GeneratorSynthesizer(
        teacher, generator=generator, **defaults | weights | settings
    )


def forgetful(model):
    "With dropout before the last layer: in training mode it draws from the global streams."
    return nn.Sequential(*model[:-1], nn.Dropout(0.4), model[-1])


class Noisy(Generator):
    "A generator that draws from PyTorch's global streams, as dropout does."

    def forward(self, z):
        return super().forward(F.dropout(z, 0.3, self.training))


def trainer_of(teacher, weights, pooled=False, rounds=3, warmup=0, **settings):
    student = forgetful(network(1, teacher.domain))
    if weights.get('adversarial_weight'):
        settings = {'student': student} | settings
    torch.manual_seed(5)
    synthesizer = synthesizer_of(teacher, weights, **settings)
    source = (
        GrowingPool(teacher.domain)
        if pooled
        else DrawnImages(synthesizer.sample_images, teacher.domain)
    )
    distiller = Distiller(
        teacher,
        student,
        source,
        steps=(rounds - warmup) * 4,
        batch_size=4,
        learning_rate=0.05,
        device='cpu',
    )
    return AlternatingTrainer(
        synthesizer, distiller, rounds=rounds, steps_per_round=4, warmup_rounds=warmup
    )


def bits(trainer):
    synthesizer = trainer.synthesizer
    return [
        *trainer.student.state_dict().values(),
        *synthesizer.weights.values(),
        *synthesizer.buffers.values(),
        synthesizer.latents.detach(),
    ]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def view_of(logits, student=None):
    return LossInputs(
        torch.zeros(len(logits), 1, 8, 8), logits, logits.argmax(1), student_logits=student
    )


# --- the generator ---


@pytest.mark.parametrize(
    ('latent', 'parameters'),
    [(256, 2_328_899), (512, 4_426_051)],
    ids=['as in FastDFKD', 'as for DAFL'],
)
def test_it_has_the_parameters_of_the_field(latent, parameters):
    assert count_parameters(Generator((3, 32, 32), latent)) == parameters


@pytest.mark.parametrize(
    'shape',
    [
        (1, 4, 4),
        (1, 8, 8),
        (1, 28, 28),
        (3, 30, 41),
        (3, 64, 64),
        (3, 224, 224),
        (2, 9, 64),
    ],
    ids=str,
)
def test_any_size_is_generated_and_no_weight_is_idle(shape):
    generator = Generator(shape, 5, 2)
    images = generator(torch.randn(2, 5))
    assert tuple(images.shape) == (2, *shape)
    assert images.min() >= 0 and images.max() <= 1
    images.square().mean().backward()
    assert all(p.grad is not None for p in generator.parameters())


def test_sizes_of_the_field_are_reached_by_doublings_alone():
    for size, begin, doublings in ((32, 8, 2), (64, 8, 3), (128, 8, 4), (224, 14, 4)):
        generator = Generator((3, size, size), 4, 1)
        assert generator.begin == (begin, begin) and len(generator.blocks) == doublings


def test_a_generator_that_cannot_be_is_refused():
    with pytest.raises(DFKDError, match='4 x 4 pixels'):
        Generator((3, 3, 32))
    with pytest.raises(DFKDError, match='1 or more of the rest'):
        Generator((3, 32, 32), 0)


# --- the terms ---


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 20),
    st.integers(2, 100),
    st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
)
def test_balance_and_certainty_make_the_mutual_information(seed, images, classes, scale):
    logits = scale * torch.randn(
        images, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    p = logits.softmax(1)
    balance, hesitation = balance_term(view_of(logits)), torch.special.entr(p).sum(1).mean()
    assert -math.log(classes) - 1e-9 <= balance <= 1e-9
    assert -1e-9 <= -balance - hesitation <= math.log(min(images, classes)) + 1e-9


def test_gradients_of_the_terms_are_right():
    a, b = (2 * torch.randn(2, 4, 7, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: balance_term(view_of(a)), [a])
    for distance in DISTANCES:
        assert torch.autograd.gradcheck(
            lambda a, b, d=distance: adversarial_term(d, temperature=2.0)(view_of(a, b)),
            [a, b],
        )


def test_terms_survive_logits_that_are_out_of_all_bounds():
    for scale in (1e2, 1e4, 1e8):
        a, b = (scale * torch.randn(2, 5, 10)).requires_grad_()
        for term in (
            balance_term,
            adversarial_term('kl'),
            adversarial_term('l1'),
            adversarial_term('js'),
        ):
            loss = term(view_of(a, b))
            assert loss.isfinite() and torch.autograd.grad(loss, a)[0].isfinite().all()


def test_the_adversary_is_minus_the_distance():
    a, b = torch.randn(2, 9, 5)
    kl = F.kl_div(b.log_softmax(1), a.softmax(1), reduction='batchmean')
    assert torch.allclose(adversarial_term()(view_of(a, b)), -kl, atol=1e-6)
    assert torch.allclose(adversarial_term('l1')(view_of(a, b)), -(a - b).abs().mean())
    assert -math.log(2) <= adversarial_term('js')(view_of(90 * a, 90 * b)) <= 0
    agree = a.argmax(1) == b.argmax(1)
    assert agree.any() and not agree.all()
    wanted = F.kl_div(b[agree].log_softmax(1), a[agree].softmax(1), reduction='sum') / 9
    assert torch.allclose(
        adversarial_term(agreement=True)(view_of(a, b)), -wanted, atol=1e-6
    )


def test_terms_say_what_they_lack():
    logits = torch.randn(2, 3)
    with pytest.raises(DFKDError, match='give the synthesizer a student'):
        adversarial_term()(view_of(logits))
    with pytest.raises(DFKDError, match="embedding='classifier'"):
        activation_term(view_of(logits))
    with pytest.raises(DFKDError, match='use kl, l1, js'):
        adversarial_term('cosine')
    with pytest.raises(DFKDError, match='positive'):
        adversarial_term(temperature=0.0)


# --- the synthesizer ---


def test_the_same_seed_generates_the_same_and_another_another(teacher):
    torch.manual_seed(3)
    one = synthesizer_of(teacher).synthesize(12)
    torch.manual_seed(3)
    two = synthesizer_of(teacher).synthesize(12)
    other = synthesizer_of(teacher, seed=1).synthesize(12)
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, other.images)


@pytest.mark.parametrize('method', METHODS)
def test_every_method_lowers_its_own_loss(teacher, method):
    weights = METHODS[method] | (
        {'student': network(1)} if 'adversarial_weight' in METHODS[method] else {}
    )
    synthesizer = synthesizer_of(teacher, weights, batch_size=32, learning_rate=3e-3)
    latents = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    before = float(
        synthesizer.compute_loss(synthesizer.generate(latents), None)[0].detach()
    )
    for _ in range(15):
        synthesizer.step()
        if not synthesizer.steps_left:
            synthesizer.pop()
    assert (
        float(synthesizer.compute_loss(synthesizer.generate(latents), None)[0].detach())
        < before
    )


def test_weights_and_latents_move_as_adam_with_the_betas_of_the_field(teacher):
    synthesizer = synthesizer_of(teacher, latent_learning_rate=0.1, steps=4)
    synthesizer.begin_batch()
    leaves = [*synthesizer.weights.values(), synthesizer.latents]
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    adams = [
        torch.optim.Adam(copies[:-1], synthesizer.learning_rate, betas=(0.5, 0.999)),
        torch.optim.Adam(copies[-1:], 0.1, betas=(0.5, 0.999)),
    ]
    for _ in range(3):
        synthesizer.step()
        for leaf, copied in zip(leaves, copies, strict=True):
            copied.grad = leaf.grad.clone()
        for adam in adams:
            adam.step()
    for leaf, copied in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf, copied, rtol=1e-4, atol=1e-6)


def test_the_best_iterate_is_kept_and_is_a_copy(teacher):
    synthesizer = synthesizer_of(teacher, steps=6, learning_rate=0.5)
    losses = []
    pictures = []
    for _ in range(6):
        latents = synthesizer.latents if synthesizer.steps_left else None
        synthesizer.step()
        losses.append(float(synthesizer.best['loss']))
        pictures.append(synthesizer.best['images'].clone())
        assert latents is None or torch.equal(latents, synthesizer.latents)
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(synthesizer.pop().images, pictures[-1])
    with pytest.raises(DFKDError, match='not finished'):
        synthesizer.pop()


def test_synthesis_leaves_no_trace_in_teacher_and_student(teacher):
    student = network(1).train()
    before = [
        v.clone() for v in (*teacher.state_dict().values(), *student.state_dict().values())
    ]
    synthesizer_of(
        teacher, METHODS['dfq'], student=student, embedding='classifier'
    ).synthesize(12)
    assert same(before, (*teacher.state_dict().values(), *student.state_dict().values()))
    assert student.training and all(p.grad is None for p in student.parameters())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks
        for m in (*teacher.modules(), *student.modules())
    )


def test_pixel_latents_and_a_fresh_start_are_ways_to_begin(teacher):
    pixels = synthesizer_of(
        teacher,
        {'class_weight': 1.0},
        generator=Pixels(DIGITS.shape),
        latent_learning_rate=0.1,
    )
    assert pixels.synthesize(12).images.shape == (12, 1, 8, 8)
    with pytest.raises(DFKDError, match='latent_learning_rate above 0'):
        synthesizer_of(teacher, {'class_weight': 1.0}, generator=Pixels(DIGITS.shape))
    fresh = synthesizer_of(teacher, init='scratch', steps=1)
    fresh.step()
    weight = fresh.weights['last.weight'].clone()
    fresh.pop()
    fresh.begin_batch()
    assert (fresh.weights['last.weight'] != weight).all()


def test_targets_are_sampled_and_predictions_are_taken(teacher):
    sampled = synthesizer_of(
        teacher, {'class_weight': 1.0}, labels='sampled', batch_size=64, steps=1
    ).synthesize(64)
    assert sampled.labels.unique().numel() == 10
    answered = synthesizer_of(teacher, {'class_weight': 1.0}, steps=1).synthesize(6)
    assert answered.labels.max() < 10


def test_augmentation_and_further_terms_take_part(teacher):
    seen = []

    def remember(inputs):
        seen.append(inputs.x.shape)
        return inputs.x.square().mean()

    synthesizer = synthesizer_of(
        teacher, {}, terms={'size': (1.0, remember)}, augment=Augment(2, False)
    )
    assert set(synthesizer.synthesize(6).images.shape) and set(synthesizer.history[0]) == {
        'batch',
        'steps',
        'total',
        'size',
    }
    assert seen == [torch.Size([6, 1, 8, 8])] * 3


class Tanh(nn.Module):
    latent_shape = (4,)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 64)

    def forward(self, z):
        return self.layer(50 * z + 50).tanh().view(-1, 1, 8, 8)


class Computed(Generator):
    "Keeps a tensor that was computed from a weight, which Python does not copy."

    def __init__(self):
        super().__init__(DIGITS.shape, 4, 2)
        self.doubled = 2 * self.last.weight


SWAPPED = dataclasses.replace(DIGITS, classes=('1', '0', *'23456789'))


class Stubborn(Pixels):
    "Has weights, and gives nothing back."

    def __init__(self):
        super().__init__(DIGITS.shape)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, z):
        return z.sigmoid().detach()


@each(
    ('change', 'message'),
    [
        ({'steps': 0}, '1 or more of each'),
        ({'learning_rate': 0.0}, 'give a positive one'),
        ({'learning_rate': math.nan}, 'give a positive one'),
        ({'latent_learning_rate': math.inf}, 'and 0 or more'),
        ({'seed': -1}, 'seed -1 is out of range'),
        ({'tv_l2': math.nan}, 'give a finite number'),
        ({'feature_scale': 'huge'}, 'unknown feature_scale'),
        ({'distance': 'cosine'}, 'use kl, l1, js'),
        ({'temperature': 0.0}, 'temperature 0.0'),
        ({'student_domain': DIGITS}, 'give a student'),
        (
            {
                'student': network(1),
                'student_domain': dataclasses.replace(DIGITS, shape=(1, 9, 9)),
            },
            'mean and std only',
        ),
        ({'student': network(1), 'student_domain': SWAPPED}, 'number the labels alike'),
        ({'generator': Computed()}, 'cannot be copied'),
        ({'init': 'never'}, 'use sequential, scratch'),
        ({'labels': 'none'}, "'teacher' or 'sampled'"),
        ({'adversarial_weight': 1.0}, 'give a student'),
        ({'adversarial_weight': 1.0, 'student': network()}, 'the student is the teacher'),
        ({'feature_weight': 1.0, 'feature_scale': 'huge'}, 'unknown feature_scale'),
        (
            {'class_weight': 0.0, 'balance_weight': 0.0, 'activation_weight': 0.0},
            'no term has a weight',
        ),
        ({'generator': nn.Linear(4, 64)}, 'give it latent_shape'),
        ({'generator': Generator((1, 16, 16), 4, 2)}, 'build it with that shape'),
        ({'generator': Tanh()}, 'end it with a sigmoid'),
        ({'precision': 'float8'}, 'unknown precision'),
    ],
)
def test_what_cannot_work_is_told_at_once(teacher, change, message):
    with pytest.raises(DFKDError, match=message) as error:
        synthesizer_of(teacher, **change)
    assert '\n' not in str(error.value)


def test_a_generator_that_gets_no_gradient_and_a_loss_that_is_none(teacher):
    with pytest.raises(DFKDError, match='no gradient reaches the generator'):
        synthesizer_of(teacher, generator=Stubborn()).step()
    with pytest.raises(DFKDError, match="'burst' is not finite"):
        synthesizer_of(
            teacher, terms={'burst': (1.0, lambda inputs: inputs.x.mean() / 0)}
        ).step()
    with pytest.raises(DFKDError, match='ask for 1 or more'):
        synthesizer_of(teacher).synthesize(0)


def test_on_other_devices_losses_are_read_once_a_batch_and_still_checked(
    teacher, monkeypatch
):
    """Without a look at each step the same iterate is kept, a loss that is not finite is
    told by its step, and no checkpoint is written after it.
    """
    settings = {'steps': 6, 'learning_rate': 0.5}
    start = Generator((1, 8, 8), 8, 4)
    eager, deferred = (
        synthesizer_of(teacher, generator=start, **settings) for _ in range(2)
    )
    deferred.checks_every_step = False
    assert torch.equal(eager.synthesize(12).images, deferred.synthesize(12).images)
    assert eager.history == deferred.history
    count = []

    def bursts_later(inputs):
        count.append(1)
        return inputs.x.mean() / (0 if len(count) > 2 else 1)

    deferred = synthesizer_of(teacher, terms={'burst': (1.0, bursts_later)})
    deferred.checks_every_step = False
    reads = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda v: reads.append(1) or plain(v))
    monkeypatch.setattr(torch.Tensor, '__float__', lambda v: pytest.fail('read a value'))
    monkeypatch.setattr(torch.Tensor, '__bool__', lambda v: pytest.fail('read a value'))
    deferred.step()
    deferred.step()
    assert not reads
    monkeypatch.undo()
    deferred.state_dict()
    deferred.step()
    for ask in (deferred.state_dict, deferred.pop):
        with pytest.raises(DFKDError, match="'burst' is not finite at step 3"):
            ask()


@pytest.fixture
def graphs(monkeypatch):
    """What `torch.compile` was asked to compile: whole graphs, or it is an error.

    With a backend that needs no C++ compiler.
    """
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    plain = torch.compile
    monkeypatch.setattr(
        torch, 'compile', lambda f, mode: plain(f, backend=backend, fullgraph=True)
    )
    torch._dynamo.reset()
    return found


def compilable(kind, teacher, compile):
    torch.manual_seed(0)
    settings = {
        'generator': Generator((1, 8, 8), 8, 4),
        'student': network(1),
        'batch_size': 4,
        'steps': 3,
        'augment': Augment(1, False),
        'class_weight': 1.0,
        'feature_weight': 1.0,
        'adversarial_weight': 0.5,
        'latent_learning_rate': 0.01,
        'device': 'cpu',
        'compile': compile,
    }
    if kind is MetaSynthesizer:
        settings |= {'momentum': 0.1}
    if kind is ContrastiveSynthesizer:
        settings |= {'bank_size': 8, 'negatives': 6, 'head_size': 8}
    if kind is MirrorSynthesizer:
        settings |= {'generator': mirror_of(teacher, 8), 'latent_learning_rate': 0.0}
    return kind(teacher, **settings)


@pytest.mark.parametrize(
    'kind',
    [GeneratorSynthesizer, MetaSynthesizer, ContrastiveSynthesizer, MirrorSynthesizer],
)
def test_a_compiled_look_is_one_graph_and_the_same(kind, teacher, graphs, tmp_path):
    """No break, no graph for each batch, the same images; and a run goes on from anywhere
    to the same bits.
    """
    compiled, eager = (compilable(kind, teacher, flag) for flag in (True, False))
    images = compiled.synthesize(8).images
    compiled.step()
    save_checkpoint(tmp_path / 'state.pt', compiled.state_dict())
    images = torch.cat([images, compiled.synthesize(12).images])
    # the second where there are running statistics, or where the bank is empty at first
    assert len(graphs) <= 3, 'compiled again and again'
    difference = images.int() - eager.synthesize(20).images.int()
    assert difference.abs().max() <= 1
    for row, wanted in zip(compiled.history, eager.history, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    resumed = compilable(kind, teacher, True)
    resumed.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    while resumed.steps_left:
        resumed.step()
    assert torch.equal(resumed.pop().images, images[8:12])


def test_a_compiled_look_computes_no_gradient_of_the_students_weights(teacher, graphs):
    synthesizer = compilable(GeneratorSynthesizer, teacher, True)
    synthesizer.step()
    assert all(p.grad is None for p in synthesizer.student.parameters())
    evaluated = synthesizer.evaluate_batch(synthesizer.latents, None)
    leaves = [p for p in synthesizer.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(evaluated.total, leaves, allow_unused=True)
    assert leaves and all(gradient is None for gradient in found)


class Viewed(nn.Module):
    "A student that flattens its features with `view`, as some of other people's do."

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(3600, 10)

    def forward(self, x):
        return self.last(self.first(x).view(len(x), -1))


def test_channels_last_only_where_all_networks_take_it():
    "It is an order in memory: losses and pictures stay, but for rounding."
    teacher = load_teacher('cifar10-resnet20')
    torch.manual_seed(2)
    start = Generator((3, 32, 32), 8, 4)
    viewed = synthesizer_of(teacher, METHODS['dfq'], student=Viewed())
    assert not viewed.channels_last
    viewed.synthesize(6)
    student = network(1, teacher.domain)
    last, first = (
        synthesizer_of(teacher, METHODS['dfq'], generator=start, student=student)
        for _ in range(2)
    )
    assert last.channels_last
    first.channels_last = False
    pictures = [made.synthesize(6).images.int() for made in (last, first)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1
    for row, wanted in zip(last.history, first.history, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert all(p.is_contiguous() for p in student.parameters())


# --- what is handed in ---

KINDS = {
    'sequential': (GeneratorSynthesizer, {}),
    'scratch': (GeneratorSynthesizer, {'init': 'scratch'}),
    'meta': (
        MetaSynthesizer,
        {'reset_first_layer_at': 2, 'latent_learning_rate': 0.1, 'latent_reuse': 2},
    ),
    'meta restart': (MetaSynthesizer, {'init': 'scratch'}),
    'contrast': (ContrastiveSynthesizer, {'bank_size': 8, 'negatives': 4, 'head_size': 8}),
}


def snapshot(network):
    "What somebody could change: tensors and their layout, modes, flags, hooks."
    tensors = {
        k: (v.clone(), v.stride(), v.device)
        for k, v in network.state_dict(keep_vars=False).items()
    }
    modes = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in network.modules()
    ]
    return tensors, modes, [(p.requires_grad, p.grad is None) for p in network.parameters()]


def unchanged(network, before):
    tensors, *rest = snapshot(network)
    alike = all(
        torch.equal(v, w) and s == t and d == e
        for (v, s, d), (w, t, e) in zip(tensors.values(), before[0].values(), strict=True)
    )
    return alike and rest == list(before[1:])


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_handed_in_stays_as_it_is_and_the_trained_generator_is_another(
    teacher, kind
):
    torch.manual_seed(0)
    generator, student = (
        Generator(DIGITS.shape, 8, 4),
        network(1).to(memory_format=torch.channels_last).train(),
    )
    generator.blocks[0][1].eval()  # modes need not be alike
    student[1].eval()
    generator.register_forward_hook(lambda module, inputs, output: output)
    handed_in = generator, student, teacher
    before = [snapshot(m) for m in handed_in]
    synthesizer_class, settings = KINDS[kind]
    weights = {'class_weight': 1.0, 'feature_weight': 1.0, 'adversarial_weight': 1.0}
    synthesizer = synthesizer_class(
        teacher,
        generator=generator,
        student=student,
        steps=2,
        batch_size=6,
        device='cpu',
        **weights | settings,
    )
    synthesizer.synthesize(12)
    assert all(unchanged(m, b) for m, b in zip(handed_in, before, strict=True))
    trained, latents = (
        synthesizer.generator,
        torch.randn(3, 8, generator=torch.Generator().manual_seed(2)),
    )
    assert not any(m.training for m in trained.modules())
    assert torch.equal(
        trained(latents), synthesizer.sample_images(3, torch.Generator().manual_seed(2))
    )
    assert all(
        (p != q).any()
        for p, q in zip(trained.parameters(), generator.parameters(), strict=True)
    )
    kept = [v.clone() for v in trained.state_dict().values()]
    synthesizer.synthesize(6)
    assert same(trained.state_dict().values(), kept), 'later updates do not reach it'
    assert not torch.equal(synthesizer.generator(latents), trained(latents))


class Elsewhere(Teacher):
    "Says that it is on another device, and notes which of its copies is moved."

    moved: list[Teacher] = []

    @property
    def device(self):
        return torch.device('cuda:7')

    def to(self, *where, **settings):
        self.moved.append(self)
        return super().to(*where, **settings)


def test_a_teacher_on_another_device_is_copied_and_one_on_this_device_is_not(teacher):
    assert synthesizer_of(teacher).teacher is teacher
    away = Elsewhere(network(), DIGITS)
    synthesizer = synthesizer_of(away, {'class_weight': 1.0})
    assert Elsewhere.moved == [synthesizer.teacher] and synthesizer.teacher is not away


def test_frozen_weights_stay_and_resume(teacher, tmp_path):
    "All frozen: only codes learn. Some frozen: the others learn, also from fresh weights."
    some = {'last.bias'}
    for init, trained in (('sequential', some), ('scratch', some), ('sequential', set())):
        torch.manual_seed(1)
        generator = Generator(DIGITS.shape, 8, 4)
        generator.norm.running_mean.normal_()
        for name, weight in generator.named_parameters():
            weight.requires_grad_(name in trained)

        def make(generator=generator, init=init):
            return synthesizer_of(
                teacher,
                generator=copy.deepcopy(generator),
                init=init,
                latent_learning_rate=0.1,
            )

        whole, part, resumed = make(), make(), make()
        wanted = whole.synthesize(18).images
        part.synthesize(6)
        part.step()
        save_checkpoint(tmp_path / 'state.pt', part.state_dict())
        resumed.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
        while resumed.steps_left:
            resumed.step()
        assert torch.equal(
            torch.cat([resumed.pop().images, resumed.synthesize(6).images]), wanted[6:]
        )
        now = dict(resumed.generator.named_parameters())
        changed = {
            name for name, p in generator.named_parameters() if (now[name] != p).any()
        }
        assert changed == trained
        if init == 'scratch':  # a frozen layer keeps its statistics as well
            resumed.begin_batch()
        if init == 'scratch' or not trained:  # nothing to train: eval mode
            assert same(resumed.generator.buffers(), generator.buffers())
    with pytest.raises(DFKDError, match='no weights that may change'):
        synthesizer_of(teacher, generator=generator)


# --- two normalisations ---

OTHER = dataclasses.replace(DIGITS, mean=(0.6,), std=(0.15,))


@pytest.mark.parametrize('augment', [None, Augment(2, True)])
def test_a_student_sees_images_on_its_own_scale(teacher, augment):
    "In the loop it answers as outside, and terms see pixels in units that no network sets."
    student, images = (
        network(1),
        torch.rand(5, *DIGITS.shape, generator=torch.Generator().manual_seed(0)),
    )
    synthesizer = synthesizer_of(
        teacher, METHODS['dfq'], student=student, student_domain=OTHER, augment=augment
    )
    _, values, inputs = synthesizer.compute_loss(images, None)
    shown = images if augment is None else augment(images, torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher_logits, student_logits, wrong = (
            teacher.predict(shown),
            student.eval()(OTHER.normalize(shown)),
            student(DIGITS.normalize(shown)),
        )
    torch.testing.assert_close(
        inputs.student_logits.detach(), student_logits, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(inputs.logits.detach(), teacher_logits, rtol=1e-4, atol=1e-5)
    assert (student_logits - wrong).abs().max() > 0.1
    torch.testing.assert_close(
        values['adversarial'],
        adversarial_term()(view_of(teacher_logits, student_logits)),
        rtol=1e-3,
        atol=1e-5,
    )
    torch.testing.assert_close(inputs.x, (shown - 0.5) / 0.25, rtol=1e-5, atol=1e-5)
    synthesizer_of(
        teacher, METHODS['zskt'], student=network(), student_domain=OTHER
    )  # the same weights, but another network


def test_a_trainer_shows_the_student_one_scale(teacher):
    def parts(domain, synthesizer_domain=None, pool_domain=None):
        student = network(1)
        synthesizer = synthesizer_of(
            teacher, METHODS['dfq'], student=student, student_domain=synthesizer_domain
        )
        pool = ReplayPool(DIGITS, 20, teacher, student, student_domain=pool_domain)
        settings = {'steps': 4, 'batch_size': 4, 'device': 'cpu', 'domain': domain}
        return AlternatingTrainer(
            synthesizer,
            Distiller(teacher, student, pool, **settings),
            rounds=1,
            steps_per_round=4,
        )

    trainer = parts(OTHER)
    assert trainer.synthesizer.student_domain == trainer.pool.student_domain == OTHER
    trainer.step()
    while trainer.synthesizer.steps_left:
        trainer.step()
    with torch.no_grad():
        teacher_logits, student_logits = (
            teacher.predict(trainer.pool.images),
            trainer.student.eval()(OTHER.normalize(trainer.pool.images)),
        )
    wanted = F.kl_div(
        student_logits.log_softmax(1), teacher_logits.softmax(1), reduction='none'
    ).sum(1)
    # those that the synthesizer knows: of intensities before they were rounded to bytes
    torch.testing.assert_close(trainer.pool.priorities, wanted, rtol=1e-2, atol=1e-3)
    assert parts(None).synthesizer.student_domain == DIGITS
    for change in ({'synthesizer_domain': DIGITS}, {'pool_domain': DIGITS}):
        with pytest.raises(
            DFKDError, match='make student_domain and the domain of the Distiller agree'
        ) as error:
            parts(OTHER, **change)
        assert '\n' not in str(error.value)


# --- precision ---


@pytest.mark.parametrize('kind', KINDS)
def test_bfloat16_is_finite_and_close(kind):
    """The first loss differs by what 8 bits leave of some layers, and losses still fall.

    A product is rounded by 2^-9 = 0.2 %; over twenty layers that partly cancels:
    0.4 % at most were seen, 2 % are allowed.
    """
    teacher, losses = load_teacher('cifar10-resnet20'), []
    for precision in ('float32', 'bfloat16'):
        torch.manual_seed(0)
        synthesizer_class, settings = KINDS[kind]
        weights = {
            'class_weight': 1.0,
            'feature_weight': 0.1,
            'adversarial_weight': 0.1,
            'balance_weight': 1.0,
        }
        shared = {
            'steps': 3,
            'batch_size': 8,
            'device': 'cpu',
            'precision': precision,
            'student': network(1, teacher.domain),
        }
        synthesizer = synthesizer_class(
            teacher, generator=Generator((3, 32, 32), 8, 4), **shared | weights | settings
        )
        synthesizer.step()
        losses.append(float(synthesizer.best['loss']))
        while synthesizer.steps_left:
            synthesizer.step()
        assert synthesizer.best['loss'] < losses[-1], 'some updates later it costs less'
        synthesizer.pop()
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# --- resuming ---


@pytest.mark.parametrize('left', [0, 1, 2])
def test_a_batch_resumes_to_the_same_bits_wherever_it_was_cut(teacher, tmp_path, left):
    settings = {
        'latent_learning_rate': 0.01,
        'augment': Augment(1, False),
        'labels': 'sampled',
    }

    def fresh():
        torch.manual_seed(0)
        return synthesizer_of(teacher, METHODS['dafl'], **settings)

    whole, part = fresh(), fresh()
    wanted = whole.synthesize(18)
    part.synthesize(6)
    part.step()
    while part.steps_left > left:
        part.step()
    save_checkpoint(tmp_path / 'state.pt', part.state_dict())
    torch.manual_seed(99)
    resumed = synthesizer_of(teacher, METHODS['dafl'], **settings)
    resumed.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    while resumed.steps_left:
        resumed.step()
    assert torch.equal(
        torch.cat([resumed.pop().images, resumed.synthesize(6).images]), wanted.images[6:]
    )
    assert resumed.history == whole.history


def test_what_was_loaded_is_not_shared(teacher):
    part, other = (synthesizer_of(teacher, latent_learning_rate=0.01) for _ in range(2))
    part.step()
    other.load_state_dict(part.state_dict())
    other.step()
    other.step()
    images = other.pop().images
    part.step()
    part.step()
    assert torch.equal(part.pop().images, images)


def test_a_state_of_other_settings_is_refused(teacher):
    with pytest.raises(DFKDError, match=r'steps \(was 4, now 3\)'):
        synthesizer_of(teacher).load_state_dict(
            synthesizer_of(teacher, steps=4).state_dict()
        )
    with pytest.raises(DFKDError, match='another generator'):
        synthesizer_of(teacher).load_state_dict(
            synthesizer_of(teacher, generator=Generator((1, 8, 8), 8, 5)).state_dict()
        )
    for change in (
        {'temperature': 2.0},
        {'augment': Augment(1, False)},
        {'distance': 'js'},
        {'agreement': True},
        {'feature_scale': 'relative'},
    ):
        with pytest.raises(DFKDError, match=next(iter(change))):
            synthesizer_of(teacher).load_state_dict(
                synthesizer_of(teacher, **change).state_dict()
            )


# --- the trainer ---


@pytest.mark.parametrize('pooled', [False, True], ids=['drawn', 'pooled'])
@pytest.mark.parametrize('method', METHODS)
def test_a_trainer_resumes_to_the_same_bits(teacher, tmp_path, method, pooled):
    "Wherever it was cut; student and generator draw from the global streams."

    def trainer():
        torch.manual_seed(5)
        return trainer_of(
            teacher, METHODS[method], pooled, generator=Noisy(DIGITS.shape, 8, 4)
        )

    whole = trainer().run()
    for until in (1, 3, 5, 9, 17):
        part, resumed = trainer(), trainer()
        for _ in range(until):
            part.step()
        save_checkpoint(tmp_path / 'trainer.pt', part.state_dict())
        torch.manual_seed(99)
        resumed.load_state_dict(load_checkpoint(tmp_path / 'trainer.pt'))
        resumed.run()
        assert same(bits(resumed), bits(whole)), until
        assert resumed.synthesizer.history == whole.synthesizer.history
        assert not pooled or torch.equal(resumed.pool.images, whole.pool.images)


def test_rounds_are_as_planned_and_nobody_competes_while_warming_up(teacher):
    trainer = trainer_of(teacher, METHODS['dfq'], True, rounds=4, warmup=2, steps=1)
    order = ''
    competed = []
    while not trainer.finished:
        order += 'G' if trainer.synthesis_due else 's'
        trainer.step()
        if order[-1] == 'G':
            competed.append('adversarial' in trainer.synthesizer.history[-1])
    assert order == 'GGG' + 'ssss' + 'G' + 'ssss'
    assert competed == [False, False, True, True]
    assert len(trainer.pool) == 24
    with pytest.raises(DFKDError, match='taken all its steps'):
        trainer.step()


def test_the_rate_of_a_generator_falls_over_the_rounds(teacher):
    "By hand, and the same after a stop between two rounds."
    falling = {'schedule': 'cosine', 'schedule_rounds': 4, 'learning_rate': 0.01}
    trainer, rates = trainer_of(teacher, METHODS['dafl'], rounds=4, **falling), []
    whole = trainer_of(teacher, METHODS['dafl'], rounds=4, **falling).run()
    while not trainer.finished:
        if trainer.synthesis_due and trainer.synthesizer.steps_left == 1:
            rates.append(trainer.synthesizer.optimizer.param_groups[0]['lr'])
        trainer.step()
        if trainer.round == 2 and trainer.done == 5:
            state = copy.deepcopy(trainer.state_dict())
            trainer = trainer_of(teacher, METHODS['dafl'], rounds=4, **falling)
            trainer.load_state_dict(state)
    expected = [0.01 * (1 + math.cos(math.pi * done)) / 2 for done in (1 / 4, 2 / 4, 3 / 4)]
    assert rates[:3] == pytest.approx(expected) and 0 < rates[3] < rates[2]
    for name, weight in whole.synthesizer.weights.items():
        assert torch.equal(weight, trainer.synthesizer.weights[name]), name
    for wrong, words in (
        ({'schedule': 'falling'}, "unknown schedule 'falling'"),
        ({'schedule': 'cosine'}, 'over 0 rounds'),
        ({'schedule': 'cosine', 'schedule_rounds': 3, 'init': 'scratch'}, "init 'scratch'"),
    ):
        with pytest.raises(DFKDError, match=words):
            synthesizer_of(teacher, **wrong)


def test_a_callback_and_a_deadline_stop_between_two_updates(teacher):
    trainer = trainer_of(teacher, METHODS['dafl'])
    trainer.run(callback=lambda now: now.synthesizer.steps_done == 2)
    assert (trainer.synthesizer.steps_done, trainer.done) == (2, 0)
    trainer.run(deadline=0.0)
    assert (trainer.synthesizer.steps_done, trainer.done) == (2, 0)
    assert trainer.run(until=5).done == 5 and trainer.run().finished and trainer.seconds > 0


@each(
    ('change', 'message'),
    [
        ({'rounds': 0}, 'give 1 or more'),
        ({'warmup_rounds': 3}, 'fewer to warm up'),
        ({'steps_per_round': 5}, 'make them agree'),
        ({'warmup_rounds': 1, 'rounds': 4}, 'nothing to optimise without'),
    ],
)
def test_a_trainer_that_cannot_run_is_refused(teacher, change, message):
    trainer = trainer_of(teacher, METHODS['zskt'])
    with pytest.raises(DFKDError, match=message):
        AlternatingTrainer(
            trainer.synthesizer,
            trainer.distiller,
            **{'rounds': 3, 'steps_per_round': 4} | change,
        )


def test_a_checkpoint_of_another_trainer_is_refused(teacher):
    trainer = trainer_of(teacher, METHODS['dafl'])
    with pytest.raises(DFKDError, match='not written by an AlternatingTrainer'):
        trainer.load_state_dict({'kind': 'competition'})
    with pytest.raises(DFKDError, match=r'rounds \(was 2, now 3\)'):
        trainer.load_state_dict(trainer_of(teacher, METHODS['dafl'], rounds=2).state_dict())


# --- networks of one's own ---


def test_a_foreign_network_with_its_own_size_mean_and_classes():
    import_torchvision()
    from torchvision.models import resnet18

    domain = Domain(
        'leaves', (3, 40, 40), (0.3, 0.5, 0.2), (0.2, 0.3, 0.1), tuple('abcdefg')
    )
    torch.manual_seed(0)
    model = resnet18(num_classes=7)
    with torch.no_grad():
        model(torch.randn(4, 3, 40, 40))  # BatchNorm has seen something
    teacher = Teacher(model, domain, 'resnet18')
    trainer = trainer_of(
        teacher, METHODS['dfq'], True, rounds=2, steps=1, augment=Augment(4, True)
    )
    trainer.run()
    assert (
        trainer.pool.images.shape == (12, 3, 40, 40)
        and trainer.pool.images.dtype == torch.uint8
    )
    assert trainer.pool.labels.max() < 7
    assert {'class', 'balance', 'features', 'adversarial'} <= set(
        trainer.synthesizer.history[0]
    )


def test_a_foreign_size_without_batchnorm_is_generated_by_logits_alone():
    domain = Domain('wide', (3, 64, 64), (0.5,) * 3, (0.5,) * 3, ('yes', 'no'))
    torch.manual_seed(0)
    teacher = Teacher(
        nn.Sequential(
            nn.Conv2d(3, 4, 5, 4),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        domain,
    )
    made = synthesizer_of(teacher, METHODS['dafl'], steps=2).synthesize(6)
    assert made.images.shape == (6, 3, 64, 64) and made.domain is domain
    with pytest.raises(DFKDError):
        synthesizer_of(teacher, METHODS['dfq'], student=network(1, domain))


class ChannelsLast(Generator):
    "A generator whose features, and with them its weights' gradients, lie channels last."

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.linear(z).view(len(z), -1, *self.begin)).to(
            memory_format=torch.channels_last
        )
        for block in self.blocks:
            x = block(F.interpolate(x, scale_factor=2, mode='nearest'))
        return self.last(x).sigmoid()


def test_gradients_in_another_order_of_memory_reach_their_own_weights() -> None:
    """A fused Adam reads a gradient in the order of memory; one that lies otherwise must be
    laid out like its weight.
    """
    teacher = load_teacher('cifar10-resnet20')
    synthesizers = []
    for fused in (True, False):
        torch.manual_seed(1)
        settings = {
            'batch_size': 4,
            'steps': 2,
            'class_weight': 1.0,
            'feature_weight': 1.0,
            'device': 'cpu',
        }
        synthesizer = GeneratorSynthesizer(
            teacher, generator=ChannelsLast((3, 32, 32), 8, 4), **settings
        )
        if not fused:
            synthesizer.optimizer = torch.optim.Adam(
                synthesizer.weights.values(),
                synthesizer.learning_rate,
                betas=(0.5, 0.999),
                fused=False,
            )
        synthesizer.synthesize(4)
        synthesizers.append(synthesizer)
    for name, weight in synthesizers[0].weights.items():
        # Adam's first steps are 1e-3 in some direction
        assert (weight - synthesizers[1].weights[name]).abs().max() < 2e-4, name
