"Teachers as people have them, layers by their exact names, and words about the rest."

from __future__ import annotations

import copy
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_nb.toolbox.core import load_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError, DFKDWarning
from dfkd_nb.toolbox.models import count_parameters
from dfkd_nb.toolbox.networks import (
    capture_input,
    classifier_layer,
    load_weights,
    save_weights,
    unwrap,
    why_no_hooks,
)
from dfkd_nb.toolbox.teachers import Teacher, check_network, copy_blocks_from_teacher

HALVES = (0.5, 0.5, 0.5)
OWN = Domain('own', (3, 8, 8), HALVES, HALVES, tuple('abcd'))
IMAGES = torch.randint(
    0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain(seed: int = 0) -> nn.Sequential:
    "A convolution, a BatchNorm that has seen something, a classifier."
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    net(4 * X + 1)
    return net.eval()


def one_line(call: Callable[[], Any], *words: str) -> str:
    "`call` raises a DFKDError of one line that holds all words."
    with pytest.raises(DFKDError) as caught:
        call()
    message = str(caught.value)
    assert '\n' not in message and ':' in message, message
    for word in words:
        assert word in message, message
    return message


# --- any precision, any wrapper -----------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    "A group of one process, which `DistributedDataParallel` needs."
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/group', rank=0, world_size=1
        )
        yield
        torch.distributed.destroy_process_group()


def exported(
    net: nn.Module, dtype: torch.dtype = torch.float32
) -> torch.export.ExportedProgram:
    return torch.export.export(
        net,
        (X.to(dtype),),
        dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=512)},),
    )


class Shifted(nn.Module):
    "Single precision, except a buffer that came from NumPy."

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('shift', torch.zeros(3, 1, 1, dtype=torch.float64))
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.shift)


def compiled_in_place() -> nn.Module:
    net = plain()
    net.compile(backend='eager')
    return net


def compiled_in_part() -> nn.Module:
    net = plain()
    net[1] = torch.compile(net[1], backend='eager')
    return net


FORMS: dict[str, Callable[[], Any]] = {
    'float64': lambda: plain().double(),
    'float16': lambda: plain().half(),
    'bfloat16': lambda: plain().bfloat16(),
    'float64 buffer': Shifted,
    'torch.compile': lambda: torch.compile(plain(), backend='eager'),
    'compiled in place': compiled_in_place,
    'compiled in part': compiled_in_part,
    'DataParallel': lambda: nn.DataParallel(plain()),
    'compiled DDP': lambda: torch.compile(
        nn.parallel.DistributedDataParallel(plain()), backend='eager'
    ),
    'torch.fx': lambda: torch.fx.symbolic_trace(plain()),
    'torch.jit.script': lambda: torch.jit.script(plain()),
    'torch.jit.trace': lambda: torch.jit.trace(plain(), X),
    'frozen': lambda: torch.jit.freeze(torch.jit.script(plain())),
    'scripted float64': lambda: torch.jit.script(plain().double()),
    'ExportedProgram': lambda: exported(plain()),
    'torch.export': lambda: exported(plain()).module(),
    'exported float64': lambda: exported(plain().double(), torch.float64).module(),
}


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('error::FutureWarning')
@pytest.mark.parametrize('form', FORMS)
def test_a_network_in_any_form_teaches_alike(form: str, process_group: None) -> None:
    own, teacher = Teacher(plain(), OWN), Teacher(FORMS[form](), OWN)
    rough = form in ('float16', 'bfloat16')
    logits = teacher.predict(IMAGES, batch_size=3)
    torch.testing.assert_close(
        logits,
        own.predict(IMAGES),
        atol=0.05 if rough else 1e-5,
        rtol=0.05 if rough else 1e-5,
    )
    assert logits.dtype == torch.float32 and not any(
        p.requires_grad for p in teacher.parameters()
    )
    x = OWN.normalize(IMAGES).requires_grad_()
    teacher(x).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    if why_no_hooks(teacher):
        assert form in list(FORMS)[list(FORMS).index('torch.jit.script') :]
        for layer in ('classifier', '5'):
            words = 'be read: ', 'give the network it was made from'
            one_line(lambda layer=layer: teacher.embed(IMAGES, layer), *words)
    else:
        prefix = 'net.' if form == 'float64 buffer' else ''
        norms = [
            name
            for name, layer in teacher.model.named_modules()
            if isinstance(layer, nn.BatchNorm2d)
        ]
        assert norms == [f'{prefix}1'], 'under the names that the network itself has'
        assert (
            teacher.embed(IMAGES).shape == (5, 8)
            and classifier_layer(teacher) == f'{prefix}5'
        )


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_part_that_cannot_be_read() -> None:
    net = plain()
    teacher = Teacher(nn.Sequential(net[:3], torch.jit.script(net[3:])), OWN)
    assert teacher.embed(IMAGES, '0.1').equal(Teacher(net, OWN).embed(IMAGES, '1'))
    for layer in ('1', '1.1', 'classifier'):
        one_line(
            lambda layer=layer: teacher.embed(IMAGES, layer), 'TorchScript', 'be read: '
        )


def test_double_precision_on_purpose() -> None:
    teacher = Teacher(plain(), OWN)
    short = teacher.predict(IMAGES), teacher.embed(IMAGES)
    long = teacher.double().predict(IMAGES), teacher.embed(IMAGES)
    for one, other in zip(short, long, strict=True):
        assert other.dtype == torch.float64
        torch.testing.assert_close(one, other.float())


class Detector(nn.Module):
    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{'boxes': x.new_zeros(1, 4), 'scores': x.new_zeros(1)} for _ in x]


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 4)
        self.lock = threading.Lock()


class Averaging(nn.Module):
    "One answer to a whole batch."

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((0, 2, 3))[None].repeat(1, 2)[:, :4]


class Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def trained_trace() -> nn.Module:
    return torch.jit.trace(plain().train(), X, check_trace=False)


def dropped_out() -> nn.Module:
    return torch.jit.trace(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5)),
        X,
        check_trace=False,
    )


REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    'meta': (
        lambda: plain().to('meta'),
        ('no numbers', 'meta device', 'load its weights first'),
    ),
    'lazy': (
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)),
        ('has a layer without a shape', 'call it once'),
    ),
    'no forward': (
        nn.Module,
        ('NotImplementedError', 'give a network with a forward method'),
    ),
    'list of modules': (
        lambda: nn.ModuleList([plain()]),
        ('give a network with a forward method',),
    ),
    'detector': (Detector, ('list of dict', 'wrap it so that it returns logits')),
    'lock': (Locked, ('cannot be copied', 'lock')),
    'one answer': (Averaging, ('1 answers to 2 images', '(N, 4)')),
    'nothing': (lambda: None, ('NoneType is no network', 'give an nn.Module')),
    'function': (lambda: len, ('is no network', 'give an nn.Module')),
    'class': (lambda: nn.Linear, ('this Linear is no network',)),
    'weights': (
        lambda: plain().state_dict(),
        ('weights are no network', 'load_state_dict'),
    ),
    'one batch size': (
        lambda: torch.export.export(plain(), (X[:1],)).module(),
        ('Guard failed', 'for batches of any size'),
    ),
    'short constants': (
        lambda: torch.jit.freeze(torch.jit.script(plain().half())),
        ('export it from float32 weights',),
    ),
    'exported awake': (
        lambda: exported(plain().train()),
        ('exported in training mode', "'1.running_mean' changes", '.eval()'),
    ),
    'traced awake': (trained_trace, ('exported in training mode', "running_mean' changes")),
    'traced with dropout': (
        dropped_out,
        ('exported in training mode', 'its answer changes'),
    ),
}


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_teach_says_what_to_do(case: str) -> None:
    make, words = REFUSED[case]
    message = one_line(lambda: Teacher(make(), OWN), *words)
    assert 'channels and size' not in message, 'the shape is not what is wrong'


@pytest.mark.parametrize(
    'error',
    [
        ZeroDivisionError('integer division or modulo by zero'),
        TypeError("forward() missing 1 required positional argument: 'mask'\nand more"),
        RuntimeError('Expected all tensors to be on the same device'),
        KeyError('image_size'),
        RuntimeError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_network_complains_in_its_own_words(error: Exception) -> None:
    words = (str(error).splitlines() or ['no message'])[0]
    expected = "'odd' fails on images of shape (3, 8, 8)", type(error).__name__, words
    message = one_line(lambda: check_network(Fails(error), OWN, 'odd'), *expected)
    assert 'call it yourself, model(torch.zeros(2, 3, 8, 8))' in message
    assert 'channels and size' not in message


def test_a_shape_is_blamed_where_it_is_wrong() -> None:
    grey, vector = nn.Conv2d(1, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(75, 4))
    words = 'does not take images of shape (3, 8, 8)', 'check the channels and size'
    for net in (grey, vector, nn.Conv2d(3, 4, 9), torch.jit.script(grey)):
        one_line(lambda net=net: check_network(net, OWN), *words)
    name: Any = 'cifar10'
    one_line(lambda: Teacher(plain(), name), "'cifar10' is no domain", 'DOMAINS')


# --- the caller's network -----------------------------------------------------------------


@pytest.mark.parametrize(
    'form', ['float64', 'torch.compile', 'DataParallel', 'compiled in part', 'float16']
)
def test_the_callers_network_stays_the_callers(form: str) -> None:
    model = FORMS[form]()
    model.train()
    network = unwrap(model)
    network[5].bias.requires_grad_(False)
    network[5].register_forward_hook(lambda module, inputs, output: None)

    def sample() -> list[Any]:
        modules = list(model.modules())
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in modules
        ]
        values = [*model.parameters(), *model.buffers()]
        tensors = [
            (v.dtype, v.device, v.requires_grad, v.stride(), v._version) for v in values
        ]
        return [hooks, tensors, [(id(m), type(m), m.training) for m in modules]]

    before, bits, stream = (
        sample(),
        copy.deepcopy(network.state_dict()),
        torch.get_rng_state(),
    )
    teacher = Teacher(model, OWN)
    teacher.predict(IMAGES)
    teacher.embed(IMAGES)
    one_line(lambda: teacher.embed(IMAGES, 'none'), "no layer 'none'")
    teacher.double()
    assert sample() == before and torch.get_rng_state().equal(stream)
    assert all(v.equal(bits[name]) for name, v in network.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in teacher.parameters()
    }
    assert not shared
    assert (
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules())
        == 1
    ), "the caller's own"


def test_weights_and_blocks_pass_through_wrappers(tmp_path: Path) -> None:
    path, net = tmp_path / 'w.safetensors', plain()
    save_weights(path, torch.compile(net, backend='eager'), half=False)
    assert set(load_tensors(path)[0]) == set(net.state_dict()), (
        'the names of the network, not those of the wrapper'
    )
    for wrap in (torch.compile, nn.DataParallel):
        for fill in (
            lambda model: load_weights(path, model),
            lambda model: copy_blocks_from_teacher(model, torch.compile(net)),
        ):
            other = plain(1)
            fill(wrap(other))
            assert all(
                v.equal(net.state_dict()[name]) for name, v in other.state_dict().items()
            )
            assert other[0].weight.data_ptr() != net[0].weight.data_ptr()
    assert (
        copy_blocks_from_teacher(plain(1).double(), net) == 1.0
        and count_parameters(net) > 0
    )


# --- the right layer ----------------------------------------------------------------------


class Net(nn.Module):
    "Squeeze and excite has an `fc`, too; the head listed last only helps in training."

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.se = nn.Conv2d(3, 8, 3), nn.ModuleDict({'fc': nn.Linear(8, 8)})
        self.fc = nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.AuxLogits = nn.ModuleDict({'fc': nn.Linear(8, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = x * self.se['fc'](x.mean((2, 3))).sigmoid()[..., None, None]
        rows = x.flatten(2).transpose(1, 2)
        x = self.attention(rows, rows, rows)[0].mean(1)
        return self.fc(x) + 0 if not self.training else self.fc(x) + self.AuxLogits['fc'](x)


class Heads(nn.Module):
    "Another linear layer works after the one that answers."

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(4, 4), nn.Linear(192, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(x.flatten(1))
        return logits, self.project(logits)


def test_the_classifier_is_the_layer_that_answers() -> None:
    teacher = Teacher(Net(), OWN)
    assert (
        classifier_layer(teacher) == 'fc' and classifier_layer(teacher.model, OWN) == 'fc'
    )
    assert classifier_layer(Net()) == 'AuxLogits.fc', (
        'without images the order of the list decides'
    )
    assert (
        classifier_layer(nn.ModuleList([nn.Linear(8, 8), nn.MultiheadAttention(8, 2)]))
        == '0'
    ), 'out_proj is never called'
    heads = Teacher(Heads(), OWN)
    assert classifier_layer(heads) == 'head', 'the other one is called later'
    torch.testing.assert_close(
        teacher.model.get_submodule('fc')(teacher.embed(IMAGES)), teacher.predict(IMAGES)
    )
    seen = {name: teacher.embed(IMAGES, name) for name in ('classifier', 'fc', 'se.fc')}
    assert seen['classifier'].equal(seen['fc']) and not seen['se.fc'].equal(seen['fc'])
    with capture_input(teacher) as taken:
        teacher(OWN.normalize(IMAGES))
    assert taken[0].equal(teacher.embed(IMAGES))
    one_line(
        lambda: teacher.embed(IMAGES, 'AuxLogits.fc'), "did not use layer 'AuxLogits.fc'"
    )
    one_line(
        lambda: classifier_layer(
            Teacher(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), OWN)
        ),
        'no linear layer',
    )


def test_the_last_call_counts_where_none_answers_alone() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(192, 4), nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.first(x.flatten(1)) + self.second(x.flatten(1))) / 2

    assert (
        classifier_layer(Teacher(Mean(), OWN)) == 'second'
        and classifier_layer(Mean()) == 'first'
    )


class Shared(nn.Module):
    "One layer under two names, called twice, the second time through a keyword."

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(192, 192)
        self.again, self.fc = self.first, nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.again(input=self.first(x.flatten(1))))


def test_a_layer_of_two_names_that_is_called_twice() -> None:
    teacher, x = Teacher(Shared(), OWN), OWN.normalize(IMAGES)
    second = teacher.model.get_submodule('first')(
        x.flatten(1)
    )  # what enters the second call
    for name in ('first', 'again'):
        torch.testing.assert_close(teacher.embed(IMAGES, name, batch_size=2), second)
    with capture_input(teacher.model, 'again') as taken:
        for batch in x.split(2):
            teacher(batch)
    assert [len(rows) for rows in taken] == [2, 2, 1], 'one entry each pass'
    torch.testing.assert_close(torch.cat(taken), second)


class Tokens(nn.Module):
    "A sequence of 64 places, cut into windows."

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.norm, self.window, self.drop = (
            nn.Linear(3, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 6),
            nn.Identity(),
        )
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.rows(x.flatten(2).transpose(1, 2)))
        rows = self.window(rows.reshape(-1, 16, 6)).view(len(x), 64, 6)
        return self.fc(self.relu(self.drop(rows).mean(1)))


def test_one_row_an_image() -> None:
    teacher, x = Teacher(Tokens(), OWN), OWN.normalize(IMAGES)
    rows = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        teacher.embed(IMAGES, 'rows'), rows.mean(1)
    )  # over tokens, not over features
    assert all(
        teacher.embed(IMAGES, name).shape == (5, 6) for name in ('norm', 'drop', 'fc')
    )
    assert float(teacher.embed(IMAGES, 'relu').min()) < 0, (
        'what entered, before it was written over'
    )
    one_line(
        lambda: teacher.embed(IMAGES, 'window'),
        'gets 20 rows for 5 images',
        'one row an image',
    )
    maps = Teacher(plain(), OWN)
    torch.testing.assert_close(maps.embed(IMAGES, '1'), maps.model[0](x).mean((2, 3)))
    for name in ('', '2.fc', 'x'):
        one_line(lambda name=name: maps.embed(IMAGES, name), f"no layer '{name}'")


# --- what looks wrong ---------------------------------------------------------------------


def warnings_of(make: Callable[[], nn.Module], domain: Domain = OWN) -> list[str]:
    "The warnings of a new teacher."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        Teacher(make(), domain)
    assert all(w.category is DFKDWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


class Voting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x.mean((1, 2, 3)).mul(100).long() % 4, 4).float()


def test_probabilities_are_noticed() -> None:
    for make in (
        lambda: nn.Sequential(plain(), nn.Softmax(1)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(1)),
        lambda: nn.Sequential(plain(), nn.Softmax(1)).half(),
        Voting,
    ):
        (message,) = warnings_of(make)
        assert (
            'probabilities' in message
            and 'remove its softmax' in message
            and '\n' not in message
        )
    one = Domain('one', (3, 8, 8), HALVES, HALVES, ('a',))
    head = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Sigmoid())
    for net in (head, nn.Sequential(head, nn.Softmax(1))):
        assert warnings_of(lambda net=net: net, one) == [], 'one class has no rows to judge'


class Once(nn.Module):
    "Logits that are like probabilities the first time, by chance."

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        first = x.mean((1, 2, 3)).sigmoid()
        return torch.stack([first, self.calls - first, 0 * first, 0 * first], 1)


def test_logits_are_not_taken_for_probabilities() -> None:
    ends = nn.Identity(), nn.LogSoftmax(1), nn.Sigmoid()
    for make in (*(lambda end=end: nn.Sequential(plain(), end) for end in ends), Once):
        assert warnings_of(make) == []
    negative = nn.Sequential(plain(), nn.Softmax(1), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        # sums of one, some below zero
        negative[2].weight.copy_(torch.eye(4) * 80 - 19.75)
    assert warnings_of(lambda: negative) == []


# --- images -------------------------------------------------------------------------------


def test_images_of_any_source_or_one_line() -> None:
    teacher = Teacher(plain(), OWN)
    source = ImageSet(IMAGES, None, OWN)
    assert teacher.predict(source, 2).equal(teacher.predict(IMAGES, 2)) and teacher.embed(
        source
    ).equal(teacher.embed(IMAGES))
    for call in (teacher.predict, teacher.embed):
        for wrong in (None, [IMAGES], IMAGES.numpy(), 'images'):
            one_line(
                lambda call=call, wrong=wrong: call(wrong),
                'was shown a',
                type(wrong).__name__,
                'ImageSource',
            )
        one_line(lambda call=call: call(IMAGES, batch_size=0), 'batches of 0 images')
        one_line(lambda call=call: call(IMAGES.float()), 'divide by 255')
        one_line(lambda call=call: call(OWN.normalize(IMAGES)), 'normalised already')
        one_line(lambda call=call: call(IMAGES[:, :1]), '(5, 1, 8, 8)', 'own')


def test_one_class_is_enough() -> None:
    one = Domain('one', (3, 8, 8), HALVES, HALVES, ('a',))
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), one)
    assert teacher.predict(IMAGES).shape == (5, 1) and teacher.embed(IMAGES).shape == (
        5,
        192,
    )


# --- half precision -----------------------------------------------------------------------


def test_statistics_that_half_precision_cannot_hold_stay(tmp_path: Path) -> None:
    path, net = tmp_path / 'w.safetensors', plain()
    with torch.no_grad():
        net[1].running_var[:3] = torch.tensor(
            [1e-8, 1e-5, 0.0]
        )  # lost, rounded badly, exact
        net[1].running_mean[0] = 1e5  # infinite in half precision
        net[0].weight[0, 0, 0, 0] = 1e-9  # beside larger ones it may become 0
        net[5].bias.copy_(torch.tensor([1e-9, 2e-9, 0.0, 0.0]))
    save_weights(path, net)
    kept = {name for name, v in load_tensors(path)[0].items() if v.dtype == torch.float32}
    assert kept == {'1.running_var', '1.running_mean', '5.bias'}
    other = plain(1)
    load_weights(path, other)
    assert all(other.state_dict()[name].equal(net.state_dict()[name]) for name in kept)
    save_weights(path, plain())
    assert {v.dtype for v in load_tensors(path)[0].values()} == {
        torch.float16,
        torch.int64,
    }, 'others are halved'


def test_damage_is_no_matter_of_precision(tmp_path: Path) -> None:
    net = plain()
    net[1].running_mean[0] = torch.nan
    for half in (True, False):
        words = "'1.running_mean' is not finite", 'the network is damaged'
        message = one_line(
            lambda half=half: save_weights(tmp_path / 'w', net, half=half), *words
        )
        assert 'half' not in message
    net = plain()
    net[0].weight.data[0] = 1e6
    one_line(
        lambda: save_weights(tmp_path / 'w', net),
        "'0.weight' is not finite in half precision",
        'half=False',
    )
