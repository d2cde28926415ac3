"""Generators: sizes, terms against definitions, batches that forget nothing, races that resume to the same bits, networks of one's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfkd_nb.dreams.competition import GrowingPool
from dfkd_nb.dreams.priors import View
from dfkd_nb.foundations.core import DFKDError, import_torchvision, load_checkpoint, save_checkpoint
from dfkd_nb.foundations.data import Augment, Domain
from dfkd_nb.foundations.distillation import Distiller, DrawnImages
from dfkd_nb.foundations.models import Teacher, count_parameters, load_teacher
from dfkd_nb.generators.generators import (
    DISTANCES,
    METHODS,
    Alternation,
    GenerativeSynthesizer,
    Generator,
    Pixels,
    activation_term,
    adversarial_term,
    balance_term,
)
from cases import each
from tiny import DIGITS, network


@pytest.fixture(scope="module")
def teacher():
    return Teacher(network(), DIGITS, "tiny")


def maker_of(teacher, weights=METHODS["dafl"], **settings):
    generator = settings.pop("generator", None) or Generator(teacher.domain.shape, 8, 4)
    defaults = {"steps": 3, "batch_size": 6, "device": "cpu"}
    return GenerativeSynthesizer(teacher, generator=generator, **defaults | weights | settings)


def race_of(teacher, weights, pooled=False, rounds=3, warmup=0, **settings):
    student = network(1, teacher.domain)
    if weights.get("adversarial_weight"):
        settings = {"student": student} | settings
    torch.manual_seed(5)
    maker = maker_of(teacher, weights, **settings)
    source = GrowingPool(teacher.domain) if pooled else DrawnImages(maker.draw, teacher.domain)
    distiller = Distiller(teacher, student, source, steps=(rounds - warmup) * 4, batch_size=4, learning_rate=0.05, device="cpu")
    return Alternation(maker, distiller, rounds=rounds, updates_per_round=4, warmup_rounds=warmup)


def bits(race):
    maker = race.maker
    return [*race.student.state_dict().values(), *maker.weights.values(), *maker.buffers.values(), maker.codes.detach()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def view_of(logits, student=None):
    return View(torch.zeros(len(logits), 1, 8, 8), logits, logits.argmax(1), student_logits=student)


# --- the generator ---


@pytest.mark.parametrize(
    ("latent", "parameters"), [(256, 2_328_899), (512, 4_426_051)], ids=["as in FastDFKD", "as for DAFL"]
)
def test_it_has_the_parameters_of_the_field(latent, parameters):
    assert count_parameters(Generator((3, 32, 32), latent)) == parameters


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (1, 28, 28), (3, 30, 41), (3, 64, 64), (3, 224, 224), (2, 9, 64)], ids=str)
def test_any_size_is_painted_and_no_weight_is_idle(shape):
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
    with pytest.raises(DFKDError, match="4 x 4 pixels"):
        Generator((3, 3, 32))
    with pytest.raises(DFKDError, match="1 or more of the rest"):
        Generator((3, 32, 32), 0)


# --- the terms ---


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(2, 100), st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_balance_and_certainty_make_the_mutual_information(seed, images, classes, scale):
    logits = scale * torch.randn(images, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p = logits.softmax(1)
    balance, hesitation = balance_term(view_of(logits)), torch.special.entr(p).sum(1).mean()
    assert -math.log(classes) - 1e-9 <= balance <= 1e-9
    assert -1e-9 <= -balance - hesitation <= math.log(min(images, classes)) + 1e-9


def test_gradients_of_the_terms_are_right():
    a, b = (2 * torch.randn(2, 4, 7, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: balance_term(view_of(a)), [a])
    for distance in DISTANCES:
        assert torch.autograd.gradcheck(lambda a, b, d=distance: adversarial_term(d, temperature=2.0)(view_of(a, b)), [a, b])


def test_terms_survive_answers_that_are_out_of_all_bounds():
    for scale in (1e2, 1e4, 1e8):
        a, b = (scale * torch.randn(2, 5, 10)).requires_grad_()
        for term in (balance_term, adversarial_term("kl"), adversarial_term("l1"), adversarial_term("js")):
            price = term(view_of(a, b))
            assert price.isfinite() and torch.autograd.grad(price, a)[0].isfinite().all()


def test_the_adversary_is_minus_the_distance():
    a, b = torch.randn(2, 9, 5)
    kl = F.kl_div(b.log_softmax(1), a.softmax(1), reduction="batchmean")
    assert torch.allclose(adversarial_term()(view_of(a, b)), -kl, atol=1e-6)
    assert torch.allclose(adversarial_term("l1")(view_of(a, b)), -(a - b).abs().mean())
    assert -math.log(2) <= adversarial_term("js")(view_of(90 * a, 90 * b)) <= 0
    agree = a.argmax(1) == b.argmax(1)
    assert agree.any() and not agree.all()
    wanted = F.kl_div(b[agree].log_softmax(1), a[agree].softmax(1), reduction="sum") / 9
    assert torch.allclose(adversarial_term(agreement=True)(view_of(a, b)), -wanted, atol=1e-6)


def test_terms_say_what_they_lack():
    logits = torch.randn(2, 3)
    with pytest.raises(DFKDError, match="give the synthesizer a student"):
        adversarial_term()(view_of(logits))
    with pytest.raises(DFKDError, match="embedding='classifier'"):
        activation_term(view_of(logits))
    with pytest.raises(DFKDError, match="use kl, l1, js"):
        adversarial_term("cosine")
    with pytest.raises(DFKDError, match="positive"):
        adversarial_term(temperature=0.0)


# --- the synthesizer ---


def test_the_same_seed_paints_the_same_and_another_another(teacher):
    torch.manual_seed(3)
    one = maker_of(teacher).synthesize(2)
    torch.manual_seed(3)
    two = maker_of(teacher).synthesize(2)
    other = maker_of(teacher, seed=1).synthesize(2)
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, other.images)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_own_price(teacher, method):
    weights = METHODS[method] | ({"student": network(1)} if "adversarial_weight" in METHODS[method] else {})
    maker = maker_of(teacher, weights, batch_size=32, learning_rate=3e-3)
    codes = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    before = float(maker.judge(maker.paint(codes), None)[0].detach())
    for _ in range(15):
        maker.step()
        if not maker.left:
            maker.finish()
    assert float(maker.judge(maker.paint(codes), None)[0].detach()) < before


def test_weights_and_codes_move_as_adam_with_the_betas_of_the_field(teacher):
    maker = maker_of(teacher, latent_learning_rate=0.1, steps=4)
    maker.start()
    leaves = [*maker.weights.values(), maker.codes]
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    adams = [
        torch.optim.Adam(copies[:-1], maker.learning_rate, betas=(0.5, 0.999)),
        torch.optim.Adam(copies[-1:], 0.1, betas=(0.5, 0.999)),
    ]
    for _ in range(3):
        maker.step()
        for leaf, copied in zip(leaves, copies, strict=True):
            copied.grad = leaf.grad.clone()
        for adam in adams:
            adam.step()
    for leaf, copied in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf, copied, rtol=1e-4, atol=1e-6)


def test_the_best_iterate_is_kept_and_is_a_copy(teacher):
    maker, prices, pictures = maker_of(teacher, steps=6, learning_rate=0.5), [], []
    for _ in range(6):
        codes = maker.codes if maker.left else None
        maker.step()
        prices.append(maker.best["cost"])
        pictures.append(maker.best["images"].clone())
        assert codes is None or torch.equal(codes, maker.codes)
    assert prices == sorted(prices, reverse=True)
    assert torch.equal(maker.finish().images, pictures[-1])
    with pytest.raises(DFKDError, match="not finished"):
        maker.finish()


def test_asking_leaves_no_trace_in_teacher_and_student(teacher):
    student = network(1).train()
    before = [v.clone() for v in (*teacher.state_dict().values(), *student.state_dict().values())]
    maker_of(teacher, METHODS["dfq"], student=student, embedding="classifier").synthesize(2)
    assert same(before, (*teacher.state_dict().values(), *student.state_dict().values()))
    assert student.training and all(p.grad is None for p in student.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*teacher.modules(), *student.modules()))


def test_an_untaught_pixel_code_and_a_fresh_start_are_ways_to_begin(teacher):
    pixels = maker_of(teacher, {"class_weight": 1.0}, generator=Pixels(DIGITS.shape), latent_learning_rate=0.1)
    assert pixels.synthesize(2).images.shape == (12, 1, 8, 8)
    with pytest.raises(DFKDError, match="latent_learning_rate above 0"):
        maker_of(teacher, {"class_weight": 1.0}, generator=Pixels(DIGITS.shape))
    fresh = maker_of(teacher, reuse="restart", steps=1)
    fresh.step()
    weight = fresh.weights["last.weight"].clone()
    fresh.finish()
    fresh.start()
    assert (fresh.weights["last.weight"] != weight).all()


def test_wishes_are_drawn_and_answers_are_taken(teacher):
    wished = maker_of(teacher, {"class_weight": 1.0}, labels="wishes", batch_size=64, steps=1).synthesize()
    assert wished.labels.unique().numel() == 10
    answered = maker_of(teacher, {"class_weight": 1.0}, steps=1).synthesize()
    assert answered.labels.max() < 10


def test_augmentation_and_further_terms_take_part(teacher):
    seen = []

    def remember(view):
        seen.append(view.x.shape)
        return view.x.square().mean()

    maker = maker_of(teacher, {}, terms={"size": (1.0, remember)}, augment=Augment(2, False))
    assert set(maker.synthesize().images.shape) and set(maker.history[0]) == {"batch", "updates", "total", "size"}
    assert seen == [torch.Size([6, 1, 8, 8])] * 3


class Tanh(nn.Module):
    latent_shape = (4,)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 64)

    def forward(self, z):
        return self.layer(50 * z + 50).tanh().view(-1, 1, 8, 8)


class Stubborn(Pixels):
    "Has weights, and gives nothing back."

    def __init__(self):
        super().__init__(DIGITS.shape)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, z):
        return z.sigmoid().detach()


@each(
    ("change", "message"),
    [
        ({"steps": 0}, "1 or more of each"),
        ({"learning_rate": 0.0}, "give a positive one"),
        ({"reuse": "never"}, "use continue, restart"),
        ({"labels": "none"}, "'answers' or 'wishes'"),
        ({"adversarial_weight": 1.0}, "give a student"),
        ({"adversarial_weight": 1.0, "student": network()}, "the student is the teacher"),
        ({"feature_weight": 1.0, "feature_scale": "huge"}, "unknown feature_scale"),
        ({"class_weight": 0.0, "balance_weight": 0.0, "activation_weight": 0.0}, "no term has a weight"),
        ({"generator": nn.Linear(4, 64)}, "give it latent_shape"),
        ({"generator": Generator((1, 16, 16), 4, 2)}, "build it with that shape"),
        ({"generator": Tanh()}, "end it with a sigmoid"),
        ({"precision": "float8"}, "unknown precision"),
    ],
)
def test_what_cannot_work_is_told_at_once(teacher, change, message):
    with pytest.raises(DFKDError, match=message):
        maker_of(teacher, **change)


def test_a_generator_that_gets_no_gradient_and_a_price_that_is_none(teacher):
    with pytest.raises(DFKDError, match="no gradient reaches the generator"):
        maker_of(teacher, generator=Stubborn()).step()
    with pytest.raises(DFKDError, match="'burst' is not finite"):
        maker_of(teacher, terms={"burst": (1.0, lambda view: view.x.mean() / 0)}).step()
    with pytest.raises(DFKDError, match="give 1 or more"):
        maker_of(teacher).synthesize(0)


# --- resuming ---


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_batch_resumes_to_the_same_bits_wherever_it_was_cut(teacher, tmp_path, left):
    settings = {"latent_learning_rate": 0.01, "augment": Augment(1, False), "labels": "wishes"}

    def fresh():
        torch.manual_seed(0)
        return maker_of(teacher, METHODS["dafl"], **settings)

    whole, part = fresh(), fresh()
    wanted = whole.synthesize(3)
    part.synthesize(1)
    part.step()
    while part.left > left:
        part.step()
    save_checkpoint(tmp_path / "state.pt", part.state_dict())
    torch.manual_seed(99)
    resumed = maker_of(teacher, METHODS["dafl"], **settings)
    resumed.load_state_dict(load_checkpoint(tmp_path / "state.pt"))
    while resumed.left:
        resumed.step()
    assert torch.equal(torch.cat([resumed.finish().images, resumed.synthesize().images]), wanted.images[6:])
    assert resumed.history == whole.history


def test_what_was_loaded_is_not_shared(teacher):
    part, other = (maker_of(teacher, latent_learning_rate=0.01) for _ in range(2))
    part.step()
    other.load_state_dict(part.state_dict())
    other.step()
    other.step()
    images = other.finish().images
    part.step()
    part.step()
    assert torch.equal(part.finish().images, images)


def test_a_state_of_other_settings_is_refused(teacher):
    with pytest.raises(DFKDError, match=r"steps \(was 4, now 3\)"):
        maker_of(teacher).load_state_dict(maker_of(teacher, steps=4).state_dict())
    with pytest.raises(DFKDError, match="another generator"):
        maker_of(teacher).load_state_dict(maker_of(teacher, generator=Generator((1, 8, 8), 8, 5)).state_dict())


# --- the race ---


@pytest.mark.parametrize("pooled", [False, True], ids=["drawn", "pooled"])
@pytest.mark.parametrize("method", METHODS)
def test_a_race_resumes_to_the_same_bits(teacher, tmp_path, method, pooled):
    whole, part, resumed = (race_of(teacher, METHODS[method], pooled) for _ in range(3))
    whole.run()
    part.run(until=4)
    part.step()  # one update into the second batch
    assert part.maker.left == 2
    save_checkpoint(tmp_path / "race.pt", part.state_dict())
    resumed.load_state_dict(load_checkpoint(tmp_path / "race.pt"))
    resumed.run()
    assert same(bits(resumed), bits(whole)) and resumed.maker.history == whole.maker.history
    if pooled:
        assert torch.equal(resumed.pool.images, whole.pool.images)


def test_turns_are_as_planned_and_nobody_competes_while_warming_up(teacher):
    race, turns, competed = race_of(teacher, METHODS["dfq"], True, rounds=4, warmup=2, steps=1), "", []
    while not race.finished:
        turns += "G" if race.due else "s"
        race.step()
        if turns[-1] == "G":
            competed.append("adversarial" in race.maker.history[-1])
    assert turns == "GGG" + "ssss" + "G" + "ssss"
    assert competed == [False, False, True, True]
    assert len(race.pool) == 24
    with pytest.raises(DFKDError, match="all its updates"):
        race.step()


def test_a_callback_and_a_deadline_stop_between_two_updates(teacher):
    race = race_of(teacher, METHODS["dafl"])
    race.run(callback=lambda now: now.maker.updates == 2)
    assert (race.maker.updates, race.done) == (2, 0)
    race.run(deadline=0.0)
    assert (race.maker.updates, race.done) == (2, 0)
    assert race.run(until=5).done == 5 and race.run().finished and race.seconds > 0


@each(
    ("change", "message"),
    [
        ({"rounds": 0}, "give 1 or more"),
        ({"warmup_rounds": 3}, "fewer to warm up"),
        ({"updates_per_round": 5}, "make them agree"),
        ({"warmup_rounds": 1, "rounds": 4}, "nothing to paint for"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(teacher, change, message):
    race = race_of(teacher, METHODS["zskt"])
    with pytest.raises(DFKDError, match=message):
        Alternation(race.maker, race.distiller, **{"rounds": 3, "updates_per_round": 4} | change)


def test_a_checkpoint_of_another_race_is_refused(teacher):
    race = race_of(teacher, METHODS["dafl"])
    with pytest.raises(DFKDError, match="not written by this kind of race .alternation"):
        race.load_state_dict({"kind": "competition"})
    with pytest.raises(DFKDError, match=r"rounds \(was 2, now 3\)"):
        race.load_state_dict(race_of(teacher, METHODS["dafl"], rounds=2).state_dict())


# --- networks of one's own ---


def test_a_foreign_network_with_its_own_size_mean_and_classes():
    import_torchvision()
    from torchvision.models import resnet18

    domain = Domain("leaves", (3, 40, 40), (0.3, 0.5, 0.2), (0.2, 0.3, 0.1), tuple("abcdefg"))
    torch.manual_seed(0)
    model = resnet18(num_classes=7)
    with torch.no_grad():
        model(torch.randn(4, 3, 40, 40))  # BatchNorm has seen something
    teacher = Teacher(model, domain, "resnet18")
    race = race_of(teacher, METHODS["dfq"], True, rounds=2, steps=1, augment=Augment(4, True))
    race.run()
    assert race.pool.images.shape == (12, 3, 40, 40) and race.pool.images.dtype == torch.uint8
    assert race.pool.labels.max() < 7
    assert {"class", "balance", "features", "adversarial"} <= set(race.maker.history[0])


def test_a_foreign_size_without_batchnorm_is_painted_by_answers_alone():
    domain = Domain("wide", (3, 64, 64), (0.5,) * 3, (0.5,) * 3, ("yes", "no"))
    torch.manual_seed(0)
    teacher = Teacher(nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), domain)
    made = maker_of(teacher, METHODS["dafl"], steps=2).synthesize()
    assert made.images.shape == (6, 3, 64, 64) and made.domain is domain
    with pytest.raises(DFKDError):
        maker_of(teacher, METHODS["dfq"], student=network(1, domain))


class ChannelsLast(Generator):
    "A generator whose features, and with them its weights' gradients, lie channels last."

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.linear(z).view(len(z), -1, *self.begin)).to(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.last(x).sigmoid()


def test_gradients_in_another_order_of_memory_reach_their_own_weights() -> None:
    "A fused Adam reads a gradient in the order of memory; one that lies otherwise must be laid out like its weight."
    teacher = load_teacher("cifar10-resnet20")
    makers = []
    for fused in (True, False):
        torch.manual_seed(1)
        settings = {"batch_size": 4, "steps": 2, "class_weight": 1.0, "feature_weight": 1.0, "device": "cpu"}
        maker = GenerativeSynthesizer(teacher, generator=ChannelsLast((3, 32, 32), 8, 4), **settings)
        if not fused:
            maker.optimizer = torch.optim.Adam(maker.weights.values(), maker.learning_rate, betas=(0.5, 0.999), fused=False)
        maker.synthesize()
        makers.append(maker)
    for name, weight in makers[0].weights.items():
        assert (weight - makers[1].weights[name]).abs().max() < 2e-4, name  # Adam's first steps are 1e-3 in some direction
