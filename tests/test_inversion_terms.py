"""What terms may ask for (a student, an embedding, goals), distances without units, memory
foretold.
"""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from test_inversion import DIGITS, make, network
from torch import nn

from dfkd_nb.dreams.activation_matching import embedding_term
from dfkd_nb.dreams.extractor import FeatureExtractor
from dfkd_nb.dreams.inversion import DeepInversion, deepinversion_preset
from dfkd_nb.dreams.inversion_loss import compile_mode, relative_feature_term
from dfkd_nb.dreams.memory import activation_bytes, max_batch_size
from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.dreams.statistics import Statistics, Watch, feature_term
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.networks import capture_input
from dfkd_nb.toolbox.teachers import Teacher


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


def other():
    torch.manual_seed(7)
    return build_model('digits-net', 10, 1)


def seen(teacher, **settings):
    "The views that a term was given in two updates."
    views = []

    def term(inputs):
        views.append(inputs)
        return inputs.x.square().mean()

    synthesizer = make(teacher, steps=2, terms={'look': (1.0, term)}, **settings)
    return synthesizer, views


# student


def test_a_student_sees_what_the_teacher_saw(teacher):
    student = other()
    synthesizer, views = seen(teacher, student=student, jitter=0, flip=False)
    synthesizer.synthesize(4)
    x = views[0].x.detach()
    assert views[0].student_logits.requires_grad  # the image feels it
    first = make(teacher, steps=1)  # the same seed: the same noise
    first.start(4)
    noise = first._next_batch().x.detach()
    with torch.no_grad():
        torch.testing.assert_close(
            views[0].student_logits.detach(), student.eval()(DIGITS.from_pixels(noise))
        )
    assert x.shape == (4, 1, 8, 8)


def test_the_student_kept_is_a_frozen_copy(teacher):
    student = other()
    synthesizer, _ = seen(teacher, student=student)
    before = copy.deepcopy(synthesizer.student.state_dict())
    with torch.no_grad():
        next(student.parameters()).add_(1)
    student.train()
    synthesizer.synthesize(4)
    after = synthesizer.student.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert student.training and all(p.grad is None for p in student.parameters())
    synthesizer.compete_with(student)
    assert not torch.equal(
        next(iter(synthesizer.student.state_dict().values())), next(iter(before.values()))
    )


@pytest.mark.parametrize(
    'itself', [lambda t: t, lambda t: t.model, lambda t: copy.deepcopy(t.model)]
)
def test_a_competition_against_oneself_is_refused(teacher, itself):
    with pytest.raises(DFKDError, match='give another network'):
        make(teacher, student=itself(teacher))


def test_a_student_of_another_domain_is_refused(teacher):
    with pytest.raises(DFKDError, match='student'):
        make(teacher, student=build_model('resnet20'))


def test_a_checkpoint_knows_its_student(teacher, tmp_path):
    path = tmp_path / 'dream.pt'
    make(teacher, student=other()).synthesize(
        8, checkpoint=path, callback=lambda now: True, log_every=3
    )
    changed = other()
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    with pytest.raises(DFKDError, match='another teacher, student'):
        make(teacher, student=changed).synthesize(8, checkpoint=path)


# embedding and goals


@pytest.mark.parametrize('settings', [{}, {'feature_weight': 0.0}])
def test_the_embedding_is_what_enters_the_classifier(teacher, settings):
    synthesizer, views = seen(
        teacher, embedding='classifier', jitter=0, flip=False, **settings
    )
    synthesizer.synthesize(4)
    for inputs in views:
        assert inputs.embedding.shape == (4, 8) and inputs.embedding.requires_grad
        torch.testing.assert_close(teacher.model[-1](inputs.embedding), inputs.logits)


def test_target_embeddings_reach_their_images_batch_by_batch(teacher):
    target_embeddings = torch.arange(10.0)[:, None].expand(10, 8)
    synthesizer, views = seen(teacher, embedding='classifier', batch_size=4)
    synthesizer.synthesize(10, target_embeddings=target_embeddings)
    assert [inputs.target_embeddings[:, 0].tolist() for inputs in views[::2]] == [
        [0, 1, 2, 3],
        [4, 5, 6],
        [7, 8, 9],
    ]


def test_target_embeddings_have_a_gradient(teacher):
    images = torch.randint(
        0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    target_embeddings = teacher.embed(images)

    def distance(inputs):
        return (inputs.embedding - inputs.target_embeddings).square().sum(1).mean()

    settings = dict(
        class_weight=0.0,
        tv_l2=0.0,
        feature_weight=0.0,
        steps=60,
        jitter=0,
        flip=False,
        batch_size=6,
    )
    synthesizer = make(
        teacher, embedding='classifier', terms={'goal': (1.0, distance)}, **settings
    )
    found = synthesizer.synthesize(6, target_embeddings=target_embeddings)
    assert synthesizer.history[-1]['goal'] < 0.2 * synthesizer.history[0]['goal']
    near, far = (
        (teacher.embed(found.images) - g).norm(dim=1).mean()
        for g in (target_embeddings, target_embeddings.roll(1, 0))
    )
    assert near < far


@pytest.mark.parametrize('target_embeddings', [torch.zeros(3, 8), torch.zeros(4)])
def test_target_embeddings_of_the_wrong_shape_are_refused(teacher, target_embeddings):
    with pytest.raises(DFKDError, match='one vector an image'):
        make(teacher, embedding='classifier').synthesize(
            4, target_embeddings=target_embeddings
        )


def test_a_checkpoint_knows_its_target_embeddings(teacher, tmp_path):
    path = tmp_path / 'dream.pt'
    quick = dict(embedding='classifier', batch_size=4)
    make(teacher, **quick).synthesize(
        8,
        target_embeddings=torch.zeros(8, 8),
        checkpoint=path,
        callback=lambda now: True,
        log_every=3,
    )
    with pytest.raises(DFKDError, match='target embeddings'):
        make(teacher, **quick).synthesize(
            8, target_embeddings=torch.ones(8, 8), checkpoint=path
        )
    whole = make(teacher, **quick).synthesize(8, target_embeddings=torch.zeros(8, 8))
    rest = make(teacher, **quick).synthesize(
        8, target_embeddings=torch.zeros(8, 8), checkpoint=path
    )
    assert torch.equal(whole.images, rest.images)


def test_an_unknown_embedding_is_told_at_once(teacher):
    with pytest.raises(DFKDError, match="no layer 'avgpool'"):
        make(teacher, embedding='avgpool')


# distances without units


def loss_of(model, x):
    statistics = Statistics.from_batchnorm(model)
    with torch.no_grad(), Watch(model) as watch:
        logits = model(x)
    inputs = LossInputs(x, logits, torch.zeros(len(x)), watch.moments)
    return (
        logits,
        feature_term(statistics)(inputs),
        relative_feature_term(statistics)(inputs),
    )


def test_changed_units_change_the_absolute_distance_and_not_the_relative_one():
    model, x = network(), torch.randn(16, 1, 8, 8)
    louder = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (0, 3):
            louder[layer].weight *= 10
            louder[layer].bias *= 10
            louder[layer + 1].running_mean *= 10
            louder[layer + 1].running_var.mul_(100).add_(99e-5)
    before, after = loss_of(model, x), loss_of(louder, x)
    torch.testing.assert_close(before[0], after[0], rtol=1e-4, atol=1e-4)
    assert after[1] > 20 * before[1]
    torch.testing.assert_close(before[2], after[2], rtol=1e-2, atol=0)


def test_the_relative_distance_by_hand_and_its_gradient():
    statistics = Statistics(
        {
            'a': (torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0])),
            'b': (torch.zeros(1), torch.ones(1)),
        }
    )
    term = relative_feature_term(statistics, first_layer_weight=3.0, floor=0.0)

    def value(mean, var):
        features = {'a': (mean, var), 'b': (torch.tensor([2.0]), torch.ones(1))}
        return term(LossInputs(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1), features))

    # layer a: z-scores 1 and 2, ratios 2 and 1; layer b: z-score 2
    wanted = 3 * ((5 / 2) ** 0.5 + (1 / 2) ** 0.5) + 2
    assert float(
        value(torch.tensor([3.0, 2.0]), torch.tensor([8.0, 1.0]))
    ) == pytest.approx(wanted, rel=1e-6)
    mean = torch.tensor([1.0, 0.0], requires_grad=True)
    # at its minimum
    assert (
        torch.autograd.grad(value(mean, torch.tensor([4.0, 1.0])), mean)[0].isfinite().all()
    )


def test_a_dead_channel_does_not_rule_a_layer():
    statistics = Statistics({'a': (torch.zeros(10), torch.tensor([1e-30] + [1.0] * 9))})
    inputs = LossInputs(
        torch.zeros(1),
        torch.zeros(1, 2),
        torch.zeros(1),
        {'a': (torch.zeros(10), torch.tensor([1e-3] + [1.0] * 9))},
    )
    assert float(relative_feature_term(statistics)(inputs)) < 1


def test_the_scale_is_a_setting(teacher):
    a, b = make(teacher), make(teacher, feature_scale='relative')
    assert not torch.equal(a.synthesize(4).images, b.synthesize(4).images)
    with pytest.raises(DFKDError, match='absolute or relative'):
        make(teacher, feature_scale='metric')
    synthesizer = make(teacher, **deepinversion_preset('deepinversion', 'imagenet'))
    assert (
        synthesizer.settings['feature_scale'] == 'relative'
        and synthesizer.settings['first_layer_weight'] == 3.0
    )


# memory


def test_memory_is_counted_by_hand():
    """One convolution without BatchNorm.

    Its input is needed only for weights, which are frozen; the ReLU keeps its output.
    """
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    ]
    model = nn.Sequential(*layers)
    synthesizer = DeepInversion(
        Teacher(model, DIGITS), steps=1, feature_weight=0.0, tv_l2=0.0, l2=0.0, device='cpu'
    )
    each = activation_bytes(synthesizer, 3) - activation_bytes(synthesizer, 2)
    relu = 4 * 8 * 8 * 4  # channels, height, width, bytes
    assert relu <= each <= relu + 1024  # the pixels and some logits besides


def test_what_fits_fits(teacher):
    synthesizer = make(teacher)
    for gigabytes in (0.001, 0.01):
        count = max_batch_size(synthesizer, gigabytes)
        assert (
            1.35 * activation_bytes(synthesizer, count)
            <= gigabytes * 1e9
            < 1.35 * activation_bytes(synthesizer, count + 2)
        )
    with pytest.raises(DFKDError, match='give more memory'):
        max_batch_size(synthesizer, 1e-6)
    synthesizer.synthesize(4)  # counting has changed nothing
    assert len(synthesizer.images) == 4


# two networks, two normalisations


@pytest.mark.parametrize('given', ['a domain', 'a teacher', 'later'])
def test_a_student_of_another_normalisation_predicts_as_it_does_outside(teacher, given):
    "Both see one set of pixels, each on its own scale."
    student, theirs = other().eval(), replace(DIGITS, mean=(0.0,), std=(1.0,))
    words = {
        'a domain': {'student': student, 'student_domain': theirs},
        'a teacher': {'student': Teacher(student, theirs)},
    }
    synthesizer, views = seen(teacher, jitter=0, flip=False, **words.get(given, {}))
    if given == 'later':
        synthesizer.compete_with(other())
        synthesizer.compete_with(student, theirs)
    synthesizer.start(4)
    noise = synthesizer._next_batch().x.detach()
    synthesizer.step()
    inside = views[0].student_logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(inside, student(theirs.from_pixels(noise)))
        torch.testing.assert_close(
            views[0].logits.detach(),
            teacher(DIGITS.from_pixels(noise)),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_student_of_other_images_or_classes_is_refused(teacher):
    for changes in (
        {'shape': (1, 9, 9)},
        {'classes': tuple('abc')},
        {'classes': (*DIGITS.classes[1:], '0')},
    ):
        with pytest.raises(DFKDError) as caught:
            make(teacher, student=other(), student_domain=replace(DIGITS, **changes))
        assert '\n' not in str(caught.value)


def test_a_checkpoint_knows_the_students_normalisation(teacher, tmp_path):
    path, theirs = tmp_path / 'dream.pt', replace(DIGITS, mean=(0.0,), std=(1.0,))
    make(teacher, student=other()).synthesize(
        8, checkpoint=path, callback=lambda now: True, log_every=3
    )
    with pytest.raises(DFKDError, match='another teacher, student'):
        make(teacher, student=other(), student_domain=theirs).synthesize(8, checkpoint=path)


# compiled


@pytest.mark.parametrize(
    'kind', ['plain', 'embedding', 'embedding alone', 'student', 'relative']
)
def test_the_loss_compiles_as_one_graph(teacher, kind):
    "Whatever the terms ask for: each break would cost a launch and a guard an update."
    settings: dict = {}
    if 'embedding' in kind:
        settings |= {'embedding': 'classifier', 'terms': {'e': (1.0, embedding_term)}}
    if kind == 'embedding alone':
        settings |= {'feature_weight': 0.0}
    if kind == 'student':
        settings['student'] = other()
    if kind == 'relative':
        settings |= {'feature_scale': 'relative', 'first_layer_weight': 10.0}
    loss = make(teacher, **settings).loss
    x = torch.randn(4, *DIGITS.shape, requires_grad=True)
    given = x, x, torch.arange(4), torch.randn(4, 8)
    torch._dynamo.reset()
    found = torch._dynamo.explain(loss.compute)(*given)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_cuda_compiles_to_a_graph_of_its_own():
    assert compile_mode(torch.device('cuda', 1)) == 'reduce-overhead'
    assert compile_mode(torch.device('cpu')) is None


def test_losses_outlive_the_memory_of_a_graph(teacher):
    "The next update writes over what a CUDA graph returned."
    loss = make(teacher).loss
    kept, x = torch.zeros(3), torch.zeros(1)
    loss.graphed, loss._call = True, lambda *_: (kept.sum(), kept)
    _, values = loss(x, x, x)
    kept += 1
    assert torch.equal(values, torch.zeros(3))


def test_an_embedding_leaves_no_hook_in_the_teacher(teacher):
    "Alone, in a copy of the network; what it is stays what it was."
    x = DIGITS.from_pixels(torch.randn(3, *DIGITS.shape))
    with capture_input(teacher, 'classifier') as taken:
        teacher(x)
    for statistics in (None, Statistics.from_batchnorm(teacher)):
        extractor = FeatureExtractor(teacher, statistics, embedding='classifier')
        torch.testing.assert_close(extractor(x)[2], taken[0])
        torch.testing.assert_close(copy.deepcopy(extractor)(x)[2], taken[0])
        assert extractor.capture.taken is None  # keeps no graph alive
    assert not any(m._forward_pre_hooks for m in teacher.modules())


# order of memory


@pytest.mark.parametrize('kind', ['any order', 'usual order'])
def test_the_order_of_memory_is_the_networks_choice(kind):
    colour = replace(DIGITS, shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    inner = tiny.network(domain=colour)

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.view(-1, 64 * 3).view(x.shape))

    teacher = Teacher(Viewing() if kind == 'usual order' else inner, colour)
    extractor = FeatureExtractor(teacher, Statistics.from_batchnorm(teacher))
    wanted = torch.channels_last if kind == 'any order' else torch.contiguous_format
    assert extractor.layout == wanted
    x = torch.randn(4, 3, 8, 8)
    logits, moments, _ = extractor(x)
    with Watch(teacher) as watch:
        torch.testing.assert_close(logits, teacher(x))
    for name, pair in watch.moments.items():
        torch.testing.assert_close(moments[name], pair)
