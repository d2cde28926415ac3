"Pruning's contract: what a removal computes, what importance estimates, tables, files, exports, resuming, refusals."

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfkd_nb.applications import pruning
from dfkd_nb.applications.pruning import (
    ConvKey,
    Filters,
    Gates,
    LatencyTable,
    Plan,
    PruningDistiller,
    answer_direction,
    compare_latencies,
    conv_shapes,
    export_network,
    filter_importance,
    find_filters,
    gate_gradients,
    latencies_in_turn,
    linear_fit,
    load_pruned,
    network_cost,
    prune_filters,
    rank_agreement,
    remove_filters,
    removed_filters,
    save_pruned,
    share_recovered,
)
from dfkd_nb.foundations.core import DFKDError, load_tensors, save_tensors
from dfkd_nb.foundations.data import DOMAINS, ImageSet
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.models import Teacher, build_model, load_teacher
from dfkd_nb.lab.runs import Recipe, Run
from cases import each

DIGITS, CIFAR = DOMAINS["digits"], DOMAINS["cifar10"]


def network(name="digits-net", seed=0):
    "A network whose BatchNorms are far from where they begin."
    torch.manual_seed(seed)
    domain = DIGITS if name in ("digits-net", "flat") else CIFAR
    if name == "flat":  # each filter becomes 16 inputs of the linear layer, as in VGG
        model = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(96, 9), nn.Linear(9, 10))
    else:
        model = build_model(name, 10, domain.channels)
    with torch.no_grad():
        for _ in range(10 if name == "digits-net" else 2):
            model(torch.randn(16, *domain.shape))
    return model.eval(), domain


@pytest.fixture(scope="module")
def digits():
    model, domain = network()
    return Teacher(model, domain, "tiny"), find_filters(model, domain)


@pytest.fixture(scope="module")
def pool():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (120, 1, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageSet(images, torch.randint(10, (120,), generator=rng), DIGITS)


def some(filters: Filters, seed=0):
    "Filters kept at random, the first of each layer among them."
    rng = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(group.count, generator=rng) > 0.4 for name, group in filters.groups.items()}
    for still in kept.values():
        still[0] = True
    return kept


# removal


@pytest.mark.parametrize("name", ["digits-net", "resnet20", "wrn16-1", "mobilenetv2", "resnet18", "flat"])
def test_removal_is_what_closed_gates_compute(name):
    model, domain = network(name)
    filters, model = find_filters(model, domain), model.double()
    kept = some(filters)
    small = remove_filters(model, filters, kept)
    x = torch.randn(2, *domain.shape, dtype=torch.double)
    with torch.no_grad():
        with Gates(model, filters.groups.values(), {k: v.double() for k, v in kept.items()}):
            masked = model(x)
        assert torch.allclose(small(x), masked, rtol=1e-9, atol=1e-9 * float(masked.abs().max()))
        assert not torch.allclose(model(x), masked), "the gates are gone again, and they mattered"
    assert list(conv_shapes(small.float(), domain).values()) == filters.keys(kept), "sizes are as the table is asked"


def test_the_padded_stream_is_left_alone():
    teacher = load_teacher("cifar10-resnet20")
    filters = find_filters(teacher, teacher.domain)
    assert list(filters.left_alone) == ["conv"] and len(filters.groups) == 9 and filters.total == 3 * (16 + 32 + 64)
    with pytest.raises(DFKDError, match="'conv' cannot be removed"):
        find_filters(teacher, teacher.domain, layers=["conv"])
    with pytest.raises(DFKDError, match="no filters to remove in 'fc'"):
        find_filters(teacher, teacher.domain, layers=["fc"])
    assert list(find_filters(teacher, teacher.domain, layers=["blocks.1.conv1"]).groups) == ["blocks.1.conv1"]


def test_what_layers_added_up_lose_counts_as_often(digits):
    model, domain = network("wrn16-1")
    filters = find_filters(model, domain)
    shared = [name for name in filters.groups if filters.weight(name) > 1]
    assert shared, "shortcuts add layers up"
    name = shared[0]
    kept = filters.all()
    kept[name][0] = False
    small = remove_filters(model, filters, kept)
    lost = sum(k.outputs for k in filters.shapes.values()) - sum(k.outputs for k in conv_shapes(small, domain).values())
    assert lost == filters.weight(name) and filters.removed_share(kept) == lost / filters.total


def test_removal_leaves_the_original_alone(digits):
    teacher, filters = digits
    before = copy.deepcopy(teacher.state_dict())
    small = remove_filters(teacher, filters, some(filters))
    assert all(p.requires_grad for p in small.parameters()) and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


class Twice(nn.Module):
    "One convolution, used twice."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.b(self.b(self.a(x)).relu()).mean((2, 3)))


class Tied(Twice):
    "Two convolutions that share their weights."

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x)).relu()).mean((2, 3)))


class Hidden(nn.Module):
    "Its gradient cannot be followed."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 10)

    def forward(self, x):
        with torch.no_grad():
            return self.fc(self.b(self.a(x)).mean((2, 3)))


@each(
    "model, text",
    [
        (Twice(), "'b' is used more than once"),
        (Tied(), "shares its weights with"),
        (Hidden(), "cannot trace|can be removed"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "no convolution that another layer reads"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10)), "cannot trace"),
        (nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), "can be removed"),
    ],
)
def test_networks_that_cannot_be_pruned(model, text):
    with pytest.raises(DFKDError, match=text) as error:
        find_filters(model, DIGITS)
    assert "\n" not in str(error.value)


def test_a_shared_layer_does_not_keep_the_others(digits):
    class Mixed(Tied):
        def __init__(self):
            super().__init__()
            self.d, self.e = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, x):
            return super().forward(self.e(self.d(x)))

    filters = find_filters(Mixed(), DIGITS)
    assert list(filters.groups) == ["d"] and "b" in " ".join(filters.left_alone)


# importance


def test_gates_know_each_image_and_the_weights(digits, pool):
    teacher, filters = digits
    x, y = DIGITS.normalize(pool.images[:6]), pool.labels[:6]

    def loss(answer, labels):
        return nn.functional.cross_entropy(answer, labels, reduction="sum")

    together = gate_gradients(teacher, filters, x, lambda a: loss(a, y))
    for i in range(6):
        alone = gate_gradients(teacher, filters, x[i : i + 1], lambda a, i=i: loss(a, y[i : i + 1]))
        for name in alone:
            assert torch.allclose(together[name][i], alone[name][0], atol=1e-5)
    model = copy.deepcopy(teacher.model).requires_grad_(True)
    loss(model(x), y).backward()
    assert torch.allclose(together["3"].sum(0), (model[6].weight * model[6].weight.grad).sum((0, 2, 3)), atol=1e-4)


def test_importance_by_hand():
    "One image, one linear answer: a channel's mean times its weight."
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        model[3].weight.zero_()
        model[3].weight[0] = torch.tensor([1.0, 1.0])
    filters = find_filters(model, DIGITS)
    images = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    a = float(DIGITS.normalize(images).mean())
    found = filter_importance(model, filters, [(images, torch.tensor([0]))], "labels")["0"]
    slope = math.exp(3 * a) / (math.exp(3 * a) + 9) - 1  # of the cross-entropy by the first logit, 3 a
    assert torch.allclose(found, torch.tensor([(slope * a) ** 2, (slope * 2 * a) ** 2]), rtol=1e-3)


def test_the_divergence_from_oneself_has_no_first_order(digits, pool):
    teacher, filters = digits
    exact = copy.deepcopy(teacher.model).double()
    x = DIGITS.normalize(pool.images[:50]).double()
    answers = exact(x).detach()

    def divergence(logits):
        return nn.functional.kl_div(logits.log_softmax(1), answers.log_softmax(1), log_target=True, reduction="sum")

    assert all(g.abs().max() < 1e-12 for g in gate_gradients(exact, filters, x, divergence).values())


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=10, deadline=None)
def test_the_direction_has_the_covariance_of_drawn_labels(seed, classes):
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 1, classes, generator=rng, dtype=torch.double)
    draws = answer_direction(a.expand(4000, -1), b.expand(4000, -1), rng)
    p, q = a.softmax(1)[0], b.softmax(1)[0]
    labels = torch.eye(classes, dtype=torch.double) - q  # minus the gradient of each label's cross-entropy
    assert torch.allclose(draws.T @ draws / 4000, (p[:, None] * labels).T @ labels, atol=0.06)


def test_importance_refuses_and_repeats(digits, pool):
    teacher, filters = digits
    first, again = (filter_importance(teacher, filters, pool.batches(60), seed=3) for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first) and math.isclose(rank_agreement(first, again), 1)
    kept = some(filters)
    partly = filter_importance(teacher, filters, pool.batches(60), kept=kept)
    assert all((partly[k][~kept[k]] == 0).all() and (partly[k][kept[k]] > 0).any() for k in kept)
    for arguments, text in (
        ({"criterion": "magnitude"}, "unknown criterion"),
        ({"square": "both"}, "unknown square"),
    ):
        with pytest.raises(DFKDError, match=text):
            filter_importance(teacher, filters, pool.batches(60), **arguments)
    with pytest.raises(DFKDError, match="needs labelled images"):
        filter_importance(teacher, filters, [(pool.images, None)], "labels")
    with pytest.raises(DFKDError, match="no images"):
        filter_importance(teacher, filters, [])
    assert math.isclose(rank_agreement(first, {k: -v for k, v in first.items()}), -1)


# latency


def test_a_clock_that_stands_still_measures_nothing(monkeypatch):
    ticks = iter([0.0, 0.0, 1.0, 1.0, 1.0, 2.0, *map(float, range(2, 99))])  # the second call seems to take no time
    monkeypatch.setattr(pruning.time, "thread_time", lambda: next(ticks))
    assert pruning.fastest(lambda: None, seconds=1.0) == 1000.0


def keyed(inputs, outputs, groups=1):
    return ConvKey(inputs, outputs, "3", "1", "8", groups)


def test_interpolation_and_depthwise():
    table = LatencyTable(step=4)
    table.measured = {keyed(a, b): float(a * b) for a in (4, 8) for b in (4, 8)}
    assert table(keyed(6, 8)) == 48 and table(keyed(6, 5)) == 30 and table(keyed(0, 8)) == 0
    table.measured[keyed(4, 4, 4)], table.measured[keyed(8, 8, 8)] = 1.0, 3.0
    assert table(keyed(6, 6, 6)) == 2.0
    assert keyed(8, 8, 8).without(2, 2) == keyed(6, 6, 6) and keyed(8, 6).without(1, 2) == keyed(7, 4)


def test_a_table_is_kept_and_belongs_to_its_machine(tmp_path):
    table = LatencyTable(seconds=0.0)
    assert table(ConvKey(2, 3, "1x3", "2x1", "8x6")) > 0, "kernels, strides and maps need not be square"
    table.again()
    table.save(path := tmp_path / "table.json")
    again = LatencyTable.load(path)
    assert again.measured == table.measured and again.machine == table.machine
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"machine": "abacus"}))
    other = LatencyTable.load(path)
    assert other(next(iter(table.measured))) > 0
    with pytest.raises(DFKDError, match="table of 'abacus'"):
        other(keyed(2, 2))


@each(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "{}",
        lambda text: "[1]",
        lambda text: text.replace("table 1", "table 9"),
        lambda text: text.replace('"8"', '"8xx"'),
        lambda text: text.replace('"3", ', ""),
        lambda text: text.replace("3, 5", "3, -5"),
    ],
)
def test_damaged_tables(tmp_path, change):
    table = LatencyTable(seconds=0.0)
    table.measured = {ConvKey(3, 5, "3", "1", "8"): 0.5}
    table.save(path := tmp_path / "table.json")
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(DFKDError, match="truncated or no latency table"):
        LatencyTable.load(path)
    with pytest.raises(DFKDError, match="cannot read"):
        LatencyTable.load(tmp_path / "none.json")


def test_a_line_and_a_share():
    assert linear_fit([1.0, 2.0, 4.0], [5.0, 7.0, 11.0]) == pytest.approx((2, 3, 1))
    assert linear_fit([1.0, 2.0, 3.0], [1.0, 3.0, 1.0])[2] == pytest.approx(0)
    with pytest.raises(DFKDError, match="three or more"):
        linear_fit([1.0, 2.0], [1.0, 2.0])
    assert share_recovered(0.2, 0.5, 0.8) == pytest.approx(0.5) and math.isnan(share_recovered(0.5, 0.6, 0.5))


def test_the_table_is_compared_with_networks(digits):
    teacher, filters = digits
    sums, measured = compare_latencies(teacher, filters, LatencyTable(seconds=0.0), 3, 2)
    assert len(sums) == len(measured) == 3 and min(sums + measured) > 0 and sums[0] < sums[-1]


def test_networks_take_turns(digits):
    teacher, _ = digits
    deep, threads = build_model("resnet20", 10, 1).train(), torch.get_num_threads()
    times = latencies_in_turn([teacher.model, deep, teacher.model], DIGITS, rounds=20)
    assert times[1] > 2 * max(times[0], times[2]), "twenty layers take longer than four, whenever they are asked"
    assert deep.training and torch.get_num_threads() == threads, "everything is as it was"
    assert all(int(layer.num_batches_tracked) == 0 for layer in deep.modules() if isinstance(layer, nn.BatchNorm2d))
    for arguments in (([], DIGITS), ([deep], DIGITS, 1, 0)):
        with pytest.raises(DFKDError, match="1 or more of each"):
            latencies_in_turn(*arguments)


# plans


@given(st.floats(0.05, 0.6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_plan_is_kept(share, group_size, per_removal, seed):
    filters = TINY
    rng = torch.Generator().manual_seed(seed)
    worth = {name: torch.rand(group.count, generator=rng) for name, group in filters.groups.items()}
    kept = prune_filters(filters, Plan(share, per_removal=per_removal, group_size=group_size), lambda kept: worth)
    removed = filters.removed_share(kept)
    assert share <= removed <= share + group_size / filters.total + 1e-9
    for name, still in kept.items():
        assert still.any(), "a layer keeps at least one filter"
        if not still.all():
            assert worth[name][still].min() >= worth[name][~still].max(), "the least important go first"


TINY = find_filters(*network())


def test_plans_that_cannot_be(digits):
    for arguments, text in (
        ({"share": 1.5}, "between 0 and 1"),
        ({"measure": "size"}, "unknown measure"),
        ({"group_size": 0}, "1 or more"),
        ({"latency_weight": -1.0}, "0 or more"),
        ({"measure": "latency"}, "no table"),
    ):
        with pytest.raises(DFKDError, match=text):
            Plan(**arguments)
    with pytest.raises(DFKDError, match="all that can be removed"):
        prune_filters(TINY, Plan(0.95, group_size=16), lambda kept: {k: v.float() for k, v in kept.items()})


def test_latency_moves_the_choice():
    "At equal importance, the ranking that looks at the clock removes where the clock runs."
    table = LatencyTable()
    slow = {"0": 9.0, "3": 1.0, "6": 1.0}
    for name, key in TINY.shapes.items():
        for inputs in range(1, key.inputs + 1):
            for outputs in range(1, key.outputs + 1):
                table.measured[key._replace(inputs=inputs, outputs=outputs)] = slow[name] * outputs * inputs / key.inputs
    worth = {name: torch.full((group.count,), 1.0) for name, group in TINY.groups.items()}
    aware = Plan(0.05, per_removal=2, group_size=2, latency_weight=10.0, table=table).remove(TINY, TINY.all(), worth)
    assert removed_filters(aware).keys() == {"0"}
    reached = Plan(0.3, "latency", 4, 2, 1.0, table)
    assert reached.removed(TINY, prune_filters(TINY, reached, lambda kept: worth)) >= 0.3


# learning


def distiller(teacher, pool, **changes):
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    plan = Plan(0.5, per_removal=16, group_size=2)
    arguments = {"filters": TINY, "plan": plan, "every": 3, "importance_batches": 1, "steps": 16, "batch_size": 30}
    return PruningDistiller(teacher, student, copy.deepcopy(pool), **arguments | {"learning_rate": 0.01, "device": "cpu"} | changes)


def test_closed_gates_learn_like_the_smaller_network(digits, pool):
    teacher, filters = digits
    kept, settings_ = some(filters), {"steps": 5, "batch_size": 30, "learning_rate": 0.05, "device": "cpu"}
    small = remove_filters(teacher, filters, kept)
    Distiller(teacher, small, copy.deepcopy(pool), **settings_).run()
    masked = distiller(teacher, pool, plan=Plan(0.5, per_removal=1), **settings_)
    masked.close(kept)
    masked.plan = Plan(1e-6)  # has been reached
    masked.run()
    small.eval()
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(masked.smaller().eval()(x), small(x), atol=1e-4)


def test_pruning_resumes_to_the_same_bits(digits, pool):
    teacher, _ = digits
    whole = distiller(teacher, pool).run()
    half = distiller(teacher, pool).run(until=7)
    state = copy.deepcopy(half.state_dict())
    rest = distiller(teacher, pool)
    rest.load_state_dict(state)
    rest.run()
    assert whole.reached and removed_filters(whole.kept) == removed_filters(rest.kept) != removed_filters(half.kept)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, rest.student.state_dict()[name])
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(whole.smaller().eval()(x), whole.student.eval()(x), atol=1e-5)
    with pytest.raises(DFKDError, match="1 or more of each"):
        distiller(teacher, pool, every=0)


# files


def test_saved_and_loaded(tmp_path, digits):
    teacher, filters = digits
    kept = some(filters)
    small = remove_filters(teacher, filters, kept).eval()
    save_pruned(path := tmp_path / "small.safetensors", small, "digits-net", removed_filters(kept), DIGITS, {"x": "y"})
    again, about = load_pruned(path)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(x), small(x)) and about["x"] == "y"
    assert json.loads(about["removed"]) == removed_filters(kept)
    tensors, metadata = load_tensors(path)

    def fails(text, **changes):
        save_tensors(tmp_path / "bad.safetensors", tensors, {k: v for k, v in (metadata | changes).items() if v})
        with pytest.raises(DFKDError, match=text):
            load_pruned(tmp_path / "bad.safetensors")

    fails("does not say which filters", removed="")
    fails("damaged list", removed="[1")
    fails("does not fit this network", removed="{}")
    fails("no convolution 'x'", removed='{"x": [0]}')
    fails("leave at least one", removed=json.dumps({"0": list(range(16))}))
    fails("not known here", domain="mars")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DFKDError, match="truncated"):
        load_pruned(path)


def test_exports_answer_alike(tmp_path, digits):
    teacher, filters = digits
    small = remove_filters(teacher, filters, some(filters))
    errors = export_network(small, DIGITS, tmp_path)
    assert set(errors) == {"torch.export", "ONNX"} and max(errors.values()) < 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "network.onnx"))
    assert session.run(None, {"images": torch.zeros(7, 1, 8, 8).numpy()})[0].shape == (7, 10), "batches of any size"


def test_costs_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(128, 10))
    cost = network_cost(model, DIGITS, 0.0)
    assert (cost.parameters, cost.flops) == (18 + 1290, 2 * (64 * 18 + 1280)) and cost.milliseconds > 0


# runs

QUICK = {"evaluations": 3, "test_limit": 100, "updates": 6, "images": 40, "judged_images": 40, "batch_size": 20}
QUICK |= {"shares": "0.4", "sources": "static=noise, real=digits", "images_from": "noise", "labelled": "digits"}
QUICK |= {"timed_networks": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    Run(Recipe.load("digits-teacher"), "quick", {"epochs": 2.0, "evaluations": 1}, out=out, device="cpu", quiet=True).start()
    return out


def begin(root, **changes) -> Run:
    return Run(Recipe.load("digits-pruning"), "quick", QUICK | changes, out=root, device="cpu", quiet=True, save_every=0.0)


@each(
    "changes, text",
    [
        ({"shares": "0.4, many"}, "numbers between 0 and 1"),
        ({"shares": "1.4"}, "numbers between 0 and 1"),
        ({"sources": "noise"}, "NAME=IMAGES"),
        ({"rankings": "speed"}, "unknown ranking 'speed'"),
        ({"shares": "0.99"}, "all that can be removed"),
    ],
)
def test_runs_that_cannot_be(root, changes, text):
    with pytest.raises(DFKDError, match=text):
        begin(root, seed=7, **changes).start(fresh=True)
