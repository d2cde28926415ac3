"""The comparison: papers' figures as they were printed, cells that never mix what differs,
and nothing invented.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from cases import each

from dfkd_nb.lab.comparison import (
    METHOD_TITLES,
    best_cells,
    comparison,
    pair_title,
    paper_figures,
    paper_pairs,
    published,
    sample_std,
    standard_error,
    table_cell_of,
)
from dfkd_nb.lab.comparison_figures import draw_scatter
from dfkd_nb.lab.comparison_tables import (
    accuracy_matrix,
    detail_of,
    duration,
    markdown_table,
    missing_runs,
    other_rows,
    repeated_seeds,
    results_command,
    results_text,
    row_of,
    sections,
    table_cells,
    teacher_recipe,
    text_table,
)
from dfkd_nb.lab.evidence import NEWER
from dfkd_nb.lab.recipes import SCALES, recipe_names
from dfkd_nb.lab.results import REVISION, Result, results, teachers_note
from dfkd_nb.toolbox.errors import DFKDError

matplotlib.use('Agg')
ROOT = Path(__file__).resolve().parents[1]
PAIR = 'cifar10-wrn40-2-wrn16-1'


def made_up(
    accuracy=0.889,
    pair=PAIR,
    method='fast-5',
    seed=0,
    scale='full',
    steps=80000,
    **changes,
):
    "A result that no run has left."
    settings = {
        'pair': pair,
        'method': method,
        'seed': seed,
        'steps': steps,
        'temperature': 20.0,
        'student': 'wrn16-1',
    }
    settings |= {'teacher': 'run:cifar10-teacher-wrn40-2'} | changes.pop('settings', {})
    numbers = {
        'student_accuracy': accuracy,
        'teacher_accuracy': 0.9487,
        'images': 56320,
        'steps': steps,
    }
    numbers |= {'test_images': 10000} | changes.pop('numbers', {})
    seconds = {'synthesis': 60.0, 'distillation': 600.0, 'total': 700.0} | changes.pop(
        'seconds', {}
    )
    about = {
        'device': 'cuda',
        'processor': 'NVIDIA H200',
        'threads': 8,
        'seed': seed,
        'command': 'dfkd run x',
        'commit': 'abcdef12345',
    }
    about |= changes.pop('environment', {})
    return Result(
        f'{pair}-{method}',
        scale,
        'generative',
        'made up',
        '',
        settings,
        numbers,
        seconds,
        about,
    )


@pytest.fixture
def left(tmp_path):
    "Leaves results in a folder, one a run, as `publish` does."

    def leave(result, name):
        folder = tmp_path / result.recipe / name
        folder.mkdir(parents=True)
        (folder / 'result.json').write_text(result.to_json())
        return folder / 'result.json'

    leave.folder = tmp_path
    return leave


# --- what the papers printed --------------------------------------------------------------


def test_every_figure_stands_once_and_is_an_accuracy():
    keys = [(f.paper, f.table, f.pair, f.method) for f in paper_figures()]
    assert len(set(keys)) == len(keys) == 258
    assert all(
        20 < f.accuracy < 96 and f.method in {*METHOD_TITLES, 'teacher'}
        for f in paper_figures()
    )
    assert all(
        0 < hours < 310
        for f in paper_figures()
        for hours in (f.synthesis_hours, f.total_hours)
        if hours is not None
    )
    # no paper printed both
    assert not any(f.synthesis_hours and f.total_hours for f in paper_figures())


SPEED_UPS = {  # FastDFKD, Table 1, last column: not in our file
    'cifar10': {
        'cmi': 1.6,
        'dafl': 15.7,
        'zskt': 30.4,
        'dfq': 18.9,
        'fast-2': 655.0,
        'fast-5': 247.1,
        'fast-10': 126.7,
    },
    'cifar100': {
        'cmi': 1.6,
        'dafl': 15.2,
        'zskt': 30.4,
        'dfq': 18.8,
        'fast-2': 588.2,
        'fast-5': 253.1,
        'fast-10': 124.7,
    },
}


@pytest.mark.parametrize('data', SPEED_UPS)
def test_fastdfkds_hours_give_its_speed_ups(data):
    hours = {
        (f.pair, f.method): f.synthesis_hours
        for f in paper_figures()
        if f.paper == 'FastDFKD' and f.pair.startswith(data + '-')
    }
    for method, printed in SPEED_UPS[data].items():
        ratios = [
            hours[pair, 'deepinversion'] / hours[pair, m]
            for pair, m in hours
            if m == method
        ]
        assert len(ratios) == 5 and statistics.mean(ratios) == pytest.approx(
            printed, abs=0.051
        )


def test_ssd_kds_table_says_what_its_text_says():
    rows = {
        (f.pair, f.method): f
        for f in paper_figures()
        if (f.paper, f.table) == ('SSD-KD', 'Table 1')
    }
    pairs = [p for p in dict.fromkeys(p for p, _ in rows)]
    small = [p for p in pairs if p.startswith('cifar10-')]
    faster = [
        rows[p, 'fast-2'].total_hours / rows[p, 'ssd-kd-10'].total_hours for p in small
    ]
    assert (round(min(faster), 2), round(max(faster), 2)) == (1.90, 3.92)
    gains = [
        rows[p, 'ssd-kd-10'].accuracy - rows[p, 'fast-2'].accuracy
        for p in pairs
        if p.startswith('cifar100-')
    ]
    assert (round(min(gains), 2), round(max(gains), 2)) == (3.29, 10.19)
    assert (
        sum(rows[p, 'ssd-kd-10'].accuracy > rows[p, 'fast-2'].accuracy for p in small) == 4
    )


def test_papers_quote_each_other_faithfully_but_once():
    first = {
        (f.pair, f.method): f.accuracy for f in paper_figures() if f.paper == 'FastDFKD'
    }
    odd = [
        (f.pair, f.method)
        for f in paper_figures()
        if f.paper == 'SSD-KD' and first.get((f.pair, f.method), f.accuracy) != f.accuracy
    ]
    assert set(odd) == {('cifar10-vgg11-resnet18', 'scratch')}


def test_unconfirmed_figures_are_never_compared_with():
    doubtful = [f for f in paper_figures() if not f.confirmed]
    assert doubtful and all(f.paper == 'DeepInversion' for f in doubtful)
    for f in doubtful:
        assert (
            published(f.pair, f.method) is None
            or published(f.pair, f.method).source != f'{f.paper}, {f.table}'
        )


def test_ten_pairs_have_every_method():
    pairs = [p for p in paper_pairs() if p != 'cifar10-vgg11-vgg11']
    assert len(pairs) == 10
    absent = {
        (p, m)
        for p in pairs
        for m in ('teacher', *METHOD_TITLES)
        # of the hour scale only: in no table of CIFAR students
        if m not in ('noise', 'deepdream', 'metadata', *NEWER) and published(p, m) is None
    }
    # of DeepInversion's own table
    both = {'cifar10-resnet34-resnet18', 'cifar10-vgg11-resnet18'}
    assert absent == {(p, 'adaptive') for p in pairs if p not in both}
    assert (
        published(PAIR, 'ssd-kd-100').accuracy,
        published(PAIR, 'ssd-kd-100').total_hours,
    ) == (89.96, 1.48)


# --- cells --------------------------------------------------------------------------------


def test_nothing_gives_nothing():
    assert comparison([]) == [] and repeated_seeds([]) == [] and other_rows([]) == []
    assert markdown_table([]) == text_table([]) == ''
    cells = [
        text
        for row in accuracy_matrix([], 'cifar10')
        for key, text in row.items()
        if key != 'method'
    ]
    # no number of ours
    assert len(cells) == 13 * 5 and all(text.startswith('·') for text in cells)


def test_seeds_are_averaged_whatever_their_order():
    runs = [made_up(0.88, seed=2), made_up(0.90, seed=0), made_up(0.89, seed=1)]
    for order in (runs, runs[::-1]):
        (cell,) = comparison(order)
        assert (
            cell.seeds == [0, 1, 2]
            and cell.mean == pytest.approx(89.0)
            and sample_std(cell.accuracies) == pytest.approx(1.0)
        )
        assert standard_error(cell.accuracies) == pytest.approx(3**-0.5)
        assert (
            row_of(cell)['accuracy, %'] == '89.00 ± 1.00' and row_of(cell)['gap'] == '+0.10'
        )


def test_one_seed_has_no_spread():
    (cell,) = comparison([made_up()])
    assert (
        sample_std(cell.accuracies) is None
        and row_of(cell)['accuracy, %'] == '88.90'
        and '±' not in ' '.join(row_of(cell).values())
    )


def test_scales_are_never_mixed():
    runs = [made_up(0.9), made_up(0.5, seed=1, scale='quick')]
    assert [c.mean for c in comparison(runs, 'full')] == [pytest.approx(90)]
    assert [c.mean for c in comparison(runs, 'quick')] == [pytest.approx(50)]
    assert 'paper, %' not in row_of(comparison(runs, 'quick')[0])
    with pytest.raises(DFKDError, match="no scale 'medium'"):
        comparison(runs, 'medium')


def test_settings_are_never_mixed():
    long, short = comparison(
        [made_up(seed=0), made_up(seed=1), made_up(0.95, seed=2, steps=10)]
    )
    assert (len(long.runs), long.variant, short.variant) == (
        2,
        'steps 80000',
        'steps 10',
    )
    # the one with more seeds is shown
    assert accuracy_matrix([long, short], 'cifar10') == accuracy_matrix([long], 'cifar10')


def test_a_seed_counts_once_and_the_rest_is_told():
    runs = [made_up(0.88), made_up(0.90), made_up(0.89, seed=1)]
    (cell,) = comparison(runs)
    assert cell.accuracies == [pytest.approx(88), pytest.approx(89)] and repeated_seeds(
        runs
    ) == [runs[1]]
    assert '1 of the results repeat a seed' in results_text(runs)


def test_times_of_different_machines_are_not_averaged():
    (cell,) = comparison([made_up(), made_up(seed=1, environment={'processor': 'V100'})])
    assert (
        cell.hours('total') is None
        and row_of(cell)['synthesis'] == ''
        and 'V100' in cell.hardware
    )
    (cell,) = comparison([made_up(), made_up(seed=1, seconds={'total': 900.0})])
    assert (
        cell.hours('total') == pytest.approx(800 / 3600)
        and cell.hours('inspection') is None
    )


@each('value', [None, 88.9, -0.1, '0.9', True, float('nan')])
def test_an_accuracy_that_is_none_names_the_recipe(value):
    with pytest.raises(DFKDError, match=f"'{PAIR}-fast-5' .full. has student_accuracy"):
        row_of(comparison([made_up(value)])[0])


def test_other_runs_stand_apart():
    plain = made_up(settings={'pair': '', 'method': ''})
    assert (
        table_cell_of(plain.settings) is None
        and comparison([plain]) == []
        and len(other_rows([plain])) == 1
    )
    assert table_cell_of({'teacher': 'x'}) is None


def test_methods_of_ones_own_have_a_place():
    runs = [made_up(method='mine', pair='digits'), made_up(method='dafl', pair='digits')]
    assert [c.method for c in comparison(runs)] == ['dafl', 'mine']
    assert [row['method'] for row in accuracy_matrix(comparison(runs), 'digits')] == [
        'DAFL',
        'mine',
    ]
    assert 'mine' in results_text(runs) and published('digits', 'mine') is None


# --- what is missing, and what belongs to a number ----------------------------------------


@pytest.mark.parametrize('scale', SCALES)
def test_the_next_command_names_a_recipe(scale):
    wanted = table_cells(scale)
    assert set(wanted.values()) <= set(recipe_names())
    printed = missing_runs([], wanted, scale)
    assert (
        str(len(wanted)) in printed and f'--scale {scale}' in printed
        if wanted
        else 'No recipe' in printed
    )


def test_missing_counts_places_and_seeds():
    wanted = {(PAIR, 'fast-5'): 'a', (PAIR, 'dafl'): 'b'}
    assert '2 have no run yet and 0 fewer' in missing_runs([], wanted, 'full')
    assert '1 have no run yet and 1 fewer' in missing_runs(
        comparison([made_up()]), wanted, 'full'
    )
    runs = [made_up(seed=s, method=m) for s in range(3) for m in ('fast-5', 'dafl')]
    assert missing_runs(comparison(runs[2:]), wanted, 'full').count('--seed 2') == 1
    assert missing_runs(comparison(runs), wanted, 'full').startswith('All 2 cells')


def test_details_answer_what_readers_ask():
    row = detail_of(made_up(settings={'student_init': 'teacher-blocks'}))
    assert (
        row['T'] == '20'
        and '94.87 %' in row['teacher']
        and 'cifar10-teacher-wrn40-2' in row['teacher']
    )
    assert 'teacher-blocks' in row['student'] and row['hardware'] == 'NVIDIA H200'
    assert row['command'] == '`dfkd run x`' and row['commit'] == 'abcdef1'
    assert (
        teacher_recipe('run:cifar10-teacher-vgg11/full') == 'cifar10-teacher-vgg11'
        and teacher_recipe('') == ''
    )


def test_words():
    assert (
        pair_title('cifar100-vgg11-resnet18') == 'CIFAR-100, VGG-11 → ResNet-18'
        and pair_title('digits') == 'digits'
    )
    assert [duration(h) for h in (None, 0.01, 0.2, 2)] == ['', '36 s', '12.0 min', '2.00 h']
    assert markdown_table([{'a': 'x|y', 'b': '1.5'}]).splitlines() == [
        '| a | b |',
        '| --- | --: |',
        '| x\\|y | 1.5 |',
    ]
    assert text_table([{'a': 'x', 'b': ''}, {'a': 'long', 'b': ''}]).splitlines() == [
        'a',
        'x',
        'long',
    ]


# --- files --------------------------------------------------------------------------------


def test_results_come_from_files(left, capsys):
    for seed, accuracy in enumerate((0.88, 0.90)):
        left(made_up(accuracy, seed=seed), f'full-seed{seed}')
    left(made_up(0.5, scale='quick'), 'quick')
    assert results_command(left.folder) == 0
    printed = capsys.readouterr().out
    assert (
        '89.00 ± 1.41' in printed
        and '50.00' in printed
        and printed.index('full scale') < printed.index('quick scale')
    )
    assert results_command(left.folder, 'quick') == 0
    assert '89.00' not in capsys.readouterr().out


def test_no_results(tmp_path):
    with pytest.raises(DFKDError, match='no results under'):
        results_command(tmp_path)
    with pytest.raises(DFKDError, match='no results under'):
        results_command(tmp_path / 'not there')


@pytest.mark.parametrize('keep', [0, 1, 200, -3])
def test_a_truncated_result_names_its_file(left, keep):
    left(made_up(), 'full')
    path = left(made_up(method='dafl'), 'full')
    path.write_text(path.read_text()[:keep])
    with pytest.raises(DFKDError, match='dafl.*result.json'):
        results_command(left.folder)


def test_looking_does_not_load_torch(left):
    left(made_up(), 'full')
    code = (
        'import sys\nfrom dfkd_nb.lab.comparison_tables import'
        " results_command\nresults_command(sys.argv[1])\nassert 'torch' not in"
        ' sys.modules'
    )
    subprocess.run(
        [sys.executable, '-c', code, str(left.folder)],
        check=True,
        capture_output=True,
        timeout=60,
    )


def test_pictures_with_and_without_runs():
    import matplotlib.pyplot as plt

    empty = draw_scatter([], PAIR)
    full = draw_scatter(comparison([made_up(seed=s) for s in range(2)]), PAIR)
    words = [
        [t.get_text() for ax in figure.axes for t in ax.texts] for figure in (empty, full)
    ]
    assert words[1].count('Fast-5') == words[0].count('Fast-5') + 2  # ours on both clocks
    assert [ax.get_xscale() for ax in full.axes] == ['log', 'log']
    draw_scatter([], 'digits')
    plt.close('all')


def test_the_page_shows_every_run_of_the_comparison():
    compared = {r.recipe for r in results(ROOT / 'results') if table_cell_of(r.settings)}
    cells = json.loads((ROOT / 'nbs/lab/21_comparison.ipynb').read_text(encoding='utf-8'))[
        'cells'
    ]
    stored = json.dumps([cell.get('outputs', []) for cell in cells])
    absent = sorted(name for name in compared if f'`{name}`' not in stored)
    assert not absent, f'run `make results`: {absent} are new'


# --- older than a mend


def older(**changes):
    "A result of an earlier revision."
    return dataclasses.replace(made_up(**changes), revision=REVISION - 1)


def test_revisions_are_never_averaged():
    found = [
        older(accuracy=0.80, seed=0),
        older(accuracy=0.82, seed=1),
        older(accuracy=0.84, seed=2),
        made_up(accuracy=0.90, seed=3),
    ]
    new, old = comparison(found)
    assert (new.revision, new.accuracies, new.variant) == (
        REVISION,
        [90.0],
        f'revision {REVISION}',
    )
    assert (old.revision, old.seeds, old.variant) == (
        REVISION - 1,
        [0, 1, 2],
        f'revision {REVISION - 1}',
    )
    assert best_cells([old, new])[PAIR, 'fast-5'] is new, (
        'the newest counts, however few its seeds'
    )
    assert best_cells([old])[PAIR, 'fast-5'] is old


def test_numbers_that_are_older_carry_a_sign_and_the_table_a_sentence():
    old, new = older(accuracy=0.80), made_up(accuracy=0.90, method='dafl')
    cells = comparison([old, new])
    rows = {cell.method: row_of(cell)['accuracy, %'] for cell in cells}
    assert rows == {'fast-5': '80.00†', 'dafl': '90.00'}
    note = f'† 1 of these 2 runs was made before revision {REVISION}'
    for table in (markdown_table, text_table):
        assert sections(cells, table).count(note) == 1 and '80.00†' in sections(
            cells, table
        )
    assert 'older' not in sections(comparison([new]))
    grid = {
        row['method']: row['WRN-40-2 → WRN-16-1']
        for row in accuracy_matrix(cells, 'cifar10')
    }
    assert grid['Fast-5'] == '80.00† / *88.90*' and '†' not in grid['DAFL']
    assert (
        detail_of(old)['accuracy, %'] == '80.00†'
        and detail_of(new)['accuracy, %'] == '90.00'
    )
    assert '--:' in markdown_table([row_of(cells[0])]).splitlines()[1], (
        'a column of marked numbers stays to the right'
    )
    aside = older(pair='', method='')
    assert other_rows([aside])[0]['accuracy, %'] == '88.90†'
    assert results_text([old, aside]).count('made before revision') == 2, 'once a table'


def test_the_list_of_results_marks_them_too(left, capsys):
    from dfkd_nb.lab.commands import main

    left(older(accuracy=0.80), 'full')
    left(made_up(accuracy=0.90, method='dafl'), 'full')
    assert main(['results', '--folder', str(left.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith('†') for line in lines[:2]] == [False, True] and lines[0].split()[
        0
    ].endswith('dafl')
    assert lines[-1].startswith('† 1 of these 2 runs')


def test_pictures_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    draw_scatter(comparison([made_up(), made_up(seed=1, accuracy=0.9)]), PAIR)
    assert dict(matplotlib.rcParams) == before


def test_rows_of_different_teachers_are_told():
    a, b = made_up(), made_up(seed=1)
    for run in (a, b):
        run.settings['teacher'] = 'run:cifar10-teacher-wrn40-2'
        run.environment['teacher'] = '0123456789abcdef'
    assert not teachers_note([a, b])
    b.environment['teacher'] = 'fedcba9876543210'
    assert '2 different ones' in teachers_note([a, b])
    assert teachers_note([a, b]) in sections(comparison([a, b]))
    del b.environment['teacher']  # not known: it may have been another
    assert '2 different ones' in teachers_note([a, b])
    for run in (a, b):  # the same everywhere
        run.settings['teacher'] = 'cifar10-resnet20'
    assert not teachers_note([a, b])
