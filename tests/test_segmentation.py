"""Scenes, masks and what is learned from them.

Answers by hand, torchmetrics, resumed runs, refusals.
"""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dfkd_nb.applications import segmentation as seg
from dfkd_nb.applications.segmentation_data import (
    IGNORED,
    SegmentationSet,
    class_colours,
    colour_masks,
    dominant_class,
    draw_scenes,
    load_segmentation,
    segmentation_domain,
)
from dfkd_nb.applications.segmenters import SEGMENTERS, build_segmenter
from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.foundations.distillation import distillation_loss
from dfkd_nb.generators.generators import balance_term
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.core import import_torchvision, load_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import data_root
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.teachers import Teacher

import_torchvision()
torch.set_num_threads(1)


def network(seed=0, name='deeplab-tiny', classes=6):
    torch.manual_seed(seed)
    return build_segmenter(name, classes)


@pytest.fixture(scope='module')
def scenes():
    return draw_scenes(24, (16, 16), seed=0)


@pytest.fixture(scope='module')
def teacher(scenes):
    net = network()
    seg.SegmentationDistiller(
        None, net, scenes, steps=60, batch_size=8, learning_rate=0.1, device='cpu'
    ).run()
    return Teacher(net, scenes.domain)


# scenes
def test_the_same_seed_draws_the_same_scenes():
    one, again, other = draw_scenes(6), draw_scenes(6), draw_scenes(6, seed=1)
    assert torch.equal(one.images, again.images) and torch.equal(one.masks, again.masks)
    assert not torch.equal(one.masks, other.masks)


@settings(max_examples=10, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 99))
def test_every_size_has_sky_above_and_ground_below(height, width, seed):
    found = draw_scenes(3, (height, width), seed)
    assert found.images.shape == (3, 3, height, width) and found.masks.shape == (
        3,
        height,
        width,
    )
    assert (
        not (found.masks[:, -1] == 0).any()
        and not ((found.masks[:, 0] == 1) | (found.masks[:, 0] == 2)).any()
    )


def test_masks_are_exact():
    drawn = draw_scenes(200)
    assert drawn.masks.unique().tolist() == list(range(6))
    sky, grass = (drawn.images.movedim(1, 3)[drawn.masks == k].float() for k in (0, 1))
    assert sky[:, 2].mean() > 1.5 * grass[:, 2].mean()  # blue is above


def test_a_batch_brings_masks_and_labels_are_one_an_image(scenes):
    images, masks = scenes.sampler().sample(5, torch.Generator().manual_seed(0))
    assert (
        images.dtype == torch.uint8
        and masks.dtype == torch.int64
        and masks.shape == (5, 16, 16)
    )
    assert scenes.labels.shape == (24,)
    counts = torch.bincount(scenes.masks[3].flatten().long(), minlength=6)
    assert int(scenes.labels[3]) == int(counts.argmax())


def test_scenes_survive_a_file(scenes, tmp_path):
    scenes.save(tmp_path / 'scenes.safetensors')
    again = SegmentationSet.load(tmp_path / 'scenes.safetensors')
    assert torch.equal(again.masks, scenes.masks) and again.domain == scenes.domain
    assert torch.equal(ImageSet.load(tmp_path / 'scenes.safetensors').images, scenes.images)
    ImageSet(scenes.images, None, scenes.domain).save(tmp_path / 'images.safetensors')
    with pytest.raises(DFKDError, match='holds no scenes'):
        SegmentationSet.load(tmp_path / 'images.safetensors')


@each(
    'masks, words',
    [
        (torch.zeros(24, 16, 15, dtype=torch.uint8), 'give one number a pixel'),
        (torch.zeros(24, 16, 16), 'as integers'),
        (torch.full((24, 16, 16), 6), 'masks hold 6'),
        (torch.full((24, 16, 16), -1), 'masks hold -1'),
        (torch.full((24, 16, 16), 300), 'masks hold 300'),
    ],
)
def test_masks_that_do_not_fit_are_refused(scenes, masks, words):
    with pytest.raises(DFKDError, match=words):
        SegmentationSet(scenes.images, masks, scenes.domain)


def test_bad_sizes_and_names_are_refused():
    for call, words in (
        (lambda: draw_scenes(0), 'give 1 or more'),
        (lambda: draw_scenes(1, (4, 32)), '8 x 8 or more'),
        (lambda: segmentation_domain('kitti'), 'unknown scenes'),
        (lambda: load_segmentation('scenes', 'holdout'), 'unknown split'),
        (lambda: load_segmentation('scenes', limit=0), 'leaves no scene'),
        (lambda: build_segmenter('deeplab-huge', 6), 'unknown segmenter'),
        (
            lambda: build_segmenter('deeplab-tiny', 6, True),
            'with a pretrained backbone',
        ),
        (
            lambda: build_segmenter('torchvision:deeplabv3_resnet5', 6),
            'torchvision has no',
        ),
    ):
        with pytest.raises(DFKDError, match=words):
            call()


# files
def png(pixels, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy(), mode).save(buffer, 'PNG')
    return buffer.getvalue()


def test_folders_of_png_files(tmp_path):
    for kind in ('image', 'seg13'):
        (tmp_path / 'nyuv2' / kind / 'test').mkdir(parents=True)
    mask = torch.zeros(30, 40, dtype=torch.uint8)
    mask[:, 20:], mask[:, 30:] = 1, 13
    (tmp_path / 'nyuv2/image/test/0001.png').write_bytes(
        png(torch.zeros(30, 40, 3, dtype=torch.uint8))
    )
    with pytest.raises(DFKDError, match='has no mask: put 0001.png into'):
        load_segmentation('nyuv2', root=tmp_path)
    (tmp_path / 'nyuv2/seg13/test/0001.png').write_bytes(png(mask))
    found = load_segmentation('nyuv2', size=(30, 40), root=tmp_path)
    assert found.masks[0, 5, [0, 19, 20, 29, 30, 39]].tolist() == [255, 255, 0, 0, 12, 12]
    # 13 x 10, its middle cut out
    small = load_segmentation('nyuv2', size=(10, 10), root=tmp_path)
    assert set(small.masks.unique().tolist()) == {255, 0, 12}
    (tmp_path / 'nyuv2/seg13/test/0001.png').write_bytes(
        png(torch.zeros(30, 40, 3, dtype=torch.uint8))
    )
    with pytest.raises(DFKDError, match="mode 'RGB'"):
        load_segmentation('nyuv2', root=tmp_path)


def test_parquet_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / 'camvid'
    folder.mkdir()
    image = png(torch.zeros(24, 32, 3, dtype=torch.uint8))
    mask = torch.arange(24 * 32).view(24, 32).remainder(12).to(torch.uint8)
    pq.write_table(
        pa.table({'image': [{'bytes': image}], 'mask': [png(mask)]}),
        folder / 'test.parquet',
    )
    found = load_segmentation('camvid', size=(24, 32), root=tmp_path)
    assert torch.equal(found.masks[0], mask.masked_fill(mask == 11, 255))  # void
    pq.write_table(pa.table({'image': [image]}), folder / 'test.parquet')
    with pytest.raises(DFKDError, match="needs 'image' and 'mask'"):
        load_segmentation('camvid', root=tmp_path)
    (folder / 'test.parquet').write_bytes(b'PAR1 not really')
    with pytest.raises(DFKDError, match='no Parquet file'):
        load_segmentation('camvid', root=tmp_path)
    with pytest.raises(DFKDError, match='put train.parquet'):
        load_segmentation('camvid', 'train', root=tmp_path)


@pytest.mark.skipif(
    not (data_root() / 'camvid').is_dir(), reason='no CamVid under DFKD_DATA'
)
def test_camvid():
    found = load_segmentation('camvid', 'val', (24, 32), limit=5)
    assert len(found) == 5 and found.domain.num_classes == 11
    road = (found.masks == 3).float().mean((0, 2))
    sky = (found.masks == 0).float().mean((0, 2))
    assert road[-3:].mean() > 0.5 > road[:3].mean() and sky[:3].mean() > sky[-3:].mean()


# networks
@pytest.mark.parametrize('name', [*SEGMENTERS, 'torchvision:deeplabv3_mobilenet_v3_large'])
def test_a_segmenter_predicts_at_every_pixel(name):
    with torch.no_grad():
        assert network(0, name, 5).eval()(torch.zeros(1, 3, 24, 40))['out'].shape == (
            1,
            5,
            24,
            40,
        )


# learning
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.booleans(), st.integers(0, 10_000))
def test_an_image_and_its_mask_move_alike(padding, flip, seed):
    masks = torch.randint(6, (5, 9, 11), generator=torch.Generator().manual_seed(seed))
    masks[:, 4, 4] = IGNORED
    # the picture is its own mask, padding 0
    images = (masks + 1).clamp_max(40).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    moved, moved_masks = seg.augment_segmentation(
        images, masks, Augment(padding, flip), torch.Generator().manual_seed(seed)
    )
    expected = torch.where(
        (moved[:, 0] == 0) | (moved[:, 0] == 40), IGNORED, moved[:, 0].long() - 1
    )
    assert torch.equal(moved_masks, expected) and moved_masks.shape == masks.shape


def test_the_loss_at_pixels_by_hand():
    # at the first pixel 1 : 3, the second does not count
    logits = torch.tensor([[[[0.0, 5.0]], [[math.log(3), -5.0]]]])
    masks = torch.tensor([[[1, IGNORED]]])
    assert float(seg.mask_loss(logits, masks)) == pytest.approx(math.log(4 / 3), abs=1e-6)
    assert float(seg.mask_loss(logits, torch.full((1, 1, 2), IGNORED))) == 0


def test_distillation_at_pixels_is_distillation_of_pixels():
    student, known = torch.randn(
        2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0)
    ).double()
    flat = [logits.movedim(1, -1).reshape(-1, 5) for logits in (student, known)]
    torch.testing.assert_close(
        distillation_loss(student, known, 3.0), distillation_loss(*flat, 3.0)
    )


def distiller_of(source, teacher=None, **more):
    usual = {
        'steps': 6,
        'batch_size': 4,
        'learning_rate': 0.05,
        'device': 'cpu',
        'augment': Augment(2, True),
    }
    return seg.SegmentationDistiller(teacher, network(1), source, **usual | more)


@pytest.mark.parametrize('label_weight', [0.0, 0.5])
def test_a_distiller_goes_on_to_the_same_bits(scenes, teacher, label_weight):
    # one set, three consumers
    whole = distiller_of(scenes, teacher, label_weight=label_weight).run()
    first = distiller_of(scenes, teacher, label_weight=label_weight).run(until=3)
    scenes.sampler().sample(5, torch.Generator())  # and a fourth
    second = distiller_of(scenes, teacher, label_weight=label_weight)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.student.state_dict().values(), second.student.state_dict().values()
        )
    )


def test_pixels_are_learned_as_deterministically_as_images(scenes, teacher):
    """No operation of an update is one that PyTorch cannot repeat on a GPU (its list in
    `use_deterministic_algorithms`).
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    names = set()
    learner = distiller_of(scenes, teacher, label_weight=0.5)
    with Recorder():
        learner.step()
    assert 'convolution_backward' in names and 'nll_loss_backward' in names
    assert not names & {
        'nll_loss2d_forward',
        'nll_loss2d_backward',
        'grid_sampler_2d_backward',
        'cumsum',
        'put_',
        'histc',
    }


def test_a_student_of_another_normalisation_learns_the_same_masks(scenes, teacher):
    "What a student's scale is, is its own matter: the teacher sees its own."
    other = replace(scenes.domain, mean=(0.0,) * 3, std=(1.0,) * 3)
    known = []
    for domain in (scenes.domain, other):
        learner = distiller_of(scenes, teacher, domain=domain, augment=None)
        x, _ = learner.prepare(scenes.images[:4], None)
        known.append(learner.teacher_logits(x))
    torch.testing.assert_close(known[1], known[0], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_learned_is_refused(scenes, teacher):
    plain = ImageSet(scenes.images, scenes.labels, scenes.domain)
    swapped = replace(
        scenes.domain, classes=(*scenes.domain.classes[1::-1], *scenes.domain.classes[2:])
    )
    for call, words in (
        (lambda: distiller_of(scenes, mixup_alpha=1.0), 'mixed scenes have no mask'),
        (lambda: distiller_of(plain), 'give a SegmentationSet'),
        (lambda: distiller_of(plain, teacher, label_weight=1.0), 'give a SegmentationSet'),
        (
            lambda: seg.mean_iou(network(0, classes=5), scenes),
            'give a segmenter of its classes',
        ),
        (
            lambda: seg.mean_iou(
                network(), scenes.subset(torch.tensor([], dtype=torch.long))
            ),
            'no scenes to test on',
        ),
        (lambda: seg.mean_iou(network(), plain), 'give a SegmentationSet'),
        (lambda: seg.mean_iou(network(), None), 'give a SegmentationSet'),
        (lambda: seg.mean_iou(network(), scenes, domain=swapped), "'sky' is class 0"),
        (lambda: distiller_of('scenes', teacher), 'no images in a str'),
    ):
        with pytest.raises(DFKDError, match=words):
            call()


# measures
class Says(torch.nn.Module):
    def __init__(self, predictions):
        super().__init__()
        self.logits = F.one_hot(predictions, 6).movedim(3, 1).float()

    def forward(self, x):
        return {'out': self.logits}


def test_intersection_over_union_by_hand():
    domain = segmentation_domain('scenes', (8, 8))
    truth = torch.zeros(1, 8, 8, dtype=torch.long)
    predictions = torch.zeros(1, 8, 8, dtype=torch.long)
    # 32 pixels of each class, 16 of the second taken for the first
    truth[:, :, 4:], predictions[:, :, 6:] = 1, 1
    truth[:, 7], predictions[:, 7] = IGNORED, 5  # does not count, whatever is said there
    scenes = SegmentationSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), truth, domain)
    found = seg.intersection_over_union(seg.confusion_matrix(Says(predictions), scenes))
    assert (
        found[:2].tolist() == pytest.approx([28 / 42, 14 / 28]) and found[2:].isnan().all()
    )
    assert seg.mean_iou(Says(predictions), scenes) == pytest.approx((28 / 42 + 1 / 2) / 2)


def test_mean_iou_is_that_of_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex

    rng = torch.Generator().manual_seed(0)
    # the sixth class never occurs
    truth, predictions = torch.randint(5, (2, 4, 8, 8), generator=rng)
    truth[:, :2] = IGNORED
    scenes = SegmentationSet(
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        truth,
        segmentation_domain('scenes', (8, 8)),
    )
    theirs = MulticlassJaccardIndex(6, average='macro', ignore_index=IGNORED)(
        predictions, truth
    )
    assert seg.mean_iou(Says(predictions), scenes, batch_size=4) == pytest.approx(
        float(theirs), abs=1e-6
    )


def test_boundaries_by_hand():
    masks = torch.tensor([[[0, 0, 0], [0, 0, 1], [0, 0, 0]]])
    assert seg.mask_boundaries(masks).int().tolist() == [[[0, 0, 1], [0, 1, 1], [0, 0, 1]]]


def test_pictures_of_masks():
    colours = class_colours(20)
    assert len({tuple(c) for c in colours.tolist()}) == 20 and torch.equal(
        colours[:6], class_colours(6)
    )
    drawn = colour_masks(torch.tensor([[[0, 5], [255, -1]]]), 6)
    assert drawn[0, :, 0, 0].tolist() == colours[0].tolist() and drawn[0, :, 1].sum() == 0


# without data
def test_balance_counts_pixels_as_a_classifiers_counts_images():
    logits = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0)).double()

    def inputs(a):
        return LossInputs(torch.zeros(len(a), 3, 4, 5), a, torch.zeros(len(a)))

    torch.testing.assert_close(
        seg.segmentation_balance_term(inputs(logits)),
        balance_term(inputs(logits.movedim(1, -1).reshape(-1, 6))),
    )
    assert float(
        seg.segmentation_balance_term(inputs(torch.zeros(2, 6, 4, 5)))
    ) == pytest.approx(-math.log(6), abs=1e-6)


def trainer_of(teacher, replay=0, **synthesizer):
    sizes = {
        'rounds': 3,
        'steps_per_round': 2,
        'warmup_rounds': 1,
        'generator_width': 4,
        'latent_size': 8,
    }
    parts = {
        'synthesizer': {'batch_size': 4, 'steps': 2} | synthesizer,
        'distiller': {'batch_size': 4, 'learning_rate': 0.05},
    }
    return seg.segmentation_ssd_kd(
        teacher, network(1), replay=replay, device='cpu', **sizes, **parts
    )


@pytest.mark.parametrize('replay', [0, 6])
def test_a_trainer_goes_on_to_the_same_bits(teacher, replay):
    whole = trainer_of(teacher, replay, balance_weight=1.0).run(log_every=1)
    first = trainer_of(teacher, replay, balance_weight=1.0)
    second = trainer_of(teacher, replay, balance_weight=1.0)
    for _ in range(7):  # in the middle of a batch
        first.step()
    assert first.synthesizer.steps_left
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    second.run(log_every=1)
    assert torch.equal(whole.pool.images, second.pool.images)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.student.state_dict().values(), second.student.state_dict().values()
        )
    )


def test_labels_in_a_buffer_are_those_of_the_images(teacher):
    "Without augmentation the logits that come with them are those of the images."
    pool = trainer_of(teacher, 6, augment=None).run().pool
    asked = dominant_class(teacher.predict(pool.images).argmax(1), 6)
    assert (pool.labels == asked).float().mean() > 0.8


def test_a_target_for_an_image_is_refused(teacher):
    with pytest.raises(DFKDError, match='predicts pixels'):
        trainer_of(teacher, labels='sampled')
    # statistics and competition alone
    assert trainer_of(teacher).synthesizer.objective.weights['class'] == 0


def test_a_buffer_of_scenes(teacher, scenes, tmp_path):
    student = network(1).eval()
    pool = seg.SegmentationPool(scenes.domain, 10, teacher, student)
    pool.add(scenes.images[:8])
    with torch.no_grad():
        x = scenes.domain.normalize(scenes.images[:8])
        known, said = teacher(x), student(x)['out']
        apart = (
            F.kl_div(
                said.log_softmax(1), known.log_softmax(1), reduction='none', log_target=True
            )
            .sum(1)
            .mean((1, 2))
        )
    torch.testing.assert_close(pool.priorities, apart, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pool.confidences, known.softmax(1).amax(1).mean((1, 2)))
    assert torch.equal(pool.labels, dominant_class(known.argmax(1), 6))
    pool.sample(4, torch.Generator().manual_seed(0))
    pool.update(said[:4], known[:4])
    pool.add(scenes.images[8:12])
    assert len(pool) == 10 and pool.added == 12
    pool.save(tmp_path / 'pool.safetensors')
    assert torch.equal(
        seg.SegmentationPool.load(tmp_path / 'pool.safetensors', teacher).priorities,
        pool.priorities,
    )
    with pytest.raises(DFKDError, match='give the pool a teacher'):
        seg.SegmentationPool(scenes.domain, 4).add(scenes.images[:2])


def test_images_from_masks(teacher, scenes):
    masks = scenes.masks[:3]

    def seen(some):
        return float((teacher.predict(some.images).argmax(1) == masks).float().mean())

    first, last = (
        seg.synthesize_from_masks(teacher, masks, steps=steps, device='cpu')
        for steps in (1, 50)
    )
    assert seen(last) > max(seen(first) + 0.1, 0.7) and torch.equal(last.masks, masks)
    with pytest.raises(DFKDError, match='give one number a pixel'):
        seg.synthesize_from_masks(teacher, masks[:, :8], device='cpu')
    with pytest.raises(DFKDError, match='no target masks'):
        seg.mask_term((16, 16))(
            LossInputs(torch.zeros(1, 3, 16, 16), torch.zeros(1, 6, 16, 16), torch.zeros(1))
        )


# as a run
TINY = """
title = "Scenes"
task = "segmentation"
[quick]
height = 16
width = 16
limit = 16
test_limit = 8
sources = ["labels", "real", "dreams", "layouts"]
teacher_model = "deeplab-tiny"
teacher_steps = 2
batch_size = 4
steps = 2
rounds = 3
warmup_rounds = 1
synthesis_steps = 1
synthesis_batch_size = 4
generator_width = 4
latent_size = 8
layout_images = 4
layout_steps = 2
evaluations = 1
picture = 3
"""


def test_a_run_that_is_stopped_again_and_again_ends_alike(tmp_path, monkeypatch):
    from dfkd_nb.lab.recipes import Recipe
    from dfkd_nb.lab.runs import Run
    from dfkd_nb.toolbox.errors import RunStopped

    def run(out, **more):
        recipe = Recipe.parse(TINY, 'tiny')
        return Run(
            recipe,
            'quick',
            more,
            out=tmp_path / out,
            results=tmp_path / 'results',
            device='cpu',
            save_every=1e9,
            quiet=True,
        )

    whole, checks, stops = run('whole').start(), 0, 0

    def third_check(self):
        nonlocal checks
        checks += 1
        return checks % 3 == 0

    monkeypatch.setattr(Run, 'asked_to_stop', property(third_check))
    again = None
    while again is None:
        try:
            again = run('cut').start(resume=stops > 0)
        except RunStopped:
            stops += 1
    assert stops > 1 and again.numbers == whole.numbers
    assert set(again.numbers['class_iou']) == {
        'teacher',
        'labels',
        'real',
        'dreams',
        'layouts',
    }
    for whole_file in sorted((tmp_path / 'whole/tiny/quick').glob('*.safetensors')):
        one, other = (
            load_tensors(tmp_path / out / 'tiny/quick' / whole_file.name)[0]
            for out in ('whole', 'cut')
        )
        assert one.keys() == other.keys() and all(
            torch.equal(one[k], other[k]) for k in one
        ), whole_file.name
    left = {path.name for path in (tmp_path / 'cut/tiny/quick').iterdir()}
    assert {'images.png', 'teacher.safetensors', 'student-dreams.safetensors'} <= left
    changes = {
        "'sources' is 'dream'": {'sources': 'dream'},
        'a multiple of them': {'steps': 5},
        "leave 'layouts' out": {'data': 'camvid'},
    }
    for words, change in changes.items():
        with pytest.raises(DFKDError, match=words):
            run('wrong', **change).start(fresh=True)
