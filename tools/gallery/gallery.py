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
    common = list(about['network'])
    if about.get('test'):
        common += ['--test', about['test']]
    if about.get('statistics'):
        common += ['--statistics', about['statistics']]
    for setting in about.get('settings', ('held_out=20',)):
        common += ['--set', setting]
    images = str(about.get('images', IMAGES))
    found = {'8bit': ['quantize', *common, '--images', images]}
    if about.get('student'):
        found['student'] = ['distill', *common, *about['student']]
    if about.get('prune'):
        found['pruned'] = ['prune', *common, '--images', images, *about['prune']]
    return found


def run(name: str, files: Path, out: Path) -> None:
    "All commands of a network that have no result yet, one after the other."
    from dfkd_nb.lab.commands import main

    for what, words in commands(name).items():
        folder = out / f'gallery-{name}-{what}'
        if (folder / 'result.json').is_file():
            continue
        line = [*words, '--out', os.path.relpath(folder, files), '--resume']
        print('dfkd', *line, flush=True)
        os.chdir(files)
        main([*line, '--device', 'cpu'])


def judge(name: str, files: Path, out: Path) -> dict[str, float]:
    "The share of a network's images that each of its judges gives their target class."
    import torch

    from dfkd_nb.lab.arguments import add_network_options
    from dfkd_nb.lab.network_options import own_teacher
    from dfkd_nb.toolbox.data import ImageSet
    from dfkd_nb.toolbox.domains import resize_images

    torch.set_num_threads(1)
    images = ImageSet.load(out / f'gallery-{name}-8bit' / 'images.safetensors')
    os.chdir(files)
    found = {}
    for other in networks()[name].get('judges', ()):
        parser = argparse.ArgumentParser()
        parser.add_argument('--teacher', default='')
        add_network_options(parser)
        teacher = own_teacher(parser.parse_args(networks()[other]['network']))
        shown = images.images
        if not teacher.domain.is_signal:
            if shown.shape[1] > teacher.domain.channels:
                shown = shown.float().mean(1, keepdim=True).round().to(torch.uint8)
            shown = resize_images(shown, teacher.domain, as_bytes=True)
        assert images.labels is not None
        right = teacher.predict(shown).argmax(1).eq(images.labels).float().mean()
        found[f'recognition_by_{other}'] = float(right)
    return found


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
        if what == '8bit':
            result['numbers'] |= judge(name, files, out)
        path.write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + '\n', encoding='utf-8'
        )
        print(path)


def make_files(files: Path) -> None:
    "What needs no download: class names, digits of scikit-learn, CIFAR-10 and ImageNet."
    import pyarrow.parquet as pq
    import torch

    from dfkd_nb.toolbox.data import ImageSet
    from dfkd_nb.toolbox.datasets import load_data
    from dfkd_nb.toolbox.domains import DOMAINS, Domain, resize_images

    files.mkdir(parents=True, exist_ok=True)
    names = '\n'.join(DOMAINS['cifar10'].classes)
    (files / 'cifar10.txt').write_text(names + '\n', encoding='utf-8')
    data = Path(os.environ['DFKD_DATA'])
    shutil.copyfile(data / 'cifar10/test.parquet', files / 'cifar10-test.parquet')
    shutil.copyfile(
        data / 'imagenet_sample/test.parquet', files / 'imagenet-sample.parquet'
    )
    shutil.copyfile(HERE / 'networks.py', files / 'networks.py')
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


def command_line() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('what', choices=('files', 'run', 'publish'))
    parser.add_argument('names', nargs='*', help='networks of gallery.toml (default: all)')
    parser.add_argument('--files', type=Path, required=True, help='weights and test images')
    parser.add_argument('--out', type=Path, default=Path('runs'), help='folder of runs')
    parser.add_argument('--results', type=Path, default=Path('results'))
    arguments = parser.parse_args()
    files, out = arguments.files.resolve(), arguments.out.resolve()
    if arguments.what == 'files':
        make_files(files)
        return
    for name in arguments.names or networks():
        if arguments.what == 'run':
            run(name, files, out)
        else:
            publish(name, files, out, arguments.results.resolve())


if __name__ == '__main__':
    command_line()
