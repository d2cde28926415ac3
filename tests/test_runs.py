"Recipes, journals, runs and results: what they promise, tried."

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import tomllib
import types

import numpy
import pytest
import torch
from cases import each
from torch import nn

from dfkd_nb.dreams.inversion import deepinversion_preset
from dfkd_nb.foundations import optimization
from dfkd_nb.lab.recipes import (
    TASKS,
    Recipe,
    Task,
    compared,
    parse_assignment,
    recipe_folder,
    recipe_names,
    resolved_toml,
)
from dfkd_nb.lab.reproducibility import deterministic, environment
from dfkd_nb.lab.results import REVISION, Result, read_history, results
from dfkd_nb.lab.runs import Journal, Run, run_lock
from dfkd_nb.lab.settings import (
    PRECISIONS,
    SCHEDULES,
    TeacherSettings,
    check_settings,
    setting,
)
from dfkd_nb.lab.tasks.common import describe_images, open_teacher
from dfkd_nb.lab.tasks.dream import verifier_accuracies
from dfkd_nb.toolbox import evaluation, models
from dfkd_nb.toolbox.core import PRECISIONS as CORE_PRECISIONS
from dfkd_nb.toolbox.core import load_checkpoint, load_tensors, save_checkpoint
from dfkd_nb.toolbox.errors import DFKDError, RunStopped

TINY = {'epochs': 1.0, 'evaluations': 2}


def tiny(tmp_path, **settings):
    "A digits teacher of twenty updates."
    return Run(
        Recipe.load('digits-teacher'),
        'quick',
        TINY | settings,
        out=tmp_path / 'runs',
        results=tmp_path / 'results',
        quiet=True,
    )


def rows(run):
    return [
        {k: v for k, v in row.items() if 'seconds' not in k}
        for row in read_history(run.folder / 'history.csv')
    ]


# recipes


@each('name', recipe_names())
def test_every_recipe_is_whole(name):
    recipe = Recipe.load(name)
    assert (
        recipe.title
        and recipe.expected
        and recipe.hardware
        and recipe.hours > 0
        and set(recipe.scales) <= {'quick', 'hour', 'full'}
    )
    # those are composed; their tables' heads say how they are called
    if name not in compared():
        text = (recipe_folder() / f'{name}.toml').read_text()
        assert text.startswith('#') and f'dfkd run {name}' in text, (
            'its head says what it is and how to run it'
        )
    for scale in recipe.scales:
        settings = recipe.resolve(scale)
        again = tomllib.loads(resolved_toml(recipe, scale, settings))[scale]
        assert check_settings(type(settings), again, name) == settings, (
            'what a run notes down is the recipe again'
        )


def test_scales_of_a_comparison_agree():
    "The four sources are compared at the same number of images and updates."
    for data in ('digits', 'cifar10'):
        kinds = [
            dataclasses.asdict(Recipe.load(f'{data}-transfer-{k}').resolve('quick'))
            for k in ('noise', 'deepdream', 'deepinversion', 'real')
        ]
        free = {'source', 'real_data', 'tv_l2', 'tv_l1', 'l2', 'feature_weight'}
        # real images are there from the beginning
        idle_rounds = {'rounds', 'steps_per_round'}
        for other in kinds[1:]:
            # nothing is dreamt where images are real
            idle = (
                {k for k in other if k.startswith('synthesis')}
                | {'half_size_steps'}
                | idle_rounds
            )
            left_out = free | (idle if other['source'] == 'real' else set())
            assert {k: v for k, v in other.items() if k not in left_out} == {
                k: v for k, v in kinds[0].items() if k not in left_out
            }
        assert [k['feature_weight'] > 0 for k in kinds[:3]] == [False, False, True]
        assert [k['tv_l2'] > 0 for k in kinds[:3]] == [False, True, True]


@pytest.mark.parametrize('scale', ['quick', 'full'])
def test_competition_and_measured_statistics_change_one_setting(scale):
    def settings(name):
        return dataclasses.asdict(Recipe.load(name).resolve(scale))

    def differs(a, b):
        return {k for k in a if a[k] != b[k]}

    plain = settings('cifar10-transfer-deepinversion')
    adaptive = settings('cifar10-transfer-adaptive')
    assert (
        differs(plain, adaptive) == {'competition_weight'}
        and adaptive['competition_weight'] > 0
    )
    for word, base in (('di', plain), ('adi', adaptive)):
        for n in (1, 10, 100, 1000):
            other = settings(f'cifar10-measured-{word}-{n}')
            assert (
                differs(base, other) == {'statistics_images'}
                and other['statistics_images'] == n
            )


@pytest.mark.parametrize('method', ['noise', 'deepdream', 'deepinversion'])
@each('data', ['digits', 'cifar10'])
def test_a_method_leaves_out_what_its_preset_leaves_out(data, method):
    recipe = Recipe.load(f'{data}-transfer-{method}')
    for scale in recipe.scales:
        settings = dataclasses.asdict(recipe.resolve(scale))
        assert [settings[name] > 0 for name in deepinversion_preset(method)] == [
            weight > 0 for weight in deepinversion_preset(method).values()
        ]


def test_words_agree_with_the_foundations():
    assert SCHEDULES == optimization.SCHEDULES
    assert set(PRECISIONS) == {*CORE_PRECISIONS, 'auto'}


@each(
    'change, words',
    [
        ({'learning_rat': 0.1}, ("'learning_rat'", "'learning_rate'")),
        ({'epochs': 'ten'}, ("'epochs'", 'a number')),
        ({'batch_size': 64.0}, ("'batch_size'", 'a whole number')),
        ({'augment': 1}, ("'augment'", 'true or false')),
        ({'batch_size': True}, ("'batch_size'", 'a whole number')),
        ({'momentum': 1.5}, ("'momentum'", 'at most 1')),
        ({'batch_size': 0}, ("'batch_size'", 'at least 2')),
        ({'schedule': 'cosin'}, ("'schedule'", "'cosine'")),
        ({'learning_rate': math.nan}, ("'learning_rate'", 'finite')),
    ],
)
def test_settings_are_checked(change, words):
    with pytest.raises(DFKDError) as error:
        check_settings(TeacherSettings, change, 'here')
    assert all(word in str(error.value) for word in ('here', *words))


def test_integers_serve_as_floats():
    assert check_settings(TeacherSettings, {'epochs': 3}, '').epochs == 3.0


@each(
    'text, wanted',
    [
        ('epochs=2', ('epochs', 2)),
        ('epochs = 2.5', ('epochs', 2.5)),
        ('augment=false', ('augment', False)),
        ('model=resnet20', ('model', 'resnet20')),
        ('model="resnet20"', ('model', 'resnet20')),
        ('teacher=run:a/full', ('teacher', 'run:a/full')),
        ('tv_l2=1e-3', ('tv_l2', 1e-3)),
    ],
)
def test_assignments(text, wanted):
    key, value = parse_assignment(text)
    assert (key, value) == wanted and type(value) is type(wanted[1])


# the journal


def test_a_journal_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path / 'j')
    journal.add('a', 1, loss=0.5)
    journal.add('a', 2, loss=0.25)
    whole = (tmp_path / 'j').read_bytes()
    for cut in range(len(whole)):  # whatever a kill leaves
        (tmp_path / 'j').write_bytes(whole[:cut])
        torn = Journal(tmp_path / 'j')
        assert [r['step'] for r in torn.rows.values()] in ([], [1], [1, 2])
        torn.add('a', 1, loss=0.5)
        torn.add('a', 2, loss=0.25)
        assert Journal(tmp_path / 'j').table() == journal.table()


def test_a_row_that_comes_again_replaces_the_first(tmp_path):
    journal = Journal(tmp_path / 'j')
    for loss in (3.0, 2.0):
        journal.add('a', 1, loss=loss)
    assert [r['loss'] for r in Journal(tmp_path / 'j').rows.values()] == [2.0]
    journal.add('a', 1, batch=1, loss=4.0)
    assert [r['loss'] for r in Journal(tmp_path / 'j').rows.values()] == [
        2.0,
        4.0,
    ], 'batches have rows of their own'


# runs


def test_a_run_leaves_what_it_promises(tmp_path):
    (tmp_path / 'results').mkdir()
    run = Run(
        Recipe.load('digits-teacher'),
        out=tmp_path / 'runs',
        results=tmp_path / 'results',
        quiet=True,
    )
    result = run.start(command='dfkd run digits-teacher')
    assert result.numbers['accuracy'] > 0.95 and result.numbers['accuracy_first'] < 0.5
    assert {p.name for p in run.folder.iterdir()} == {
        'lock',
        'recipe.toml',
        'environment.json',
        'journal.jsonl',
        'checkpoint.pt',
        'history.csv',
        'weights.safetensors',
        'model-card.md',
        'result.json',
    }
    published = tmp_path / 'results/digits-teacher/quick'
    assert {p.name for p in published.iterdir()} == {
        'recipe.toml',
        'environment.json',
        'history.csv',
        'result.json',
    }
    assert Result.load(published) == Result.load(run.folder) == result and results(
        tmp_path / 'results'
    ) == [result]
    assert (
        result.environment['command'] == 'dfkd run digits-teacher'
        and result.environment['threads'] == torch.get_num_threads()
    )
    teacher = open_teacher('run:digits-teacher', tmp_path / 'runs', 'quick')
    assert teacher.domain.name == 'digits' and not any(
        p.requires_grad for p in teacher.parameters()
    )
    assert run.start() == result, 'a finished run shows its result'


@dataclasses.dataclass(frozen=True)
class CountSettings:
    to: int = setting(10, 'how far', low=1)
    seed: int = setting(0, 'unused')


def count(run):
    "A task without a network: one number an update."

    def work(state, spent):
        done = state['done'] if state else 0
        while done < run.settings.to:
            done += 1
            run.journal.add('counting', done, square=done**2, seconds=spent())
            run.tick('counting', lambda done=done: {'done': done})
        return {'sum': sum(row['step'] for row in run.journal.rows.values())}

    first = run.phase('counting', work)
    return first | run.phase('doubling', lambda state, spent: {'double': 2 * first['sum']})


@pytest.fixture
def counting(tmp_path):
    "A run that counts to ten."
    TASKS['count'] = Task('count', CountSettings, count)
    recipe = Recipe.parse('title = "Count"\ntask = "count"\n[quick]\nto = 10\n', 'count')
    yield lambda **changes: Run(
        recipe, 'quick', changes, tmp_path / 'runs', tmp_path / 'results', 'cpu', quiet=True
    )
    del TASKS['count']


def pieces(make, **how):
    "Call until it is done; how often it stopped, and the result."
    stops = 0
    while True:
        try:
            return stops, make().start(resume=True, **how)
        except RunStopped as stopped:
            assert '--resume' in str(stopped)
            stops += 1
            assert stops < 100, 'a stopped run must come forward'


def test_every_number_is_counted_once(counting):
    stops, result = pieces(counting, max_minutes=1e-9)
    assert stops >= 10 and result.numbers == {'sum': 55, 'double': 110}
    assert [row['square'] for row in rows(counting())] == [n**2 for n in range(1, 11)]


def global_draws():
    "A number from each global stream."
    return [torch.rand(1).item(), random.random(), float(numpy.random.rand())]


def draw(run):
    """A task whose every number comes from the global streams.

    In a phase, between two, and in another.
    """
    first = []

    def work(state, spent):
        first.extend(state['drawn'] if state else [])
        while len(first) < run.settings.to:
            first.append(global_draws())
            run.journal.add('drawing', len(first), value=first[-1][0])
            run.tick('drawing', lambda: {'drawn': first})
        return {'drawn': first}

    found = run.phase('drawing', work)
    between = global_draws()
    assert run.state['current'] is None or run.state['current']['phase'] != 'drawing'
    late = []

    def again(state, spent):
        late.extend(state['drawn'] if state else [])
        while len(late) < 3:
            late.append(global_draws())
            run.tick('again', lambda: {'drawn': late})
        return {'late': late}

    return found | run.phase('again', again) | {'between': between, 'after': global_draws()}


@pytest.fixture
def drawing(counting):
    TASKS['count'] = Task('count', CountSettings, draw)
    return counting


def test_global_streams_are_part_of_the_checkpoint(drawing):
    """Stopped after every draw, and each process begins with streams of its own.

    The numbers are those of one process.
    """
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    whole = drawing(to=4).start()
    stops = 0
    while True:
        (
            torch.manual_seed(100 + stops),
            random.seed(100 + stops),
            numpy.random.seed(100 + stops),
        )
        before = global_draws()
        (
            torch.manual_seed(100 + stops),
            random.seed(100 + stops),
            numpy.random.seed(100 + stops),
        )
        try:
            result = drawing(to=4).start(
                resume=stops > 0, fresh=stops == 0, max_minutes=1e-9
            )
            break
        except RunStopped:
            stops += 1
            assert global_draws() == before, (
                "the caller's streams go on as if nothing had been drawn"
            )
    assert stops >= 7 and result.numbers == whole.numbers
    flat = [
        v
        for row in [
            *whole.numbers['drawn'],
            *whole.numbers['late'],
            whole.numbers['between'],
        ]
        for v in row
    ]
    assert len(set(flat)) == len(flat), 'no stream begins again within a run'


def test_another_seed_is_another_stream(drawing):
    assert drawing(to=2).start().numbers != drawing(to=2, seed=1).start().numbers


def test_a_changed_run_is_not_published(counting, tmp_path):
    (tmp_path / 'results').mkdir()
    assert (
        counting(to=3).start().changed == ['to']
        and not (tmp_path / 'results/count').exists()
    )
    assert (
        counting().start(fresh=True).changed == []
        and (tmp_path / 'results/count/quick/result.json').is_file()
    )


def test_what_is_set_to_what_it_was_is_no_change(counting, tmp_path):
    (tmp_path / 'results').mkdir()
    assert (
        counting(to=10, seed=0).start().changed == []
        and (tmp_path / 'results/count/quick/result.json').is_file()
    )


def test_a_wrong_name_is_told_before_the_folder_begins(tmp_path):
    with pytest.raises(DFKDError, match="'model': unknown model 'resnet21'"):
        tiny(tmp_path, model='resnet21').start()
    assert not (tmp_path / 'runs').exists()


def test_a_result_knows_its_revision(counting):
    result = counting().start()
    folder = counting().folder
    assert (
        result.revision
        == REVISION
        == json.loads((folder / 'result.json').read_text())['revision']
    )
    assert not result.outdated and Result.load(folder) == result
    without = {
        k: v
        for k, v in json.loads((folder / 'result.json').read_text()).items()
        if k != 'revision'
    }
    (folder / 'result.json').write_text(json.dumps(without))
    assert Result.load(folder).revision == 1 and Result.load(folder).outdated


def test_a_run_that_began_before_a_mend_stays_older_than_it(counting, monkeypatch):
    monkeypatch.setattr('dfkd_nb.lab.reproducibility.REVISION', 1)
    with pytest.raises(RunStopped):
        counting().start(max_minutes=1e-9)
    monkeypatch.undo()
    assert counting().start(resume=True).outdated


def test_fresh_throws_all_away_but_the_lock(counting):
    with pytest.raises(RunStopped):
        counting(to=5).start(max_minutes=1e-9)
    (counting().folder / 'parts').mkdir()
    counting(to=3).start(fresh=True)
    assert not (counting().folder / 'parts').exists() and len(rows(counting())) == 3


def test_settings_younger_than_a_run_do_not_keep_it_from_resuming(counting):
    with pytest.raises(RunStopped):
        counting().start(max_minutes=1e-9)
    noted = counting().folder / 'recipe.toml'
    noted.write_text(
        '\n'.join(
            line for line in noted.read_text().splitlines() if not line.startswith('seed')
        )
    )
    assert counting().start(resume=True).numbers['sum'] == 55


def test_the_process_is_left_as_it_was(counting):
    def state():
        return (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            signal.getsignal(signal.SIGINT),
        )

    before = state()
    with deterministic(1):
        assert torch.are_deterministic_algorithms_enabled()
    counting().start()
    assert before == state()


def test_threads_of_the_first_process_are_kept(counting):
    with pytest.raises(RunStopped):
        counting().start(max_minutes=1e-9)
    noted = counting().folder / 'environment.json'
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {'threads': 2}))
    seen = []
    TASKS['count'] = dataclasses.replace(
        TASKS['count'], function=lambda run: seen.append(torch.get_num_threads()) or {}
    )
    counting().start(resume=True)
    assert seen == [2]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly(counting, number):
    run = counting()
    tick = run.tick
    run.tick = lambda phase, state: (os.kill(os.getpid(), number), tick(phase, state))
    with pytest.raises(RunStopped, match=number.name):
        run.start()
    assert (
        load_checkpoint(run.folder / 'checkpoint.pt')['current']['state']['done'] >= 1
        and not run.finished
    )
    assert counting().start(resume=True).numbers['sum'] == 55


def test_a_second_signal_ends_at_once(counting):
    run = counting()
    run.tick = lambda phase, state: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        run.start()


def test_seconds_add_up_over_processes(counting):
    with pytest.raises(RunStopped):
        counting().start(max_minutes=1e-9)
    path = counting().folder / 'checkpoint.pt'
    state = load_checkpoint(path)
    state['seconds']['counting'] += 1000.0  # as if it had been long
    save_checkpoint(path, state)
    pieces(counting, max_minutes=1e-9)
    result = Result.load(counting().folder)
    assert 1000 <= result.seconds['counting'] < 1100
    assert (
        set(result.seconds) == {'counting', 'doubling', 'total'}
        and result.seconds['total'] >= result.seconds['counting']
    )


def test_a_training_stopped_everywhere_ends_in_the_same_bits(tmp_path):
    tiny(tmp_path / 'whole').start()
    stops, _ = pieces(lambda: tiny(tmp_path / 'cut'), max_minutes=1e-9)
    whole, cut = tiny(tmp_path / 'whole'), tiny(tmp_path / 'cut')
    assert (
        stops >= 1
        and Result.load(cut.folder).numbers == Result.load(whole.folder).numbers
        and rows(cut) == rows(whole)
    )
    a, b = (load_tensors(run.folder / 'weights.safetensors')[0] for run in (whole, cut))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_what_is_reported_last_is_what_was_saved(tmp_path, monkeypatch):
    "The weights are judged in half precision, as they are in the file."
    usual, halves = evaluation.evaluate, []

    def spy(network, *words, **more):
        halves.append(all(v.equal(v.half().float()) for v in network.parameters()))
        return usual(network, *words, **more)

    monkeypatch.setattr(evaluation, 'evaluate', spy)
    tiny(tmp_path).start()
    assert halves[-1] and not halves[-2]


def test_a_lock_ends_with_its_holder(tmp_path):
    code = (
        'import os, pathlib\n'
        'from dfkd_nb.lab.runs import run_lock\n'
        f'with run_lock(pathlib.Path({str(tmp_path)!r})): os.kill(os.getpid(), 9)'
    )
    assert (
        subprocess.run([sys.executable, '-c', code], timeout=60).returncode
        == -signal.SIGKILL
    )
    with run_lock(tmp_path):
        pass


def test_environment_says_where(tmp_path):
    noted = environment(torch.device('cpu'), 5, 'dfkd run x')
    assert (
        noted['torch'] == torch.__version__
        and noted['seed'] == 5
        and noted['processor']
        and noted['cores'] == os.cpu_count()
    )
    json.dumps(noted)


# students of dreams that are made in rounds, or from metadata

DIGITS = """
title = "A student of the digits teacher"
task = "transfer"
[settings]
teacher = "run:digits-teacher/quick"
test_data = "digits"
real_data = "digits"
batch_size = 64
padding = 1
flip = false
synthesis_flip = false
synthesis_batch_size = 20
synthesis_steps = 6
images = 60
steps = 12
test_limit = 100
picture = 2
"""
KINDS = {
    'rounds': (
        'evaluations = 2\nrounds = 3\nsteps_per_round = 4\ncompetition_weight = 5.0'
    ),
    'metadata': (
        'evaluations = 2\nclass_weight = 0.0\nembedding_weight = 1.0\n'
        'metadata_images = 300\nmetadata_clusters = 2\nmetadata_components = 5'
    ),
    'labels': (
        'evaluations = 2\nlearn_from = "labels"\nstatistics_images = 50\nstatistics_data ='
        ' "digits"'
    ),
    'dropout': 'student = "dropping"\nevaluations = 4\nsource = "real"',
}


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """A folder of runs with a digits teacher in it, and a small network whose units drop
    out.
    """

    def dropping(classes, channels):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * channels, 32),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(32, classes),
        )

    models.MODELS['dropping'] = dropping
    out = tmp_path_factory.mktemp('taught')
    Run(
        Recipe.load('digits-teacher'),
        'quick',
        TINY,
        out=out,
        results=out / 'results',
        device='cpu',
        quiet=True,
    ).start()
    yield out
    del models.MODELS['dropping']


def student(taught, kind, name, **changes):
    network = '' if 'student =' in KINDS[kind] else 'student = "digits-net"\n'
    recipe = Recipe.parse(DIGITS + '[quick]\n' + network + KINDS[kind], name)
    return Run(
        recipe,
        'quick',
        changes,
        out=taught,
        results=taught / 'results',
        device='cpu',
        quiet=True,
    )


@pytest.mark.parametrize('kind', list(KINDS))
def test_a_transfer_of_any_kind_stopped_everywhere_ends_in_the_same_bits(taught, kind):
    result = student(taught, kind, f'{kind}-whole').start()
    stops, again = pieces(lambda: student(taught, kind, f'{kind}-cut'), max_minutes=1e-9)
    assert stops >= 1 and again.numbers == result.numbers
    whole, cut = (student(taught, kind, f'{kind}-{word}') for word in ('whole', 'cut'))
    assert rows(whole) == rows(cut)
    files = sorted(path.name for path in whole.folder.glob('*.safetensors'))
    assert files == sorted(path.name for path in cut.folder.glob('*.safetensors'))
    assert 'weights.safetensors' in files and ('images.safetensors' in files) == (
        kind != 'dropout'
    )
    for name in files:
        a, b = (load_tensors(run.folder / name)[0] for run in (whole, cut))
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert not (cut.folder / 'parts').exists()
    assert (
        kind == 'dropout'
        or len(load_tensors(cut.folder / 'images.safetensors')[0]['images']) == 60
    )
    if kind == 'rounds':
        kept = [row for row in rows(cut) if row['phase'] == 'rounds']
        assert [(row['batch'], row['step'], row['images']) for row in kept] == [
            (0, 0, 20),
            (1, 4, 40),
            (2, 8, 60),
        ]
        assert all(
            0 <= row['student_fresh'] <= 1 and 0 <= row['divergence'] <= 0.6932
            for row in kept
        )
    if kind == 'metadata':
        assert (
            again.numbers['metadata_bytes']
            == (cut.folder / 'metadata.safetensors').stat().st_size
        )
        assert (
            10 <= again.numbers['metadata_clusters'] <= 20
            and again.numbers['embedding_distance'] > 0
        )


@each(
    ('kind', 'changes', 'words'),
    [
        ('rounds', {'images': 61}, 'multiple of rounds'),
        ('rounds', {'embedding_weight': 1.0}, 'set rounds to 1'),
        ('rounds', {'source': 'real'}, 'set rounds to 1'),
        ('rounds', {'steps': 5}, 'fewer rounds'),
        ('metadata', {'metadata_components': 50}, '33 images: give at least 51'),
    ],
)
def test_transfers_that_cannot_be(taught, kind, changes, words):
    with pytest.raises(DFKDError, match=words):
        student(taught, kind, 'impossible', **changes).start(fresh=True)


def test_a_pool_is_measured_against_real_images(taught):
    # the run of the test above, where it was made
    numbers = student(taught, 'labels', 'labels-whole').start().numbers
    assert (
        all(0 <= numbers[k] <= 1 for k in ('precision', 'recall', 'coverage'))
        and numbers['area'] > 0
    )


def test_labels_of_another_order_are_refused(taught):
    from dfkd_nb.toolbox.data import ImageSet
    from dfkd_nb.toolbox.domains import DOMAINS

    cifar = DOMAINS['cifar10']
    other = dataclasses.replace(cifar, name='other', classes=cifar.classes[::-1])
    images = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), other)
    with pytest.raises(
        DFKDError, match="'truck' is class 0 of 'other' and class 9 of 'cifar10'"
    ):
        describe_images(images, open_teacher('cifar10-resnet20'))
    asked = types.SimpleNamespace(
        settings=types.SimpleNamespace(verifiers=('cifar10-resnet20',)),
        root=taught,
        scale='quick',
        device='cpu',
    )
    with pytest.raises(DFKDError, match="'truck' is class 0"):
        verifier_accuracies(asked, images)


def test_verifiers_say_what_they_see(taught):
    text = """
    title = "Digits, and who names them"
    task = "dream"
    [quick]
    teacher = "run:digits-teacher/quick"
    verifiers = ["run:digits-teacher/quick"]
    images = 40
    synthesis_steps = 20
    synthesis_batch_size = 20
    picture = 10
    """
    recipe = Recipe.parse(text, 'verified')
    run = Run(
        recipe,
        'quick',
        {},
        out=taught,
        results=taught / 'results',
        device='cpu',
        quiet=True,
    )
    numbers = run.start(fresh=True).numbers
    # one and the same
    assert numbers['accuracy_under_run:digits-teacher/quick'] == pytest.approx(
        numbers['recognition']
    )
