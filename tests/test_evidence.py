"The hour scale: one budget for all methods, the queue of its runs, and their curves."

import dataclasses
import json
import math
import os
import signal
import time

import matplotlib
import pytest
from cases import each

from dfkd_nb.foundations.method_tables import method_settings, method_tables
from dfkd_nb.lab import evidence
from dfkd_nb.lab.commands import STOPPED, main
from dfkd_nb.lab.comparison import HOUR_PAIR, METHOD_TITLES, comparison
from dfkd_nb.lab.comparison_figures import draw_curves, learning_curve
from dfkd_nb.lab.comparison_tables import hour_table, row_of
from dfkd_nb.lab.evidence import (
    ABLATIONS,
    METHODS,
    NEWER,
    REPEATED,
    Planned,
    evidence_plan,
    list_queue,
    missing_evidence,
    open_run,
    run_queue,
    run_state,
)
from dfkd_nb.lab.recipes import TASKS, Recipe, Task, compared
from dfkd_nb.lab.results import REVISION, Result, read_history, results
from dfkd_nb.lab.runs import Run
from dfkd_nb.lab.settings import setting
from dfkd_nb.lab.tasks.common import StudentTraining
from dfkd_nb.toolbox.errors import DFKDError, RunStopped

matplotlib.use('Agg')


# --- the scale ----------------------------------------------------------------------------


def test_every_method_has_one_budget():
    "The student's updates are the same for all, and so is how it is trained."
    names = ('batch_size', 'learning_rate', 'momentum', 'weight_decay', 'schedule')
    names += ('warmup', 'temperature', 'student', 'student_init', 'teacher', 'augment')
    names += ('test_data', 'test_limit', 'evaluations')
    found = set()
    for method in (*METHODS, *NEWER, *ABLATIONS):
        settings = Recipe.load(f'{HOUR_PAIR}-{method}').resolve('hour')
        steps = getattr(settings, 'steps', 0)
        if not steps:
            taught = settings.rounds - settings.warmup_rounds
            steps = taught * settings.steps_per_round
        found.add((steps, *(getattr(settings, name) for name in names)))
    assert len(found) == 1
    (only,) = found
    assert only[:2] == (4000, 128) and only[8:11] == (
        'wrn16-1',
        'random',
        'cifar10-resnet20',
    )
    assert only[-3:] == ('cifar10', 0, 20)


SEVERAL_SCALES = ['dafl', 'zskt', 'dfq', 'cmi', 'fast-2', 'fast-5', 'fast-10', 'nayer']


@each('method', [*SEVERAL_SCALES, 'ssd-kd-10'])
def test_weights_are_those_of_the_papers(method):
    free = {'rounds', 'warmup_rounds', 'steps_per_round', 'reset_round', 'precision'}
    free |= {'synthesis_batch_size', 'batch_size', 'generator_width', 'learning_rate'}
    hour, full = (method_settings(method, scale) for scale in ('hour', 'full'))
    assert {k for k in full if hour.get(k) != full[k]} <= free


def test_ablations_change_what_they_name():
    "Each differs from its method in the settings of its row, and in nothing else."
    for name in (*ABLATIONS, *NEWER):
        row = method_tables()[1][name]
        if 'ablates' not in row:
            continue
        base, changed = (
            dataclasses.asdict(Recipe.load(f'{HOUR_PAIR}-{m}').resolve('hour'))
            for m in (row['ablates'], name)
        )
        differ = {k for k in base if base[k] != changed[k]}
        named = {*row['settings'], 'method'}
        # a newer row may also say what its synthesizer does by default
        if name in NEWER:
            named -= {k for k in row['settings'] if base[k] == row['settings'][k]}
        assert differ == named > {'method'}, name


def test_methods_of_one_scale_are_recipes_of_pairs_that_have_it():
    only = [m for m, row in method_tables()[1].items() if 'scales' in row]
    assert set(only) == {'noise', 'deepdream', 'metadata', *ABLATIONS}
    pairs = {pair for pair, method in compared().values() if method in only}
    assert pairs == {HOUR_PAIR}
    assert set(Recipe.load(f'{HOUR_PAIR}-fast-5').scales) == {'hour'}


# --- the queue ----------------------------------------------------------------------------


def test_the_order():
    plan = evidence_plan()
    names = [(p.recipe.removeprefix(f'{HOUR_PAIR}-'), p.seed) for p in plan]
    assert names[:4] == [('vanilla', 0), ('scratch', 0), ('ssd-kd-10', 0), ('fast-5', 0)]
    assert names[len(METHODS) :][: 2 * len(REPEATED)] == [
        (m, seed) for seed in (1, 2) for m in REPEATED
    ]
    assert (
        len(set(names)) == len(names) == len(METHODS) + 2 * 6 + len(NEWER) + len(ABLATIONS)
    )
    later = names[len(METHODS) + 2 * 6 :]
    assert later == [(m, 0) for m in (*NEWER, *ABLATIONS)]
    # every recipe of the pair is in the queue
    assert {m for m, _ in names} == {
        m for pair, m in compared().values() if pair == HOUR_PAIR
    }
    assert {*METHODS, *NEWER} == set(METHOD_TITLES)
    assert all(20 <= p.minutes <= 95 for p in plan)


@dataclasses.dataclass(frozen=True)
class CountSettings:
    to: int = setting(3, 'how far', low=1)
    seed: int = setting(0, 'unused')


class Queue:
    "Recipes that count, in the order of their names; `done` is the order of their updates."

    def __init__(self, folder):
        self.folder, self.done, self.after = folder, [], lambda: None
        (folder / 'results').mkdir()
        for name in 'abc':
            self.write(name)

    def write(self, name, to=3):
        text = f'title = "{name}"\ntask = "tally"\nhours = 0.5\n[hour]\nto = {to}\n'
        (self.folder / f'{name}.toml').write_text(text)

    def count(self, run):
        def work(state, spent):
            done = state['done'] if state else 0
            while done < run.settings.to:
                done += 1
                self.done.append((run.recipe.name, run.settings.seed, done))
                self.after()
                run.tick('counting', lambda done=done: {'done': done})
            return {'student_accuracy': done / 10}

        return run.phase('counting', work)

    def plan(self, names='abc'):
        return [Planned(str(self.folder / f'{name}.toml')) for name in names]

    def run(self, names='abc', **more):
        plan = self.plan(names)
        return run_queue(plan, self.folder / 'runs', self.folder / 'results', **more)

    def list(self):
        return list_queue(self.plan(), self.folder / 'runs', self.folder / 'results')


@pytest.fixture
def queue(tmp_path):
    made = Queue(tmp_path)
    TASKS['tally'] = Task('tally', CountSettings, made.count)
    yield made
    del TASKS['tally']


ALL = [(name, 0, n) for name in 'abc' for n in (1, 2, 3)]


def test_all_in_order_published_and_not_again(queue, capsys):
    assert [r.recipe for r in queue.run()] == ['a', 'b', 'c'] and queue.done == ALL
    assert [r.recipe for r in results(queue.folder / 'results')] == ['a', 'b', 'c']
    assert 'student 30.00 %' in capsys.readouterr().out
    assert queue.run() == [] and queue.done == ALL, 'what is done is not done again'
    assert queue.list().count('  done  ') == 3 and 'no time' in queue.list()


def test_what_has_a_result_is_not_run_even_in_an_empty_folder(queue):
    queue.run('b')
    found = run_queue(queue.plan(), queue.folder / 'other', queue.folder / 'results')
    assert [r.recipe for r in found] == ['a', 'c']


def test_what_is_finished_is_published_without_running(queue):
    run_queue(queue.plan('a'), queue.folder / 'runs', queue.folder / 'elsewhere')
    assert 'finished' in queue.list()
    assert [r.recipe for r in queue.run('a')] == ['a'] and len(queue.done) == 3
    assert results(queue.folder / 'results')[0].recipe == 'a'


def test_time_stops_it_and_the_same_command_goes_on(queue):
    stops = 0
    while True:
        try:
            queue.run(max_minutes=1e-9 if stops < 4 else math.inf)
            break
        except RunStopped as stopped:
            assert 'the same command goes on' in str(stopped)
            assert '--resume' not in str(stopped)
            stops += 1
    # before the first run, there is no time left to begin it
    assert stops == 4 and queue.done == ALL


def test_time_stops_it_within_a_run(queue, monkeypatch):
    real, late = time.monotonic, []
    monkeypatch.setattr(time, 'monotonic', lambda: real() + 3600 * len(late))
    queue.after = lambda: late.append(1) if len(queue.done) == 5 else None
    with pytest.raises(RunStopped, match='time is up.*runs/b/hour'):
        queue.run(max_minutes=30)
    assert queue.done == ALL[:5] and 'begun' in queue.list()


def test_a_signal_stops_within_a_run_which_is_resumed(queue):
    queue.after = lambda: len(queue.done) == 5 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(RunStopped, match='SIGTERM.*runs/b/hour'):
        queue.run()
    assert queue.done == ALL[:5] and 'begun' in queue.list()
    queue.run()
    assert queue.done == ALL


def test_other_settings_begin_afresh_beside(queue, capsys):
    queue.after = lambda: len(queue.done) == 1 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(RunStopped):
        queue.run('a')
    kept = (queue.folder / 'runs/a/hour/checkpoint.pt').read_bytes()
    queue.write('a', to=2)
    (found,) = queue.run('a')
    said = capsys.readouterr().out
    assert said.count('stays as it is (begun with other settings)') == 1
    assert found.numbers == {'student_accuracy': 0.2} and queue.done[1:] == ALL[:2]
    assert (queue.folder / 'runs/a/hour/checkpoint.pt').read_bytes() == kept
    assert (queue.folder / 'runs/again-2/a/hour/result.json').is_file()
    assert queue.run('a') == []


def test_another_revision_begins_afresh_beside(queue, capsys):
    queue.run('a')
    for place in ('runs', 'results'):
        folder = queue.folder / place / 'a/hour'
        for name in ('environment.json', 'result.json'):
            text = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(text | {'revision': REVISION - 1}))
    (found,) = queue.run('a')
    assert f'revision {REVISION - 1} of the code' in capsys.readouterr().out
    assert not found.outdated and len(queue.done) == 6


def test_a_failure_does_not_keep_the_others_from_running(queue, capsys):
    def fail():
        if queue.done[-1][0] == 'b':
            raise DFKDError('no data')

    queue.after = fail
    with pytest.raises(DFKDError, match='1 of 3 runs failed.*no data'):
        queue.run()
    assert [r.recipe for r in results(queue.folder / 'results')] == ['a', 'c']


def test_seeds_have_folders_of_their_own(queue):
    plan = [Planned(str(queue.folder / 'a.toml'), seed) for seed in (0, 2)]
    run_queue(plan, queue.folder / 'runs', queue.folder / 'results')
    assert [r.settings['seed'] for r in results(queue.folder / 'results')] == [0, 2]
    run = open_run(plan[1], queue.folder / 'runs', queue.folder / 'results')
    assert (run.folder.name, run_state(run)) == ('hour-seed2', 'done')
    assert plan[1].command.endswith('a.toml --scale hour --seed 2')


def test_the_command(queue, monkeypatch, capsys):
    "One thread, the lowest priority, the folder of the environment; 3 where it stopped."
    called = []
    monkeypatch.setattr(evidence, 'evidence_plan', queue.plan)
    monkeypatch.setattr(os, 'nice', called.append, raising=False)
    monkeypatch.setenv('DFKD_RUNS', str(queue.folder / 'far'))
    monkeypatch.chdir(queue.folder)
    assert main(['evidence', '--list']) == 0 and not queue.done and not called
    assert '0 of 3 are done, the others need about 90 min' in capsys.readouterr().out
    assert main(['evidence', '--max-minutes', '1e-9']) == STOPPED
    assert main(['evidence']) == 0 and called == [19, 19] and queue.done == ALL
    about = json.loads((queue.folder / 'far/a/hour/environment.json').read_text())
    assert about['threads'] == 1 and about['command'].startswith('dfkd run')
    assert len(results(queue.folder / 'results')) == 3
    monkeypatch.undo()
    assert main(['evidence', '--list', '--only', 'fast-6']) == 2
    assert "'fast-" in capsys.readouterr().err


# --- results ------------------------------------------------------------------------------


def left(folder, method, accuracy, seed=0, curve=((0, 0.1), (1800, 0.5), (3600, 0.8))):
    "The result and the history of a run that nobody has made."
    numbers = {'student_accuracy': accuracy, 'teacher_accuracy': 0.9, 'steps': 4000}
    result = Result(
        f'{HOUR_PAIR}-{method}',
        'hour',
        'generative',
        'made up',
        '',
        {'pair': HOUR_PAIR, 'method': method, 'seed': seed},
        numbers,
        {'synthesis': 5000.0, 'distillation': 5000.0, 'total': 10000.0},
        {'device': 'cpu', 'processor': 'one', 'threads': 1},
        processor_seconds={'synthesis': 1200.0, 'distillation': 2400.0, 'total': 3600.0},
    )
    place = folder / result.recipe / (f'hour-seed{seed}' if seed else 'hour')
    place.mkdir(parents=True)
    (place / 'result.json').write_text(result.to_json())
    rows = [f'distillation,{n},{a},{s}' for n, (s, a) in enumerate(curve)]
    rows = ['phase,step,accuracy,processor_seconds', 'synthesis,1,,7', *rows]
    (place / 'history.csv').write_text('\n'.join(rows) + '\n')


def test_curves_come_from_the_published_files_alone(tmp_path):
    left(tmp_path, 'fast-5', 0.8)
    left(tmp_path, 'fast-5', 0.7, seed=1, curve=((0, 0.1), (7200, 0.7)))
    left(tmp_path, 'fast-5-scratch', 0.6)
    left(tmp_path, 'scratch', 0.85)
    left(tmp_path, 'vanilla', 0.88)
    cells = comparison(results(tmp_path), 'hour')
    figure = draw_curves(cells, HOUR_PAIR, tmp_path)
    (axes,) = figure.axes
    curves = [
        line for line in axes.lines if len(line.get_xdata()) > 2 or line.get_ls() == '-'
    ]
    found = {tuple(zip(line.get_xdata(), line.get_ydata())) for line in curves}
    assert found == {((0, 10), (0.5, 50), (1, 80)), ((0, 10), (2, 70))}
    across = sorted(line.get_ydata()[0] for line in axes.lines if line.get_ls() == ':')
    assert across == pytest.approx([85, 88, 90])
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert 'KD on real data, 88.0 %' in words and 'teacher, 90.0 %' in words
    assert [text.get_text() for text in axes.texts] == ['Fast-5']
    matplotlib.pyplot.close(figure)
    assert draw_curves([], HOUR_PAIR, tmp_path) is None


def test_a_run_without_processor_seconds_has_no_curve(tmp_path):
    left(tmp_path, 'dafl', 0.8)
    path = tmp_path / f'{HOUR_PAIR}-dafl' / 'hour' / 'history.csv'
    path.write_text('phase,step,accuracy,seconds\ndistillation,0,0.1,3\n')
    assert learning_curve(results(tmp_path)[0], tmp_path) == []
    assert draw_curves(comparison(results(tmp_path), 'hour'), HOUR_PAIR, tmp_path) is None


def test_a_chapters_table_is_of_the_hour_scale_and_of_its_methods(tmp_path):
    "By hand: photographs first, then by the mean over the seeds; a quick run is no row."
    left(tmp_path, 'dafl', 0.85)
    left(tmp_path, 'vanilla', 0.84)
    for seed, accuracy in enumerate((0.80, 0.82)):
        left(tmp_path, 'fast-5', accuracy, seed)
    left(tmp_path, 'cmi', 0.9)
    left(tmp_path, 'zskt', 0.95)
    path = tmp_path / f'{HOUR_PAIR}-zskt' / 'hour' / 'result.json'
    path.write_text(path.read_text().replace('"hour"', '"quick"'))
    table = hour_table(results(tmp_path), ['fast-5', 'zskt', 'dafl', 'vanilla'])
    rows = [line.split(' | ')[:5] for line in table.splitlines()[2:5]]
    assert rows == [
        ['| KD on real data', '84.00', '1', '', '20.0 min'],
        ['| DAFL', '85.00', '1', '', '20.0 min'],
        ['| Fast-5', '81.00 ± 1.41', '2', '', '20.0 min'],
    ]
    assert '95.00' not in table and 'CMI' not in table and '90.00 %' in table


def test_a_row_has_the_processors_time(tmp_path):
    for seed, accuracy in enumerate((0.80, 0.82)):
        left(tmp_path, 'fast-5', accuracy, seed)
    (cell,) = comparison(results(tmp_path), 'hour')
    row = row_of(cell)
    assert row['synthesis, processor'] == '20.0 min' and row['seeds'] == '2'
    assert row['distillation, processor'] == '40.0 min' and 'synthesis' not in row
    assert row['accuracy, %'] == '81.00 ± 1.41' and 'gap' not in row
    assert not comparison(results(tmp_path), 'quick')


def test_missing_runs_are_counted(tmp_path):
    plan = evidence_plan()
    assert missing_evidence([], plan).startswith(f'Of {len(plan)} runs')
    left(tmp_path, 'fast-5', 0.8)
    left(tmp_path, 'fast-5', 0.8, seed=7)
    assert f'{len(plan) - 1} have no result yet' in missing_evidence(
        results(tmp_path), plan
    )
    assert missing_evidence(results(tmp_path), []).startswith('All 0')


def test_processor_time_of_a_run_is_counted_and_split(tmp_path, monkeypatch):
    "Synthesis, learning and tests apart; the history counts without the tests."

    def run(recipe, changes):
        made = Run(
            Recipe.load(recipe), 'quick', changes, tmp_path, device='cpu', quiet=True
        )
        return made, made.start()

    def slowly(self):
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
        return 0.5

    run('digits-teacher', {'epochs': 1.0, 'evaluations': 1})
    monkeypatch.setattr(StudentTraining, 'measure', slowly)
    few = {'rounds': 3, 'warmup_rounds': 1, 'steps_per_round': 6, 'evaluations': 2}
    made, result = run('digits-dafl', few | {'picture': 2, 'test_limit': 100})
    processor = result.processor_seconds
    assert {'synthesis', 'distillation', 'evaluation', 'total'} <= set(processor)
    assert all(value > 0 for value in processor.values())
    parts = sum(v for k, v in processor.items() if k != 'total')
    assert parts == pytest.approx(processor['total'], abs=0.05)
    rows = [
        row['processor_seconds']
        for row in read_history(made.folder / 'history.csv')
        if row['phase'] == 'distillation'
    ]
    assert len(rows) == 3 and rows == sorted(rows)
    spent = processor['synthesis'] + processor['distillation']
    # four tests of half a second are in none of them
    assert spent - 1 < rows[-1] <= spent + 0.05 and processor['evaluation'] >= 2
    assert Result.load(made.folder) == result
