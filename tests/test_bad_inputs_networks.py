"""Whatever a stranger hands to the commands: one line that says what to do, no more.

Files, specs, domains and heads that cannot be used, and files that were made to do harm.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_nb.lab import distill
from dfkd_nb.lab.commands import main
from dfkd_nb.lab.distill import open_test
from dfkd_nb.toolbox.core import save_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model

CODE = """
import torch
from torch import nn

number = 7


class Net(nn.Module):
    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(width), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Net()


class Boxes(Net):
    def forward(self, x):
        return [{'boxes': x}]


class Nothing(Net):
    def forward(self, x):
        return None


class NaN(Net):
    def forward(self, x):
        return super().forward(x) / 0 * 0


class OneAnswer(Net):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


class Parts(Net):
    def forward(self, x):
        return {'scores': super().forward(x), 'aux': x}


class Rude(Net):
    def forward(self, x):
        raise SystemExit('no')


def broken():
    raise ValueError('two\\nlines')


def leaves():
    raise SystemExit(3)


def needs(depth):
    return Net()
"""
NUMBERS = '--mean 0.3 --std 0.4 --size 8'.split()
DIGITS = ['--model', 'digits-net', *NUMBERS]
OWN = ['--model', 'mine.py:Net', '--channels', '1', *NUMBERS]


class Bomb:
    "Unpickled, it makes the folder `marker`."

    def __reduce__(self) -> Any:
        return os.mkdir, ('marker',)


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_model('digits-net', 10, 1).state_dict()


def content(data: bytes | str) -> Callable[[Path], Any]:
    raw = data.encode() if isinstance(data, str) else data
    return lambda path: path.write_bytes(raw)


def saved(thing: Any) -> Callable[[Path], Any]:
    return lambda path: torch.save(thing() if callable(thing) else thing, path)


def cut(path: Path, share: float = 0.5) -> None:
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def deflated(path: Path) -> None:
    "An archive whose one record is a thousand times as large as the file."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('net/data.pkl', bytes(100_000_000))
        archive.writestr('net/version', '3')


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack('<Q', len(header) if length is None else length) + header


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    'missing': (lambda path: None, 'check the path'),
    'empty': (content(''), 'is empty'),
    'a folder': (lambda path: path.mkdir(), 'is a folder'),
    'a link to itself': (lambda path: path.symlink_to(path), 'check the path'),
    'a web page': (content('<!doctype html><html>'), 'a web page'),
    'a pointer of LFS': (content('version https://git-lfs.github.com/spec/v1\n'), 'LFS'),
    'a picture': (content(b'\x89PNG\r\n\x1a\n' + bytes(90)), 'a picture'),
    'Keras': (content(b'\x89HDF\r\n\x1a\n' + bytes(90)), 'Keras'),
    'plain text': (content('rate: 0.1\n' * 9), 'no checkpoint'),
    'noise': (content(bytes(range(1, 200))), 'no checkpoint'),
    'truncated': (cut, 'truncated'),
    'truncated early': (lambda path: cut(path, 0.02), 'truncated'),
    'a record that swells': (deflated, ''),
    'a pickle bomb': (saved(lambda: {'fc': torch.ones(2), 'x': Bomb()}), 'nothing was run'),
    'a bare bomb': (content(pickle.dumps(Bomb())), 'nothing was run'),
    'a whole network': (saved(lambda: torch.nn.Linear(2, 2)), 'nothing was run'),
    'an optimiser': (saved({'optimizer': {'state': {0: torch.ones(2)}}}), ''),
    'no weights': (saved({'epoch': 3}), 'no weights'),
    'another network': (saved({'a.weight': torch.ones(3)}), 'none of its names'),
    'weights that are not finite': (
        saved(lambda: {k: v * torch.nan for k, v in state().items()}),
        'NaN',
    ),
    'a header that is too long': (content(safetensors(b'{}', 2**60) + bytes(99)), ''),
    'a header that is no JSON': (content(safetensors(b'{' * 64)), ''),
    'places beyond the end': (
        content(
            safetensors(
                json.dumps(
                    {'a': {'dtype': 'F32', 'shape': [9], 'data_offsets': [0, 10**9]}}
                ).encode()
            )
        ),
        '',
    ),
}
SPECS: dict[str, tuple[list[str], str]] = {
    'a name of nothing': (['resnet21'], 'resnet20'),
    'nothing at all': ([''], 'nothing to inspect'),
    'torchvision alone': (['torchvision:'], ''),
    'torchvision misspelt': (['torchvision:resnet1'], ''),
    'a library misspelt': (['torchvison:resnet18'], 'torchvision'),
    'no folder': (['hf:./nowhere'], 'no folder'),
    'a folder without a network': (['hf:./empty'], 'config.json'),
    'no such class': (['mine.py:Gone'], "'Gone'"),
    'no such file': (['gone.py:Net'], 'no file gone.py'),
    'a number': (['mine.py:number'], 'int'),
    'a class of something else': (['collections:OrderedDict'], 'nn.Module'),
    'code for an argument': (["mine.py:Net(width=__import__('os').mkdir('marker'))"], ''),
    'code for a name': (["mine.py:__import__('os').mkdir('marker')"], ''),
    'no literal': (['mine.py:Net(width=n)'], 'literal'),
    'an argument without a name': (['mine.py:Net(4)'], 'literal'),
    'an unknown argument': (['mine.py:Net(depth=4)'], 'depth'),
    'an argument that is missing': (['mine.py:needs'], "'depth'"),
    'code that fails': (['mine.py:broken'], 'ValueError'),
    'code that leaves': (['mine.py:leaves'], 'SystemExit'),
    'weights of a name': (['resnet20@best'], '@pretrained'),
    'a file of noise': (['noise.pt2'], 'noise.pt2'),
    'noise as ONNX': (['noise.onnx'], ''),
    'noise as TorchScript': (['noise.ts'], 'noise.ts'),
    'a path out of here': (['../../etc/passwd:Net'], ''),
}
DOMAIN_OPTIONS: dict[str, tuple[list[str], str]] = {
    'no size': (['--size', '0'], '--size'),
    'a size in words': (['--size', '8by8'], '--size'),
    'a negative size': (['--size', '-8'], '--size'),
    'three sizes': (['--size', '8x8x8'], '--size'),
    'a size that no memory holds': (['--size', '9999999'], '--size'),
    'words for a mean': (['--mean', 'grey'], '--mean'),
    'no number for a mean': (['--mean', 'nan'], ''),
    'a mean of bytes': (['--mean', '127'], '--range 0..255'),
    'a negative mean': (['--mean', '-0.5'], ''),
    'no spread': (['--std', '0'], 'positive'),
    'a negative spread': (['--std', '-1'], ''),
    'an endless spread': (['--std', 'inf'], 'positive'),
    'two means': (['--mean', '.1,.2', '--channels', '1'], '2 means for 1'),
    'a range of nothing': (['--range', '1..1'], 'A below B'),
    'half a range': (['--range', '..255'], '--range'),
    'no channels': (['--channels', '0'], '--channels'),
    'no classes': (['--num-classes', '0'], '--num-classes'),
    'classes in words': (['--num-classes', 'ten'], '--num-classes'),
    'classes without names': (['--class-names', 'gone.txt'], 'gone.txt'),
    'names in bytes': (['--class-names', 'noise.pt2'], 'noise.pt2'),
    'fewer names': (['--class-names', 'two.txt'], ''),
    'names with a gap': (['--class-names', 'gap.json'], 'numbered from 0'),
    'names of nothing': (['--class-names', 'empty'], ''),
}
HEADS: dict[str, tuple[list[str], str]] = {
    'no forward': (['mine.py:NoForward'], 'forward'),
    'boxes': (['mine.py:Boxes'], '--output'),
    'nothing': (['mine.py:Nothing'], '--output'),
    'not a number': (['mine.py:NaN'], 'NaN'),
    'one answer for all': (['mine.py:OneAnswer'], ''),
    'parts without logits': (['mine.py:Parts'], '--output'),
    'an unknown part': (['mine.py:Parts', '--output', 'boxes'], "'boxes'"),
    'a kind of nothing': (['mine.py:Net', '--outputs', 'votes'], 'logits'),
    'one that leaves': (['mine.py:Rude'], ''),
    'too many classes': (['mine.py:Net(num_classes=3)', '--num-classes', '4'], '4'),
}


def picture(width: int, height: int) -> bytes:
    "A PNG that says it is so large."

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack('>I', len(data))
            + kind
            + data
            + struct.pack('>I', zlib.crc32(kind + data))
        )

    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', data)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / 'work'
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path('mine.py').write_text(CODE)
    torch.save(state(), 'good.pth')
    for name in ('noise.pt2', 'noise.onnx', 'noise.ts'):
        Path(name).write_bytes(bytes(range(255, 100, -1)) * 9)
    Path('two.txt').write_text('cat\ndog\n')
    Path('gap.json').write_text('{"0": "cat", "2": "dog"}')
    Path('empty').mkdir()
    return folder


def everything(folder: Path) -> dict[str, bytes | None]:
    "All files below a folder, what Python compiled aside."
    return {
        str(p): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob('*'))
        if '__pycache__' not in p.parts
    }


def refused(words: list[str], capsys: pytest.CaptureFixture[str], root: Path) -> str:
    "The one line of a command that fails and leaves everything as it was."
    before = everything(root)
    assert main(words) == 2, words
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith('dfkd: error: ') and 'error: unexpected' not in said, said
    assert 'Traceback' not in said and len(lines[0]) < 500, said
    assert everything(root) == before
    return lines[0]


@pytest.mark.parametrize('name', FILES)
def test_files(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = FILES[name]
    for ending in ('pth', 'safetensors') if 'header' in name else ('pth',):
        make(here / f'net.{ending}')
        line = refused(
            ['inspect', *DIGITS, '--checkpoint', f'net.{ending}'], capsys, here.parent
        )
        assert words in line and f'net.{ending}' in line, line


@pytest.mark.parametrize('name', SPECS)
def test_specs(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spec, *more), words = SPECS[name]
    weights = [] if ':' in spec and not spec.startswith('torchv') else ['good.pth']
    given = ['--checkpoint', *weights] if weights and '.pt' not in spec else []
    if spec.endswith(('.pt2', '.onnx', '.ts')):
        given = []
    line = refused(['inspect', '--model', spec, *NUMBERS, *given], capsys, here.parent)
    assert words in line, line


@pytest.mark.parametrize('name', DOMAIN_OPTIONS)
def test_domains(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = DOMAIN_OPTIONS[name]
    given = [*DIGITS, '--checkpoint', 'good.pth']
    joined = [f'{options[0]}={options[1]}', *options[2:]]
    for form in (joined, options):  # a value may begin with a minus sign
        line = refused(['inspect', *given, *form], capsys, here.parent)
        assert words in line and 'expected one argument' not in line, line


def test_a_complaint_about_channels_is_whole(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ['inspect', '--model', 'mine.py:Net', '--size', '8', '--channels', '3']
    words += ['--mean', '.3,.3,.3', '--std', '.4,.4,.4']
    line = refused(words, capsys, here.parent)
    assert 'to have 1 channels, but got 3 channels instead' in line, line


@pytest.mark.parametrize('name', HEADS)
def test_heads(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spec, *more), words = HEADS[name]
    given = ['--model', spec, '--channels', '1', *NUMBERS, *more]
    for command in (['inspect'], ['invert', '--n', '2', '--out', 'dreams']):
        assert words in refused([*command, *given], capsys, here.parent)


def digits(count: int = 3, classes: tuple[str, ...] = ('a', 'b', 'c')) -> ImageSet:
    domain = Domain('own', (1, 8, 8), (0.3,), (0.4,), classes)
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % len(classes), domain)


TESTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    'a picture that swells': (
        lambda folder: (folder / '0' / 'x.png').write_bytes(picture(60_000, 60_000)),
        'x.png',
    ),
    'a picture that ends': (
        lambda folder: (folder / '0' / 'x.png').write_bytes(picture(8, 8)[:40]),
        'x.png',
    ),
    'text': (lambda folder: (folder / '0' / 'x.png').write_text('cat'), 'x.png'),
    'noise as a table': (
        lambda folder: (folder / 'x.parquet').write_bytes(bytes(99)),
        'x.parquet',
    ),
}


@pytest.mark.parametrize('name', TESTS)
def test_test_images(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        (here / 'test' / str(number)).mkdir(parents=True)
        source = here / 'test' / str(number) / 'good.png'
        digits().to_folder(here / f'x{number}')
        source.write_bytes(next((here / f'x{number}').rglob('*.png')).read_bytes())
    make, words = TESTS[name]
    make(here / 'test')
    with pytest.raises(DFKDError, match=words) as found:
        open_test('test', DOMAINS['digits'])  # before anything is asked for
    assert len(str(found.value).splitlines()) == 1
    monkeypatch.setattr(distill, 'TEST_BYTES', 0)  # large sets are not decoded at once
    with pytest.raises(DFKDError, match=words):
        open_test('test', DOMAINS['digits'])


NO_TESTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    'x.safetensors': (lambda path: path.write_bytes(b'junk' * 30), 'no safetensors file'),
    'weights.safetensors': (
        lambda path: save_tensors(path, {'w': torch.zeros(2)}),
        'holds no image set',
    ),
    'x.png': (lambda path: path.write_bytes(picture(8, 8)), 'no file of labelled images'),
    'x.txt': (lambda path: path.write_text('0,1'), 'no file of labelled images'),
    'x.parquet': (lambda path: path.write_bytes(bytes(99)), 'no Parquet file'),
    'unlabelled.safetensors': (
        lambda path: ImageSet(digits().images, None, digits().domain).save(path),
        'without labels',
    ),
}


@pytest.mark.parametrize('name', NO_TESTS)
def test_files_that_are_no_test(name: str, here: Path) -> None:
    make, words = NO_TESTS[name]
    make(here / name)
    with pytest.raises(DFKDError, match=words) as found:
        open_test(name, digits().domain)
    assert str(found.value).startswith(f'--test {name}: ')
    assert 'no folder' not in str(found.value)


def test_a_test_is_read_once_and_kept(here: Path) -> None:
    images = digits(9)
    images.save(here / 'x.safetensors')
    images.to_folder(here / 'x')
    for name in ('x.safetensors', 'x'):
        found = open_test(name, images.domain)
        assert isinstance(found, ImageSet)
        assert found.images.shape == (9, 1, 8, 8)
    # files that change later do not matter to a run that has begun
    assert found.labels is not None and found.labels.bincount().tolist() == [3, 3, 3]


OUTSIDE = '../secret.png', '{root}/secret.png', 'a/../../secret.png'


@pytest.mark.parametrize('file', OUTSIDE)
def test_a_manifest_reads_no_file_outside_its_folder(
    file: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits().to_folder(here / 'some')
    secret = next((here / 'some').rglob('*.png')).read_bytes()
    (here / 'secret.png').write_bytes(secret)
    (here / 'dreams').mkdir()
    line = {'class': 0, 'name': 'a', 'predicted': 0, 'predicted_name': 'a'}
    request = {'shape': [1, 8, 8], 'mean': [0.3], 'std': [0.4], 'format': 'png'}
    line['file'] = file.format(root=here)
    manifest = {'images': [line], 'request': request}
    (here / 'dreams' / 'manifest.json').write_text(json.dumps(manifest))
    said = refused(['images', 'dreams', '--to', 'npy'], capsys, here.parent)
    assert 'outside' in said


@pytest.mark.parametrize('where', ['teacher', 'verifiers', 'model'])
@pytest.mark.parametrize('spec', ["os:mkdir(path='marker')", 'evil.py:Net'])
def test_a_foreign_folder_runs_no_code(
    where: str, spec: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    "A result.json or manifest.json of somebody names the network; their code stays theirs."
    (here / 'run').mkdir()
    digits(10, tuple('0123456789')).save(here / 'run' / 'images.safetensors')
    (here / 'evil.py').write_text('import os\nos.mkdir("marker")\nNet = None\n')
    settings = {'teacher': 'cifar10-resnet20', where: spec}
    result = {'recipe': 'x', 'scale': 'hour', 'task': 'dream', 'settings': settings}
    if where == 'model':
        (here / 'run' / 'manifest.json').write_text(json.dumps({'model': spec}))
    else:
        (here / 'run' / 'result.json').write_text(json.dumps(result))
    if where == 'verifiers' and "'" in spec:
        settings['verifiers'] = [spec]
        (here / 'run' / 'result.json').write_text(json.dumps(result))
    assert 'which is code' in refused(['inspect', 'run', '--real', ''], capsys, here.parent)


NAMES = ('../../up', '/root', '<script>alert(1)</script>', 'con\0', '..', '$\\frac{1}$')


@pytest.mark.parametrize('kind', ['png', 'parquet', 'webdataset'])
def test_names_of_classes_are_no_paths(kind: str, here: Path) -> None:
    (here / 'run').mkdir()
    digits(6, NAMES).save(here / 'run' / 'images.safetensors')
    outside = {p for p in here.parent.rglob('*') if here not in p.parents}
    assert main(['images', 'run', '--to', kind, '--out', 'inside/all']) == 0
    assert {p for p in here.parent.rglob('*') if here not in p.parents} == outside
    written = [p for p in (here / 'inside').rglob('*') if p.is_file()]
    assert written and all('script' not in str(p) for p in written)


def test_names_of_classes_are_no_html(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / 'run').mkdir()
    names = tuple(f'<script>alert({i})</script>' for i in range(10))
    domain = Domain('own', (1, 8, 8), (0.3,), (0.4,), names)
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    made = ImageSet(images, torch.arange(20) % 10, domain)
    made.save(here / 'run' / 'images.safetensors')
    (here / 'names.txt').write_text('\n'.join(names))
    words = ['inspect', 'run', *DIGITS, '--checkpoint', 'good.pth', '--real', '']
    assert main([*words, '--class-names', 'names.txt']) == 0
    page = (here / 'run' / 'inspection' / 'report.html').read_text()
    assert '<script' not in page


def test_a_table_of_foreign_names_is_read(here: Path) -> None:
    digits(6, NAMES).to_parquet(here / 'x.parquet')
    again = ImageSet.from_parquet(here / 'x.parquet')
    assert again.domain.classes == NAMES
    again.to_folder(here / 'y')
    assert sorted(p.name for p in (here / 'y').iterdir()) == [f'{i:04d}' for i in range(6)]


def test_there_are_sixty_cases() -> None:
    assert len(FILES) + len(SPECS) + len(DOMAIN_OPTIONS) + len(HEADS) + len(TESTS) >= 60
