"Networks, checkpoints and domains as people bring them, hostile files among them."

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import stirred
from torch import Tensor, nn

from dfkd_nb import load_network
from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.lab.commands import main
from dfkd_nb.toolbox.checkpoints import HeadMismatch, fit_checkpoint, read_checkpoint
from dfkd_nb.toolbox.core import import_torchvision, save_tensors
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError, DFKDWarning
from dfkd_nb.toolbox.exported_files import load_exported, load_network_file
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.network_specs import LoadedNetwork
from dfkd_nb.toolbox.outputs import AdaptedOutput

SMALL = Domain('small', (3, 8, 8), (0.5,) * 3, (0.25,) * 3, tuple('abcd'))
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    "A convolution, a BatchNorm, a classifier."

    def __init__(self, num_classes: int = 4, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


class Renamed(nn.Module):
    "The same network in another implementation."

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)).relu().mean((2, 3)))


def trained(seed: int = 0, kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(seed)
    return stirred(kind()).eval()


def one_line(call: Callable[[], Any], *words: str) -> str:
    "`call` raises a DFKDError of one line that holds all words."
    with pytest.raises(DFKDError) as caught:
        call()
    message = str(caught.value)
    assert '\n' not in message and len(message) < 420, message
    for word in words:
        assert word in message, message
    return message


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "Work in an empty folder, with some code of the user's own."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own_code.py').write_text(
        'from torch import nn\n'
        'NUMBER = 3\n'
        'def net(num_classes=4, width=6):\n'
        '    import torch\n'
        '    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width),'
        ' nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))\n'
        'def grey(in_channels, num_classes=2):\n'
        '    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))\n'
        'def text(): return "no network"\n'
        'def needy(depth): return nn.Linear(depth, 2)\n'
        'def broken():\n'
        '    raise KeyError("two\\nlines")\n'
        'made = net()\n'
    )
    (tmp_path / 'quits.py').write_text('import sys\nsys.exit(3)\n')
    (tmp_path / 'torn.py').write_text('def net(:\n')
    (tmp_path / 'needs.py').write_text('import a_module_that_is_not_there\n')
    sys.modules.pop('own_code', None)
    return tmp_path


# --- checkpoints as people have them ------------------------------------------------------


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {f'{prefix}{name}': value for name, value in state.items()}


def with_other(name: str, state: dict[str, Tensor], other: str) -> dict[str, Any]:
    return {other: dict(trained(7).state_dict()), name: state}


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    'plain': dict,
    'DataParallel': prefixed('module.'),
    'torch.compile': prefixed('_orig_mod.'),
    'compiled part': lambda s: {k.replace('bn.', 'bn._orig_mod.'): v for k, v in s.items()},
    'FSDP': prefixed('_fsdp_wrapped_module.'),
    'Lightning': lambda s: {'epoch': 3, 'state_dict': prefixed('model.')(s)},
    'backbone': prefixed('backbone.'),
    'net in net': lambda s: {'net': prefixed('net.')(s)},
    'state_dict': lambda s: {'state_dict': s, 'best_acc1': 93.4, 'arch': 'net'},
    'model': lambda s: {'model': s},
    'model_state_dict': lambda s: {'model_state_dict': s, 'loss': torch.tensor(0.3)},
    'weights': lambda s: {'weights': prefixed('module.')(s)},
    'params': lambda s: {'params': s},
    'deeper': lambda s: {'run': {'best': {'state_dict': prefixed('module.')(s)}}},
    'EMA beside it': lambda s: with_other('state_dict_ema', s, 'state_dict'),
    'EMA as module': lambda s: (
        prefixed('module_ema.')(s) | prefixed('module.')(trained(7).state_dict())
    ),
    'EMA as prefix': lambda s: (
        prefixed('ema.')(s) | prefixed('model.')(trained(7).state_dict())
    ),
    'half': lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    'bfloat16': lambda s: {k: v.bfloat16() if v.ndim > 1 else v for k, v in s.items()},
    'float64': lambda s: {k: v.double() for k, v in s.items() if v.is_floating_point()},
    'without counters': lambda s: {k: v for k, v in s.items() if 'tracked' not in k},
    'with counters of operations': lambda s: s | {'total_ops': torch.ones(1)},
    'arguments of a script': lambda s: {'state_dict': s, 'args': argparse.Namespace(lr=1)},
    'optimiser': lambda s: {
        'model': s,
        'optimizer': {'state': {0: {'momentum_buffer': torch.ones(6, 3, 3, 3)}}},
    },
    'parameters': lambda s: {k: nn.Parameter(v, False) for k, v in s.items()},
    'Keras words': lambda s: {
        k.replace('bn.weight', 'bn.gamma')
        .replace('bn.bias', 'bn.beta')
        .replace('running_mean', 'moving_mean')
        .replace('running_var', 'moving_variance'): v
        for k, v in s.items()
        if 'tracked' not in k
    },
}


@pytest.mark.parametrize('form', FORMS)
def test_a_checkpoint_in_any_form_is_the_same_network(form: str, tmp_path: Path) -> None:
    source = trained(1)
    state = dict(source.state_dict())
    torch.save(FORMS[form](state), tmp_path / 'net.pt')
    found = load_network(Net(), tmp_path / 'net.pt', domain=SMALL)
    rough = form in ('half', 'bfloat16')
    torch.testing.assert_close(
        found.model(X), source(X), atol=1e-2 if rough else 0, rtol=1e-2 if rough else 0
    )
    assert all(v.dtype in (torch.float32, torch.int64) for v in found.model.buffers())
    assert any('averaged' in note for note in found.notes) == ('EMA' in form)


@pytest.mark.parametrize('form', ['safetensors', 'legacy', 'shared'])
def test_a_checkpoint_in_any_file_format(form: str, tmp_path: Path) -> None:
    source, path = trained(1), tmp_path / 'net.weights'
    state: dict[str, Any] = dict(source.state_dict())
    if form == 'safetensors':
        save_tensors(path, state)
    elif form == 'legacy':
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({'model': state, 'module': state}, path)
    assert load_network(Net(), path).model(X).equal(source(X))


def test_weights_saved_on_a_gpu_are_read_without_one(tmp_path: Path) -> None:
    torch.save(trained(1).state_dict(), tmp_path / 'cpu.pt')
    with zipfile.ZipFile(tmp_path / 'cpu.pt') as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / 'gpu.pt', 'w') as new:
        for name, content in parts.items():
            if name.endswith('data.pkl'):
                content = content.replace(
                    b'X\x03\x00\x00\x00cpu', b'X\x06\x00\x00\x00cuda:0'
                )
            new.writestr(name, content)
    assert b'cuda:0' in (tmp_path / 'gpu.pt').read_bytes()
    loaded = load_network(Net(), tmp_path / 'gpu.pt').model
    assert loaded(X).equal(trained(1)(X)) and loaded.fc.weight.device.type == 'cpu'


def test_tensors_that_agree_in_order_are_matched_and_it_is_said(tmp_path: Path) -> None:
    source = trained(1)
    torch.save({'state_dict': prefixed('module.')(source.state_dict())}, tmp_path / 'n.pt')
    found = load_network(Renamed(), tmp_path / 'n.pt')
    assert found.model(X).equal(source(X))
    (note,) = found.notes
    assert 'matched by their order' in note and "'state_dict.module.conv.weight'" in note


def test_order_does_not_win_over_names(tmp_path: Path) -> None:
    "Two layers of equal shapes whose names are exchanged are not matched in order."

    class Two(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            setattr(self, first, nn.Linear(3, 3))
            setattr(self, second, nn.Linear(3, 3))
            self.more = nn.Linear(3, 2)

    state = Two('a', 'b').state_dict()
    swapped = {('x.' + k if k.startswith('more') else k): v for k, v in state.items()}
    torch.save(swapped, tmp_path / 'net.pt')
    one_line(lambda: load_network(Two('b', 'a'), tmp_path / 'net.pt'), 'are missing')
    kinds = [k.replace('weight', 'scale') for k in trained().state_dict()]
    torch.save(dict(zip(kinds, trained().state_dict().values())), tmp_path / 'kinds.pt')
    one_line(lambda: load_network(Renamed(), tmp_path / 'kinds.pt'), 'none of its names')


def test_two_sets_that_agree_in_order_are_for_the_user_to_choose(tmp_path: Path) -> None:
    one, other = trained(1), trained(2)
    torch.save({'a': one.state_dict(), 'b': other.state_dict()}, tmp_path / 'two.pt')
    one_line(lambda: load_network(Renamed(), tmp_path / 'two.pt'), 'several sets', 'prefix')
    found = load_network(Renamed(), tmp_path / 'two.pt', prefix='b.')
    assert found.model(X).equal(other(X))


def test_the_checkpoint_says_how_many_classes_there_are(tmp_path: Path) -> None:
    source = build_model('resnet8', 7).eval()
    torch.save({'model': source.state_dict()}, tmp_path / 'seven.pt')
    found = load_network('resnet8', tmp_path / 'seven.pt')
    x = torch.randn(2, 3, 32, 32)
    assert found.model(x).equal(source(x)) and found.notes[0].startswith('7 classes')
    with pytest.raises(HeadMismatch, match=r"'fc.weight' is \(7, 64\) .* and \(5, 64\)"):
        load_network('resnet8', tmp_path / 'seven.pt', num_classes=5)


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    state = dict(trained(1).state_dict())
    state['fc.bias'] = torch.tensor([0.0, float('nan'), 0, 0])
    torch.save(state, tmp_path / 'net.pt')
    model = trained(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one_line(lambda: fit_checkpoint(model, read_checkpoint(tmp_path / 'net.pt')), 'NaN')
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


# --- files that cannot be read ------------------------------------------------------------


class Bomb:
    "Unpickled, it makes the file `marker` in the working directory."

    def __reduce__(self) -> Any:
        return os.mkdir, ('marker',)


def bomb(path: Path, kind: str) -> None:
    if kind == 'raw':
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        content = {'fc.bias': torch.ones(2), 'more': Bomb()}
        torch.save(content, path, _use_new_zipfile_serialization=kind == 'zip')


def zipped(path: Path, **parts: bytes) -> None:
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def saved(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def cut(path: Path, content: Any = None, share: float = 0.5) -> None:
    torch.save(trained().state_dict() if content is None else content, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def cut_safetensors(path: Path) -> None:
    save_tensors(path, trained().state_dict())
    path.write_bytes(path.read_bytes()[:-20])


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda path: (
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        and None
    )


def changed(**changes: Tensor | None) -> Callable[[Path], None]:
    "The state of a network with some tensors replaced, or left out (None)."

    def make(path: Path) -> None:
        state = trained().state_dict() | {
            k.replace('__', '.'): v for k, v in changes.items()
        }
        torch.save({k: v for k, v in state.items() if v is not None}, path)

    return make


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.trace(trained(), X).save(str(path))


def program() -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim('batch', min=1, max=512)},)
    return torch.export.export(trained(), (X,), dynamic_shapes=batch)


BAD_FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    'missing': (lambda path: None, ('no file', 'check the path')),
    'empty': (text(''), ('is empty',)),
    'a folder': (lambda path: path.mkdir(), ('is a folder',)),
    'a web page': (text('<!doctype html><html>'), ('a web page',)),
    'a pointer of LFS': (text('version https://git-lfs.github.com/spec/v1\n'), ('LFS',)),
    'a picture': (text(b'\x89PNG\r\n\x1a\n' + bytes(90)), ('a picture',)),
    'Keras': (text(b'\x89HDF\r\n\x1a\n' + bytes(90)), ('Keras', 'ONNX')),
    'TensorFlow Lite': (text(b'\x1c\x00\x00\x00TFL3' + bytes(90)), ('Lite', 'ONNX')),
    'compressed': (text(b'\x1f\x8b\x08' + bytes(90)), ('unpack it',)),
    'plain text': (text('learning_rate: 0.1\n' * 9), ('no checkpoint',)),
    'noise': (text(bytes(range(1, 200))), ('no checkpoint',)),
    'NumPy': (lambda path: zipped(path, **{'w.npy': b''}), ('NumPy',)),
    'another archive': (
        lambda path: zipped(path, **{'a.txt': b''}),
        ('without',),
    ),
    'truncated': (cut, ('truncated',)),
    'truncated early': (lambda path: cut(path, share=0.02), ('truncated',)),
    'truncated safetensors': (cut_safetensors, ('truncated',)),
    'code': (lambda path: bomb(path, 'zip'), ('Python objects', 'nothing was run')),
    'code in an old file': (lambda path: bomb(path, 'old'), ('nothing was run',)),
    'only code': (lambda path: bomb(path, 'raw'), ('nothing was run',)),
    'a whole network': (saved(nn.Linear(2, 2)), ('nothing was run', 'state_dict')),
    'TorchScript': (script, ('TorchScript', 'as the model')),
    'a program': (lambda path: torch.export.save(program(), path), ('whole network',)),
    'no weights': (saved({'epoch': 3}), ('no weights',)),
    'only an optimiser': (
        saved({'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}}}),
        ('no weights',),
    ),
    'another protocol': (
        lambda path: torch.save(trained().state_dict(), path, pickle_protocol=4),
        ('protocol',),
    ),
    'a tensor': (saved(torch.ones(3)), ('no weights',)),
    'a list': (saved([torch.ones(3)]), ('no weights',)),
    'another network': (saved({'a.weight': torch.ones(3)}), ('none of its names',)),
    'NaN': (changed(fc__bias=torch.full((4,), torch.nan)), ('NaN', "'fc.bias'")),
    'infinity': (changed(bn__running_var=torch.full((6,), torch.inf)), ('infinite',)),
    'quantised': (
        changed(fc__weight=torch.ones(4, 6, dtype=torch.int8)),
        ("'fc.weight'", 'quantised'),
    ),
    'a tensor missing': (changed(bn__running_mean=None), ("'bn.running_mean'", 'missing')),
    'a tensor too many': (changed(fc2__bias=torch.ones(3)), ("'fc2.bias'", 'lacks')),
    'another shape': (
        changed(conv__weight=torch.ones(6, 3, 5, 5)),
        ("'conv.weight'", '(6, 3, 5, 5)', '(6, 3, 3, 3)'),
    ),
    'another head': (
        changed(fc__weight=torch.ones(9, 6), fc__bias=torch.ones(9)),
        ("'fc.weight'", '(9, 6)', '(4, 6)', 'num_classes=9'),
    ),
    'two networks': (
        lambda path: torch.save(
            {'teacher': trained(1).state_dict(), 'student': trained(2).state_dict()}, path
        ),
        ("'student.'", "prefix='teacher.'", '--checkpoint-prefix'),
    ),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_a_bad_checkpoint_is_one_line(name: str, here: Path) -> None:
    make, words = BAD_FILES[name]
    make(here / 'net.pt')
    one_line(lambda: load_network(Net(num_classes=4), here / 'net.pt'), 'net.pt', *words)
    assert not (here / 'marker').exists()


@pytest.mark.parametrize('kind', ['zip', 'old', 'raw'])
def test_the_bombs_would_explode(kind: str, here: Path) -> None:
    "So that the tests above can fail: read without care, these files run their code."
    bomb(here / 'net.pt', kind)
    if kind == 'raw':
        pickle.loads((here / 'net.pt').read_bytes())
    else:
        torch.load(here / 'net.pt', weights_only=False)
    assert (here / 'marker').is_dir()


# --- programs of torch.export -------------------------------------------------------------


def edited(path: Path, **edits: Callable[[bytes], bytes]) -> None:
    "A program whose parts (by the end of their names) were changed by somebody."
    torch.export.save(program(), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for end, edit in edits.items():
        name = next((n for n in parts if n.endswith(end)), f'{path.stem}/{end}')
        parts[name] = edit(parts.get(name, b''))
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def pickled_bomb() -> bytes:
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    return buffer.getvalue()


def graph_edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        graph = json.loads(content)
        change(graph)
        return json.dumps(graph).encode()

    return edit


def calls(target: str) -> Callable[[bytes], bytes]:
    def change(graph: dict[str, Any]) -> None:
        graph['graph_module']['graph']['nodes'][0]['target'] = target

    return graph_edit(change)


def sized(expression: str) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(
        b"Symbol('s77', positive=True, integer=True)", expression.encode()
    )


def with_pickled_weight(content: bytes) -> bytes:
    config = json.loads(content)
    config['config']['fc.bias'] |= {'use_pickle': True}
    return json.dumps(config).encode()


def guarded(text: str) -> Callable[[bytes], bytes]:
    return graph_edit(lambda graph: graph.update(guards_code=[text]))


RUN = "__import__('os').mkdir('marker')"
GRAPH = 'models/model.json'
BAD_PROGRAMS: dict[str, dict[str, Callable[[bytes], bytes]]] = {
    'pickled weight': {'model_weights_config.json': with_pickled_weight},
    'pickled weights': {'data/weights/model.pt': lambda _: pickled_bomb()},
    'pickled inputs': {'data/sample_inputs/model.pt': lambda _: pickled_bomb()},
    'a function of os': {GRAPH: calls('torch.serialization.os.system')},
    'a loaded library': {GRAPH: calls('torch.ops.load_library')},
    'a file': {GRAPH: calls('torch.ops.aten.from_file.default')},
    'any method': {GRAPH: calls('_operator.methodcaller')},
    'torch.load': {GRAPH: calls('torch.load')},
    'a guard': {GRAPH: guarded(f'{RUN} is None')},
    'a hidden guard': {GRAPH: guarded("L['x'].__class__.mro()")},
    'a guard that calls': {GRAPH: guarded("open('marker', 'w')")},
    'a size': {GRAPH: sized(RUN.replace("'", '\\"'))},
    'a text in a size': {GRAPH: sized('Abs(\\"' + RUN + '\\")')},
    'machine code': {'data/aotinductor/model/x.so': lambda _: b'\x7fELF'},
    'a function among inputs': {
        GRAPH: graph_edit(
            lambda graph: graph['graph_module']['module_call_graph'][0]['signature'].update(
                in_spec='[1, {"type": "collections.defaultdict", "context": "os"}]'
            )
        )
    },
    'no JSON': {GRAPH: lambda content: content[:99]},
}


@pytest.mark.parametrize('name', BAD_PROGRAMS)
def test_a_program_that_could_run_code_is_refused(name: str, here: Path) -> None:
    edited(here / 'net.pt2', **BAD_PROGRAMS[name])
    words = (
        ('truncated',) if name == 'no JSON' else ('nothing was run', 'torch.export.load')
    )
    one_line(lambda: load_network(str(here / 'net.pt2')), 'net.pt2', *words)
    assert not (here / 'marker').exists()


def test_pytorch_itself_would_run_a_guard_and_a_size(here: Path) -> None:
    "So that the test above can fail."
    edited(here / 'guard.pt2', **BAD_PROGRAMS['a guard'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            torch.export.load(here / 'guard.pt2').module()(X)
        except Exception:
            pass
    assert (here / 'marker').is_dir()


@pytest.mark.parametrize('decomposed', [False, True])
@pytest.mark.parametrize('kind', [Net, Renamed, 'resnet8'])
def test_a_program_teaches_like_the_network_it_was(
    kind: Any, decomposed: bool, here: Path
) -> None:
    domain = SMALL if kind != 'resnet8' else DOMAINS['cifar10']
    net = trained(1, kind if kind != 'resnet8' else lambda: build_model('resnet8'))
    x = torch.randn(2, *domain.shape)
    batch = ({0: torch.export.Dim('batch', min=1, max=512)},)
    exported = torch.export.export(net, (x,), dynamic_shapes=batch)
    if decomposed:
        exported = exported.run_decompositions()
    torch.export.save(exported, here / 'net.pt2')
    own = LoadedNetwork(net, domain).teacher()
    loaded = load_network(str(here / 'net.pt2'), domain=domain)
    teacher = loaded.teacher()
    torch.testing.assert_close(teacher.model(x), net(x))
    assert not loaded.notes
    norms = [m for m in teacher.model.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(expected)
    images = torch.randint(0, 256, (3, *domain.shape), dtype=torch.uint8)
    torch.testing.assert_close(teacher.embed(images), own.embed(images))
    settings: dict[str, Any] = dict(steps=2, batch_size=2, seed=0, device='cpu')
    one, two = (DeepInversion(t, **settings).synthesize(2) for t in (own, teacher))
    assert (one.images.int() - two.images.int()).abs().max() <= 1


def test_torchscript_answers_and_says_what_it_cannot(here: Path) -> None:
    script(here / 'net.pt')
    found = load_network(str(here / 'net.pt'), domain=SMALL)
    torch.testing.assert_close(found.model(X), trained()(X))
    assert 'its layers cannot be read' in found.notes[0]
    one_line(
        lambda: DeepInversion(found.teacher(), steps=1, device='cpu').synthesize(2),
        'TorchScript',
        'feature_weight=0',
    )


# --- specs --------------------------------------------------------------------------------

BAD_SPECS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    'a typing mistake': (lambda: load_network('resnet21'), ('resnet20',)),
    'nothing': (lambda: load_network(''), ('package.module:name',)),
    'None': (lambda: load_network(None), ('names no network',)),  # type: ignore[arg-type]
    'a class': (lambda: load_network(Net), ('names no network',)),  # type: ignore[arg-type]
    'a library alone': (lambda: load_network('timm:'), ('timm:resnet18',)),
    'unknown in torchvision': (lambda: load_network('torchvision:resnet19'), ('resnet18',)),
    'four channels in torchvision': (
        lambda: load_network('torchvision:resnet18', channels=4),
        ('takes 3 channels',),
    ),
    'unknown weights': (
        lambda: load_network('torchvision:resnet18@V9'),
        ("'V9'", 'IMAGENET1K_V1'),
    ),
    'weights by name': (lambda: load_network('resnet20@V9'), ('resnet20@pretrained',)),
    'no public weights': (lambda: load_network('resnet20', pretrained=True), ('resnet20',)),
    'public weights of a file': (
        lambda: load_network('own_code.py:net@pretrained'),
        ('no public weights',),
    ),
    'two sets of weights': (
        lambda: load_network('torchvision:resnet18', 'x.pt', pretrained=True),
        ('one of them',),
    ),
    'weights as a network': (lambda: load_network('net.pt'), ('weights and no network',)),
    'a file that is not there': (lambda: load_network('gone.onnx'), ('no file',)),
    'a text as a network': (lambda: load_network('own_code.py'), ('is no network',)),
    'spaces': (lambda: load_network('my net:Net'), ('names no network',)),
    'no such module': (lambda: load_network('own_cod:net'), ("no module 'own_cod'",)),
    'no such library': (lambda: load_network('tim:resnet18'), ("did you mean 'timm:'",)),
    'no such file of code': (lambda: load_network('gone.py:net'), ('no file gone.py',)),
    'no such name': (lambda: load_network('own_code:nett'), ("no 'nett'", 'net')),
    'a number': (lambda: load_network('own_code:NUMBER'), ('is a int',)),
    'makes a text': (lambda: load_network('own_code:text'), ('returned a str',)),
    'needs an argument': (lambda: load_network('own_code:needy'), ('needy(depth=...)',)),
    'fails': (lambda: load_network('own_code:broken'), ('KeyError',)),
    'unknown argument': (lambda: load_network('own_code:net(depth=3)'), ('TypeError',)),
    'a call inside': (
        lambda: load_network('own_code:net(width=os.mkdir("marker"))'),
        ('literal arguments',),
    ),
    'arguments without names': (lambda: load_network('own_code:net(3)'), ('literal',)),
    'quits': (lambda: load_network('quits:net'), ('SystemExit',)),
    'a syntax error': (lambda: load_network('torn.py:net'), ('SyntaxError',)),
    'needs a module': (lambda: load_network('needs:net'), ('a_module_that_is_not_there',)),
    'classes that differ': (
        lambda: load_network('resnet8', num_classes=5, domain=SMALL),
        ('5 classes', "'small' has 4"),
    ),
    'no domain': (lambda: load_network('own_code:net').teacher(), ('Domain.from_values',)),
    'a prefix that is not there': (
        lambda: load_network('own_code:net', 'net.pt', prefix='ema.'),
        ('none of its names',),
    ),
    'no weights to fill': (lambda: load_network(nn.ReLU(), 'net.pt'), ('has no weights',)),
}


@pytest.mark.parametrize('name', BAD_SPECS)
def test_a_bad_spec_is_one_line(name: str, here: Path) -> None:
    call, words = BAD_SPECS[name]
    torch.save(trained().state_dict(), here / 'net.pt')
    one_line(call, *words)
    assert not (here / 'marker').exists() and str(here) not in sys.path


@pytest.mark.parametrize(
    'spec, module, package',
    [
        ('timm:resnet18', 'timm', 'pip install timm'),
        ('hf:folder', 'transformers', 'pip install transformers'),
        ('net.onnx', 'onnx2torch', 'pip install onnx2torch'),
    ],
)
def test_a_missing_package_is_named(
    spec: str, module: str, package: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (here / 'folder').mkdir()
    (here / 'folder' / 'config.json').write_text('{}')
    (here / 'net.onnx').write_bytes(b'\x08\x08')
    one_line(lambda: load_network(spec), package, 'dfkd_nb[networks]')


def test_code_of_ones_own(here: Path) -> None:
    by_module = load_network('own_code:net(width=5)', num_classes=3, domain=None)
    assert by_module.model[0].out_channels == 5 and by_module.model[4].out_features == 3
    assert by_module.notes == [] and not by_module.model.training
    assert load_network('own_code.py:made').model[4].out_features == 4
    grey = Domain.from_values((1, 8, 8), 2)
    assert load_network('own_code.py:grey', domain=grey).teacher().domain is grey
    torch.save(by_module.model.state_dict(), here / 'net.pt')
    again = load_network('own_code.py:net(width=5)', here / 'net.pt')
    assert again.model(X).equal(by_module.model(X)) and '3 classes' in again.notes[0]


def test_torchvision_without_a_download(
    monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    def offline(*arguments: Any, **keywords: Any) -> None:
        raise OSError('Network is unreachable')

    monkeypatch.setenv('TORCH_HOME', str(here / 'hub'))
    monkeypatch.setattr('torch.hub.download_url_to_file', offline)
    found = load_network('torchvision:squeezenet1_1')
    assert 'random' in found.notes[0] and found.domain is not None
    assert found.domain.classes == DOMAINS['imagenet'].classes
    own = load_network('torchvision:squeezenet1_1', num_classes=3)
    assert own.domain is not None and own.domain.classes == ('0', '1', '2')
    for spec in ('torchvision:squeezenet1_1@pretrained', 'torchvision:resnet18@DEFAULT'):
        one_line(lambda spec=spec: load_network(spec), 'could not be downloaded')
    one_line(
        lambda: load_network('torchvision:resnet18@pretrained', num_classes=3),
        '1000 classes, not 3',
    )


class FakeTimm(types.ModuleType):
    "As much of timm as `load_network` uses."

    def __init__(self) -> None:
        super().__init__('timm')
        self.asked: dict[str, Any] = {}

    def is_model(self, name: str) -> bool:
        return name == 'tiny_net'

    def list_models(self) -> list[str]:
        return ['tiny_net']

    def list_pretrained(self, pattern: str) -> list[str]:
        return ['tiny_net.a1']

    def get_pretrained_cfg(self, name: str, allow_unregistered: bool) -> Any:
        return types.SimpleNamespace(num_classes=4)

    def create_model(self, name: str, **options: Any) -> nn.Module:
        self.asked = options
        if options.pop('pretrained'):
            raise ConnectionError('no\nnetwork')
        net = Net(options.get('num_classes', 4))
        net.num_classes = net.fc.out_features  # type: ignore[assignment]
        net.pretrained_cfg = {  # type: ignore[assignment]
            'input_size': (3, 8, 12),
            'mean': (0.5,) * 3,
            'std': (0.2,) * 3,
            'num_classes': 4,
            'first_conv': 'conv',
        }
        return net


def test_timm_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTimm()
    monkeypatch.setitem(sys.modules, 'timm', fake)
    found = load_network('timm:tiny_net', num_classes=6)
    assert found.domain == Domain(
        'timm:tiny_net', (3, 8, 12), (0.5,) * 3, (0.2,) * 3, tuple('012345')
    )
    assert found.teacher().predict(torch.zeros(1, 3, 8, 12)).shape == (1, 6)
    one_line(lambda: load_network('timm:tiny_nets'), 'tiny_net')
    one_line(lambda: load_network('timm:tiny_net.b9'), 'tiny_net.a1')
    one_line(lambda: load_network('timm:tiny_net@pretrained'), 'could not be downloaded')
    one_line(
        lambda: load_network('timm:tiny_net', pretrained=True, num_classes=9),
        '4 classes, not 9',
    )


class FakeOutput(dict):
    "As transformers' ModelOutput."

    @property
    def logits(self) -> Tensor:
        return self['logits']


class FakeHF(Net):
    config = types.SimpleNamespace(
        num_labels=4, id2label=dict(enumerate('wxyz')), num_channels=3, problem_type=None
    )

    def forward(self, x: Tensor) -> Any:
        return FakeOutput(logits=super().forward(x), hidden=x)


def test_transformers_in_its_words(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    missing: list[str] = []
    asked: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        if not Path(name).is_dir():
            raise OSError('not\nfound')
        return FakeHF(), {'missing_keys': missing}

    fake = types.ModuleType('transformers')
    auto = types.SimpleNamespace(from_pretrained=from_pretrained)
    logging = types.SimpleNamespace(
        is_progress_bar_enabled=lambda: False,
        disable_progress_bar=lambda: None,
        enable_progress_bar=lambda: None,
    )
    fake.AutoModelForImageClassification = auto  # type: ignore[attr-defined]
    fake.utils = types.SimpleNamespace(logging=logging)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, 'transformers', fake)
    folder = here / 'classifier'
    folder.mkdir()
    one_line(lambda: load_network('hf:classifier'), 'no config.json')
    (folder / 'config.json').write_text('{}')
    found = load_network('hf:classifier')
    assert found.domain is None and 'not described' in found.notes[0]
    (folder / 'preprocessor_config.json').write_text(
        json.dumps({'size': 8, 'image_mean': [0.5] * 3, 'image_std': [0.25] * 3})
    )
    found = load_network('hf:classifier')
    assert found.domain is not None and found.domain.classes == tuple('wxyz')
    assert found.teacher().predict(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
    assert asked['local_files_only'] and asked['trust_remote_code'] is False
    monkeypatch.setattr(FakeHF.config, 'problem_type', 'multi_label_classification')
    assert 'multi-label' in load_network('hf:classifier').notes[0]
    one_line(lambda: load_network('hf:some/name'), 'not in the cache', '@pretrained')
    assert asked['local_files_only']
    one_line(lambda: load_network('hf:some/name@pretrained'), 'could not be downloaded')
    assert not asked['local_files_only']
    one_line(lambda: load_network('hf:./gone'), 'no folder')
    missing.append('classifier.weight')
    one_line(lambda: load_network('hf:classifier'), "'classifier.weight'", 'no trained')


# --- the libraries themselves -------------------------------------------------------------


def library(name: str) -> Any:
    "An optional package; the test is skipped where it is missing."
    import_torchvision()
    return pytest.importorskip(name)


@pytest.mark.filterwarnings('ignore')
def test_networks_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    library('timm')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    grey = Domain.from_values((1, 32, 48), 3)
    found = load_network('timm:resnet10t', domain=grey)
    assert found.teacher().predict(torch.zeros(1, 1, 32, 48)).shape == (1, 3)
    vit = load_network('timm:vit_tiny_patch16_224')
    assert vit.domain is not None and vit.domain.shape == (3, 224, 224)
    assert vit.domain.mean == (0.5,) * 3 and vit.domain.num_classes == 1000
    one_line(lambda: load_network('timm:resnet11'), 'resnet')
    one_line(lambda: load_network('timm:resnet18.nothing'), 'resnet18.')
    one_line(lambda: load_network('timm:resnet18.a1_in1k@pretrained'), 'downloaded')


@pytest.mark.filterwarnings('ignore')
def test_a_folder_of_transformers(here: Path) -> None:
    transformers = library('transformers')
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type='basic',
        id2label={0: 'cat', 1: 'dog', 2: 'bird'},
        label2id={'cat': 0, 'dog': 1, 'bird': 2},
    )
    net = transformers.ResNetForImageClassification(config).eval()
    net.save_pretrained(here / 'net')
    transformers.ViTImageProcessor(size={'height': 32, 'width': 40}).save_pretrained(
        here / 'net'
    )
    found = load_network('hf:net')
    assert found.domain == Domain(
        'hf:net', (3, 32, 40), (0.5,) * 3, (0.5,) * 3, ('cat', 'dog', 'bird')
    )
    x = torch.randn(2, 3, 32, 40)
    assert found.teacher()(x).equal(net(x).logits)
    dreams = DeepInversion(found.teacher(), steps=1, batch_size=2, device='cpu')
    assert len(dreams.synthesize(2).images) == 2


@pytest.mark.filterwarnings('ignore')
def test_a_folder_of_transformers_runs_no_code(here: Path) -> None:
    transformers = library('transformers')
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    folder = here / 'net'
    config.save_pretrained(folder)
    torch.save({'more': Bomb()}, folder / 'pytorch_model.bin')
    one_line(lambda: load_network('hf:net'), 'could not be built')
    (folder / 'own.py').write_text("import os\nos.mkdir('marker')\n")
    values = {'model_type': 'own', 'auto_map': {'AutoConfig': 'own.Config'}}
    values['auto_map']['AutoModelForImageClassification'] = 'own.Net'
    (folder / 'config.json').write_text(json.dumps(values))
    one_line(lambda: load_network('hf:net'), 'could not be built')
    assert not (here / 'marker').exists()


@pytest.mark.filterwarnings('ignore')
def test_an_onnx_file(here: Path) -> None:
    library('onnx2torch')
    net = trained(1)
    for name, training in (('eval', 0), ('kept', 1)):
        torch.onnx.export(
            net,
            (X,),
            here / f'{name}.onnx',
            dynamo=False,
            input_names=['x'],
            dynamic_axes={'x': {0: 'n'}},
            opset_version=17,
            do_constant_folding=not training,
            training=torch.onnx.TrainingMode(training),
        )
        found = load_network(str(here / f'{name}.onnx'), domain=SMALL)
        torch.testing.assert_close(found.teacher()(X), net(X))
        norms = [m for m in found.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == training
    (here / 'torn.onnx').write_bytes((here / 'eval.onnx').read_bytes()[:150])
    one_line(lambda: load_network('torn.onnx'), 'cannot be read as ONNX')


# --- domains ------------------------------------------------------------------------------


def transforms(*steps: str, **values: Any) -> list[Any]:
    "Stand-ins with torchvision's names and attributes."
    return [type(step, (), values)() for step in steps]


NORMAL = {'mean': [0.5], 'std': [0.5]}
TIMM = {'input_size': (3, 8, 8), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
BAD_DOMAINS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    'bytes as intensities': (
        lambda: Domain.from_values((3, 8, 8), 2, (123.7, 116.3, 103.5), (58.4,)),
        ('--range 0..255',),
    ),
    'an empty range': (
        lambda: Domain.from_values((3, 8, 8), 2, value_range=(255, 0)),
        ('black before white',),
    ),
    'two means': (
        lambda: Domain.from_values((3, 8, 8), 2, (0.5, 0.5)),
        ('2 numbers of mean for 3 channels',),
    ),
    'a std of 0': (lambda: Domain.from_values((1, 8, 8), 2, 0.5, 0.0), ('positive',)),
    'a mean below black': (lambda: Domain.from_values((1, 8, 8), 2, -0.5), ('means',)),
    'no classes': (lambda: Domain.from_values((1, 8, 8), 0), ('classes',)),
    'no network of timm': (lambda: Domain.from_timm(Net()), ('pretrained_cfg',)),
    'timm without classes': (lambda: Domain.from_timm(TIMM), ('no classes',)),
    'four channels in timm': (
        lambda: Domain.from_timm(
            types.SimpleNamespace(
                pretrained_cfg=TIMM | {'first_conv': 'x', 'num_classes': 2},
                get_submodule=lambda name: nn.Conv2d(4, 2, 3),
            )
        ),
        ('4 channels', 'Domain.from_values'),
    ),
    'transforms without classes': (lambda: Domain.from_torchvision([]), ('classes=',)),
    'transforms without a size': (
        lambda: Domain.from_torchvision(transforms('ToTensor'), 2),
        ('size=',),
    ),
    'a lambda': (lambda: Domain.from_torchvision([lambda x: x], 2, 8), ('a function',)),
    'normalised twice': (
        lambda: Domain.from_torchvision(
            transforms('Normalize', 'Normalize', **NORMAL), 2, 8
        ),
        ('two Normalize',),
    ),
    'no folder': (lambda: Domain.from_hf('gone'), ('save_pretrained',)),
    'a torn configuration': (lambda: Domain.from_hf('.'), ('no JSON',)),
    'no classes of transformers': (lambda: Domain.from_hf({'size': 8}, {}), ('id2label',)),
    'no size of transformers': (
        lambda: Domain.from_hf({}, {'num_labels': 2}),
        ('no size',),
    ),
}


@pytest.mark.parametrize('name', BAD_DOMAINS)
def test_a_bad_domain_is_one_line(name: str, here: Path) -> None:
    (here / 'preprocessor_config.json').write_text('{"size": 8')
    call, words = BAD_DOMAINS[name]
    one_line(call, *words)


def test_a_range_is_the_same_input(tmp_path: Path) -> None:
    "What reaches the network is what its training script fed it."
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    values = images.double()
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    pairs = {
        (0.0, 255.0): values,
        (-1.0, 1.0): values / 127.5 - 1,
        (0.0, 1.0): values / 255,
    }
    for value_range, fed in pairs.items():
        plain = Domain.from_values((3, 8, 8), 2, value_range=value_range)
        torch.testing.assert_close(plain.normalize(images).double(), fed, rtol=0, atol=1e-4)
    caffe = Domain.from_values((3, 8, 8), 2, mean, std, (0, 255))
    expected = (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(
        caffe.normalize(images).double(), expected, rtol=0, atol=1e-5
    )


def test_torchvisions_transforms_are_read() -> None:
    v1 = importlib.import_module(f'{import_torchvision().__name__}.transforms')
    v2 = importlib.import_module('torchvision.transforms.v2')
    usual = [v1.Resize(40), v1.CenterCrop((32, 24)), v1.ToTensor()]
    found = Domain.from_torchvision(
        v1.Compose([*usual, v1.Normalize([0.5] * 3, [0.2] * 3)]), 5
    )
    assert found.shape == (3, 32, 24) and found.mean == (0.5,) * 3
    grey = Domain.from_torchvision([v1.Grayscale(), v1.Resize((9, 7)), v1.ToTensor()], 2)
    assert grey.shape == (1, 9, 7) and grey.std == (1.0,)
    raw = Domain.from_torchvision([v2.Resize((8, 8)), v2.PILToTensor()], 2)
    assert raw.std == (1 / 255,) * 3
    scaled = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.CenterCrop(8)]
    assert Domain.from_torchvision(scaled, 2).std == (1.0,) * 3
    weights = import_torchvision().models.ResNet18_Weights
    for source in (weights, weights.DEFAULT):
        imagenet = Domain.from_torchvision(source)
        assert imagenet.shape == (3, 224, 224) and imagenet.classes[0] == 'tench'


def test_transformers_preprocessors_are_read() -> None:
    labels = {'id2label': {'0': 'a', '10': 'c', '2': 'b'}, 'num_channels': 1}
    grey = Domain.from_hf(
        {'size': [8, 9], 'image_mean': [0.4, 0.5, 0.6]} | {'image_std': [0.2] * 3}, labels
    )
    assert grey.shape == (1, 8, 9) and grey.classes == ('a', 'b', 'c')
    assert grey.mean == pytest.approx((0.5,)) and grey.std == pytest.approx((0.2,))
    signed = {'size': 8, 'rescale_factor': 1 / 127.5, 'rescale_offset': True}
    found = Domain.from_hf(signed | {'do_normalize': False}, {'num_labels': 2})
    assert found.mean == pytest.approx((0.5,) * 3) and found.std == pytest.approx(
        (0.5,) * 3
    )


# --- heads --------------------------------------------------------------------------------


class Answers(nn.Module):
    "Returns what it was made with, as far as it depends on the images."

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make, self.scale = make, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.make(x.flatten(1).mean(1, keepdim=True) * self.scale)


TWO = Domain.from_values((3, 8, 8), ('no', 'yes'))
BAD_HEADS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    'a dict without logits': (
        lambda: load_network(Answers(lambda z: {'pred': z}), domain=TWO),
        ("'pred': Tensor (2, 1)", '--output'),
    ),
    'no such part': (
        lambda: load_network(
            Answers(lambda z: {'pred': z}), domain=TWO, output='out'
        ).model(X),
        ("'out' is not there", "'pred'"),
    ),
    'no such number': (
        lambda: load_network(Answers(lambda z: (z, z)), domain=TWO, output=5).model(X),
        ('5 is not there', '1: Tensor (2, 1)'),
    ),
    'a part that is a list': (
        lambda: load_network(Answers(lambda z: ([z], z)), domain=TWO, output=0).model(X),
        ('0 is a list',),
    ),
    'a detector': (
        lambda: load_network(Answers(lambda z: [{'boxes': z}]), domain=TWO),
        ('a list of 0: dict',),
    ),
    'unknown kind': (lambda: load_network(Net(), outputs='logit'), ("mean 'logits'",)),
    'binary with four': (
        lambda: load_network(Net(), domain=SMALL, outputs='binary').model(X),
        ('one number an image', '4'),
    ),
    'one number for one class': (
        lambda: load_network(Answers(lambda z: z), domain=Domain.from_values((3, 8, 8), 1)),
        ('two classes',),
    ),
    'one number for ten classes': (
        lambda: load_network(
            Answers(lambda z: z), domain=Domain.from_values((3, 8, 8), 10)
        ).teacher(),
        ('1 outputs', '10 classes'),
    ),
    'nothing': (lambda: load_network(Answers(lambda z: None), domain=TWO), ('NoneType',)),
}


@pytest.mark.parametrize('name', BAD_HEADS)
def test_a_bad_head_is_one_line(name: str) -> None:
    call, words = BAD_HEADS[name]
    one_line(call, *words)


@pytest.mark.parametrize('shape', ['column', 'row'])
def test_one_logit_is_two_classes(shape: str) -> None:
    make = (lambda z: z) if shape == 'column' else (lambda z: z[:, 0])
    found = load_network(Answers(make), domain=TWO)
    z = X.flatten(1).mean(1)
    torch.testing.assert_close(found.teacher()(X).softmax(1)[:, 1], z.sigmoid())
    assert '[0, z]' in found.notes[0] and "'yes'" in found.notes[0]


def test_probabilities_become_logits_and_parts_are_taken() -> None:
    net = trained(1)
    softmax = load_network(nn.Sequential(net, nn.Softmax(1)), outputs='softmax').model
    torch.testing.assert_close(softmax(X).softmax(1), net(X).softmax(1))
    sigmoid = load_network(nn.Sequential(net, nn.Sigmoid()), outputs='sigmoid').model
    torch.testing.assert_close(sigmoid(X), net(X), atol=1e-4, rtol=1e-4)
    parts = Answers(lambda z: {'a': z, 'b': (2 * z).expand(-1, 2)})
    assert load_network(parts, output='b', domain=TWO).teacher()(X).shape == (2, 2)
    assert AdaptedOutput(Answers(lambda z: (z, 3 * z)), 1)(X).equal(
        3 * X.flatten(1).mean(1, keepdim=True)
    )


def test_sigmoids_are_noticed() -> None:
    with pytest.warns(DFKDWarning, match="outputs='sigmoid'"):
        load_network(nn.Sequential(trained(), nn.Sigmoid()), domain=SMALL)


# --- the command line ---------------------------------------------------------------------

INVERT = 'invert --n 2 --device cpu --out dreams --set synthesis_steps=2'.split()
OWN = ['--model', 'own_code.py:net']
BAD_OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    'a range': ([*OWN, '--range', '255'], ("--range '255'", '0..255')),
    'an upside-down range': ([*OWN, '--range', '255..0'], ('A below B',)),
    'half a normalisation': (
        [*OWN, '--range', '0..255', '--mean', '127'],
        ('one of --mean and --std',),
    ),
    'bytes without a range': (
        [*OWN, '--mean', '123,116,103', '--std', '58,57,57'],
        ('--range 0..255',),
    ),
    'a size': ([*OWN, '--size', '8by8'], ("--size '8by8'",)),
    'a number of classes': ([*OWN, '--num-classes', 'ten'], ('--num-classes',)),
    'no classes': ([*OWN, '--num-classes', '0'], ('--num-classes',)),
    'channels': ([*OWN, '--channels', '0'], ('--channels',)),
    'channels that differ': (
        [*OWN, '--channels', '2', '--mean', '.5,.5,.5', '--std', '1,1,1'],
        ('3 means for 2 channels',),
    ),
    'names that are not there': ([*OWN, '--class-names', 'gone.txt'], ('gone.txt',)),
    'no names': ([*OWN, '--class-names', 'empty.txt'], ('holds no names',)),
    'names with a gap': ([*OWN, '--class-names', 'gap.json'], ('numbered from 0',)),
    'other names': (
        [*OWN, '--class-names', 'three.txt', '--num-classes', '4'],
        ('names 3 classes', '4'),
    ),
    'a teacher and a range': (
        ['--teacher', 'cifar10-resnet20', '--range', '0..255'],
        ('leave out --range',),
    ),
    'no weights': (['--model', 'resnet8'], ('--checkpoint FILE or --pretrained',)),
    'two networks in a file': (
        [*OWN, '--checkpoint', 'two.pt'],
        ("--checkpoint-prefix 'teacher.'",),
    ),
    'another head': (
        [*OWN, '--checkpoint', 'five.pt', '--num-classes', '4'],
        ('--num-classes 5', '(5, 6)'),
    ),
    'a kind of output': ([*OWN, '--outputs', 'logit'], ("mean 'logits'",)),
    'a missing part': ([*OWN, '--output', 'pred'], ("'pred'",)),
}


@pytest.mark.filterwarnings('ignore::dfkd_nb.toolbox.errors.DFKDWarning')
@pytest.mark.parametrize('name', BAD_OPTIONS)
def test_bad_options_are_one_line(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / 'empty.txt').write_text('\n')
    (here / 'gap.json').write_text('{"0": "cat", "2": "dog"}')
    (here / 'three.txt').write_text('cat\ndog\nbird\n')
    net = load_network('own_code.py:net')
    state = net.model.state_dict()
    other = {k: v + 1 for k, v in state.items()}
    torch.save({'teacher': state, 'student': other}, here / 'two.pt')
    five = load_network('own_code.py:net', num_classes=5).model
    torch.save(five.state_dict(), here / 'five.pt')
    options, words = BAD_OPTIONS[name]
    assert main([*INVERT, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('dfkd: error: ') and 'unexpected' not in line
    assert all(word in line for word in words), line
    assert not (here / 'dreams').exists()


def test_invert_and_inspect_a_network_of_ones_own(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = stirred(load_network('own_code.py:net(width=5)', num_classes=3).model)
    torch.save({'state_dict': prefixed('module.')(net.state_dict())}, here / 'best.pth')
    (here / 'names.txt').write_text('cat\ndog\nbird\n')
    own = ['--model', 'own_code.py:net(width=5)', '--checkpoint', 'best.pth']
    own += '--range 0..255 --size 8x10 --class-names names.txt'.split()
    assert main([*INVERT, *own, '--classes', 'dog']) == 0
    said = capsys.readouterr()
    assert "names in the file begin with 'state_dict.module.'" in said.out and not said.err
    manifest = json.loads((here / 'dreams' / 'manifest.json').read_text())
    assert [line['class'] for line in manifest['images']] == [1, 1]
    pictures = sorted((here / 'dreams').rglob('*.png'))
    assert len(pictures) == 2 and manifest['model'] == 'own_code.py:net(width=5)'
    seen: list[Any] = []

    def inspected(folder: Any, real: Any, verifiers: Any, teacher: Any, **rest: Any) -> Any:
        seen.append(teacher)
        raise DFKDError('enough')

    monkeypatch.setattr('dfkd_nb.lab.reports.inspect_run', inspected)
    assert main(['inspect', 'dreams', *own, '--real', '']) == 2
    (teacher,) = seen
    assert teacher.domain.classes == ('cat', 'dog', 'bird')
    assert teacher.domain.shape == (3, 8, 10) and teacher.domain.std == (1 / 255,) * 3
    assert teacher.model[4].bias.equal(net[4].bias)


def test_everything_that_is_a_file_is_read_by_one_call(here: Path) -> None:
    torch.export.save(program(), here / 'net.pt2')
    script(here / 'net.pt')
    for name in ('net.pt2', 'net.pt'):
        torch.testing.assert_close(load_network_file(here / name)(X), trained()(X))
    torch.testing.assert_close(load_exported(here / 'net.pt2')(X), trained()(X))


LENGTHS = """
import torch
from torch import nn


class Good(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 4)

    def size(self, x):
        return x.shape[0]

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.last(x.view(self.size(x), 8))


class Length(Good):
    def size(self, x):
        return len(x)


class Number(Good):
    def size(self, x):
        return int(x.size(0))


class Two(Good):
    def size(self, x):
        return 2
"""
SIZED = '--size 8 --channels 1 --mean .5 --std .5 --device cpu --out no'.split()


@pytest.mark.parametrize('kind', ['Length', 'Number'])
@pytest.mark.parametrize(
    'command',
    [
        'quantize --model mine.py:{}',
        'prune --keep 0.5 --export pt2 --model mine.py:{}',
        'distill --method noise --export pt2 --model mine.py:Good --student mine.py:{}',
    ],
)
def test_a_batch_that_is_fixed_is_told_before_the_work(
    kind: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(LENGTHS)
    assert main([*command.format(kind).split(), *SIZED]) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if 'error' in s]
    assert 'take the size as x.shape[0] or x.size(0), not as len(x)' in line
    assert not (tmp_path / 'no').exists()


def test_a_network_of_two_images_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(LENGTHS)
    scope: dict[str, Any] = {}
    exec(LENGTHS, scope)
    program = torch.export.export(scope['Good']().eval(), (torch.zeros(2, 1, 8, 8),))
    torch.export.save(program, tmp_path / 'two.pt2')
    for spec in ('two.pt2', 'mine.py:Two'):
        assert main(['inspect', '--model', spec, *SIZED[:-4]]) == 2
        (line,) = [s for s in capsys.readouterr().err.splitlines() if 'error' in s]
        assert 'takes 2 images, and not 3' in line and 'dynamic_shapes' in line


def make_transformer(here: Path, spec: str) -> list[str]:
    "Weights of a transformer in a file, and the options that describe it."
    network = load_network(spec, num_classes=3).model
    torch.save(network.state_dict(), here / 'net.pt')
    small = 'synthesis_steps=1 half_size_steps=1 synthesis_batch_size=4'.split()
    words = ['--model', spec, '--checkpoint', 'net.pt', '--size', '32', '--device', 'cpu']
    words += ['--mean', '.5,.5,.5', '--std', '.5,.5,.5']
    return words + [word for value in small for word in ('--set', value)]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'spec', ['vit-tiny', 'timm:vit_tiny_patch16_224(img_size=32, patch_size=8, depth=2)']
)
def test_a_transformer_at_the_command_line(
    spec: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if spec.startswith('timm:'):
        library('timm')
    words = make_transformer(here, spec)
    bare = words[: words.index('--device')] + words[words.index('--mean') :][:4]
    assert main(['inspect', *bare]) == 0
    shown = capsys.readouterr().out
    assert 'there are no BatchNorm layers (use --statistics none)' in shown
    assert '3 x 32 x 32' in shown
    invert = ['invert', *words, '--n', '2', '--out', 'made']
    assert main(invert) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if 'error' in s]
    assert 'no BatchNorm layers' in line and '--statistics none goes on without' in line
    assert main([*invert, '--statistics', 'none']) == 0
    assert len(list((here / 'made').rglob('*.png'))) == 2
    distill = ['distill', *words, '--student', 'resnet8', '--method', 'deepinversion']
    distill += ['--steps', '10', '--images', '4', '--out', 'student', '--statistics']
    distill += ['none', '--set', 'held_out=10', '--set', 'held_out_steps=1']
    assert main(distill) == 0
    numbers = json.loads((here / 'student/result.json').read_text())['numbers']
    assert numbers['steps'] == 10


@pytest.mark.filterwarnings('ignore')
def test_arguments_of_timm() -> None:
    library('timm')
    name = 'vit_tiny_patch16_224'
    found = load_network(f'timm:{name}(img_size=32, patch_size=8)', num_classes=3)
    assert found.domain is not None and found.domain.shape == (3, 32, 32)
    assert found.teacher().predict(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    one_line(lambda: load_network(f'timm:{name}(32)'), 'cannot be read')
    one_line(lambda: load_network(f'timm:{name}(img=32)'), "argument 'img'")
