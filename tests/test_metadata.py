"""Metadata's contract: moments, files, refusals, goals that are reached, and an honest
account of what is given away.
"""

import dataclasses

import pytest
import torch
from cases import each
from tiny import DIGITS, used
from torch import nn

from dfkd_nb.dreams.activation_matching import (
    ActivationMatching,
    TraversalStrip,
    activation_matching_preset,
    dream_distillation,
    embedding_distance,
    embedding_term,
    traverse_component,
)
from dfkd_nb.dreams.membership import (
    membership_auc,
    membership_report,
    membership_score,
    nearest_distance_ratio,
    nearest_points,
)
from dfkd_nb.dreams.metadata import (
    Metadata,
    cluster_vectors,
    merge_small,
    principal_components,
)
from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.lab.explorers import ClusterBrowser
from dfkd_nb.toolbox.core import load_tensors, save_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import data_root, load_data
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher

CPU = {'device': 'cpu'}


def network(seed=0, width=8, domain=DIGITS):
    "A small network with BatchNorm whose summary has `width` numbers."
    torch.manual_seed(seed)
    channels = domain.channels
    model = nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, domain.num_classes),
    )
    return used(model, domain.shape, 20, 64)


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


@pytest.fixture(scope='module')
def digits():
    return load_data('digits', 'train')


@pytest.fixture(scope='module')
def metadata(teacher, digits):
    return Metadata.measure(teacher, digits, clusters=2, components=4)


# ---- clusters and lines


def test_every_cluster_is_large_enough_and_none_is_lost():
    vectors = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assigned = cluster_vectors(vectors, 12)
    for smallest in (1, 5, 20, 500):
        merged = merge_small(assigned, vectors, smallest)
        counts = merged.bincount()
        assert counts.sum() == 200 and (counts > 0).all()
        assert len(counts) == 1 or counts.min() >= smallest
    assert torch.equal(merge_small(assigned, vectors, 1), assigned)


def test_clusters_repeat_with_their_seed(teacher, digits):
    first, second = (
        Metadata.measure(teacher, digits, clusters=3, components=3) for _ in range(2)
    )
    assert torch.equal(first.centroids, second.centroids) and torch.equal(
        first.components, second.components
    )


def test_components_are_the_covariance_s_eigenvectors():
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.arange(1.0, 7.0)
    )
    found = principal_components(vectors, 6)
    lines, variances = found['components'], found['variances']
    torch.testing.assert_close(lines @ lines.T, torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        lines.T @ torch.diag(variances) @ lines, vectors.T.cov(), atol=1e-3, rtol=1e-4
    )
    assert found['rest'] < 1e-4
    cut = principal_components(vectors, 2)
    torch.testing.assert_close(
        cut['rest'] + cut['variances'].sum(), variances.sum(), atol=1e-3, rtol=1e-4
    )


def test_metadata_is_what_one_would_compute_by_hand(teacher, digits):
    found = Metadata.measure(teacher, digits, clusters=1, components=3)
    vectors = teacher.embed(digits.images)
    assert (
        found.labels.tolist() == list(range(10))
        and found.counts.tolist() == digits.labels.bincount().tolist()
    )
    for label in range(10):
        torch.testing.assert_close(
            found.centroids[label],
            vectors[digits.labels == label].mean(0),
            atol=1e-5,
            rtol=1e-4,
        )


def test_activations_at_hand_do_as_well(teacher, digits, metadata):
    vectors = teacher.embed(digits.images)
    found = Metadata.fit(teacher, vectors, digits.labels, clusters=2, components=4)
    torch.testing.assert_close(found.centroids, metadata.centroids, atol=1e-5, rtol=1e-4)
    wrong = vectors.clone()
    wrong[3, 2] = float('nan')
    for bad, labels, message in (
        (vectors[:, :5], digits.labels, 'give one label a vector'),
        (vectors, digits.labels.float(), 'as integers'),
        (vectors, digits.labels + 1, '0 to 9'),
        (vectors[:0], digits.labels[:0], 'at least one'),
        (wrong, digits.labels, 'NaN'),
    ):
        with pytest.raises(DFKDError, match=message) as error:
            Metadata.fit(teacher, bad, labels)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'name, domain, width',
    [
        ('resnet20', 'cifar10', 64),
        ('wrn16-1', 'cifar10', 64),
        ('wrn16-2', 'cifar10', 128),
        ('digits-net', 'digits', 64),
    ],
)
def test_any_network_with_a_linear_head(name, domain, width):
    torch.manual_seed(0)
    domain = DOMAINS[domain]
    teacher = Teacher(build_model(name, domain.num_classes, domain.channels), domain, name)
    images = ImageSet(
        torch.randint(0, 256, (24, *domain.shape), dtype=torch.uint8),
        torch.arange(24) % 2,
        domain,
    )
    found = Metadata.measure(teacher, images, clusters=1, components=2)
    assert found.centroids.shape == (2, width)
    target_embeddings, labels, _ = found.sample(4)
    assert labels.tolist() == [0, 1, 0, 1]
    made = ActivationMatching(teacher, found, steps=2, **CPU).synthesize(
        len(labels), labels, target_embeddings=target_embeddings
    )
    assert made.images.shape == (4, *domain.shape) and torch.equal(made.labels, labels)


def test_centroids_without_components(teacher, digits):
    found = Metadata.measure(teacher, digits, clusters=2, components=0)
    target_embeddings, _, clusters = found.sample(20)
    assert torch.equal(target_embeddings, found.centroids[clusters])
    assert found.explained.max() == 0


@each(
    'change, message',
    [
        ({'components': 9}, 'give at most 8'),
        ({'clusters': 1000}, r'lower clusters \(1000\)'),
        ({'clusters': 0}, 'give at least 1, 0 and 1'),
        ({'layer': 'nowhere'}, "no layer 'nowhere'"),
        ({'smallest': 500}, r'or smallest \(500\)'),
    ],
)
def test_what_cannot_be_measured_says_why(teacher, digits, change, message):
    with pytest.raises(DFKDError, match=message):
        Metadata.measure(teacher, digits, **{'clusters': 2, 'components': 3} | change)


def test_more_components_than_members_is_refused_and_can_be_merged_away(teacher, digits):
    few = digits.subset(200)  # about twenty a class
    with pytest.raises(DFKDError, match='merge it with smallest=8'):
        Metadata.measure(teacher, few, clusters=4, components=7, smallest=1)
    assert (
        Metadata.measure(teacher, few, clusters=4, components=7, smallest=8).counts.min()
        >= 8
    )


def test_images_that_do_not_belong(teacher, digits):
    with pytest.raises(DFKDError, match='no labels'):
        Metadata.measure(teacher, ImageSet(digits.images, None, DIGITS))
    with pytest.raises(DFKDError, match="the images are of 'cifar10'"):
        Metadata.measure(teacher, load_data('cifar10-mini', limit=50))
    with pytest.raises(DFKDError, match='no images to measure'):
        Metadata.measure(teacher, digits.subset(torch.arange(0)))


# ---- the file


@pytest.mark.parametrize('half', [False, True])
def test_a_file_comes_back(tmp_path, teacher, metadata, half):
    size = metadata.save(tmp_path / 'm.safetensors', half)
    again = Metadata.load(tmp_path / 'm.safetensors', teacher)
    assert size == (tmp_path / 'm.safetensors').stat().st_size
    for field in dataclasses.fields(Metadata):
        ours, theirs = getattr(metadata, field.name), getattr(again, field.name)
        if isinstance(ours, str):
            assert ours == theirs
        else:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(
                theirs, ours, rtol=2e-3 if half else 0, atol=1e-3 if half else 0
            )


def test_half_precision_is_half_the_size(tmp_path, metadata):
    sizes = [metadata.save(tmp_path / 'm.safetensors', half) for half in (False, True)]
    numbers = sum(
        v.numel()
        for k, v in vars(metadata).items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    )
    assert abs(sizes[0] - sizes[1] - 2 * numbers) < 64


def test_damaged_and_foreign_files(tmp_path, teacher, digits, metadata):
    path = tmp_path / 'm.safetensors'
    metadata.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DFKDError, match='truncated'):
        Metadata.load(path)
    with pytest.raises(DFKDError, match='no file'):
        Metadata.load(tmp_path / 'nothing')
    digits.save(path)
    with pytest.raises(DFKDError, match='holds no metadata'):
        Metadata.load(path)
    metadata.save(path)
    tensors, about = load_tensors(path)
    save_tensors(path, tensors, about | {'format': '99'})
    with pytest.raises(DFKDError, match='format 99'):
        Metadata.load(path)
    save_tensors(path, tensors | {'variances': tensors['variances'][:, :1].clone()}, about)
    with pytest.raises(DFKDError, match="'variances' has shape"):
        Metadata.load(path)


def test_too_large_for_half_precision(tmp_path, metadata):
    loud = dataclasses.replace(metadata, rest=metadata.rest + 1e6)
    with pytest.raises(DFKDError, match='half=False'):
        loud.save(tmp_path / 'm.safetensors', half=True)
    assert not (tmp_path / 'm.safetensors').exists()


def test_another_teacher_is_told(metadata):
    with pytest.raises(DFKDError, match='other weights'):
        metadata.check(Teacher(network(seed=1), DIGITS, 'tiny'))
    with pytest.raises(DFKDError, match="8 dimensions, 'wider' 12"):
        metadata.check(Teacher(network(width=12), DIGITS, 'wider'))
    cifar = Teacher(network(domain=DOMAINS['cifar10']), DOMAINS['cifar10'], 'colour')
    with pytest.raises(DFKDError, match="does not fit 'colour'"):
        ActivationMatching(cifar, metadata, **CPU)


def test_weights_rounded_to_half_precision_are_the_same_teacher(metadata):
    metadata.check(Teacher(network().half().float(), DIGITS, 'rounded'))


# ---- goals


def test_target_embeddings_have_the_moments_of_their_clusters(metadata):
    target_embeddings, _, clusters = metadata.sample(60_000)
    for k in (0, 7):
        mine = target_embeddings[clusters == k]
        lines, wanted = metadata.components[k], metadata.variances[k]
        inside = (mine - metadata.centroids[k]) @ lines.T
        torch.testing.assert_close(
            inside.var(0), wanted, rtol=0.15, atol=0
        )  # a variance of 1,500 draws: 4 % standard error
        assert (inside.mean(0).abs() < 5 * (wanted / len(mine)).sqrt()).all()
        # nothing outside of the lines
        assert (mine - metadata.centroids[k] - inside @ lines).abs().max() < 1e-4


def test_classes_come_in_turn_and_clusters_by_their_size(metadata):
    _, labels, clusters = metadata.sample(20_000)
    assert torch.equal(labels, torch.arange(20_000) % 10)
    assert torch.equal(metadata.labels[clusters], labels)
    for k in range(len(metadata)):
        fraction = (
            metadata.counts[k]
            / metadata.counts[metadata.labels == metadata.labels[k]].sum()
        )
        assert abs((clusters == k).sum() / 2000 - fraction) < 0.06  # five standard errors


def test_target_embeddings_repeat_and_obey(metadata):
    first, second, third = (
        metadata.sample(30),
        metadata.sample(30),
        metadata.sample(30, torch.Generator().manual_seed(1)),
    )
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], third[0])
    assert metadata.sample(30, clamp=True)[0].min() >= 0
    assert metadata.sample(5, classes=[3])[1].tolist() == [3] * 5
    for bad in (
        {'n': 0},
        {'n': 5, 'classes': [11]},
        {'n': 5, 'spread': -1.0},
        {'n': 5, 'classes': []},
    ):
        with pytest.raises(DFKDError):
            metadata.sample(**bad)


def test_a_class_without_images_has_no_target_embeddings(teacher, digits):
    found = Metadata.measure(
        teacher,
        digits.subset((digits.labels > 6).nonzero()[:, 0]),
        clusters=1,
        components=2,
    )
    assert found.sample(6)[1].tolist() == [7, 8, 9, 7, 8, 9]
    with pytest.raises(DFKDError, match='no cluster of class 3'):
        found.sample(2, classes=[3])


def test_a_line_goes_through_the_centroid(metadata):
    points = metadata.along_component(5, 1, [-1.0, 0.0, 2.0])
    assert torch.equal(points[1], metadata.centroids[5])
    torch.testing.assert_close(
        (points[2] - points[1]).norm(), 2 * metadata.variances[5, 1].sqrt()
    )
    with pytest.raises(DFKDError, match='cluster 99'):
        metadata.along_component(99, 0, [0.0])
    with pytest.raises(DFKDError, match='component 4'):
        metadata.along_component(0, 4, [0.0])


# ---- images


def test_the_target_embeddings_gradient_is_exact():
    generator = torch.Generator().manual_seed(0)
    embedding, target_embeddings = (
        torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    x = torch.zeros(3, 1, 2, 2)

    def loss(e):
        return embedding_term(
            LossInputs(
                x,
                torch.zeros(3, 2),
                torch.zeros(3).long(),
                embedding=e,
                target_embeddings=target_embeddings,
            )
        )

    assert torch.autograd.gradcheck(loss, embedding.requires_grad_())
    # summed over the numbers, averaged over the images
    assert loss(target_embeddings) == 0 and loss(target_embeddings + 1) == 5


def test_a_target_embedding_that_nobody_gave():
    x, logits, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, 10), torch.zeros(2).long()
    with pytest.raises(DFKDError, match="embedding='classifier'"):
        embedding_term(LossInputs(x, logits, labels, embedding=torch.zeros(2, 3)))
    with pytest.raises(DFKDError, match='same layer'):
        embedding_term(
            LossInputs(
                x,
                logits,
                labels,
                embedding=torch.zeros(2, 3),
                target_embeddings=torch.zeros(2, 4),
            )
        )


def test_target_embeddings_are_reached(teacher, metadata):
    target_embeddings, labels, _ = metadata.sample(12)
    near = [
        embedding_distance(
            teacher,
            ActivationMatching(teacher, metadata, steps=steps, **CPU)
            .synthesize(len(labels), labels, target_embeddings=target_embeddings)
            .images,
            target_embeddings,
        ).mean()
        for steps in (1, 60)
    ]
    assert near[1] < 0.5 * near[0]


def test_batches_keep_target_embeddings_and_labels_together(teacher, metadata):
    target_embeddings, labels, _ = metadata.sample(10)
    made = ActivationMatching(teacher, metadata, steps=60, batch_size=4, **CPU).synthesize(
        len(labels), labels, target_embeddings=target_embeddings
    )
    assert torch.equal(made.labels, labels)
    own = embedding_distance(teacher, made.images, target_embeddings)
    swapped = embedding_distance(teacher, made.images, target_embeddings.roll(1, 0))
    assert (own < swapped).float().mean() >= 0.9


def test_images_can_start_elsewhere(teacher, metadata, digits):
    first = digits.images[:10]
    target_embeddings, labels = metadata.sample(10)[:2]
    made = ActivationMatching(
        teacher, metadata, steps=1, batch_size=4, learning_rate=0.01, **CPU
    ).synthesize(
        len(labels),
        labels,
        target_embeddings=target_embeddings,
        initial_images=first,
    )
    # a step of 0.01 * 0.25 * 255
    assert (made.images.int() - first.int()).abs().max() <= 1
    with pytest.raises(DFKDError, match='3 images to start from'):
        ActivationMatching(teacher, metadata, steps=1, **CPU).synthesize(
            len(labels),
            labels,
            target_embeddings=target_embeddings,
            initial_images=first[:3],
        )
    with pytest.raises(DFKDError, match='use one stage'):
        ActivationMatching(teacher, metadata, stages=[(4, 1), (8, 1)], **CPU).synthesize(
            len(labels),
            labels,
            target_embeddings=target_embeddings,
            initial_images=first,
        )


def test_vectors_of_another_layer_are_refused(teacher, metadata, digits):
    matching = ActivationMatching(teacher, metadata, steps=1, **CPU)
    for mistake, message in (
        (lambda: nearest_points(torch.zeros(2, 8), torch.zeros(3, 7)), 'of the same layer'),
        (lambda: nearest_points(torch.zeros(8), torch.zeros(3, 8)), 'of the same layer'),
        (
            lambda: membership_score(metadata, torch.zeros(2, 7), torch.zeros(2).long()),
            r'give \(N, 8\)',
        ),
        (
            lambda: membership_score(metadata, torch.zeros(2, 8), torch.zeros(3).long()),
            'one label each',
        ),
        (
            lambda: embedding_distance(teacher, digits.images[:3], torch.zeros(2, 8)),
            'give one an image',
        ),
        (lambda: traverse_component(matching, metadata, []), 'give one or more of 0 to'),
        (
            lambda: traverse_component(matching, metadata, [len(metadata)]),
            'give one or more of 0 to',
        ),
    ):
        with pytest.raises(DFKDError, match=message) as error:
            mistake()
        assert '\n' not in str(error.value)


def test_a_stop_in_the_middle_changes_nothing(teacher, metadata, tmp_path):
    target_embeddings, labels, _ = metadata.sample(8)

    def make():
        return ActivationMatching(
            teacher, metadata, 'book', steps=6, batch_size=4, jitter=1, **CPU
        )

    whole = make().synthesize(8, labels, target_embeddings=target_embeddings)
    make().synthesize(
        8,
        labels,
        target_embeddings=target_embeddings,
        checkpoint=tmp_path / 'c.pt',
        callback=lambda now: (now.batch, now.step) == (1, 3),
        log_every=3,
    )
    rest = make().synthesize(
        8, labels, target_embeddings=target_embeddings, checkpoint=tmp_path / 'c.pt'
    )
    assert torch.equal(whole.images, rest.images)
    with pytest.raises(DFKDError, match='target embeddings'):
        make().synthesize(
            8, labels, target_embeddings=target_embeddings + 1, checkpoint=tmp_path / 'c.pt'
        )


def test_the_front_door(teacher, metadata):
    made = dream_distillation(teacher, metadata, 12, steps=3, **CPU)
    again = dream_distillation(teacher, metadata, 12, steps=3, **CPU)
    other = dream_distillation(teacher, metadata, 12, steps=3, seed=1, **CPU)
    assert torch.equal(made.images, again.images) and not torch.equal(
        made.images, other.images
    )
    assert made.labels.tolist() == [*range(10), 0, 1]
    with pytest.raises(DFKDError, match='unknown source'):
        dream_distillation(teacher, metadata, 2, 'magazine', **CPU)


def test_the_paper_asks_for_the_target_embedding_alone(teacher, metadata):
    matching = ActivationMatching(teacher, metadata, **CPU)
    assert {name for name, weight in matching.objective.weights.items() if weight} == {
        'embedding'
    }
    assert (
        matching.steps,
        matching.pixel_settings['learning_rate'],
        matching.pixel_settings['jitter'],
    ) == (500, 0.05, 0)
    assert activation_matching_preset('book')['feature_weight'] > 0


def test_further_terms_join(teacher, metadata):
    matching = ActivationMatching(
        teacher,
        metadata,
        steps=2,
        terms={'dark': (1.0, lambda inputs: inputs.x.mean())},
        **CPU,
    )
    target_embeddings, labels, _ = metadata.sample(2)
    matching.synthesize(len(labels), labels, target_embeddings=target_embeddings)
    assert {'embedding', 'dark'} <= matching.history[-1].keys()


def test_a_walk_passes_the_centroid(teacher, metadata):
    frames = traverse_component(
        ActivationMatching(teacher, metadata, steps=40, **CPU),
        metadata,
        [0, 4, 9],
        0,
        (-2.0, 0.0, 2.0),
    )
    assert [tuple(frame.shape) for frame in frames] == [(3, 1, 8, 8)] * 3
    ends = [metadata.along_component(k, 0, [-2.0, 2.0]) for k in (0, 4, 9)]
    for i, end in enumerate(ends):
        here = teacher.embed(frames[0][i : i + 1])[0]
        there = teacher.embed(frames[2][i : i + 1])[0]
        assert (here - end[0]).norm() < (there - end[0]).norm()


def test_a_film_of_a_walk_speaks_of_places():
    frames = [torch.zeros(2, 1, 8, 8, dtype=torch.uint8)] * 3
    page = TraversalStrip(frames, [-1.0, 0.0, 1.0])._repr_html_()
    assert 'update' not in page and '1.0 sd</output>' in page


def test_the_browser_moves(teacher, metadata):
    pytest.importorskip('ipywidgets')
    inputs = ClusterBrowser(teacher, metadata, steps=5, first_steps=10, jitter=1, **CPU)
    seen = [inputs.picture.value]
    inputs.cluster.value = 3
    seen.append(inputs.picture.value)
    inputs.position.value = 2.0
    seen.append(inputs.picture.value)
    assert len(set(seen)) == 3 and set(inputs.centroid_images) == {0, 3}
    assert 'squared distance' in inputs.status.value


# ---- what is given away


def test_nearest_is_the_nearest():
    points = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0))
    distances, which = nearest_points(points + 1e-3, points)
    assert torch.equal(which, torch.arange(2500)) and distances.max() < 3e-3
    with pytest.raises(DFKDError, match='at least one'):
        nearest_points(points, points[:0])


def test_copies_are_memories_and_held_out_images_are_not():
    generator = torch.Generator().manual_seed(0)
    members, held_out, new = (torch.randn(400, 6, generator=generator) for _ in range(3))
    assert nearest_distance_ratio(members[:50], members, held_out) < 1e-2
    assert 0.85 < nearest_distance_ratio(new, members, held_out) < 1.15


def test_clusters_of_one_image_name_their_members(teacher, digits):
    inside, outside = digits.subset(200), digits.subset(torch.arange(200, 400))
    loose = Metadata.measure(teacher, inside, clusters=6, components=0, smallest=1)
    safe = Metadata.measure(teacher, inside, clusters=6, components=0, smallest=6)
    warned = [
        membership_report(teacher, found, inside, outside)['auc_centroid']
        for found in (loose, safe)
    ]
    assert loose.counts.min() < 6 <= safe.counts.min()
    assert warned[0] > warned[1]


def test_components_name_their_members(teacher, digits):
    inside, outside = digits.subset(200), digits.subset(torch.arange(200, 400))
    warned = [
        membership_report(
            teacher,
            Metadata.measure(teacher, inside, clusters=1, components=m),
            inside,
            outside,
        )['auc_rest']
        for m in (1, 7)
    ]
    assert warned[1] > warned[0]


def test_nobody_is_suspect_among_equals(teacher, digits, metadata):
    images = digits.subset(300)
    assert (
        abs(membership_report(teacher, metadata, images, images)['auc_rest'] - 0.5) < 1e-6
    )


def test_membership_scores_stay_within_the_class(metadata):
    vector = metadata.centroids[:1]
    own, other = (
        membership_score(metadata, vector, torch.tensor([label]))[0]
        for label in (int(metadata.labels[0]), 9)
    )
    assert own == 0 and other < 0
    with pytest.raises(DFKDError, match='unknown score'):
        membership_score(metadata, vector, torch.tensor([0]), 'smell')


def test_an_image_of_a_class_without_clusters_is_not_suspect(teacher, digits):
    found = Metadata.measure(
        teacher,
        digits.subset((digits.labels > 6).nonzero()[:, 0]),
        clusters=1,
        components=2,
    )
    vectors, labels = teacher.embed(digits.images[:50]), digits.labels[:50]
    assert 0 <= membership_auc(found, (vectors, labels), (vectors + 1, labels)) <= 1


# ---- other data, where it is


@pytest.mark.parametrize(
    'name, folder', [('cifar100', 'cifar-100-python'), ('fashion-mnist', 'FashionMNIST')]
)
def test_a_student_of_other_data(name, folder):
    if not any((data_root() / place).is_dir() for place in (name, folder)):
        pytest.skip(f'{name} is not on this machine')
    images = load_data(name, 'train', limit=32)
    domain = Domain(
        'other', images.domain.shape, images.domain.mean, images.domain.std, DIGITS.classes
    )
    teacher = Teacher(network(domain=domain), domain, 'elsewhere')
    student = network(seed=1, domain=domain)
    Distiller(
        teacher,
        student,
        ImageSet(images.images, None, domain),
        steps=2,
        batch_size=16,
        **CPU,
    ).run()
