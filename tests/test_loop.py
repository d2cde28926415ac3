"""The loop: parts of about twenty lines go through the trainer and learn.

A run that was stopped resumes to the same bits.
"""

import copy
import inspect
import itertools
import math

import pytest
import torch
from cases import each
from tiny import DIGITS, network

from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.inversion_settings import INVERSION_KEYWORDS, inversion_keywords
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import (
    AlternatingTrainer,
    GrowingPool,
    NoiseSynthesizer,
    Pool,
    Synthesizer,
)
from dfkd_nb.foundations.method_tables import method_head, method_settings, method_tables
from dfkd_nb.generators.contrastive import cmi_preset
from dfkd_nb.generators.generators import METHODS, Generator
from dfkd_nb.generators.meta import fast_preset
from dfkd_nb.generators.methods import (
    POOLS,
    SYNTHESIZERS,
    MethodSettings,
    build_method,
    read_method,
    register_pool,
    register_synthesizer,
)
from dfkd_nb.generators.synthesizer import KEYWORDS, GeneratorSynthesizer
from dfkd_nb.toolbox.core import load_checkpoint, save_checkpoint
from dfkd_nb.toolbox.data import ImageSet, SyntheticBatch
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.sources import DrawnImages
from dfkd_nb.toolbox.teachers import Teacher


class Brightening(Synthesizer):
    "Noise that gets brighter, three steps a batch: a synthesizer of about twenty lines."

    def __init__(self, domain, seed=0):
        self.domain, self.rounds = domain, []
        self.generator = torch.Generator().manual_seed(seed)
        self.pixels, self.steps = torch.zeros(0, *domain.shape), 0

    def begin_round(self, index, competing):
        self.rounds.append((index, competing))

    def step(self):
        if not self.steps:
            self.pixels = torch.rand(8, *self.domain.shape, generator=self.generator)
        self.pixels, self.steps = self.pixels.sqrt(), self.steps + 1

    @property
    def batch_done(self):
        return self.steps == 3

    def pop(self):
        self.steps = 0
        images = (255 * self.pixels).round().to(torch.uint8)
        return SyntheticBatch(images, torch.arange(8) % self.domain.num_classes)

    def state_dict(self):
        rng = self.generator.get_state()
        return {'pixels': self.pixels.clone(), 'steps': self.steps, 'rng': rng}

    def load_state_dict(self, state):
        self.pixels, self.steps = state['pixels'].clone(), state['steps']
        self.generator.set_state(state['rng'])


class Newest(Pool):
    "The newest images alone, each as likely as any other: a pool of about twenty lines."

    def __init__(self, domain, size=12):
        self.domain, self.size = domain, size
        self.images = torch.empty(0, *domain.shape, dtype=torch.uint8)
        self.labels = torch.empty(0, dtype=torch.long)

    def add(self, images, labels=None, teacher_logits=None, student_logits=None):
        self.images = torch.cat([self.images, images])[-self.size :]
        self.labels = torch.cat([self.labels, labels])[-self.size :]

    def sample(self, batch_size, generator):
        where = torch.randint(len(self), (batch_size,), generator=generator)
        return self.images[where], self.labels[where]

    def state_dict(self):
        return {'images': self.images, 'labels': self.labels}

    def load_state_dict(self, state):
        self.images, self.labels = state['images'].clone(), state['labels'].clone()


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


def trainer_of(
    teacher, synthesizer=None, pool=None, steps=12, student=None, source=None, **settings
):
    student = student or network(1)
    learning = {'batch_size': 4, 'learning_rate': 0.05, 'device': 'cpu'}
    # an empty pool is false
    source = next(s for s in (source, pool, Newest(DIGITS)) if s is not None)
    distiller = Distiller(teacher, student, source, steps=steps, **learning)
    settings = {'rounds': 3, 'steps_per_round': 4} | settings
    return AlternatingTrainer(synthesizer or Brightening(DIGITS), distiller, **settings)


def bits(trainer):
    return torch.cat([v.double().flatten() for v in trainer.student.state_dict().values()])


# --- own parts ---


def test_a_synthesizer_and_a_pool_of_ones_own_teach_a_student(teacher):
    trainer = trainer_of(teacher, steps=120, steps_per_round=40).run(log_every=5)
    rows = trainer.distiller.history
    assert trainer.finished and len(trainer.pool) == 12
    assert rows[-1]['loss'] < 0.7 * rows[0]['loss']
    assert trainer.synthesizer.rounds == [(0, True), (1, True), (2, True)]
    assert isinstance(trainer.synthesizer, Synthesizer)
    assert len(Brightening(DIGITS).synthesize(9)) == 16


@pytest.mark.parametrize('steps', [0, 1, 4, 7, 9, 13, 20, 26])
@pytest.mark.parametrize('batches', [1, 2])
def test_they_resume_to_the_same_bits_from_anywhere(teacher, tmp_path, steps, batches):
    def measure(trainer, made):
        return {'brightness': float(made.images.float().mean()), 'made': len(made.images)}

    def fresh():
        settings = {'batches_per_round': batches, 'measure': measure}
        return trainer_of(teacher, warmup_rounds=1, steps=8, **settings)

    whole, part = fresh().run(), fresh()
    for _ in range(steps):
        if not part.finished:
            part.step()
    save_checkpoint(tmp_path / 'state.pt', part.state_dict())
    other = fresh()
    other.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    other.run()
    assert torch.equal(bits(other), bits(whole))
    assert torch.equal(other.pool.images, whole.pool.images)
    assert other.history == whole.history
    assert [row['made'] for row in whole.history] == [8 * batches] * 3


def test_registered_parts_are_built_by_name(teacher):
    row = {'synthesizer': 'brightening', 'pool': 'newest', 'rounds': 2, 'batch_size': 4}
    register_synthesizer('brightening')(
        lambda parts: Brightening(parts.teacher.domain, parts.row['first_seed'])
    )
    register_pool('newest')(lambda parts: Newest(parts.teacher.domain))
    try:
        trainer = build_method(
            row | {'first_seed': 3}, teacher, network(1), device='cpu', steps_per_round=3
        ).run()
    finally:
        del SYNTHESIZERS['brightening'], POOLS['newest']
    assert isinstance(trainer.pool, Newest) and trainer.done == 6
    other = Brightening(DIGITS, 3).synthesize(8)
    assert torch.equal(trainer.pool.images[:4], other.images[-4:])


# --- the trainer ---


def test_rounds_warm_up_and_final_steps(teacher):
    settings = {'warmup_rounds': 1, 'batches_per_round': 2, 'final_steps': 5, 'steps': 7}
    trainer = trainer_of(teacher, steps_per_round=2, **settings)
    order = ''
    while not trainer.finished:
        order += 'G' if trainer.synthesis_due else 's'
        trainer.step()
    assert order == 'G' * 12 + 'ss' + 'G' * 6 + 'sssss'
    assert trainer.synthesizer.rounds == [(0, False), (1, True), (2, True)]
    with pytest.raises(DFKDError, match='taken all its steps'):
        trainer.step()


def test_a_callback_and_a_deadline_stop_it(teacher):
    whole, trainer, calls = trainer_of(teacher).run(log_every=2), trainer_of(teacher), 0

    def stop(now):
        nonlocal calls
        calls += 1
        return True

    assert trainer.run(deadline=0.0).done == 0 and trainer.round == 0
    while not trainer.finished:
        trainer.run(callback=stop, log_every=2)
    assert calls > 10 and torch.equal(bits(trainer), bits(whole))
    assert trainer_of(teacher).run(until=5).done == 5
    with pytest.raises(DFKDError, match='log_every is 0'):
        trainer.run(log_every=0)


def test_every_synthesizer_fits_the_protocol_and_the_trainer(teacher):
    generator = Generator((1, 8, 8), 4, 4)
    small = {'batch_size': 4, 'steps': 2, 'device': 'cpu'}
    for synthesizer in (
        NoiseSynthesizer(DIGITS, 4),
        DeepInversion(teacher, jitter=1, **small),
        GeneratorSynthesizer(teacher, generator=generator, class_weight=1.0, **small),
    ):
        assert isinstance(synthesizer, Synthesizer)
        trainer = trainer_of(teacher, synthesizer, GrowingPool(DIGITS)).run()
        assert len(trainer.pool) == 12, type(synthesizer)


def test_without_a_pool_images_are_drawn(teacher):
    noise = NoiseSynthesizer(DIGITS, 4)
    source = DrawnImages(noise.sample_images, DIGITS)
    trainer = trainer_of(teacher, noise, source=source).run()
    assert trainer.finished and trainer.pool is None


def test_logits_are_handed_on_only_of_the_student_that_learns(teacher):
    class Listening(Newest):
        def add(self, images, labels=None, teacher_logits=None, student_logits=None):
            super().add(images, labels)
            self.heard = teacher_logits, student_logits

    def heard(student, learner):
        synthesizer = GeneratorSynthesizer(
            teacher,
            generator=Generator((1, 8, 8), 4, 4),
            batch_size=4,
            student=student,
            device='cpu',
            **METHODS['dfq'],
        )
        pool = Listening(DIGITS)
        trainer = trainer_of(teacher, synthesizer, pool, student=learner)
        trainer.run(until=1)
        return pool.heard

    student = network(1)
    teacher_logits, student_logits = heard(student, student)
    assert teacher_logits.shape == student_logits.shape == (4, 10)
    assert heard(student, network(2))[1] is None


@each(
    ('change', 'message'),
    [
        ({'rounds': 0}, 'give 1 or more'),
        ({'batches_per_round': 0}, 'give 1 or more'),
        ({'warmup_rounds': 3}, 'fewer to warm up'),
        ({'steps_per_round': 5}, 'make them agree'),
        ({'final_steps': 5}, 'make them agree'),
        ({'source': ImageSet(torch.zeros(4, 1, 8, 8).byte(), None, DIGITS)}, 'or another'),
    ],
)
def test_what_cannot_work_is_told_at_once(teacher, change, message):
    with pytest.raises(DFKDError, match=message) as error:
        trainer_of(teacher, **change)
    assert '\n' not in str(error.value)


def test_a_state_of_other_settings_is_refused(teacher):
    state = trainer_of(teacher).state_dict()
    with pytest.raises(DFKDError, match='not written by an AlternatingTrainer'):
        trainer_of(teacher).load_state_dict({'kind': 'synthesis'})
    with pytest.raises(DFKDError, match=r'steps_per_round \(was 4, now 6\)'):
        trainer_of(teacher, rounds=2, steps_per_round=6).load_state_dict(state)
    with pytest.raises(DFKDError, match='synthesizer .was Brightening, now Noise'):
        trainer_of(teacher, NoiseSynthesizer(DIGITS, 4)).load_state_dict(state)


# --- the tables ---


def test_presets_and_recipes_read_one_table(teacher):
    assert fast_preset('fast-5') == {
        'init': 'meta',
        'meta_update': 'fomaml-sum',
        'momentum': 0.1,
        'reset_first_layer_at': 140,
        'labels': 'sampled',
        'agreement': True,
        'augment': fast_preset('fast-2')['augment'],
        'batch_size': 256,
        'steps': 5,
        'feature_weight': 10.0,
        'learning_rate': 3e-3,
        'latent_learning_rate': 0.01,
        'class_weight': 0.4,
        'adversarial_weight': 1.1,
    }
    assert cmi_preset('cmi-pictures')['adversarial_weight'] == 0
    assert METHODS['dafl'] == {
        'class_weight': 1.0,
        'activation_weight': 1e-3,
        'balance_weight': 20.0,
    }
    with pytest.raises(DFKDError, match='fast-2, fast-5'):
        method_settings('fast-3')


# rows that make their images, and DeepInversion without some of its terms
NAMED = [
    name
    for name, row in method_tables()[1].items()
    if not name.startswith('common-')
    and method_head(name)['settings'].get('source') != 'real'
    and 'scales' not in row
]
NAMED += ['noise', 'deepdream']


def method_of(teacher, name, student):
    loop = {'rounds': 2, 'warmup_rounds': 0, 'steps_per_round': 3, 'steps': 6}
    if name in ('deepinversion', 'noise', 'deepdream'):
        del loop['rounds']  # one, from the row
    sizes = {'generator_width': 4, 'latent_size': 8, 'synthesis_batch_size': 6}
    few = {'synthesis_steps': 2, 'batch_size': 4, 'padding': 1, 'flip': False}
    few |= {'pool_size': 8, 'images': 8, 'jitter': 1}
    return build_method(
        name,
        teacher,
        copy.deepcopy(student),
        scale='quick',
        device='cpu',
        **loop | sizes | few,
    )


@pytest.mark.parametrize('name', NAMED)
def test_every_method_is_one_row_and_one_call(teacher, tmp_path, name):
    student = network(1)
    whole = method_of(teacher, name, student)
    before = bits(whole)
    whole.run(log_every=1)
    assert whole.finished and whole.done == 6
    assert not torch.equal(bits(whole), before)
    assert all(math.isfinite(row['loss']) for row in whole.distiller.history)
    for steps in (1, 5, 8):  # among them in the middle of a batch
        part, other = (method_of(teacher, name, student) for _ in range(2))
        for _ in range(steps):
            part.step()
        save_checkpoint(tmp_path / 'state.pt', part.state_dict())
        other.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
        assert torch.equal(bits(other.run()), bits(whole))
        if whole.pool is not None:
            assert torch.equal(other.pool.images, whole.pool.images)


def test_inversion_comes_before_the_student_or_in_rounds(teacher):
    student = network(1)
    made = []
    for name in ('noise', 'deepdream', 'deepinversion', 'adaptive'):
        trainer = method_of(teacher, name, student).run(until=1)
        first = 4 if name == 'adaptive' else 8
        assert len(trainer.pool) == first, 'all images, or those of the first round'
        assert len(trainer.run().pool) == 8
        made.append(trainer.pool.images)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(made))
    weights = trainer.synthesizer.objective.weights
    assert weights['competition'] == 10.0 and trainer.synthesizer.batch_size == 6


@each(
    ('change', 'message'),
    [
        ({'rounds': 3}, 'a multiple of rounds'),
        ({'steps': 3}, 'the last round comes after 3 steps'),
        ({'learn_from': 'labels'}, 'run the recipe'),
        ({'batches_per_round': 2}, 'set batches_per_round to 1'),
        ({'pool': 'none'}, 'choose a pool'),
    ],
)
def test_an_inversion_that_cannot_work_is_told(teacher, change, message):
    row = read_method('adaptive', 'quick')[1] | {'rounds': 2, 'steps_per_round': 3}
    with pytest.raises(DFKDError, match=message):
        build_method(row | {'images': 8} | change, teacher, network(1), device='cpu')
    with pytest.raises(DFKDError, match='makes no images'):
        build_method('scratch', teacher, network(1))


def test_inversion_keeps_its_own_defaults():
    own = inspect.signature(DeepInversion).parameters
    for name, keyword in INVERSION_KEYWORDS.items():
        # generators know these words as well, with other defaults
        if name not in KEYWORDS:
            assert getattr(MethodSettings(), name) == own[keyword].default, name
    assert inversion_keywords({}, (8, 8)) == {}
