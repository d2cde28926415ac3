"""Competition: a divergence with a bound and a gradient, a pool that forgets nothing, turns
that resume, coverage that is not fooled.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIGITS, network

from dfkd_nb.dreams.competition import (
    AdaptiveDeepInversion,
    competition_loss,
    competition_term,
    jensen_shannon,
    round_metrics,
)
from dfkd_nb.dreams.competition_toy import CompetitionToy, ToyExplorer, draw_toy
from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.priors import LossInputs
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.loop import AlternatingTrainer, GrowingPool
from dfkd_nb.lab.settings import TransferSettings, check_settings
from dfkd_nb.lab.tasks.transfer import adaptive_trainer
from dfkd_nb.toolbox.core import load_checkpoint, save_checkpoint
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.evaluation import predict_logits
from dfkd_nb.toolbox.teachers import Teacher


@pytest.fixture(scope='module')
def teacher():
    return Teacher(network(), DIGITS, 'tiny')


def compete(
    teacher,
    weight=10.0,
    rounds=3,
    every=4,
    steps=14,
    domain=DIGITS,
    student=None,
    terms=None,
    test=None,
    images=6,
    **settings,
):
    student = student or network(1)
    settings = {'steps': 5, 'batch_size': 4, 'jitter': 1} | settings
    synthesizer = AdaptiveDeepInversion(
        teacher,
        student,
        images_per_round=images,
        competition_weight=weight,
        terms=terms,
        device='cpu',
        **settings,
    )
    shared = {'batch_size': 4, 'learning_rate': 0.05, 'device': 'cpu'}
    pool = GrowingPool(DIGITS)
    distiller = Distiller(teacher, student, pool, steps=steps, domain=domain, **shared)
    return AlternatingTrainer(
        synthesizer,
        distiller,
        rounds=rounds,
        steps_per_round=every,
        final_steps=steps - (rounds - 1) * every,
        measure=round_metrics(test),
    )


def forgetful(model):
    "With dropout before the last layer: in training mode it draws from the global streams."
    return torch.nn.Sequential(*model[:-1], torch.nn.Dropout(0.4), model[-1])


def noise_term(inputs):
    "A term that draws from PyTorch's global streams, as careless code does."
    return (inputs.x * torch.rand_like(inputs.x)).mean()


def weights(model):
    return torch.cat([v.double().flatten() for v in model.state_dict().values()])


# --- the divergence ---


def test_the_divergence_is_half_the_kl_of_each_from_the_middle():
    p, q = torch.randn(2, 20, 7, dtype=torch.float64)
    m = 0.5 * (p.softmax(1) + q.softmax(1))
    wanted = 0.5 * sum(
        F.kl_div(m.log(), a.softmax(1), reduction='none').sum(1) for a in (p, q)
    )
    assert torch.allclose(jensen_shannon(p, q), wanted, atol=1e-14)
    assert torch.allclose(jensen_shannon(3 * p, 3 * q, 3.0), wanted, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 1000),
    st.sampled_from([1e-3, 1.0, 30.0, 1e4, 1e30]),
    st.sampled_from([0.5, 1.0, 3.0, 20.0]),
)
def test_it_is_bounded_symmetric_and_finite_with_a_finite_gradient(
    seed, classes, scale, temperature
):
    p, q = (
        scale * torch.randn(2, 3, classes, generator=torch.Generator().manual_seed(seed))
    ).requires_grad_()
    js = jensen_shannon(p, q, temperature)
    assert (js >= -1e-6).all() and (js <= math.log(2) + 1e-5).all()
    assert torch.allclose(js, jensen_shannon(q, p, temperature), atol=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(js.sum(), (p, q)))


@pytest.mark.parametrize('classes, scale', [(2, 1.0), (10, 40.0), (1000, 2.0)])
def test_its_gradient_is_that_of_finite_differences(classes, scale):
    p, q = (
        scale
        * torch.randn(
            1, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(s)
        )
        for s in (0, 1)
    )
    assert torch.autograd.gradcheck(
        lambda a, b: jensen_shannon(a, b, 3.0), (p.requires_grad_(), q.requires_grad_())
    )


def test_a_thousand_flat_classes_still_have_a_gradient():
    p, q = torch.randn(2, 8, 1000).requires_grad_()
    (g,) = torch.autograd.grad(jensen_shannon(p, q, 3.0).sum(), q)
    assert (g.norm(dim=1) > 0).all()


def test_it_keeps_its_bits_in_half_precision():
    p, q = torch.randn(2, 8, 10)
    assert torch.allclose(
        jensen_shannon(p.bfloat16(), q.bfloat16()),
        jensen_shannon(p.bfloat16().float(), q.bfloat16().float()),
    )


def test_the_term_penalizes_agreement_and_needs_a_student():
    inputs = LossInputs(torch.zeros(3, 1, 8, 8), torch.randn(3, 10), torch.arange(3))
    with pytest.raises(DFKDError, match='nobody to compete with'):
        competition_term()(inputs)
    inputs.student_logits = torch.randn(3, 10)
    assert competition_term(3.0)(inputs) == competition_loss(
        inputs.logits, inputs.student_logits, 3.0
    )
    assert (
        1 - math.log(2)
        <= competition_term()(inputs)
        < competition_loss(inputs.logits, inputs.logits)
    )
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(DFKDError, match='temperature'):
            competition_term(bad)


# --- the pool ---


def filled(value, n):
    return torch.full((n, 1, 8, 8), value, dtype=torch.uint8), torch.zeros(
        n, dtype=torch.long
    )


def values(batch):
    return batch[0][:, 0, 0, 0].tolist()


def test_new_images_come_first_and_then_everything_evenly():
    pool, rng = GrowingPool(DIGITS), torch.Generator().manual_seed(0)
    pool.add(*filled(1, 8))
    pool.sample(4, rng)
    pool.add(*filled(2, 4))
    pool.add(*filled(3, 4))  # nothing was drawn in between: both are new
    assert (
        sorted(values(pool.sample(4, rng)) + values(pool.sample(4, rng)))
        == [2] * 4 + [3] * 4
    )
    assert values(pool.sample(4, rng)) + values(pool.sample(4, rng)) == [1] * 8
    drawn = [v for _ in range(4) for v in values(pool.sample(4, rng))]
    assert sorted(drawn) == [1] * 8 + [2] * 4 + [3] * 4


def test_newest_first_can_be_switched_off():
    pool, rng = GrowingPool(DIGITS, newest_first=False), torch.Generator().manual_seed(0)
    pool.add(*filled(1, 60))
    pool.sample(4, rng)
    pool.add(*filled(2, 4))
    assert values(pool.sample(4, rng)) != [2] * 4


def test_the_pool_keeps_every_image_and_hands_out_no_empty_room():
    pool = GrowingPool(DIGITS)
    for k in range(1, 20):
        pool.add(*filled(k, 3))
    assert pool.images[:, 0, 0, 0].tolist() == [k for k in range(1, 20) for _ in range(3)]
    assert len(pool) == len(pool.labels) == 57
    assert pool.state_dict()['images'].untyped_storage().nbytes() == 57 * 64


@pytest.mark.parametrize('kept', [True, False])
def test_a_pool_goes_on_where_it_stood(kept):
    def make():
        pool = GrowingPool(DIGITS, saves_images=kept)
        pool.add(*filled(1, 6))
        pool.add(*filled(2, 6))
        return pool

    pool, rng = make(), torch.Generator().manual_seed(0)
    pool.sample(4, rng)
    state, stream = pool.state_dict(), rng.get_state()
    wanted = [values(pool.sample(4, rng)) for _ in range(6)]
    other = GrowingPool(DIGITS) if kept else make()
    other.load_state_dict(state)
    assert [values(other.sample(4, rng.set_state(stream))) for _ in range(1)] == wanted[:1]
    assert [values(other.sample(4, rng)) for _ in range(5)] == wanted[1:]


@pytest.mark.parametrize('kept', [True, False])
def test_a_pool_that_is_loaded_knows_what_is_new(kept):
    def make():
        pool = GrowingPool(DIGITS, saves_images=kept)
        pool.add(*filled(1, 6))
        return pool

    pool, rng = make(), torch.Generator().manual_seed(0)
    pool.sample(4, rng)
    pool.add(*filled(2, 4))
    other = GrowingPool(DIGITS) if kept else make()
    if not kept:
        other.add(*filled(2, 4))
    other.load_state_dict(pool.state_dict())
    assert values(other.sample(4, rng)) == [2] * 4


def test_a_pool_without_its_images_says_so():
    pool = GrowingPool(DIGITS, saves_images=False)
    pool.add(*filled(1, 6))
    with pytest.raises(DFKDError, match='add those first'):
        GrowingPool(DIGITS).load_state_dict(pool.state_dict())


@each(
    'images, labels, message',
    [
        (torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), 'give uint8'),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), '8'),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 10]), '0 to 9'),
        (
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            torch.tensor([0]),
            'one label an image',
        ),
        (
            torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
            torch.zeros(0, dtype=torch.long),
            'no images to add',
        ),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, 'give the target classes'),
        (
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            torch.tensor([0.0, 1.0]),
            'as integers',
        ),
    ],
)
def test_a_pool_refuses_what_does_not_fit(images, labels, message):
    with pytest.raises(DFKDError, match=message) as error:
        GrowingPool(DIGITS).add(images, labels)
    assert '\n' not in str(error.value)


# --- taking turns ---


def test_rounds_come_when_they_are_due_and_the_rows_say_what_was_fresh(teacher):
    contest = compete(teacher).run()
    assert [row['steps'] for row in contest.history] == [0, 4, 8]
    assert [row['images'] for row in contest.history] == [6, 12, 18]
    assert contest.finished and contest.done == 14 and len(contest.pool) == 18
    assert torch.bincount(contest.pool.labels, minlength=10).tolist() == [2] * 8 + [1, 1]
    fresh = ImageSet(contest.pool.images[:6], contest.pool.labels[:6], DIGITS)
    known = float(
        (predict_logits(teacher, fresh, DIGITS).argmax(1) == fresh.labels).float().mean()
    )
    assert contest.history[0]['teacher_fresh'] == known


def test_the_first_round_has_no_rival_and_later_ones_have(teacher):
    contest = compete(teacher)
    synthesizer = contest.synthesizer
    contest.step()
    assert synthesizer.underway and synthesizer.student is None
    assert synthesizer.objective.weights['competition'] == 0
    contest.run(until=4)
    contest.step()
    assert synthesizer.underway and synthesizer.student is not None
    assert synthesizer.objective.weights['competition'] == 10
    contest.run(until=5)
    plain = compete(teacher, 0.0).run()
    assert plain.synthesizer.student is None
    assert torch.equal(plain.pool.images[:6], contest.pool.images[:6])
    assert not torch.equal(plain.pool.images[6:12], contest.pool.images[6:12])


def test_weight_zero_is_deepinversion(teacher):
    with_term = compete(teacher, 0.0).run()
    for index in range(3):
        plain = DeepInversion(
            teacher, steps=5, batch_size=4, jitter=1, device='cpu', seed=index
        )
        made = plain.synthesize(6, (torch.arange(6 * index, 6 * index + 6) % 10).tolist())
        assert torch.equal(with_term.pool.images[6 * index : 6 * index + 6], made.images)


@pytest.mark.parametrize('steps', [0, 1, 7, 10, 11, 14, 17, 24, 30, 38])
def test_it_resumes_to_the_same_bits_from_anywhere(teacher, tmp_path, steps):
    def fresh():
        torch.manual_seed(5)  # the term's noise begins here
        return compete(
            teacher, student=forgetful(network(1)), terms={'noise': (1.0, noise_term)}
        )

    whole, part = fresh().run(), fresh()
    for _ in range(steps):
        part.step()
    save_checkpoint(tmp_path / 'state.pt', part.state_dict())
    other = fresh()
    torch.manual_seed(99)
    other.load_state_dict(load_checkpoint(tmp_path / 'state.pt'))
    other.run()
    assert torch.equal(other.pool.images, whole.pool.images)
    assert torch.equal(weights(other.student), weights(whole.student))
    for mine, theirs in zip(other.history, whole.history):
        # `step` leaves the rows of losses to `run`
        assert mine | {'loss': 0} == theirs | {'loss': 0}


def test_every_round_begins_with_its_own_noise(teacher):
    # the same classes in every round
    contest = compete(teacher, weight=1e-6, rounds=2, images=10)
    first, second = contest.run().pool.images.split(10)
    assert not torch.equal(first, second)


def test_a_synthesizer_is_put_back_after_every_round(teacher):
    contest = compete(teacher)
    for steps in (1, 6):  # the first round has no competition, the next another seed
        contest.run(until=steps)
        synthesizer = contest.synthesizer
        assert not synthesizer.underway and synthesizer.seed == 0
        assert synthesizer.objective.weights['competition'] == 10.0


def test_each_network_is_asked_on_its_own_scale(teacher):
    """In the loop the student answers as outside.

    To dreams, to fresh images, on the test set.
    """
    other, seen = dataclasses.replace(DIGITS, mean=(0.6,), std=(0.15,)), []

    def remember(inputs):
        seen.append([inputs.x.detach().clone(), inputs.logits, inputs.student_logits])
        return inputs.x.mean()

    settings = {'jitter': 0, 'flip': False, 'terms': {'remember': (1.0, remember)}}
    contest = compete(teacher, domain=other, rounds=2, steps=8, **settings)
    contest.run(until=4)
    seen.clear()
    contest.student.eval()
    unseen = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        predictions = contest.student(other.normalize(unseen)).argmax(1)
    contest.measure = round_metrics(ImageSet(unseen, predictions, DIGITS))
    contest.step()  # the first update of the second round
    pixels, known, guessed = seen[0]
    close = {'rtol': 1e-4, 'atol': 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(known, teacher(DIGITS.from_pixels(pixels)), **close)
        said = contest.student(other.from_pixels(pixels))
        torch.testing.assert_close(guessed, said, **close)
    while contest.synthesizer.underway:
        contest.step()
    fresh, targets = contest.pool.images[6:], contest.pool.labels[6:]
    with torch.no_grad():
        known, guessed = teacher.predict(fresh), contest.student(other.normalize(fresh))
    apart, right = jensen_shannon(known, guessed).mean(), (guessed.argmax(1) == targets)
    row = contest.history[1]
    assert row['divergence'] == pytest.approx(float(apart), rel=1e-4)
    assert row['student_fresh'] == pytest.approx(float(right.float().mean()))
    assert row['accuracy'] == 1


def test_a_callback_stops_it_and_it_goes_on(teacher):
    whole, stopped, calls = compete(teacher).run(log_every=2), compete(teacher), 0

    def stop(contest):
        nonlocal calls
        calls += 1
        return True

    while not stopped.finished:
        stopped.run(callback=stop, log_every=2)
    assert calls > 10
    assert torch.equal(weights(stopped.student), weights(whole.student))
    assert stopped.history == whole.history


def test_a_deadline_in_the_past_does_nothing(teacher):
    contest = compete(teacher).run(deadline=0.0)
    assert contest.done == 0 and contest.round == 0


def test_another_setting_is_not_resumed(teacher):
    state = compete(teacher).state_dict()
    with pytest.raises(DFKDError, match='competition_weight'):
        compete(teacher, 5.0).load_state_dict(state)
    with pytest.raises(DFKDError, match='steps_per_round'):
        compete(teacher, every=3).load_state_dict(state)
    with pytest.raises(DFKDError, match='not written by an AlternatingTrainer'):
        compete(teacher).load_state_dict({'kind': 'synthesis'})
    with pytest.raises(DFKDError, match='not saved by an AdaptiveDeepInversion'):
        compete(teacher).synthesizer.load_state_dict({'kind': 'synthesis'})


def test_what_cannot_be_a_competition_is_refused(teacher):
    with pytest.raises(DFKDError, match='the student is the teacher'):
        compete(teacher, student=network())
    with pytest.raises(DFKDError, match='1 or more'):
        compete(teacher, rounds=5)
    with pytest.raises(DFKDError, match='1 or more'):
        compete(teacher, rounds=0)
    contest = compete(teacher)
    images = ImageSet(*filled(1, 4), DIGITS)
    with pytest.raises(DFKDError, match='give its Distiller a GrowingPool'):
        AlternatingTrainer(
            contest.synthesizer,
            Distiller(teacher, contest.student, images, steps=4, device='cpu'),
            rounds=1,
            steps_per_round=4,
        )
    with pytest.raises(DFKDError, match='give both the same student'):
        AlternatingTrainer(
            contest.synthesizer,
            Distiller(teacher, network(2), GrowingPool(DIGITS), steps=4, device='cpu'),
            rounds=1,
            steps_per_round=4,
        )
    with pytest.raises(DFKDError, match='no images to predict'):
        predict_logits(teacher, GrowingPool(DIGITS), DIGITS)
    with pytest.raises(DFKDError, match='log_every is 0'):
        contest.run(log_every=0)
    with pytest.raises(DFKDError, match='taken all its steps'):
        contest.run().step()


def test_the_synthesizer_uses_the_student_in_eval_mode_and_leaves_it_alone(teacher):
    contest = compete(teacher)
    contest.run(until=4)
    before = weights(contest.student)
    contest.step()
    assert contest.synthesizer.underway and not any(
        m.training for m in contest.synthesizer.student.model.modules()
    )
    while contest.synthesizer.underway:
        contest.step()
    assert torch.equal(before, weights(contest.student))


# --- the toy ---


def test_the_toy_dreams_where_the_student_is_wrong():
    def ratio(weight):
        toy = CompetitionToy(weight=weight, steps_per_round=60)
        toy.step()
        toy.step()
        fresh, real = (
            float(jensen_shannon(toy.teacher(x), toy.student(x)).mean())
            for x in (toy.rounds[-1], toy.real)
        )
        assert len(toy.history) == 2 and draw_toy(toy, 100).shape == (3, 100, 100)
        return fresh / real

    assert ratio(10.0) > 1.5 * ratio(0.0)


def test_the_toy_explorer_plays_rounds_and_starts_again():
    pytest.importorskip('ipywidgets')
    play = ToyExplorer(steps_per_round=2)
    play.weight.value = 0.0
    play.next.click()
    assert play.toy.weight == 0 and len(play.pictures) == 2 and play.look.value == 2
    play.look.value = 1
    assert play.picture.value == play.pictures[0]
    play.again.click()
    assert len(play.toy.rounds) == 1 and len(play.pictures) == 1 and play.look.value == 1


@each(('images', 'wanted'), [(4, [0, 2, 5, 7]), (10, list(range(10)))])
def test_fewer_images_than_classes_are_spread(
    teacher: Teacher, images: int, wanted: list[int]
) -> None:
    "As a recipe with classes = 'spread' says, over all rounds."
    small = {'teacher': 'run:t', 'student': 'digits-net', 'images': images, 'rounds': 2}
    small |= {'steps': 2, 'steps_per_round': 1, 'synthesis_steps': 1, 'batch_size': 2}
    small |= {'half_size_steps': 0, 'jitter': 1, 'synthesis_batch_size': 2}
    for classes, expected in (('spread', wanted), ('in-turn', list(range(images)))):
        settings = check_settings(TransferSettings, small | {'classes': classes}, 'here')
        device = torch.device('cpu')
        trainer = adaptive_trainer(settings, teacher, network(1), device).run()
        assert trainer.pool.labels.tolist() == expected
