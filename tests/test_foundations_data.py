"""Core and data: contracts and properties that would only be in the way of the chapters'
stories.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses import FakeTensorMode

from dfkd_nb.toolbox import core, data
from dfkd_nb.toolbox.augmentation import Augment, mixup, random_crop
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import ImageFiles, data_root, load_data, read_folder
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.formats import read_parquet

CIFAR = DOMAINS['cifar10']
posix = pytest.mark.skipif(os.name != 'posix', reason='uses POSIX limits and signals')


def png(pixels: np.ndarray) -> bytes:
    "The pixels as the bytes of a PNG file."
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG')
    return buffer.getvalue()


def noise(count: int, size: int = 32) -> np.ndarray:
    "Random RGB pictures, `(count, size, size, 3)`."
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_table(path: Path, **columns: list) -> Path:
    "A Parquet file with one keyword a column, in small row groups."
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def one_line(error: pytest.ExceptionInfo[DFKDError]) -> str:
    "The message, which must be one line that says what to do after a colon."
    text = str(error.value)
    assert '\n' not in text and ': ' in text
    return text


# --- core: streams ------------------------------------------------------------------------


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.sampled_from(['random', 'gauss', 'numpy', 'torch']), max_size=7),
)
@settings(max_examples=20, deadline=None)
def test_random_state_returns_to_any_moment(seed: int, before: list[str]) -> None:
    import random

    draw = {
        'random': random.random,
        'gauss': lambda: random.gauss(0, 1),
        'numpy': np.random.normal,
        'torch': lambda: float(torch.randn(())),
    }
    core.seed_everything(seed)
    for name in before:
        draw[name]()
    state = core.random_state()
    first = [f() for f in draw.values()]
    core.restore_random_state(state)
    assert [f() for f in draw.values()] == first


def test_seeded_draws_are_the_seeds_and_put_the_streams_back() -> None:
    torch.manual_seed(5)
    with pytest.raises(KeyError), core.seeded(7):
        inside = torch.rand(3)
        raise KeyError
    after = torch.rand(3)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(after, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_random_state_survives_a_checkpoint_and_older_ones_load(tmp_path: Path) -> None:
    core.seed_everything(1)
    core.save_checkpoint(tmp_path / 'c.pt', {'random': core.random_state()})
    first = torch.rand(3)
    state = core.load_checkpoint(tmp_path / 'c.pt')['random']
    del state['python_gauss']
    core.restore_random_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize('seed', [-1, 2**64])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(DFKDError) as error:
        core.seed_everything(seed)
    one_line(error)


# --- core: files --------------------------------------------------------------------------


@each('part', [0, 0.01, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, part: float) -> None:
    core.save_checkpoint(tmp_path / 'c.pt', {'x': torch.rand(1000)})
    core.save_tensors(tmp_path / 't.safetensors', {'x': torch.rand(1000)})
    for name, load in (
        ('c.pt', core.load_checkpoint),
        ('t.safetensors', core.load_tensors),
    ):
        path = tmp_path / name
        blob = path.read_bytes()
        path.write_bytes(blob[: int(part * len(blob))])
        with pytest.raises(DFKDError) as error:
            load(path)
        assert name in one_line(error)


@each('content', [b'', b'not a file of ours', b'PK\x03\x04', b'\x80\x02N.'])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'foreign'
    path.write_bytes(content)
    for load in (core.load_checkpoint, core.load_tensors):
        with pytest.raises(DFKDError) as error:
            load(path)
        one_line(error)
    with pytest.raises(DFKDError):
        core.load_checkpoint(tmp_path)  # a folder


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save(torch.rand(3), tmp_path / 'tensor.pt')
    with pytest.raises(DFKDError, match='Tensor'):
        core.load_checkpoint(tmp_path / 'tensor.pt')


@each(
    'value',
    [np.float64(1), np.zeros(2), Path('x'), defaultdict(list), range(3), object(), print],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / 'c.pt'
    core.save_checkpoint(path, {'x': 1})
    with pytest.raises(DFKDError) as error:
        core.save_checkpoint(path, {'a': [{'b': value}]})
    assert "state['a'][0]['b']" in one_line(error)
    assert core.load_checkpoint(path) == {'x': 1}


def test_everything_plain_comes_back(tmp_path: Path) -> None:
    state = {
        'none': None,
        'flag': True,
        'tuple': (1, 2.5, 1j),
        'set': {1, 2},
        'bytes': b'x',
        3: OrderedDict(a=[1]),
        'dtype': torch.bfloat16,
        'size': torch.Size([1, 2]),
        'device': torch.device('cpu'),
        'nan': float('inf'),
    }
    core.save_checkpoint(tmp_path / 'c.pt', state)
    assert core.load_checkpoint(tmp_path / 'c.pt') == state
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    core.save_checkpoint(
        tmp_path / 'c.pt',
        {'network': network.state_dict(), 'optimizer': optimizer.state_dict()},
    )
    optimizer.load_state_dict(core.load_checkpoint(tmp_path / 'c.pt')['optimizer'])


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from dfkd_nb.toolbox import core
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS
folder = Path(sys.argv[1])
writers = {
    'c.pt': lambda p, n: core.save_checkpoint(p, {'x': torch.zeros(n)}),
    't.safetensors': lambda p, n: core.save_tensors(p, {'x': torch.zeros(n)}),
}
for name, write in writers.items(): write(folder / name, 10)
before = {name: (folder / name).read_bytes() for name in writers}
# a write beyond it fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name, write in writers.items():
    try: write(folder / name, 1_000_000)
    except core.DFKDError as error: print(error)
    else: raise AssertionError(name)
    assert (folder / name).read_bytes() == before[name]
assert sorted(p.name for p in folder.iterdir()) == sorted(writers)
"""


@posix
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-c', FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(
        'cannot write' in line and 'untouched' in line for line in lines
    )


@posix
@pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere'
)
def test_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / 'closed'
    folder.mkdir(mode=0o500)
    with pytest.raises(DFKDError) as error:
        core.save_checkpoint(folder / 'c.pt', {'x': 1})
    assert 'cannot write' in one_line(error)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('x')
    with pytest.raises(DFKDError) as error:
        core.save_checkpoint(tmp_path / 'file' / 'c.pt', {'x': 1})
    assert 'cannot write' in one_line(error)


KILLED = """
import itertools, os, signal, sys, time
from pathlib import Path
import torch
from dfkd_nb.toolbox.core import load_checkpoint, save_checkpoint
path = Path(sys.argv[1])
for number in range(6):
    path.unlink(missing_ok=True)
    if not (child := os.fork()):
        for step in itertools.count(1):
            x = torch.full((300_000,), float(step))
            save_checkpoint(path, {'step': step, 'x': x})
    while not path.exists(): time.sleep(0.005)
    time.sleep(0.01 * number)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = load_checkpoint(path)
    assert (state['x'] == state['step']).all()
"""


@posix
def test_killed_while_writing_the_file_is_whole(tmp_path: Path) -> None:
    """Six children of one process, which is started apart.

    Forking one with many threads is asking for trouble.
    """
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', KILLED, str(tmp_path / 'c.pt')]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr


def test_safetensors_keep_types_views_and_nothing_else(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    tensors = {
        'column': whole[:, 2],
        'row': whole[1].clone(),
        'empty': torch.zeros(0, 3),
        'bool': torch.tensor([True]),
    }
    core.save_tensors(tmp_path / 't.safetensors', tensors)
    again, about = core.load_tensors(tmp_path / 't.safetensors')
    assert about == {} and again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)


def test_progress_is_silent_when_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(core, 'TESTING', False)
    monkeypatch.setenv('DFKD_PROGRESS', '0')
    assert list(core.progress(range(3), delay=0)) == [0, 1, 2]
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('DFKD_PROGRESS', '1')
    assert list(core.progress(range(3), 'shown', delay=0)) == [0, 1, 2]
    assert 'shown' in capsys.readouterr().err


# --- data: domains ------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(DOMAINS)),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_bytes_come_back_whatever_the_size(
    name: str, count: int, height: int, width: int
) -> None:
    domain = DOMAINS[name]
    images = torch.randint(
        0, 256, (count, domain.channels, height, width), dtype=torch.uint8
    )
    x = domain.normalize(images)
    low, high = domain.limits()
    assert torch.equal(domain.to_uint8(x), images)
    assert (x >= low - 1e-5).all() and (x <= high + 1e-5).all()
    assert torch.allclose(domain.denormalize(x), images / 255, atol=1e-5)


@each(
    'changes',
    [
        {'mean': (0.5,)},
        {'std': (0.2, 0.2)},
        {'std': (0.2, 0.0, 0.2)},
        {'mean': (0.5, 0.5, 127.0)},
        {'classes': ()},
        {'shape': (3, 0, 32)},
    ],
)
def test_impossible_domains(changes: dict) -> None:
    plain = {
        'name': 'x',
        'shape': (3, 32, 32),
        'mean': (0.5,) * 3,
        'std': (0.2,) * 3,
        'classes': ('a',),
    }
    with pytest.raises(DFKDError) as error:
        Domain(**(plain | changes))
    one_line(error)


@each(
    'images',
    [
        torch.zeros(2, 1, 32, 32),
        torch.zeros(2, 4, 32, 32),
        torch.zeros(32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.long),
    ],
)
def test_images_that_do_not_normalise(images: torch.Tensor) -> None:
    with pytest.raises(DFKDError) as error:
        CIFAR.normalize(images)
    one_line(error)


def test_half_precision_stays_half() -> None:
    assert CIFAR.normalize(torch.rand(1, 3, 2, 2).bfloat16()).dtype == torch.bfloat16
    assert CIFAR.to_uint8(torch.zeros(1, 3, 2, 2).bfloat16()).dtype == torch.uint8


def test_nan_and_infinity() -> None:
    x = torch.zeros(3, 3, 2, 2)
    x[0], x[1] = torch.inf, -torch.inf
    assert CIFAR.to_uint8(x).flatten(1).float().mean(1)[:2].tolist() == [255, 0]
    x[2, 0, 0, 0] = torch.nan
    with pytest.raises(DFKDError, match='1 of 3'):
        CIFAR.to_uint8(x)


# --- data: sources ------------------------------------------------------------------------


def source(count: int) -> ImageSet:
    "Images whose first pixel is their number."
    classes = Domain('many', (1, 2, 2), (0.5,), (0.5,), tuple(map(str, range(5000))))
    numbers = torch.arange(count)
    return ImageSet(
        (numbers % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2),
        numbers,
        classes,
    )


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_drawing_is_fair_and_resumes(count: int, batch: int, before: int) -> None:
    sampler, generator = source(count).sampler(), torch.Generator().manual_seed(0)
    for _ in range(before):
        sampler.sample(batch, generator)
    state, stream = sampler.state_dict(), generator.get_state()
    drawn = [sampler.sample(batch, generator) for _ in range(5)]
    for x, y in drawn:
        assert len(x) == batch and y is not None and torch.equal(x[:, 0, 0, 0].long(), y)
        seen = y.bincount(minlength=count)
        assert seen.max() - seen.min() <= 2  # at most one shuffle more, cut off
    again, other = source(count).sampler(), torch.Generator()
    again.load_state_dict(state)
    other.set_state(stream)
    assert all(torch.equal(again.sample(batch, other)[1], y) for _, y in drawn)


def test_samplers_of_one_set_do_not_touch_each_other() -> None:
    images = source(10)
    first, second = images.sampler(), images.sampler()
    one, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    mixed = []
    for _ in range(7):
        mixed.append(first.sample(3, one)[1])
        second.sample(4, torch.Generator().manual_seed(5))
    alone = images.sampler()
    assert all(torch.equal(y, alone.sample(3, other)[1]) for y in mixed)
    # a set has no state but its data
    assert not any(isinstance(value, int) for value in vars(images).values())


def test_an_epoch_has_everything_once() -> None:
    sampler, generator = source(12).sampler(), torch.Generator().manual_seed(0)
    for _ in range(3):
        labels = torch.cat([sampler.sample(4, generator)[1] for _ in range(3)])
        assert torch.equal(labels.sort().values, torch.arange(12))


def test_five_thousand_classes_and_no_labels(tmp_path: Path) -> None:
    many = source(5000)
    many.save(tmp_path / 'many.safetensors')
    again = ImageSet.load(tmp_path / 'many.safetensors')
    assert again.domain == many.domain and torch.equal(again.labels, many.labels)
    bare = ImageSet(many.images, None, many.domain)
    bare.save(tmp_path / 'bare.safetensors')
    assert ImageSet.load(tmp_path / 'bare.safetensors').labels is None
    assert (
        bare.sampler().sample(3, torch.Generator())[1] is None
        and bare.to('cpu').subset(2).labels is None
    )


@each(
    'labels',
    [
        torch.arange(4),
        torch.arange(5) - 1,
        torch.arange(5) + 6,
        torch.rand(5),
        torch.zeros(5, 10, dtype=torch.long),
    ],
)
def test_labels_that_do_not_fit(labels: torch.Tensor) -> None:
    images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    for build in (
        lambda: ImageSet(images, labels, CIFAR),
        lambda: ImageFiles([b''] * 5, labels, CIFAR),
    ):
        with pytest.raises(DFKDError) as error:
            build()
        one_line(error)


def test_a_file_that_holds_no_images(tmp_path: Path) -> None:
    core.save_tensors(tmp_path / 'w.safetensors', {'weight': torch.rand(2)})
    with pytest.raises(DFKDError, match='image set'):
        ImageSet.load(tmp_path / 'w.safetensors')


# --- data: decoding -----------------------------------------------------------------------


@pytest.mark.parametrize('name', ['digits', 'cifar10', 'imagenet'])
def test_any_picture_becomes_the_domains(name: str) -> None:
    for shape in (32, 32, 3), (7, 300, 3), (300, 7, 3), (1, 1, 3), (40, 60), (40, 60, 4):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        decoded = ImageFiles([png(pixels)], None, DOMAINS[name]).fetch(torch.tensor([0]))
        assert decoded.dtype == torch.uint8, shape
        assert tuple(decoded.shape) == (1, *DOMAINS[name].shape), shape


def test_of_a_long_picture_the_middle_is_kept() -> None:
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 200
    for long in (pixels, pixels.T):
        decoded = ImageFiles([png(long)], None, DOMAINS['digits']).fetch(torch.tensor([0]))
        assert (decoded == 200).all()


def test_lossless_files_lose_nothing() -> None:
    pixels = noise(3)
    files = ImageFiles([png(p) for p in pixels], torch.tensor([2, 0, 1]), CIFAR)
    images, labels = next(files.batches(3))
    assert np.array_equal(
        images.permute(0, 2, 3, 1).numpy(), pixels
    ) and labels.tolist() == [2, 0, 1]
    black_and_white = Image.fromarray(pixels[0]).convert('1')
    buffer = io.BytesIO()
    black_and_white.save(buffer, 'PNG')
    assert set(
        ImageFiles([buffer.getvalue()], None, CIFAR)
        .fetch(torch.tensor([0]))
        .unique()
        .tolist()
    ) <= {0, 255}


def test_files_are_decoded_ahead_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next batch is begun while this one is used; order, results and the image that an
    error names are those of decoding on demand.
    """
    pixels = noise(7)
    begun = []
    plain = ImageFiles._decoded
    monkeypatch.setattr(
        ImageFiles, '_decoded', lambda self, i: begun.append(i) or plain(self, i)
    )
    files = ImageFiles([png(p) for p in pixels], torch.arange(7), CIFAR, workers=1)
    wanted = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels])
    sampler, draws = files.sampler(), torch.Generator().manual_seed(0)
    for number in range(7):  # epochs of three batches
        images, labels = sampler.sample(2, draws)
        assert images.equal(wanted[labels])
        files._pool.submit(int).result()  # the only worker has done what was begun
        if number % 3 < 2:
            ahead = sampler.order[sampler.position : sampler.position + 2].tolist()
            assert begun[-2:] == ahead
        else:
            assert begun[-2:] == labels.tolist()  # what comes next is not drawn yet
    assert len(begun) == 2 * 7 + 2, 'nothing is decoded twice'
    walked = torch.cat([images for images, _ in files.batches(3)])
    assert walked.equal(wanted)
    broken = ImageFiles([png(p) for p in pixels[:4]] + [b'no'] * 2, None, CIFAR)
    walk = broken.batches(2)
    assert len(next(walk)[0]) == len(next(walk)[0]) == 2  # the third is being decoded
    with pytest.raises(DFKDError, match=r'image 4 \(from 0\) is no readable image'):
        next(walk)
    for _ in range(9):  # batches that nobody fetches do not pile up
        broken.prefetch(torch.tensor([0, 1]))
    assert len(broken._ahead) == 4


@each(
    'content',
    [
        b'',
        b'no image',
        png(noise(1)[0])[:-200],
        b'GIF89a',
        b'\xff\xd8\xff\xe0\x00\x10JFIF',
    ],
)
def test_unreadable_images_are_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DFKDError) as error:
        ImageFiles([png(noise(1)[0]), content], None, CIFAR).fetch(torch.tensor([0, 1]))
    assert 'image 1' in one_line(error)
    path = tmp_path / 'broken.png'
    path.write_bytes(content)
    with pytest.raises(DFKDError, match='broken.png'):
        ImageFiles([path], None, CIFAR).fetch(torch.tensor([0]))


# --- data: Parquet and folders ------------------------------------------------------------


def test_parquet_in_several_files_and_either_form(tmp_path: Path) -> None:
    pngs = [png(p) for p in noise(10)]
    write_table(
        tmp_path / 'cifar10' / 'train-00000-of-00002.parquet',
        image=pngs[:6],
        label=list(range(6)),
    )
    write_table(
        tmp_path / 'cifar10' / 'train-00001-of-00002.parquet',
        label=list(range(6, 10)),
        image=[{'path': 'x.png', 'bytes': p} for p in pngs[6:]],
    )
    train = load_data('cifar10', 'train', root=tmp_path)
    assert isinstance(train, ImageSet) and torch.equal(train.labels, torch.arange(10))
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), noise(10))
    for limit in (1, 6, 7, 99):
        assert len(load_data('cifar10', 'train', root=tmp_path, limit=limit)) == min(
            limit, 10
        )


def test_parquet_one_folder_down_and_with_fine_labels(tmp_path: Path) -> None:
    write_table(
        tmp_path / 'cifar100' / 'cifar100' / 'test-00000-of-00001.parquet',
        img=[png(noise(1)[0])] * 2,
        fine_label=[99, 0],
        coarse_label=[1, 2],
    )
    assert load_data('cifar100', root=tmp_path).labels.tolist() == [99, 0]


@each(
    'columns',
    [
        {'image': [b'x']},
        {'label': [1]},
        {'image': [b'x'], 'label': ['cat']},
        {'image': [b'x'], 'label': [None]},
        {'image': ['x.png'], 'label': [1]},
        {'image': [{'path': 'x.png'}], 'label': [1]},
        {'image': [b'x'], 'label': [1.5]},
        {'image': pa.array([], pa.binary()), 'label': pa.array([], pa.int64())},
    ],
)
def test_parquet_that_does_not_fit(tmp_path: Path, columns: dict) -> None:
    with pytest.raises(DFKDError) as error:
        read_parquet([write_table(tmp_path / 'x.parquet', **columns)])
    one_line(error)


@pytest.mark.parametrize('part', [0, 0.3, 0.95])
def test_truncated_parquet(tmp_path: Path, part: float) -> None:
    path = write_table(
        tmp_path / 'cifar10' / 'test.parquet',
        image=[png(p) for p in noise(8)],
        label=[0] * 8,
    )
    blob = path.read_bytes()
    path.write_bytes(blob[: int(part * len(blob))])
    with pytest.raises(DFKDError) as error:
        load_data('cifar10', root=tmp_path)
    assert 'test.parquet' in one_line(error)


def test_a_label_that_the_classes_do_not_have(tmp_path: Path) -> None:
    write_table(tmp_path / 'cifar10' / 'test.parquet', image=[png(noise(1)[0])], label=[10])
    with pytest.raises(DFKDError, match='0 to 9'):
        load_data('cifar10', root=tmp_path)


def photographs(folder: Path, classes: list[str]) -> Path:
    "One picture a class; its first pixel is the class's place in the list."
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.full((40, 50, 3), i, np.uint8)).save(folder / name / 'a.png')
    return folder


def test_folders_keep_the_networks_order(tmp_path: Path) -> None:
    fashion = DOMAINS['fashion-mnist']
    known = read_folder(photographs(tmp_path / 'known', list(fashion.classes)), fashion)
    images, labels = next(known.batches())
    assert known.domain == fashion and torch.equal(images[:, 0, 0, 0].long(), labels)
    numbered = read_folder(
        photographs(tmp_path / 'numbered', [str(i) for i in range(12)]), CIFAR
    )
    images, labels = next(numbered.batches())
    assert (
        torch.equal(images[:, 0, 0, 0].long(), labels)
        and numbered.domain.classes[11] == '11'
    )
    own = read_folder(photographs(tmp_path / 'own', ['zebra', 'ant']), CIFAR)
    assert own.domain.classes == ('ant', 'zebra') and own.labels.tolist() == [0, 1]


def test_folders_by_name(tmp_path: Path) -> None:
    photographs(tmp_path / 'imagenet' / 'val', ['b', 'a', 'c'])
    found = load_data('imagenet', root=tmp_path, limit=2)
    assert (
        isinstance(found, ImageFiles)
        and len(found) == 2
        and found.domain.size == (224, 224)
    )
    assert tuple(found.fetch(torch.tensor([1, 0])).shape) == (2, 3, 224, 224)


@each(
    'wrong',
    [
        {'name': 'cifar11'},
        {'name': 'imagenet'},
        {'name': 'folder:nowhere'},
        {'name': 'digits', 'limit': 0},
        {'name': 'cifar10-mini', 'split': 'train'},
        {'name': 'digits', 'split': 'validation'},
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(DFKDError) as error:
        load_data(root=tmp_path, **wrong)
    one_line(error)


def test_empty_folders(tmp_path: Path) -> None:
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'classes' / 'cat').mkdir(parents=True)
    for name in ('bare', 'classes'):
        with pytest.raises(DFKDError) as error:
            read_folder(tmp_path / name, CIFAR)
        one_line(error)


def test_a_download_that_fails_says_where_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = core.import_torchvision().datasets

    def fail(*arguments: object, **settings: object) -> None:
        raise OSError

    monkeypatch.setattr(datasets, 'CIFAR10', fail)
    with pytest.raises(DFKDError) as error:
        load_data('cifar10', root=tmp_path)
    assert 'DFKD_DATA' in one_line(error)


def test_what_ships() -> None:
    mini = load_data('cifar10-mini')
    assert len(mini) == 2000 and mini.labels.bincount().tolist() == [200] * 10
    train, test = load_data('digits', 'train'), load_data('digits')
    seen = {tuple(x.flatten().tolist()) for x in train.images}
    assert not any(tuple(x.flatten().tolist()) in seen for x in test.images)
    assets = Path(data.__file__).parents[1] / 'assets'
    assert sum(p.stat().st_size for p in assets.glob('cifar10-mini*')) < 3e6


def test_the_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('DFKD_DATA', '/somewhere')
    assert data_root() == Path('/somewhere')
    monkeypatch.delenv('DFKD_DATA')
    assert data_root() == Path('.data')


# --- data: augmentation -------------------------------------------------------------------


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_crops_are_slices_of_the_padded_image(
    n: int, c: int, h: int, w: int, padding: int, flip: bool
) -> None:
    images = torch.randint(1, 256, (n, c, h, w), dtype=torch.uint8)
    cropped = random_crop(images, padding, torch.Generator().manual_seed(0), flip)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    assert cropped.shape == images.shape and cropped.dtype == images.dtype
    for image, result in zip(padded, cropped):
        slices = [
            image[:, i : i + h, j : j + w]
            for i in range(2 * padding + 1)
            for j in range(2 * padding + 1)
        ]
        assert any(
            torch.equal(result, s) or (flip and torch.equal(result, s.flip(2)))
            for s in slices
        )


def test_augmentation_is_random_per_image_and_repeats_with_its_seed() -> None:
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    batch = image.expand(64, -1, -1, -1)
    first = Augment()(batch, torch.Generator().manual_seed(0))
    assert torch.equal(first, Augment()(batch, torch.Generator().manual_seed(0)))
    assert len(first.flatten(1).unique(dim=0)) > 32
    mirrored = Augment(padding=0)(batch, torch.Generator().manual_seed(0))
    assert len(mirrored.flatten(1).unique(dim=0)) == 2
    # brighter to the right
    rising = torch.arange(100, 132, dtype=torch.uint8).expand(64, 1, 32, 32)
    cropped = Augment()(rising, torch.Generator().manual_seed(0))
    assert 16 < (cropped[:, 0, 16, 12] > cropped[:, 0, 16, 20]).sum() < 48, (
        'each is mirrored or not by itself'
    )


@given(st.floats(0.05, 4), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_mixup_is_a_convex_combination(alpha: float, count: int, seed: int) -> None:
    x, y = torch.eye(count).view(count, 1, 1, count), torch.eye(count)
    mixed, targets = mixup(x, y, alpha, torch.Generator().manual_seed(seed))
    # images and labels in the same proportion
    assert torch.equal(mixed.flatten(1), targets)
    assert (targets >= 0).all() and torch.allclose(targets.sum(1), torch.ones(count))
    # everybody is somebody's partner once
    assert torch.allclose(targets.sum(0), torch.ones(count))


# constants of a normalisation


def test_constants_are_kept_and_change_nothing():
    "By values, type and device; no gradient, no trace and no copy of a domain meets them."
    domain = Domain('kept', (1, 2, 2), (0.25,), (0.125,), ('a', 'b'))
    with torch.inference_mode():
        first = domain.normalize(torch.ones(1, 1, 2, 2))
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    domain.normalize(x).square().sum().backward()  # a tensor of inference would refuse
    assert x.grad is not None and torch.equal(first, domain.normalize(x).detach())
    assert domain.normalize(x.double()).dtype == torch.float64
    again = pickle.loads(pickle.dumps(domain))
    assert again == domain and hash(again) == hash(copy.deepcopy(domain))
    other = Domain('traced', (1, 2, 2), (0.3125,), (0.0625,), ('a', 'b'))
    with FakeTensorMode():
        other.normalize(torch.ones(1, 1, 2, 2))
    assert float(other.normalize(torch.ones(1, 1, 2, 2)).max()) == 11.0


def test_a_subset_is_given_by_a_number_indices_or_booleans() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    whole = ImageSet(images.clone(), torch.arange(5), CIFAR)
    odd = torch.arange(5) % 2 == 1
    for which, wanted in (
        (3, [0, 1, 2]),
        (range(1, 4), [1, 2, 3]),
        ([4, 0, -1], [4, 0, 4]),
        (np.array([2, 2]), [2, 2]),
        (odd, [1, 3]),
        (odd.nonzero(), [1, 3]),
        (odd.tolist(), [1, 3]),
        ([], []),
    ):
        part = whole.subset(which)
        assert part.labels is not None and part.labels.tolist() == wanted
        assert part.images[:, 0, 0, 0].tolist() == wanted


@each(
    ('which', 'message'),
    [
        ([0, 5], 'index 5 of 5 images: give 0 to 4'),
        ([-6], 'index -6 of 5'),
        (torch.tensor([0.5]), 'a subset by a Tensor'),
        ([True, False], '5 booleans'),
        ('first', 'a subset by a str'),
        (None, 'a subset by a NoneType'),
    ],
)
def test_a_subset_that_is_none_is_told(which: object, message: str) -> None:
    whole = ImageSet(torch.zeros(5, 3, 32, 32).byte(), torch.arange(5), CIFAR)
    with pytest.raises(DFKDError, match=message):
        whole.subset(which)  # type: ignore[arg-type]
