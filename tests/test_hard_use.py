"""What people do with the parts that nobody meant: other precisions, hooks, foreign states, odd settings.

It works, or one line says what to do. Never a traceback of somebody else's, never a number that is wrong.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dfkd_nb.applications import continual, segmentation
from dfkd_nb.applications.pruning import filter_importance, find_filters
from dfkd_nb.applications.transfer import fidelity
from dfkd_nb.dreams.competition import answer
from dfkd_nb.dreams.statistics import Watch, fuse_statistics
from dfkd_nb.foundations.core import DFKDError
from dfkd_nb.foundations.data import Domain, ImageSet
from dfkd_nb.foundations.distillation import Distiller, evaluate
from dfkd_nb.foundations.models import Teacher
from dfkd_nb.lab.diagnostics import observe
from tiny import DIGITS, network, stirred
from torch import Tensor, nn

QUICK: dict[str, Any] = {"steps": 3, "batch_size": 8, "learning_rate": 0.02, "device": "cpu"}


def pictures(count: int = 40, domain: Domain = DIGITS, seed: int = 0) -> ImageSet:
    "Random bytes, of every class as many."
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *domain.shape), generator=rng).to(torch.uint8)
    return ImageSet(pixels, torch.arange(count) % domain.num_classes, domain)


def one_line(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(DFKDError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(network(0), DIGITS)


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


class Segmenter(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))


def learned(who: Teacher, student: nn.Module, source: Any, **settings: Any) -> tuple[float, Tensor]:
    "The last loss, and all that the student has become."
    done = Distiller(who, student, source, **QUICK | settings).run(every=1)
    return done.history[-1]["loss"], torch.cat([v.flatten().float() for v in done.student.state_dict().values()])


@pytest.mark.parametrize("labels", [0.0, 0.5])
@pytest.mark.parametrize("who", ["student", "teacher", "images", "all"])
def test_networks_and_images_of_double_precision_learn_alike(teacher: Teacher, who: str, labels: float) -> None:
    def source(n: int, rng: torch.Generator) -> Tensor:
        pixels = torch.rand(n, 1, 8, 8, generator=rng)
        return pixels.double() if who in ("images", "all") else pixels

    given: Any = pictures() if labels else source
    student, tutor = network(5), teacher
    usual = learned(tutor, network(5), given, label_weight=labels)
    if who in ("student", "all"):
        student = double(student)
    if who in ("teacher", "all"):
        tutor = copy.deepcopy(teacher).double()
    found = learned(tutor, student, given, label_weight=labels)
    assert found[0] == pytest.approx(usual[0], rel=1e-4)
    torch.testing.assert_close(found[1], usual[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_student_of_half_precision_learns_and_is_judged(teacher: Teacher, kind: torch.dtype) -> None:
    loss, _ = learned(teacher, network(5).to(kind), pictures(), label_weight=0.5)
    assert loss == pytest.approx(learned(teacher, network(5), pictures(), label_weight=0.5)[0], rel=0.02)
    model, data = network(5), pictures()
    assert abs(evaluate(model, data) - evaluate(model.to(kind), data)) <= 0.1


def test_mixed_precision_begins_from_single_precision(teacher: Teacher) -> None:
    one_line(lambda: learned(teacher, double(network(5)), pictures(), precision="bfloat16"), "float64", "student.float()")


def test_all_that_ask_a_network_ask_it_in_its_own_precision(teacher: Teacher) -> None:
    data, new = pictures(), dataclasses.replace(DIGITS, name="new", classes=("a", "b"))
    model = network(5)
    assert evaluate(double(model), data) == evaluate(model, data)
    torch.testing.assert_close(answer(double(model), data, DIGITS).float(), answer(model, data, DIGITS))
    assert fidelity(teacher, double(model), data)["agreement"] == fidelity(teacher, model, data)["agreement"]
    assert continual.measure_sets(double(model), DIGITS, {"old": data}) == continual.measure_sets(model, DIGITS, {"old": data})
    long = copy.deepcopy(teacher).double()
    torch.testing.assert_close(observe(data, long).logits, observe(data, teacher).logits)
    for who in (teacher, long):
        learner = continual.add_classes(who, pictures(20, new), old=data, rows="fitted", **QUICK)
        assert learner.run().done == 3
    wide = stirred(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 10)))
    filters = find_filters(wide, DIGITS)
    usual = filter_importance(wide, filters, data, "divergence", teacher)
    for name, value in filter_importance(double(wide), filters, data, "divergence", teacher).items():
        torch.testing.assert_close(value, usual[name], rtol=1e-3, atol=1e-6)
    scenes = segmentation.draw_scenes(6, (16, 16))
    assert segmentation.mean_iou(double(Segmenter()), scenes) == pytest.approx(segmentation.mean_iou(Segmenter(), scenes), abs=1e-3)
    paints = Teacher(Segmenter(), scenes.domain)
    for label_weight in (0.0, 1.0):
        race = segmentation.SceneDistiller(paints, double(Segmenter()), scenes, label_weight=label_weight, **QUICK)
        assert race.run().done == 3


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def doubled(norm: nn.Module) -> None:
    plain = norm.forward
    norm.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "after": lambda norm: norm.register_forward_hook(lambda _, given, out: 3 * out),
    "before": lambda norm: norm.register_forward_pre_hook(lambda _, given: (3 * given[0] + 1,)),
    "gradient": lambda norm: norm.register_full_backward_hook(lambda _, given, out: (3 * given[0],)),
    "own forward": doubled,
    "before, a subclass": lambda norm: (
        norm.register_forward_pre_hook(lambda _, given: (3 * given[0] + 1,)),
        norm.__setattr__("__class__", type("Other", (nn.BatchNorm2d,), {})),
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_fused_path_keeps_what_was_put_on_a_batchnorm(kind: str) -> None:
    model = stirred(Normed()).eval()
    CHANGES[kind](model.norm)
    who = Teacher(model, DIGITS)
    for network_ in (fuse_statistics(who), copy.deepcopy(fuse_statistics(who))):
        x, again = (torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
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
