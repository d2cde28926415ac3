"""The runs of the gallery: networks that nobody here trained, by the commands of `dfkd`.

    python tools/gallery/gallery.py files --files FILES
    python tools/gallery/gallery.py run resnet8 --files FILES --out RUNS
    python tools/gallery/gallery.py publish resnet8 --files FILES --out RUNS

FILES holds what the networks in gallery.toml name: weights, and test images; `files` writes
those that are made here. A run that was interrupted goes on.
"""

import argparse
import json
import os
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IMAGES = 40  # synthetic images of a network


def networks() -> dict[str, dict[str, Any]]:
    "What gallery.toml says, by name."
    return tomllib.loads((HERE / 'gallery.toml').read_text(encoding='utf-8'))


def commands(name: str) -> dict[str, list[str]]:
    "The commands of a network, by what they make."
    about = networks()[name]
    network = list(about['network'])
    if about.get('test'):
        network += ['--test', about['test']]
    if about.get('statistics'):
        network += ['--statistics', about['statistics']]
    settings = about.get('settings', ['held_out=20'])
    common, of_student = (
        [*network, *(word for setting in values for word in ('--set', setting))]
        for values in (settings, about.get('student_settings', settings))
    )
    images = str(about.get('images', IMAGES))
    found = {}
    # those of signals have students; some networks have runs of recipes
    if '--length' not in common and 'bits_result' not in about:
        found['8bit'] = ['quantize', *common, '--images', images]
    if about.get('student'):
        found['student'] = ['distill', *of_student, *about['student']]
    if about.get('prune'):
        found['pruned'] = ['prune', *common, '--images', images, *about['prune']]
    return found


def run(name: str, files: Path, out: Path, only: str = '') -> None:
    "All commands of a network that have no result yet, one after the other."
    from dfkd_nb.lab.commands import main

    for what, words in commands(name).items():
        folder = out / f'gallery-{name}-{what}'
        if (folder / 'result.json').is_file() or only not in ('', what):
            continue
        line = [*words, '--out', os.path.relpath(folder, files), '--resume']
        print('dfkd', *line, flush=True)
        os.chdir(files)
        main([*line, '--device', 'cpu'])


NEAR = 2  # pitches of CREPE, 20 cents each: nearer than half a semitone


def opened(name: str) -> Any:
    "A network of the gallery; the working directory holds its files."
    from dfkd_nb.lab.arguments import add_network_options
    from dfkd_nb.lab.network_options import own_teacher

    parser = argparse.ArgumentParser()
    parser.add_argument('--teacher', default='')
    add_network_options(parser)
    return own_teacher(parser.parse_args(networks()[name]['network']))


def judge(name: str, files: Path, out: Path) -> dict[str, Any]:
    "Size of a network, and how many of its images each judge gives their target class."
    import torch

    from dfkd_nb.toolbox.data import ImageSet
    from dfkd_nb.toolbox.domains import resize_images
    from dfkd_nb.toolbox.models import count_parameters

    torch.set_num_threads(1)
    first = next(iter(commands(name)))
    images = ImageSet.load(out / f'gallery-{name}-{first}' / 'images.safetensors')
    os.chdir(files)
    own = opened(name)
    found: dict[str, Any] = {
        'classes': own.domain.num_classes,
        'teacher_parameters': count_parameters(own),
    }
    judges = networks()[name].get('judges', ())
    signals = own.domain.is_signal
    for other in (name, *judges) if signals else judges:
        teacher = own if other == name else opened(other)
        shown = images.images
        if not signals:
            if shown.shape[1] > teacher.domain.channels:
                shown = shown.float().mean(1, keepdim=True).round().to(torch.uint8)
            shown = resize_images(shown, teacher.domain, as_bytes=True)
        assert images.labels is not None
        off = (teacher.predict(shown).argmax(1) - images.labels).abs()
        found[f'recognition_by_{other}'] = float((off == 0).float().mean())
        if own.domain.num_classes <= 10:  # images of each class, and how many of them
            right = images.labels[off == 0].bincount(minlength=own.domain.num_classes)
            found[f'recognised_by_{other}'] = right.tolist()
            found['of_class'] = images.labels.bincount().tolist()
        if signals:
            found[f'near_recognition_by_{other}'] = float((off <= NEAR).float().mean())
    return found


def picture(folder: Path, target: Path) -> None:
    "The first images of a run, one of each class: dreams.png, .jpg, or .csv for signals."
    import io

    from PIL import Image

    from dfkd_nb.toolbox.data import ImageSet
    from dfkd_nb.toolbox.figures import tile
    from dfkd_nb.toolbox.formats import encode_png

    images = ImageSet.load(folder / 'images.safetensors')
    if images.domain.is_signal:
        assert images.labels is not None
        order = images.labels.argsort(stable=True)[:: max(1, len(images) // 8)][:8]
        header = ','.join(images.domain.classes[int(k)] for k in images.labels[order])
        samples = images.images[order, 0].T.tolist()
        rows = [','.join(f'{v:.3f}' for v in row) for row in samples]
        (target / 'dreams.csv').write_text('\n'.join([header, *rows]) + '\n')
        return
    large = images.domain.size[0] > 64
    content = encode_png(tile(images.images[: 8 if large else 10]))
    if not large:
        (target / 'dreams.png').write_bytes(content)
        return
    row = Image.open(io.BytesIO(content))
    row = row.resize((row.width // 2, row.height // 2), Image.Resampling.LANCZOS)
    row.save(target / 'dreams.jpg', quality=85)


def publish(name: str, files: Path, out: Path, results: Path) -> None:
    "Copy the results of a network's runs; the judges' shares are added to the first."
    from dfkd_nb.lab.runs import publish as copy

    for what in commands(name):
        source = out / f'gallery-{name}-{what}'
        if not (source / 'result.json').is_file():
            print(f'{source.name}: no result yet')
            continue
        target = results / source.name / 'hour'
        target.mkdir(parents=True, exist_ok=True)
        copy(source, target)
        path = target / 'result.json'
        result = json.loads(path.read_text(encoding='utf-8'))
        result['recipe'] = source.name
        if what == next(iter(commands(name))):
            result['numbers'] |= judge(name, files, out)
            picture(source, target)
        path.write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + '\n', encoding='utf-8'
        )
        print(path)


def make_files(files: Path) -> None:
    """What is made here: class names, digits of scikit-learn, CIFAR-10 and ImageNet, tones.

    Faces come from `lfw_subset.npy` of scikit-image, where FILES has it.
    """
    import pyarrow.parquet as pq
    import torch

    from dfkd_nb.toolbox.data import ImageSet
    from dfkd_nb.toolbox.datasets import load_data
    from dfkd_nb.toolbox.domains import DOMAINS, Domain, resize_images

    files.mkdir(parents=True, exist_ok=True)
    names = '\n'.join(DOMAINS['cifar10'].classes)
    (files / 'cifar10.txt').write_text(names + '\n', encoding='utf-8')
    (files / 'faces.txt').write_text('something else\nface\n', encoding='utf-8')
    data = Path(os.environ['DFKD_DATA'])
    shutil.copyfile(data / 'cifar10/test.parquet', files / 'cifar10-test.parquet')
    shutil.copyfile(HERE / 'networks.py', files / 'networks.py')
    few = pq.read_table(data / 'cifar10/test.parquet')[:500]
    pq.write_table(few, files / 'cifar10-test-500.parquet')
    sample = pq.read_table(data / 'imagenet_sample/test.parquet')
    about = json.loads(sample.schema.metadata[b'huggingface'])['info']['features']
    classes = '\n'.join(about['label']['names'])
    (files / 'imagenet.txt').write_text(classes + '\n', encoding='utf-8')
    every_fourth = sample.take([*range(0, len(sample), 4)])
    pq.write_table(every_fourth, files / 'imagenet-sample-250.parquet')
    sys.path.insert(0, str(HERE))
    from networks import tones

    signals, pitches = tones(500)
    pitch_classes = tuple(map(str, range(360)))
    domain = Domain('tones', (1, 1024), (0.0,), (1.0,), pitch_classes)
    ImageSet(signals, pitches, domain).save(files / 'tones.safetensors')
    parts = [load_data('digits', split) for split in ('train', 'test')]
    images = torch.cat([part.images for part in parts])
    labels = torch.cat([part.labels for part in parts])
    # MNIST's digits are 20 pixels high, in a frame of 28; those of USPS fill it
    for size, height in ((28, 20), (16, 16)):
        classes = tuple('0123456789')
        inner = Domain('digits', (1, height, height), (0.5,), (0.5,), classes)
        shown = resize_images(images, inner, as_bytes=True)
        edge = (size - height) // 2
        shown = torch.nn.functional.pad(shown, (edge,) * 4)
        outer = Domain('digits', (1, size, size), (0.5,), (0.5,), classes)
        ImageSet(shown, labels, outer).to_folder(files / f'digits-{size}')
    if (files / 'lfw_subset.npy').is_file():
        make_faces(files)


def make_faces(files: Path) -> None:
    "Labelled Faces in the Wild: 100 faces, then 100 patches of backgrounds, in grey."
    import numpy as np
    import torch

    from dfkd_nb.toolbox.data import ImageSet
    from dfkd_nb.toolbox.domains import Domain, resize_images

    patches = torch.from_numpy(np.load(files / 'lfw_subset.npy'))  # `(200, 25, 25)`, 0 to 1
    images = (255 * patches[:, None]).round().to(torch.uint8)
    labels = (torch.arange(len(images)) < 100).long()  # 1 is a face
    classes = tuple((files / 'faces.txt').read_text(encoding='utf-8').splitlines())
    for size in (24, 48):
        domain = Domain('faces', (1, size, size), (0.5,), (0.5,), classes)
        shown = resize_images(images, domain, as_bytes=True)
        ImageSet(shown, labels, domain).to_folder(files / f'faces-{size}')


def command_line() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('what', choices=('files', 'run', 'publish'))
    parser.add_argument('names', nargs='*', help='networks of gallery.toml (default: all)')
    parser.add_argument('--only', default='', help="e.g. 8bit: one of a network's runs")
    parser.add_argument('--files', type=Path, required=True, help='weights and test images')
    parser.add_argument('--out', type=Path, default=Path('runs'), help='folder of runs')
    parser.add_argument('--results', type=Path, default=Path('results'))
    arguments = parser.parse_args()
    files, out = arguments.files.resolve(), arguments.out.resolve()
    results = arguments.results.resolve()  # runs change the working directory
    if arguments.what == 'files':
        make_files(files)
        return
    for name in arguments.names or networks():
        if arguments.what == 'run':
            run(name, files, out, arguments.only)
        else:
            publish(name, files, out, results)


if __name__ == '__main__':
    command_line()
