"""The command line: what each command prints, and how a run is begun, stopped, resumed and
shown.
"""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_nb.lab.commands import main
from dfkd_nb.lab.recipes import Recipe, compared, recipe_names
from dfkd_nb.lab.run_command import required_runs
from dfkd_nb.lab.runs import Run
from dfkd_nb.toolbox.core import save_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS, Domain
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.networks import save_weights
from dfkd_nb.toolbox.teachers import Teacher

TINY = ['--set', 'epochs=1', '--set', 'evaluations=1']


@pytest.fixture
def dfkd(tmp_path, monkeypatch, capsys):
    "Run a command in an empty folder; returns exit code, stdout and stderr."
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    call.folder = tmp_path
    return call


def test_looking_does_not_load_torch():
    code = (
        'import sys\n'
        'from dfkd_nb.lab.commands import main\n'
        "main(['list']), main(['show', 'digits-teacher'])\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    subprocess.run(
        [sys.executable, '-c', code], check=True, capture_output=True, timeout=60
    )


def test_list_is_in_order_and_whole(dfkd):
    code, out, _ = dfkd('list', '--all')
    names = [line.split()[0] for line in out.splitlines()]
    assert (
        code == 0
        and sorted(names) == recipe_names()
        and names == sorted(names, key=lambda n: (Recipe.load(n).order, n))
    )


def test_list_folds_the_comparison(dfkd):
    code, out, _ = dfkd('list')
    recipes, comparison = out.split('\n\n')
    assert code == 0 and len(recipes.splitlines()) + len(compared()) == len(recipe_names())
    assert (
        'cifar10-wrn40-2-wrn16-1' in comparison
        and 'ssd-kd-10' in comparison
        and str(len(compared())) in comparison
    )


def test_a_missing_teacher_is_trained_first_and_seeds_stand_beside_each_other(dfkd):
    changes = ['images=20', 'synthesis_steps=2', 'steps=4', 'evaluations=1', 'picture=1']
    words = [
        'digits-transfer-noise',
        *(word for change in changes for word in ('--set', change)),
    ]
    code, out, _ = dfkd('run', *words)
    assert (
        code == 0
        and 'first digits-teacher (quick)' in out
        and (dfkd.folder / 'runs/digits-teacher/quick/result.json').is_file()
    )
    code, out, _ = dfkd('run', *words, '--seed', '2')
    assert code == 0 and 'first' not in out.splitlines()[0]
    assert (
        json.loads(
            (dfkd.folder / 'runs/digits-transfer-noise/quick-seed2/result.json').read_text()
        )['settings']['seed']
        == 2
    )


def test_images_of_another_run(dfkd):
    small = [
        'images=20',
        'steps=4',
        'evaluations=1',
        'picture=1',
        'images_from=run:digits-dream',
    ]
    run = Run(
        Recipe.load('digits-transfer-noise'),
        overrides={'images_from': 'run:digits-dream'},
        out=dfkd.folder / 'runs',
    )
    # the dream's own teacher comes first, once
    assert required_runs(run) == [('digits-teacher', 'quick'), ('digits-dream', 'quick')]
    network = build_model('digits-net', 10, 1)
    save_weights(
        dfkd.folder / 'runs/digits-teacher/quick/weights.safetensors',
        network,
        {'model': 'digits-net', 'domain': 'digits'},
    )
    assert required_runs(run) == [('digits-dream', 'quick')]
    images = ImageSet(
        torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8),
        torch.arange(30) % 10,
        DOMAINS['digits'],
    )
    images.save(dfkd.folder / 'runs/digits-dream/quick/images.safetensors')
    assert required_runs(run) == []
    words = [
        'run',
        'digits-transfer-noise',
        *(word for change in small for word in ('--set', change)),
    ]
    code, out, _ = dfkd(*words)
    assert (
        code == 0
        and 'synthesis' not in out
        and not (
            dfkd.folder / 'runs/digits-transfer-noise/quick/images.safetensors'
        ).exists()
    )
    code, _, error = dfkd(*words, '--set', 'images=31', '--fresh')
    assert code == 2 and 'set images to that or less' in error


def test_list_missing_full(dfkd):
    _, out, _ = dfkd('list', '--missing-full')
    assert sorted(line.split()[0] for line in out.splitlines()) == [
        n for n in recipe_names() if 'full' in Recipe.load(n).scales
    ]
    folder = dfkd.folder / 'results/digits-teacher/full'
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text('{}')
    _, out, _ = dfkd('list', '--missing-full')
    assert 'digits-teacher' not in [line.split()[0] for line in out.splitlines()]


def test_show_is_a_recipe_again(dfkd):
    code, out, _ = dfkd('show', 'digits-teacher', '--scale', 'full')
    (dfkd.folder / 'again.toml').write_text(out)
    assert code == 0 and Recipe.load('again.toml').resolve('full') == Recipe.load(
        'digits-teacher'
    ).resolve('full')


def test_a_run_from_begin_to_end(dfkd):
    run = ['run', 'digits-teacher', *TINY]
    code, _, err = dfkd(*run, '--max-minutes', '1e-9')
    assert code == 3 and '--resume' in err and len(err.splitlines()) == 1
    code, _, err = dfkd(*run)
    assert code == 2 and '--resume' in err and '--fresh' in err
    code, out, err = dfkd(*run, '--resume')
    assert code == 0 and not err and 'resuming' in out and 'accuracy' in out
    code, out, _ = dfkd(*run)
    assert code == 0 and 'finished' in out and '--fresh' in out
    code, out, _ = dfkd(*run, '--fresh')
    assert code == 0 and 'starting' in out
    code, out, _ = dfkd('results', '--folder', 'runs')
    assert code == 0 and out.startswith('digits-teacher') and 'accuracy' in out


def test_two_equal_runs_leave_the_same_bytes(dfkd):
    """Equal runs leave equal files, header and all; only what a stopwatch said differs, and
    it has columns of its own.
    """
    for name in ('one', 'two'):
        torch.rand(len(name))  # whatever ran before
        assert (
            dfkd('run', 'digits-teacher', *TINY, '--device', 'cpu', '--out', name)[0] == 0
        )
    one, two = (dfkd.folder / name / 'digits-teacher/quick' for name in ('one', 'two'))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for name in ('weights.safetensors', 'recipe.toml'):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    rows = [
        [
            line.rsplit(',', 2)[0]  # without the two times
            for line in (folder / 'history.csv').read_text().splitlines()
        ]
        for folder in (one, two)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert (one / 'history.csv').read_text().splitlines()[0].endswith(',seconds')
    cards = [(folder / 'model-card.md').read_text().splitlines() for folder in (one, two)]
    assert [a for a, b in zip(*cards) if a != b and ' s on ' not in a] == []


def test_results_are_published_where_a_folder_is(dfkd):
    (dfkd.folder / 'results').mkdir()
    text = dfkd('show', 'digits-teacher', '--scale', 'quick')[1].replace(
        'epochs = 20.0', 'epochs = 1.0'
    )
    (dfkd.folder / 'mine.toml').write_text(text)
    assert dfkd('run', 'mine.toml')[0] == 0
    assert (
        json.loads((dfkd.folder / 'results/mine/quick/result.json').read_text())[
            'settings'
        ]['epochs']
        == 1.0
    )
    assert dfkd('results')[1].startswith('mine')


def test_debug_shows_where(dfkd):
    assert (
        'Traceback' in dfkd('--debug', 'show', 'nothing')[2]
        and 'Traceback' not in dfkd('show', 'nothing')[2]
    )


def network():
    "A tiny network with something to remember."
    torch.manual_seed(0)
    model = build_model('digits-net', 10, 1)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


OWN = (
    'invert --model digits-net --num-classes 10 --mean 0.3 --std 0.4 --size 8 --device cpu'
    ' --checkpoint mine.safetensors'
)
OWN = [*OWN.split(), '--set', 'synthesis_steps=5']
BATCHES = [*OWN, '--n', '6', '--set', 'synthesis_batch_size=2']


@pytest.fixture
def own(dfkd):
    "The same command, in a folder with a network."
    save_tensors(dfkd.folder / 'mine.safetensors', network().state_dict())
    return dfkd


def manifest(folder):
    return json.loads((folder / 'manifest.json').read_text())


def contents(folder):
    "All images of a folder, by name, and all lines about them."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob('*.png'))
    }, manifest(folder)['images']


@pytest.mark.parametrize('kind', ['safetensors', 'pt', 'wrapped'])
def test_invert_a_network_of_ones_own(own, kind):
    state = network().state_dict()
    path = 'mine.safetensors' if kind == 'safetensors' else 'mine.pt'
    if kind == 'pt':
        torch.save(state, path)
    if kind == 'wrapped':
        torch.save(
            {'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in state.items()}}, path
        )
    code, out, err = own(
        *OWN, '--checkpoint', path, '--classes', '1,7', '--n', 6, '--out', 'dreams'
    )
    assert code == 0 and '6 images' in out, err
    lines = manifest(own.folder / 'dreams')['images']
    assert [line['class'] for line in lines] == [1, 7] * 3
    assert all((own.folder / 'dreams' / line['file']).is_file() for line in lines)


def test_invert_leaves_images_and_a_manifest(own):
    code, out, _ = own(*BATCHES, '--out', 'dreams', '--grid', 4, '--seed', 5)
    folder = own.folder / 'dreams'
    assert code == 0
    images, lines = contents(folder)
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
        'grid.png',
        'manifest.json',
        'metadata.csv',
    ]
    assert (
        list(images) == sorted(line['file'] for line in lines) + ['grid.png']
        and len(lines) == 6
    )
    about = manifest(folder)
    assert (
        about['request']['seed'] == 5 and about['made_with']['torch'] == torch.__version__
    )
    assert (
        about['model'] == 'digits-net'
        and about['request']['settings']['synthesis_steps'] == 5
    )
    right = sum(line['class'] == line['predicted'] for line in lines)
    assert f'6 images in dreams, the teacher recognises {right} of' in out
    assert [int(line['file'][5:10]) for line in lines] == list(range(6)), (
        'numbered over all batches'
    )
    teacher = Teacher(
        network(), Domain('own', (1, 8, 8), (0.3,), (0.4,), tuple('0123456789'))
    )
    for line in lines:
        image = torch.from_numpy(np.array(Image.open(folder / line['file'])))[None, None]
        answer = teacher.predict(image).softmax(1)[0]
        assert line['name'] == str(line['class']) and line['predicted'] == int(
            answer.argmax()
        )
        assert line['probability'] == pytest.approx(float(answer[line['class']]), abs=1e-5)


def test_invert_makes_what_the_library_makes(own):
    "Images come back from PNG files and from Parquet as `DeepInversion` made them."
    from dfkd_nb.dreams.inversion import DeepInversion
    from dfkd_nb.lab.invert_settings import FOREIGN, usual_settings
    from dfkd_nb.lab.settings import SynthesisSettings
    from dfkd_nb.lab.tasks.synthesis import build_inversion
    from dfkd_nb.toolbox.datasets import load_data
    from dfkd_nb.toolbox.domains import Domain
    from dfkd_nb.toolbox.teachers import Teacher

    domain = Domain('own', (1, 8, 8), (0.3,), (0.4,), tuple('0123456789'))
    settings = SynthesisSettings(
        **usual_settings(8)
        | FOREIGN  # for a network of the user's own
        | {'synthesis_steps': 5, 'synthesis_batch_size': 2, 'images': 6}
    )
    synthesizer = build_inversion(
        settings, Teacher(network(), domain), torch.device('cpu'), 0
    )
    assert isinstance(synthesizer, DeepInversion)
    expected = synthesizer.synthesize(6, ['7', 2, '9'])
    for kind in ('png', 'parquet'):
        assert own(*BATCHES, '--classes', '7,2,9', '--format', kind, '--out', kind)[0] == 0
        found = load_data(f'folder:{kind}', domain=domain).in_memory()
        order = (
            torch.arange(6)
            if kind == 'parquet'
            else torch.argsort(expected.labels, stable=True)
        )
        assert found.images.equal(expected.images[order]) and found.labels.equal(
            expected.labels[order]
        )
        assert found.domain.classes == domain.classes


def test_parquet_as_the_hub_has_it(own):
    import pyarrow.parquet as pq

    assert own(*BATCHES, '--format', 'parquet', '--out', 'dreams', '--grid', 6)[0] == 0
    schema = pq.read_schema('dreams/images.parquet')
    assert str(schema.field('image').type) == 'struct<bytes: binary, path: string>'
    features = json.loads(schema.metadata[b'huggingface'])['info']['features']
    assert features['image'] == {'_type': 'Image'} and features['label']['names'] == list(
        '0123456789'
    )
    assert sorted(p.name for p in (own.folder / 'dreams').iterdir()) == [
        'grid.png',
        'images.parquet',
        'manifest.json',
    ]
    assert [line['row'] for line in manifest(own.folder / 'dreams')['images']] == list(
        range(6)
    )


@pytest.mark.parametrize('kind', ['png', 'parquet'])
def test_invert_stops_and_goes_on_to_the_same_bits(own, monkeypatch, kind):
    "Stopped after every few updates, in and between batches."
    from dfkd_nb.dreams.inversion import DeepInversion

    again = [*BATCHES, '--format', kind, '--out', 'pieces', '--resume']
    assert own(*BATCHES, '--format', kind, '--out', 'whole')[0] == 0
    step, left = DeepInversion.step, [0]

    def counted(self):
        step(self)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DeepInversion, 'step', counted)
    stops = 0
    for updates in (1, 2, 3, 4, 99):
        left[0] = updates
        code, out, err = own(*again)
        if code == 0:
            break
        assert (
            code == 3
            and 'SIGTERM' in err
            and '--resume' in err
            and len(err.splitlines()) == 1
        )
        kept = sum(
            len(json.loads(p.read_text())['images'])
            for p in (own.folder / 'pieces').glob('unfinished-*.json')
        )
        assert (f'{kept} finished images' in err) == (kept > 0)
        stops += 1
    assert code == 0 and stops == 4
    whole, pieces = contents(own.folder / 'whole'), contents(own.folder / 'pieces')
    assert whole == pieces
    if kind == 'parquet':
        assert (own.folder / 'whole/images.parquet').read_bytes() == (
            own.folder / 'pieces/images.parquet'
        ).read_bytes()
    assert sorted(p.name for p in (own.folder / 'pieces').iterdir()) == sorted(
        p.name for p in (own.folder / 'whole').iterdir()
    )
    code, out, _ = own(*again)
    assert code == 0 and '6 images' in out, 'a finished folder is left as it is'


def test_stopped_before_the_first_update(own):
    code, _, err = own(*BATCHES, '--out', 'dreams', '--max-minutes', '1e-9')
    assert code == 3 and 'nothing is made yet' in err and 'checkpoint' not in err
    assert own(*BATCHES, '--out', 'dreams', '--resume')[0] == 0


def test_an_interruption_says_what_is_kept(own, monkeypatch):
    from dfkd_nb.dreams.inversion import DeepInversion
    from dfkd_nb.lab import invert, run_command

    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(invert, 'own_teacher', interrupt)
        code, _, err = own(*BATCHES, '--out', 'dreams')
        assert code == 130 and 'before anything was saved' in err and '--resume' not in err
    with monkeypatch.context() as patch:
        patch.setattr(invert, 'own_teacher', lambda _: signal.raise_signal(signal.SIGTERM))
        before = signal.getsignal(signal.SIGTERM)
        code, _, err = own(*BATCHES, '--out', 'dreams')
        assert code == 130 and 'before anything was saved' in err
        assert signal.getsignal(signal.SIGTERM) == before
    with monkeypatch.context() as patch:  # while the modules of a command are loaded
        patch.setattr(invert, 'add_arguments', interrupt)
        code, _, err = own(*BATCHES, '--out', 'dreams')
        assert code == 130 and err == 'dfkd: interrupted before anything was saved\n'
    with monkeypatch.context() as patch:
        patch.setattr(DeepInversion, 'step', interrupt)
        code, _, err = own(*BATCHES, '--out', 'dreams')
        assert (
            code == 3
            and 'the current batch is saved in dreams' in err
            and '--resume' in err
        )
    assert own(*BATCHES, '--out', 'dreams', '--resume')[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_command, 'Run', interrupt)
        code, _, err = own('run', 'digits-teacher', *TINY)
        assert code == 130 and 'before anything was saved' in err


@pytest.mark.parametrize('seed', [[], ['--seed', '0'], ['--seed', '3']])
def test_a_second_interruption_names_the_checkpoint(dfkd, monkeypatch, seed):
    from dfkd_nb.lab.runs import SavedRun

    words = ['run', 'digits-teacher', *TINY, *seed]
    folder = 'runs/digits-teacher/' + ('quick-seed3' if '3' in seed else 'quick')
    save = SavedRun.save

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SavedRun, 'save', interrupted)
        code, _, err = dfkd(*words, '--save-every', '1e-9')
    assert (
        code == 3
        and f'the last checkpoint is saved in {folder}:' in err
        and '--resume' in err
    )
    assert (dfkd.folder / folder / 'checkpoint.pt').is_file()
    code, out, _ = dfkd(*words, '--resume')
    assert code == 0 and f'saved in {folder}\n' in out
    card = (dfkd.folder / folder / 'model-card.md').read_text()
    assert f"{folder.removeprefix('runs/')}'" in card, (
        'the card names the folder that is there'
    )


def test_a_needed_run_that_is_interrupted_is_named(dfkd, monkeypatch):
    from dfkd_nb.lab.runs import SavedRun

    def interrupted(self, save=SavedRun.save):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(SavedRun, 'save', interrupted)
    code, _, err = dfkd('run', 'digits-dream', '--save-every', '1e-9')
    assert code == 3 and 'is saved in runs/digits-teacher/quick:' in err


def test_too_little_memory_is_one_line(own, monkeypatch):
    from dfkd_nb.lab import invert

    def allocate(arguments):
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(invert, 'own_teacher', allocate)
    code, _, err = own(*BATCHES, '--out', 'dreams')
    assert code == 2 and 'not enough memory' in err and err.count('\n') == 1


def test_version(dfkd):
    from dfkd_nb import __version__

    assert dfkd('--version') == (0, f'dfkd {__version__}\n', '')


def test_numbers_that_were_not_given_are_told(own):
    """A network that nobody knows to be ImageNet's gets ImageNet's mean, std and size only
    with a word.
    """
    words = [word for word in BATCHES if word not in ('--std', '0.4')]
    code, _, err = own(*words, '--std', '0.4', '--out', 'said')
    assert code == 0 and not err
    three = build_model('digits-net', 10, 3)
    save_tensors(own.folder / 'three.safetensors', three.state_dict())
    cifar = (
        'invert --model digits-net --num-classes 10 --size 8 --device cpu --checkpoint'
        ' three.safetensors --n 2 --out guessed'
    )
    code, _, err = own(*cifar.split(), '--set', 'synthesis_steps=1')
    assert all(line.startswith('dfkd: warning: ') for line in err.splitlines())
    lines = [line for line in err.splitlines() if 'ImageNet' in line]
    assert code == 0 and len(lines) == 1
    assert (
        '--mean 0.485,0.456,0.406, --std 0.229,0.224,0.225' in lines[0]
        and '--size' not in lines[0]
    )


def test_some_classes_keep_their_numbers(own):
    """Readers that number the folders they find would call 3 and 8 by 0 and 1.

    The table and the last line say so.
    """
    words = (
        '--set half_size_steps=1 --set synthesis_steps=1 --classes Cat,ship,3 --n 3'
        ' --device cpu --out dreams'.split()
    )
    code, out, err = own('invert', '--teacher', 'cifar10-resnet20', *words)
    assert code == 0 and '2 of 10 classes (3, 8)' in out and '0 to 1' in out and not err
    lines = manifest(own.folder / 'dreams')['images']
    assert [line['name'] for line in lines] == ['cat', 'ship', 'cat']
    table = (own.folder / 'dreams/metadata.csv').read_text().splitlines()
    assert table[0] == 'file_name,label,label_name'
    assert table[1:] == [f'{line["file"]},{line["class"]},{line["name"]}' for line in lines]
    assert [row.split(',')[1] for row in table[1:]] == ['3', '8', '3']
    assert 'classes (' not in own(*OWN, '--n', '10', '--out', 'all')[1], (
        'all ten classes: nothing to mind'
    )


STAGES = [((8, 8), 100), ((16, 16), 50)]


@pytest.fixture
def clock(monkeypatch):
    "A clock whose time is set by hand; a tick costs so many seconds."
    from dfkd_nb.lab import invert

    monkeypatch.setenv('DFKD_PROGRESS', '0')
    now = [0.0]
    monkeypatch.setattr(invert.time, 'monotonic', lambda: now[0])

    def make(batches=1, **settings):
        made = invert.ProgressReport(STAGES, batches, seconds=0.0, **settings)

        def tick(seconds, batch, step):
            now[0] += seconds
            made.update(batch, step, 'at work')
            return made.seconds_left()

        return made, tick

    return make


def test_the_time_left_counts_pixels(clock):
    _, tick = clock(batches=2)
    # four times the pixels, and the second batch
    assert tick(10, 0, 50) == 50 * 0.2 + 50 * 0.8 + 60
    assert tick(10, 0, 100) == 50 * 0.8 + 60
    # now it is known what a large update costs
    assert tick(30, 0, 110) == 40 * 3 + 100 * 0.2 + 50 * 3
    assert tick(120, 0, 150) == 20 + 150
    assert tick(20, 1, 100) == 150 and tick(150, 1, 150) == 0


def test_the_time_left_of_a_resumed_batch(clock):
    "What an earlier process did took this one no time."
    made, tick = clock()
    made.resume_at(0, 90)
    assert tick(5, 0, 95) == 5 * 1 + 50 * 4


def test_a_line_with_the_time_left(clock, capsys):
    clock()[1](10, 0, 50)
    assert capsys.readouterr().out == 'at work, about 50 s left\n'
    clock(visible=False)[1](10, 0, 50)
    assert not capsys.readouterr().out


def test_help_is_quick():
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'dfkd_nb.lab.commands', '--help'],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and 'invert' in done.stdout and ' torch' not in done.stderr


def test_bench_has_its_own_options(dfkd, monkeypatch):
    from dfkd_nb.lab import bench

    heard = []
    monkeypatch.setattr(bench, 'run', lambda arguments: heard.append(arguments.batch) or 0)
    assert dfkd('bench', '--batch', '64', '128')[0] == 0 and heard == [[64, 128]]
    code, out, _ = dfkd('bench', '--help')
    assert code == 0 and '--channels-last' in out and len(heard) == 1
    assert dfkd('bench', '--nothing')[0] == 2


def test_inspect_judges_a_folder_that_invert_made(dfkd):
    made = (
        'invert',
        '--teacher',
        'cifar10-resnet20',
        '--n',
        '12',
        '--out',
        'dreams',
        '--set',
        'synthesis_steps=3',
    )
    assert dfkd(*made, '--set', 'half_size_steps=0')[0] == 0
    code, out, err = dfkd(
        'inspect', 'dreams', '--real', 'cifar10-mini', '--limit', '40', '--out', 'page'
    )
    assert code == 0, err
    assert 'saved in page' in out and any((dfkd.folder / 'page').glob('*.html'))
    assert dfkd('inspect', '--help')[0] == 0
    code, _, err = dfkd('inspect', 'nowhere')
    assert code == 2 and err.startswith('dfkd: error: no images at nowhere')
    assert len(err.splitlines()) == 1
    code, _, err = dfkd('inspect')
    assert code == 2 and 'give a run or a folder' in err
    code, _, err = dfkd('invert', '--n', '4', '--grid', '-1')
    assert code == 2 and "'-1' is not a number of 0 or more" in err
