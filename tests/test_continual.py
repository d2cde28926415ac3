"""Continual learning: layers that grow and layers that cannot, a loss in parts, steps that
resume, borders that are counted.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfkd_nb.applications.class_growth import (
    classifier_to_extend,
    extend_classifier,
    wider_domain,
)
from dfkd_nb.applications.class_sets import (
    balanced,
    concatenate,
    first_class_of,
    only_classes,
    renumber_labels,
)
from dfkd_nb.applications.continual import (
    CONTINUAL_LOSSES,
    ContinualDistiller,
    ContinualLoss,
    add_classes,
    binary_trainer,
    conditional_loss,
    generated_images,
    log_class_mass,
    lwf_mc_loss,
    memory_loss,
    old_images,
    replay_generator,
    step_schedule,
)
from dfkd_nb.applications.continual_metrics import (
    TaskAccuracies,
    forgetting,
    task_accuracies,
)
from dfkd_nb.lab.recipes import Recipe
from dfkd_nb.lab.runs import Run
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.core import load_checkpoint, save_checkpoint
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import ImageFiles
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError, RunStopped
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher

DIGITS = DOMAINS['digits']
OLD = replace(DIGITS, classes=('a', 'b', 'c'))
NEW = replace(DIGITS, classes=('d', 'e'))


def network(outputs=3, seed=0):
    "A convolution, a BatchNorm that has seen something, a last layer."
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, outputs),
    )
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(32, 1, 8, 8))
    return model.eval()


def pictures(domain, count=24, seed=0):
    images = torch.randint(
        256,
        (count, *domain.shape),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    return ImageSet(images, torch.arange(count) % domain.num_classes, domain)


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), OLD, 'tiny')


# --- room for new answers


@pytest.mark.parametrize(
    'name',
    ['resnet20', 'wrn16-1', 'torchvision:squeezenet1_1', 'torchvision:mobilenet_v3_small'],
)
def test_any_network_grows_and_keeps_its_old_rows(name):
    domain = replace(DOMAINS['cifar10'], shape=(3, 64, 64) if ':' in name else (3, 32, 32))
    model = build_model(name, 10).eval()
    layer = classifier_to_extend(model, domain)
    grown, wider = extend_classifier(model, ('x', 'y'), domain, seed=3)
    before, after = model.get_submodule(layer), grown.get_submodule(layer)
    assert (
        after.weight.shape[0] == 12
        and wider.num_classes == 12
        and wider.classes[-2:] == ('x', 'y')
    )
    assert torch.equal(after.weight[:10], before.weight) and torch.equal(
        after.bias[:10], before.bias
    )
    assert before.weight.shape[0] == 10 and all(p.requires_grad for p in grown.parameters())
    others = {k: v for k, v in model.state_dict().items() if not k.startswith(layer)}
    assert all(torch.equal(v, grown.state_dict()[k]) for k, v in others.items())


def test_new_rows_are_the_seeds_and_leave_the_random_stream_alone(teacher):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, other, third = (
        extend_classifier(teacher, NEW.classes, seed=s)[0][-1].weight for s in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, other) and not torch.equal(one, third)


class Wrapped(nn.Module):
    "Calls what it is given."

    def __init__(self, rule, **parts):
        super().__init__()
        self.rule = rule
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.rule(self, x.flatten(1))


def tied():
    model = Wrapped(
        lambda m, x: m.last(x) + 0 * m.first(x),
        first=nn.Linear(64, 3),
        last=nn.Linear(64, 3),
    )
    model.first.weight = model.last.weight
    return Wrapped(
        lambda m, x: m.inner.last(m.inner.first.weight.sum() * 0 + x), inner=model
    )


def twice():
    return Wrapped(lambda m, x: m.last(x) + m.last(0.5 * x), last=nn.Linear(64, 3))


def two_names():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model.alias = model[1]
    return Wrapped(lambda m, x: m.inner[1](x), inner=model)


def computed():
    return nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 3))
    )


def scaled():
    model = Wrapped(lambda m, x: m.last(x) * m.scale, last=nn.Linear(64, 3))
    model.scale = nn.Parameter(torch.ones(3))
    return model


def centred():
    return Wrapped(
        lambda m, x: (lambda y: y - y.mean(1, keepdim=True))(m.last(x)),
        last=nn.Linear(64, 3),
    )


def headless():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@each(
    ('build', 'words'),
    [
        (tied, "shares its weights with 'inner.first"),
        (twice, 'is used 2 times'),
        (two_names, "shares its weights with 'inner.alias"),
        (computed, 'parametrisation'),
        (scaled, 'is not the last layer'),
        (centred, 'change the old logits'),
        (headless, 'cannot be found'),
        (
            lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 7), nn.AdaptiveAvgPool1d(3)
            ),
            'comes last, with 7 outputs',
        ),
    ],
)
def test_what_cannot_be_widened_says_so(build, words):
    with pytest.raises(DFKDError, match=words) as caught:
        extend_classifier(build(), NEW.classes, OLD)
    assert '\n' not in str(caught.value)


@each(
    ('classes', 'words'),
    [
        (('d', 'b'), "'b' exists already"),
        (('d', 'd'), 'named twice'),
        ((), 'at least one name'),
        ('de', 'at least one name'),
    ],
)
def test_new_names_have_to_be_new(classes, words, teacher):
    with pytest.raises(DFKDError, match=words):
        extend_classifier(teacher, classes)


def test_a_layer_can_be_named(teacher):
    assert extend_classifier(teacher, ('d',), layer='5')[0][-1].out_features == 4
    for layer, words in (
        ('6', "no layer '6'"),
        ('0', 'only a linear layer'),
        ('2', 'only a linear layer'),
    ):
        with pytest.raises(DFKDError, match=words):
            extend_classifier(teacher, ('d',), layer=layer)
    with pytest.raises(DFKDError, match='give a domain'):
        extend_classifier(network(), ('d',))


def test_wider_domains_keep_their_numbers():
    assert wider_domain(OLD, NEW.classes) == replace(OLD, classes=('a', 'b', 'c', 'd', 'e'))


# --- the loss


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0.5, 8.0), st.integers(0, 10**6))
def test_memory_is_the_papers_padded_divergence_and_falls_into_two_parts(
    old, new, temperature, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits, old_logits = (
        3 * torch.randn(5, old + new, generator=generator).double(),
        3 * torch.randn(5, old, generator=generator).double(),
    )
    padded = torch.cat([(old_logits / temperature).softmax(1), torch.zeros(5, new)], 1)
    reference = (
        F.kl_div((logits / temperature).log_softmax(1), padded, reduction='batchmean')
        * temperature**2
    )
    assert torch.allclose(
        memory_loss(logits, old_logits, temperature), reference, atol=1e-9
    )
    boundary = (
        -(logits / temperature).softmax(1)[:, :old].sum(1).log().mean() * temperature**2
    )
    assert torch.allclose(
        memory_loss(logits, old_logits, temperature)
        - conditional_loss(logits, old_logits, temperature),
        boundary,
        atol=1e-9,
    )


def test_the_conditional_term_has_no_opinion_on_new_classes():
    logits = torch.randn(4, 5, requires_grad=True)
    slope = torch.autograd.grad(conditional_loss(logits, torch.randn(4, 3)), logits)[0]
    assert (
        torch.equal(slope[:, 3:], torch.zeros(4, 2))
        and slope[:, :3].sum(1).abs().max() < 1e-6
    )


def test_losses_hold_at_extremes_and_refuse_networks_that_did_not_grow():
    far = torch.tensor([[900.0, 0.0, -900.0]], requires_grad=True)
    for value in (
        memory_loss(far, torch.tensor([[-900.0, 900.0]])),
        -log_class_mass(far, 2).mean(),
    ):
        assert (
            value.isfinite()
            and torch.autograd.grad(value, far, retain_graph=True)[0].isfinite().all()
        )
    with pytest.raises(DFKDError, match='more outputs'):
        conditional_loss(torch.zeros(1, 3), torch.zeros(1, 3))


def test_binary_loss_is_the_sum_over_classes():
    logits = torch.randn(6, 5)
    old_logits = torch.randn(6, 3)
    labels = torch.tensor([3, 4, 3, 3, 4, 4])
    targets = torch.cat([old_logits.sigmoid(), F.one_hot(labels - 3, 2).float()], 1)
    by_hand = (
        -(targets * logits.sigmoid().log() + (1 - targets) * (1 - logits.sigmoid()).log())
        .sum(1)
        .mean()
    )
    assert torch.allclose(lwf_mc_loss(logits, old_logits, labels), by_hand, atol=1e-5)


def test_the_schedule_falls_four_times():
    factors = [step_schedule(i, 600) for i in range(600)]
    assert sorted({round(f, 9) for f in factors}, reverse=True) == [
        1.0,
        0.2,
        0.04,
        0.008,
        0.0016,
    ]
    assert [factors.index(f) for f in sorted(set(factors), reverse=True)] == [
        0,
        200,
        300,
        400,
        500,
    ]


# --- the distiller


def learner(teacher, method='deepinversion', seed=0, **settings):
    old = pictures(OLD, 30, 1) if CONTINUAL_LOSSES[method].on_old else None
    return add_classes(
        teacher,
        pictures(NEW),
        method,
        old,
        seed=seed,
        **{'steps': 12, 'batch_size': 8, 'learning_rate': 0.3, 'device': 'cpu'} | settings,
    )


@pytest.mark.parametrize('method', CONTINUAL_LOSSES)
def test_every_method_resumes_to_the_same_bits(method, teacher, tmp_path):
    whole = learner(teacher, method, augment=Augment(1, False)).run(log_every=5)
    half = learner(teacher, method, augment=Augment(1, False)).run(until=7, log_every=5)
    save_checkpoint(tmp_path / 'state.pt', half.state_dict())
    rest = learner(teacher, method, seed=9, augment=Augment(1, False))
    rest.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    rest.run(log_every=5)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.student.state_dict().values(),
            rest.student.state_dict().values(),
            strict=True,
        )
    )
    assert whole.history == rest.history and set(whole.history[-1]) >= {'loss', 'new'}


def same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_student_with_dropout_resumes_to_the_same_bits(teacher, tmp_path):
    "Whatever else draws from the global stream in between."

    def begin(new):
        torch.manual_seed(3)
        student = nn.Sequential(*network(5)[:5], nn.Dropout(0.5), nn.Linear(6, 5))
        domain = replace(OLD, classes=OLD.classes + NEW.classes)
        usual = {
            'steps': 10,
            'batch_size': 8,
            'learning_rate': 0.3,
            'device': 'cpu',
            'seed': 1,
        }
        return ContinualDistiller(
            teacher,
            student,
            renumber_labels(new, domain),
            pictures(OLD, 30, 1),
            domain=domain,
            **usual,
        )

    new = pictures(NEW)  # one set, three consumers
    whole, half = begin(new).run(), begin(new).run(until=4)
    save_checkpoint(tmp_path / 'state.pt', half.state_dict())
    torch.rand(7)
    rest = begin(new)
    rest.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    rest.run()
    assert same(whole.student, rest.student) and not same(whole.student, half.student)


def test_student_and_teacher_see_one_image_each_on_its_own_scale(teacher):
    """A teacher that expects other numbers, and answers alike, teaches alike.

    Terms and fitted rows.
    """
    other = replace(OLD, mean=(0.0,), std=(1.0,))

    class Rescaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(other.renormalize(x, OLD))

    wider, made = replace(OLD, classes=OLD.classes + NEW.classes), []
    for old_teacher in (teacher, Teacher(Rescaled(), other, 'rescaled')):
        student, _ = extend_classifier(teacher, NEW.classes, seed=0)
        usual = {
            'steps': 3,
            'batch_size': 8,
            'learning_rate': 0.1,
            'device': 'cpu',
            'domain': wider,
        }
        made.append(
            ContinualDistiller(
                old_teacher,
                student,
                renumber_labels(pictures(NEW), wider),
                pictures(OLD, 30, 1),
                **usual,
            )
        )
        made[-1].init_new_classes('5')
        made[-1].run()
    for one, again in zip(
        made[0].student.parameters(), made[1].student.parameters(), strict=True
    ):
        torch.testing.assert_close(one, again, rtol=1e-3, atol=1e-4)


def test_the_callers_student_keeps_its_flags_and_has_no_hooks(teacher):
    made = learner(teacher).run(until=3)
    assert all(p.requires_grad for p in made.student.parameters()), (
        'BatchNorm is frozen by its gradients, not by flags'
    )
    for module in made.student.modules():
        assert (
            not module._forward_hooks
            and not module._forward_pre_hooks
            and not module._backward_hooks
        )


def test_what_holds_no_images_says_how_to_make_a_set(teacher):
    new = pictures(NEW)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(new.images, new.labels)
    )
    acts = [
        lambda images: add_classes(teacher, images, 'lwf', steps=1),
        lambda images: renumber_labels(images, OLD),
        lambda images: task_accuracies(teacher, OLD, {'new': images}),
        lambda images: balanced(images, 2),
        lambda images: only_classes(images, [0]),
        lambda images: add_classes(teacher, new, 'deepinversion', images, steps=1),
    ]
    for images in (loader, loader.dataset, [new.images], None, new.images):
        # what stands for old images has the old network's domain, if it is a collection
        for act in acts if images is None else acts[:-1]:
            with pytest.raises(DFKDError, match='ImageS(et|ource)|give `old`') as caught:
                act(images)
            assert '\n' not in str(caught.value)


def test_old_labels_have_to_number_the_same_classes(teacher):
    swapped = replace(OLD, classes=('b', 'a', 'c'))
    with pytest.raises(DFKDError, match="'b' is class 0"):
        add_classes(teacher, pictures(NEW), 'oracle-classify', pictures(swapped), steps=1)


def test_batchnorm_stays_and_everything_else_moves(teacher):
    done = learner(teacher).run()
    before, after = teacher.model.state_dict(), done.student.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith('1.'))
    assert not torch.equal(before['0.weight'], after['0.weight']) and not torch.equal(
        before['5.weight'], after['5.weight'][:3]
    )
    free = learner(teacher, freeze_batchnorm=False).run()
    assert not torch.equal(
        before['1.running_mean'], free.student.state_dict()['1.running_mean']
    )


def test_gradients_are_clipped_and_the_step_size_falls(teacher):
    done, seen = learner(teacher, steps=6, max_grad_norm=0.01), []
    done.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.stack(
                [p.grad.norm() for p in done.student.parameters() if p.grad is not None]
            )
            .norm()
            .item()
        )
    )
    done.run(log_every=1)
    assert max(seen) <= 0.01 + 1e-6
    assert [row['learning_rate'] for row in done.history] == pytest.approx(
        [0.3 * step_schedule(i, 6) for i in range(6)]
    )
    assert [
        row['learning_rate']
        for row in learner(teacher, steps=3, schedule='constant').run(log_every=1).history
    ] == [0.3] * 3


def test_one_pass_over_both_batches_is_two_passes(teacher):
    made = learner(teacher, max_grad_norm=0.0)
    images, labels = made.sampler.sample(8, made.generator)
    state = made.state_dict()
    generator, position = made.generator.get_state().clone(), copy.deepcopy(state['old'])
    made.student.train()
    total, parts = made.loss(images, labels)
    made.generator.set_state(generator)
    made.old_sampler.load_state_dict(position)
    old, _ = made.old_sampler.sample(8, made.generator)
    made.student.eval()
    x, z = made.domain.normalize(images), made.domain.normalize(old)
    expected = (
        F.cross_entropy(made.student(x), labels)
        + conditional_loss(made.student(x), teacher(x))
        + memory_loss(made.student(z), teacher(z))
    )
    assert torch.allclose(total, expected, atol=1e-5) and set(parts) == {
        'new',
        'conditional',
        'memory',
    }


def test_what_a_step_needs_is_told(teacher):
    new, old = pictures(NEW), pictures(OLD)
    cases = [
        (
            lambda: add_classes(teacher, new, 'deepinversion', steps=2),
            'need images of old classes',
        ),
        (
            lambda: add_classes(teacher, new, 'dreams', old, steps=2),
            "unknown method 'dreams'",
        ),
        (
            lambda: add_classes(
                teacher, new, 'oracle-classify', ImageSet(old.images, None, OLD), steps=2
            ),
            'no labels',
        ),
        (
            lambda: add_classes(teacher, ImageSet(new.images, None, NEW), 'lwf', steps=2),
            'no labels',
        ),
        (lambda: add_classes(teacher, old, 'lwf', steps=2), 'exists already'),
        (
            lambda: add_classes(
                teacher, new, 'deepinversion', pictures(DOMAINS['cifar10']), steps=2
            ),
            'resize them',
        ),
        (lambda: add_classes(teacher, new, 'lwf', steps=2, mixup_alpha=1.0), 'mixup'),
        (
            lambda: add_classes(teacher, new, 'lwf', steps=2, max_grad_norm=-1.0),
            'max_grad_norm is -1.0',
        ),
        (
            lambda: add_classes(teacher, new, 'lwf', steps=2, row_init='zero'),
            'unknown row_init',
        ),
        (
            lambda: ContinualDistiller(
                teacher, network(), pictures(OLD), None, domain=OLD, losses='lwf', steps=2
            ),
            'extend it first',
        ),
        (
            lambda: ContinualDistiller(
                teacher,
                network(),
                pictures(OLD),
                None,
                domain=OLD,
                losses=ContinualLoss('dreams'),
                steps=2,
            ),
            'unknown words',
        ),
    ]
    for act, words in cases:
        with pytest.raises(DFKDError, match=words):
            act()


def test_fitted_rows_leave_the_rest_alone_and_cost_less(teacher):
    random, fitted = (learner(teacher, row_init=init) for init in ('random', 'fitted'))
    for name, value in random.student.state_dict().items():
        other = fitted.student.state_dict()[name]
        assert (
            torch.equal(value[:3], other[:3])
            if name.startswith('5.')
            else torch.equal(value, other)
        )
    cost = []
    for made in (random, fitted):
        made.student.eval()
        x = made.domain.normalize(made.source.images)
        z = made.domain.normalize(made.old.images)
        with torch.no_grad():
            cost.append(
                float(
                    F.cross_entropy(made.student(x), made.source.labels)
                    + conditional_loss(made.student(x), teacher(x))
                    + memory_loss(made.student(z), teacher(z))
                )
            )
    assert cost[1] < cost[0]


def test_decay_keeps_fitted_rows_small(teacher):
    sizes = [
        learner(teacher, 'lwf-mc', row_init='fitted', row_init_decay=decay)
        .student[5]
        .weight[3:]
        .norm()
        .item()
        for decay in (1e-4, 1e-2, 1.0)
    ]
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2]


def test_binary_training_teaches_yes_and_no(teacher):
    bright = pictures(OLD, 60)
    bright = ImageSet(
        (bright.images // 8 + 80 * bright.labels.view(-1, 1, 1, 1).byte()),
        bright.labels,
        OLD,
    )
    made = binary_trainer(
        teacher, bright, steps=60, batch_size=20, learning_rate=0.1, device='cpu'
    ).run(log_every=20)
    assert made.history[-1]['binary'] < 0.8 * made.history[0]['binary']
    assert torch.equal(teacher.model[-1].weight, network()[-1].weight)


# --- images, sets, measures


def test_sets_are_found_by_the_names_of_their_classes():
    all_of_them = wider_domain(OLD, NEW.classes)
    assert (
        first_class_of(('a', 'b'), all_of_them),
        first_class_of(NEW.classes, all_of_them),
    ) == (0, 3)
    assert renumber_labels(pictures(NEW, 4), all_of_them).labels.tolist() == [3, 4, 3, 4]
    assert concatenate(
        [pictures(OLD, 3), pictures(NEW, 2)], all_of_them
    ).labels.tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert renumber_labels(
        ImageFiles([b'', b''], torch.tensor([0, 1]), NEW), all_of_them
    ).labels.tolist() == [3, 4]
    for classes in (('b', 'a'), ('a', 'x'), ('c', 'd', 'e', 'f')):
        with pytest.raises(DFKDError, match='are not among'):
            first_class_of(classes, all_of_them)


def test_parts_of_a_set_are_numbered_from_zero():
    part = only_classes(pictures(DIGITS, 40), (7, 2))
    assert (
        part.domain.classes == ('7', '2')
        and part.labels.unique().tolist() == [0, 1]
        and len(part) == 8
    )
    for bad in ((), (10,), (1, 1), (-1,)):
        with pytest.raises(DFKDError, match='different numbers'):
            only_classes(pictures(DIGITS, 40), bad)


def test_a_balanced_choice_is_balanced():
    images = pictures(OLD, 30)
    uneven = ImageSet(
        torch.cat([images.images, images.images[:1].expand(50, -1, -1, -1)]),
        torch.cat([images.labels, torch.zeros(50, dtype=torch.long)]),
        OLD,
    )
    assert balanced(uneven, 15).labels.bincount().tolist() == [5, 5, 5]
    assert balanced(uneven, 50).labels.bincount().tolist() == [30, 10, 10]
    assert not torch.equal(balanced(uneven, 15, 0).images, balanced(uneven, 15, 1).images)
    with pytest.raises(DFKDError, match='31 of 30'):
        balanced(images, 31)


def test_what_stands_for_old_images_is_what_the_method_says(teacher):
    real = pictures(OLD, 30)
    assert (
        old_images(teacher, 'lwf-mc', 5) is None
        and old_images(teacher, 'fine-tuning', 5) is None
    )
    dreams = old_images(teacher, 'deepinversion', 6, steps=2, jitter=1, device='cpu')
    assert dreams.labels.tolist() == [0, 1, 2, 0, 1, 2] and dreams.domain == OLD
    assert not torch.equal(
        dreams.images,
        old_images(teacher, 'deepdream', 6, steps=2, jitter=1, device='cpu').images,
    )
    assert old_images(
        teacher, 'oracle-classify', 6, real=real
    ).labels.bincount().tolist() == [2, 2, 2]
    one, two = (
        old_images(
            teacher,
            'generator',
            6,
            rounds=2,
            batch_size=8,
            latent_size=8,
            width=4,
            seed=s,
            device='cpu',
        )
        for s in (1, 1)
    )
    assert (
        torch.equal(one.images, two.images)
        and len(one) == 6
        and torch.equal(one.labels, teacher.predict(one.images).argmax(1))
    )
    with pytest.raises(DFKDError, match='real old images'):
        old_images(teacher, 'oracle-distill', 6)


def test_a_generator_makes_the_same_images_from_the_same_seed(teacher):
    synthesizer = replay_generator(
        teacher, latent_size=8, width=4, batch_size=8, device='cpu'
    )
    assert torch.equal(
        generated_images(synthesizer, 7, 3).images,
        generated_images(synthesizer, 7, 3).images,
    )
    assert not torch.equal(
        generated_images(synthesizer, 7, 3).images,
        generated_images(synthesizer, 7, 4).images,
    )


class Table(nn.Module):
    "Answers each image with what stands in its first pixel."

    def forward(self, x):
        return F.one_hot((OLD.denormalize(x)[:, 0, 0, 0] * 255).round().long(), 5).float()


def marked(domain, answers, labels):
    images = torch.zeros(len(answers), 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(answers, dtype=torch.uint8)
    return ImageSet(images, torch.tensor(labels), domain)


def test_measures_by_hand():
    tests = {
        'old': marked(OLD, [0, 1, 3, 4], [0, 1, 2, 0]),
        'new': marked(NEW, [3, 3, 0, 4], [0, 1, 0, 1]),
    }
    found = task_accuracies(Table(), wider_domain(OLD, NEW.classes), tests)
    assert found.accuracy == (0.5, 0.5) and found.combined == 0.5
    assert found.confusion == ((0.5, 0.5), (0.25, 0.75))
    # told that it is new, the third image's even zeros name the first class
    assert found.within[1] == 0.75
    only_old = task_accuracies(
        Table(), wider_domain(OLD, NEW.classes), {'old': tests['old']}
    )
    # what is put elsewhere belongs to no set that is looked at
    assert only_old.confusion == ((0.5,),)
    with pytest.raises(DFKDError, match='are not among'):
        task_accuracies(Table(), OLD, tests)


def test_forgetting_is_the_fall_from_the_best():
    def step(**accuracy):
        return TaskAccuracies(
            tuple(accuracy), tuple(accuracy.values()), tuple(accuracy.values()), ()
        )

    lost = forgetting([step(a=0.9), step(a=0.95, b=0.8), step(a=0.7, b=0.85, c=0.6)])
    assert lost == pytest.approx({'a': 0.25, 'b': -0.05})
    with pytest.raises(DFKDError, match='empty history'):
        forgetting([])


def test_two_steps_end_with_all_classes(teacher):
    first = learner(teacher, steps=3).run().as_teacher()
    last = replace(DIGITS, classes=('f',))
    second = add_classes(
        first,
        pictures(last),
        'deepinversion',
        old_images(first, 'deepinversion', 10, steps=2, device='cpu'),
        steps=3,
        batch_size=8,
        device='cpu',
    ).run()
    assert second.domain.classes == ('a', 'b', 'c', 'd', 'e', 'f')
    sets = task_accuracies(
        second.student,
        second.domain,
        {'one': pictures(OLD), 'two': pictures(NEW), 'three': pictures(last)},
    )
    assert len(sets.accuracy) == 3 and all(
        abs(sum(row) - 1) < 1e-6 for row in sets.confusion
    )


# --- the task

TOY = """
title = "toy"
task = "continual"
[quick]
old_model = "digits-net"
old_data = "digits:0-2"
old_epochs = 1.0
old_limit = 300
test_data = "digits:0-2"
new_data = ["digits:3-4", "digits:9-9"]
new_tests = ["digits:3-4", "digits:9-9"]
methods = ["lwf-mc", "deepinversion", "generator"]
images = 12
synthesis_steps = 3
synthesis_batch_size = 12
generator_rounds = 2
generator_batch_size = 8
binary_tuning_steps = 2
binary_steps = 6
row_init_decay = 0.1
row_init = "fitted"
batch_size = 8
steps = 4
learning_rate = 0.2
padding = 1
flip = false
evaluations = 1
"""


def test_a_run_of_two_steps_stops_and_resumes_to_the_same_numbers(tmp_path, monkeypatch):
    recipe = Recipe.parse(TOY, 'toy')
    whole = Run(
        recipe,
        'quick',
        out=tmp_path / 'whole',
        results=tmp_path / 'r',
        quiet=True,
        device='cpu',
    ).start()
    ticks = []

    def asked(run):
        ticks.append(run)
        return len(ticks) % 5 == 0

    monkeypatch.setattr(Run, 'asked_to_stop', property(asked))
    stops = 0
    while True:
        again = Run(
            recipe,
            'quick',
            out=tmp_path / 'parts',
            results=tmp_path / 's',
            quiet=True,
            device='cpu',
        )
        try:
            result = again.start(resume=True)
            break
        except RunStopped:
            stops += 1
    assert stops >= 2 and result.numbers == whole.numbers
    table = next((tmp_path / 'r').rglob('history.csv')).read_text().splitlines()
    last = {row.split(',')[0]: int(row.split(',')[2]) for row in table[1:]}
    # a length of its own
    assert last['lwf-mc 2'] == 6 and last['deepinversion 2'] == last['generator 1'] == 4
    steps = whole.numbers['steps']
    assert set(steps) == {'lwf-mc', 'deepinversion', 'generator'}
    assert [row['names'] for row in steps['deepinversion']] == [
        ['old'],
        ['old', 'digits:3-4'],
        ['old', 'digits:3-4', 'digits:9-9'],
    ]
    assert (
        whole.numbers['accuracy']
        == steps['deepinversion'][-1]['combined']
        == whole.numbers['combined_deepinversion']
    )


def test_a_recipe_whose_lists_do_not_match_is_told(tmp_path):
    for line, words in (
        ('new_tests = ["digits:3-4"]', 'as many to test on'),
        ('methods = ["magic"]', "unknown method 'magic'"),
        ('new_data = ["digits:0-1", "digits:9-9"]', 'exists already'),
    ):
        rows = [
            row for row in TOY.splitlines() if row.split(' = ')[0] != line.split(' = ')[0]
        ]
        recipe = Recipe.parse('\n'.join([*rows, line]), 'toy')
        with pytest.raises(DFKDError, match=words):
            Run(recipe, 'quick', out=tmp_path / words[:4], quiet=True, device='cpu').start()
