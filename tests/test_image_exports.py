"Images that leave this package are read by the programs that they are for."

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import network

from dfkd_nb.lab.commands import main
from dfkd_nb.toolbox.core import import_torchvision, save_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.image_exports import CalibrationReader, export_images

DOMAIN = Domain('own', (3, 6, 8), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), ('cat', 'dog', 'elk'))
CODE = """
from torch import nn


def net():
    layers = nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
"""


@pytest.fixture
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (7, 3, 6, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.tensor([0, 2, 1, 0, 2, 2, 1]), DOMAIN)


@pytest.fixture
def here(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A folder as a run leaves it."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run').mkdir()
    images.save(tmp_path / 'run' / 'images.safetensors')
    return tmp_path


def test_png_is_read_by_image_folder(images: ImageSet, here: Path) -> None:
    assert main(['images', 'run']) == 0
    found = import_torchvision().datasets.ImageFolder('run/png')
    assert found.classes == list(DOMAIN.classes) and len(found) == 7
    assert images.labels is not None
    for name, label in found.samples:
        index = int(Path(name).stem)
        pixels = torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1)
        assert pixels.equal(images.images[index]) and label == images.labels[index]


def test_parquet_is_read_by_pyarrow(images: ImageSet, here: Path) -> None:
    parquet = pytest.importorskip('pyarrow.parquet')
    assert main(['images', 'run', '--to', 'parquet', '--out', 'x.parquet']) == 0
    table = parquet.read_table('x.parquet')
    assert images.labels is not None
    assert table.column('label').to_pylist() == images.labels.tolist()
    encoded = table.column('image').to_pylist()[4]['bytes']
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)))).permute(2, 0, 1)
    assert pixels.equal(images.images[4])
    about = json.loads(table.schema.metadata[b'huggingface'])
    assert about['info']['features']['label']['names'] == list(DOMAIN.classes)


def test_parquet_is_read_by_datasets(here: Path) -> None:
    datasets = pytest.importorskip('datasets')
    assert main(['images', 'run', '--to', 'parquet', '--out', 'x.parquet']) == 0
    found = datasets.load_dataset('parquet', data_files='x.parquet', split='train')
    assert found.features['label'].names == list(DOMAIN.classes) and len(found) == 7


def test_arrays_are_intensities_or_the_networks_inputs(
    images: ImageSet, here: Path
) -> None:
    assert main(['images', 'run', '--to', 'npy']) == 0
    array = np.load('run/images.npy')
    assert array.shape == (7, 6, 8, 3) and array.dtype == np.float32
    assert 0 <= array.min() and array.max() <= 1
    assert np.allclose(array[3] * 255, images.images[3].permute(1, 2, 0).numpy(), atol=1e-3)
    assert np.load('run/images-labels.npy').tolist() == [0, 2, 1, 0, 2, 2, 1]
    assert main(['images', 'run', '--to', 'npy', '--normalized', '--out', 'in.npy']) == 0
    assert torch.from_numpy(np.load('in.npy')).equal(DOMAIN.normalize(images.images))


def test_shards_are_pairs_of_files(images: ImageSet, here: Path) -> None:
    assert main(['images', 'run', '--to', 'webdataset']) == 0
    (shard,) = (here / 'run' / 'webdataset').iterdir()
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, kind = member.name.partition('.')
            content = tar.extractfile(member)
            assert content is not None
            samples.setdefault(key, {})[kind] = content.read()
    assert len(samples) == 7 and images.labels is not None
    for index, sample in enumerate(samples.values()):
        pixels = np.array(Image.open(io.BytesIO(sample['png'])))
        assert torch.from_numpy(pixels).permute(2, 0, 1).equal(images.images[index])
        label = int(sample['cls'])
        assert label == images.labels[index]
        assert json.loads(sample['json'])['class'] == DOMAIN.classes[label]
    first = shard.read_bytes()
    assert main(['images', 'run', '--to', 'webdataset', '--out', 'again']) == 0
    assert (here / 'again' / shard.name).read_bytes() == first


def test_shards_are_read_by_webdataset(here: Path) -> None:
    webdataset = pytest.importorskip('webdataset')
    assert main(['images', 'run', '--to', 'webdataset']) == 0
    (shard,) = (here / 'run' / 'webdataset').iterdir()
    found = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode('torchrgb'))
    assert len(found) == 7 and found[1]['cls'] == 2


@pytest.mark.filterwarnings('ignore')
def test_calibration_images_change_the_quantised_file(here: Path) -> None:
    "ONNX Runtime asks the reader for batches, and uses what it gets."
    quantization = pytest.importorskip('onnxruntime.quantization')
    pytest.importorskip('onnxscript')
    from dfkd_nb.applications.export import export_network

    domain = Domain('own', (1, 8, 8), (0.3,), (0.4,), tuple('0123456789'))
    export_network(network(), domain, here, 'net', ['onnx'])
    files = []
    for number, value in enumerate((10, 250)):
        pixels = torch.full((4, 1, 8, 8), value, dtype=torch.uint8)
        made = ImageSet(pixels, torch.zeros(4, dtype=torch.long), domain)
        array = export_images(made, here / f'{number}.npy', 'npy', normalized=True)
        reader = CalibrationReader(array, 'images', 2)
        out = here / f'{number}.onnx'
        quantization.quantize_static('net.onnx', str(out), reader)
        assert reader.get_next() is None
        files.append(out.read_bytes())
    assert files[0] != files[1]


@pytest.mark.parametrize('kind', ['png', 'parquet'])
def test_images_of_invert(
    kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tensors(here / 'net.safetensors', network().state_dict())
    (here / 'net.py').write_text(CODE)
    words = 'invert --model net.py:net --checkpoint net.safetensors --mean 0.3 --std 0.4'
    words += f' --size 8 --n 3 --classes 7,2 --set synthesis_steps=2 --format {kind}'
    assert main([*words.split(), '--out', 'dreams']) == 0
    assert main(['images', 'dreams', '--to', 'npy']) == 0
    assert np.load('dreams/images-labels.npy').tolist() == [7, 2, 7]
    assert np.load('dreams/images.npy').shape == (3, 8, 8, 1)
    capsys.readouterr()


BAD = {
    'no folder': (['images', 'nowhere'], 'no images at nowhere'),
    'an empty folder': (['images', 'empty'], 'empty'),
    'a place that is taken': (['images', 'run', '--out', 'run'], 'there already'),
    'normalised files': (['images', 'run', '--normalized'], '--to npy'),
    'a foreign manifest': (['images', 'foreign'], 'no manifest of dfkd invert'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / 'empty').mkdir()
    (here / 'foreign').mkdir()
    (here / 'foreign' / 'manifest.json').write_text('[1, 2]')
    before = sorted(here.rglob('*'))
    words, message = BAD[name]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('dfkd: error: ') and 'unexpected' not in line
    assert message in line and sorted(here.rglob('*')) == before


def test_what_is_interrupted_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfkd_nb.toolbox import data, image_exports

    made = 0

    def full(image: torch.Tensor) -> bytes:
        nonlocal made
        made += 1
        if made > 3:
            raise OSError(28, 'No space left on device')
        return b'png'

    monkeypatch.setattr(data, 'encode_png', full)
    monkeypatch.setattr(image_exports, 'encode_png', full)
    before = sorted(here.rglob('*'))
    for kind in ('png', 'webdataset', 'parquet'):
        made = 0
        assert main(['images', 'run', '--to', kind]) == 2
        assert sorted(here.rglob('*')) == before
