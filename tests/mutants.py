"""Deliberate faults, each put into a copy of the package whose tests must then fail.

The list is `mutants.toml`. A fault that no test notices is a line that nobody checks.
`make mutants` runs them all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name('mutants.toml')
COPIED = 'dfkd_nb', 'tests', 'setup.cfg'
# by the process that others fork
PRELOADED = ['pytest', 'torch', 'matplotlib.pyplot', 'sklearn.datasets']


@dataclass(frozen=True)
class Mutant:
    "A fault: other text in one place of one module, and the tests that have to notice."

    name: str
    module: str  # e.g. 'foundations/data'
    old: str  # stands in the module exactly once, or `index` says which one is meant
    new: str
    tests: tuple[str, ...]  # 'test_x.py' or 'test_x.py::test_y'
    index: int = 0  # among equal texts, from 0
    of: int = 1  # how many equal texts there are

    @property
    def path(self) -> Path:
        return Path('dfkd_nb') / f'{self.module}.py'

    def applied(self, text: str) -> str:
        """The module with its fault; a `ValueError` where the text is not there as often as
        it should be.
        """
        parts = text.split(self.old)
        if len(parts) != self.of + 1:
            raise ValueError(
                f'{self.name}: {self.old!r} occurs {len(parts) - 1} times in {self.path},'
                f' not {self.of}'
            )
        return (
            self.old.join(parts[: self.index + 1])
            + self.new
            + self.old.join(parts[self.index + 1 :])
        )


def load_mutants(path: Path = LIST) -> list[Mutant]:
    "All of the list, in its order."
    rows = tomllib.loads(path.read_text(encoding='utf-8'))['mutant']
    return [Mutant(**row | {'tests': tuple(row['tests'])}) for row in rows]


class Watcher:
    "A plugin of pytest that remembers the first test that failed."

    def __init__(self) -> None:
        self.failed = ''

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def run_tests(folder: Path, tests: list[str]) -> None:
    """In a process of its own: pytest on the copy in `folder`; what came of it goes to a
    file there.
    """
    output = os.open(folder / 'output.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    # two texts of one length within a second would share it
    sys.dont_write_bytecode = True
    settings = {
        'PYTHONPATH': str(folder),
        'PYTHONDONTWRITEBYTECODE': '1',
        'MPLBACKEND': 'agg',
        'DFKD_PROGRESS': '0',
    }
    os.environ.update(settings | {'TMPDIR': str(folder / 'tmp')})
    import pytest

    watcher = Watcher()
    options = [
        '-x',
        '-q',
        '-p',
        'no:cacheprovider',
        '--durations=0',
        '--basetemp',
        str(folder / 'tmp' / 'pytest'),
    ]
    code = pytest.main([*options, *(f'tests/{test}' for test in tests)], plugins=[watcher])
    (folder / 'outcome.json').write_text(json.dumps([int(code), watcher.failed]))


@dataclass(frozen=True)
class Outcome:
    "What became of a mutant."

    word: str  # 'killed', 'survived' or 'error'
    by: str  # the test that failed first, or what went wrong
    seconds: float


class Worker:
    "A copy of package and tests in which one run after the other is made."

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        without = shutil.ignore_patterns('__pycache__')
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=without)
            else:
                shutil.copy2(source, folder / name)
        (folder / 'tmp').mkdir()
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context(
            'forkserver' if 'forkserver' in methods else 'spawn'
        )

    def run(self, tests: list[str], times: int = 1) -> Outcome:
        """The tests on the copy as it stands; 'survived' where all pass within so many
        times the limit.
        """
        (self.folder / 'outcome.json').unlink(missing_ok=True)
        began = time.monotonic()
        process = self.context.Process(target=run_tests, args=(self.folder, tests))
        process.start()
        process.join(self.limit * times)
        if process.is_alive():
            process.kill()
            process.join()
            return Outcome(
                'killed', f'no end after {self.limit * times:g} s', time.monotonic() - began
            )
        seconds = time.monotonic() - began
        shutil.rmtree(self.folder / 'tmp' / 'pytest', ignore_errors=True)
        if not (self.folder / 'outcome.json').is_file():
            return Outcome('killed', f'the process ended with {process.exitcode}', seconds)
        code, failed = json.loads((self.folder / 'outcome.json').read_text())
        if code == 0:
            return Outcome('survived', '', seconds)
        if code == 1:
            return Outcome('killed', failed.removeprefix('tests/'), seconds)
        # nothing collected, or the fault broke the collection
        return Outcome('error', self.last_lines(), seconds)

    def last_lines(self) -> str:
        lines = (
            (self.folder / 'output.txt').read_text(errors='replace').strip().splitlines()
        )
        return ' / '.join(lines[-3:])[-300:]

    def try_out(self, mutant: Mutant) -> Outcome:
        "The fault is put in, its tests are run, the fault is taken out."
        path = self.folder / mutant.path
        text = path.read_text(encoding='utf-8')
        try:
            path.write_text(mutant.applied(text), encoding='utf-8')
            return self.run(list(mutant.tests))
        except ValueError as error:
            return Outcome('error', str(error), 0.0)
        finally:
            path.write_text(text, encoding='utf-8')


@contextlib.contextmanager
def workers(count: int, limit: float) -> Iterator[list[Worker]]:
    "So many copies, in a folder that is removed at the end."
    with tempfile.TemporaryDirectory(prefix='mutants-') as name:
        folders = [Path(name) / str(number) for number in range(count)]
        for folder in folders:
            folder.mkdir()
        yield [Worker(folder, limit) for folder in folders]


def check_baseline(crew: list[Worker], mutants: list[Mutant]) -> str:
    """What fails where nothing was changed: then no mutant proves anything.

    Empty if all pass.
    """
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    files = sorted({test.partition('::')[0] for test in tests})
    shares = [
        [t for t in tests if t.partition('::')[0] in files[i :: len(crew)]]
        for i in range(len(crew))
    ]
    with ThreadPoolExecutor(len(crew)) as pool:
        found = list(
            pool.map(
                lambda worker, share: worker.run(share, len(mutants)),
                crew,
                filter(None, shares),
            )
        )
    return '; '.join(outcome.by for outcome in found if outcome.word != 'survived')


def main(words: list[str] | None = None) -> int:
    """0: all are killed, 1: some survive, 2: the list or the tests without any fault are
    not in order.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        '--only', default='', help='mutants whose name or module contains this'
    )
    parser.add_argument(
        '--list', action='store_true', help='names, places and tests; nothing is run'
    )
    parser.add_argument('--jobs', type=int, default=1, help='processes at a time')
    parser.add_argument(
        '--limit',
        type=float,
        default=120,
        help='seconds after which a run counts as killed',
    )
    parser.add_argument(
        '--no-baseline', action='store_true', help='skip the run without any fault'
    )
    choice = parser.parse_args(words)
    mutants = [
        m for m in load_mutants() if choice.only in m.name or choice.only in m.module
    ]
    if not mutants:
        parser.error(f"no mutant is called '{choice.only}': --list shows all")
    if choice.list:
        for mutant in mutants:
            print(f'{mutant.name:<44} {mutant.module:<26} {", ".join(mutant.tests)}')
        return 0
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    if 'forkserver' in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(PRELOADED)
    began = time.monotonic()
    with workers(max(1, min(choice.jobs, len(mutants))), choice.limit) as crew:
        if not choice.no_baseline and (wrong := check_baseline(crew, mutants)):
            print(f'without any fault these tests fail: {wrong}')
            return 2
        return report(crew, mutants, began)


def report(crew: list[Worker], mutants: list[Mutant], began: float) -> int:
    "Try all mutants, tell of each as it comes, and count."
    free = list(crew)

    def attempt(mutant: Mutant) -> Outcome:
        worker = free.pop()
        outcome = worker.try_out(mutant)
        free.append(worker)
        print(
            f'{outcome.word:<9}{outcome.seconds:5.1f} s  {mutant.name:<44} {outcome.by}',
            flush=True,
        )
        return outcome

    with ThreadPoolExecutor(len(crew)) as pool:
        outcomes = dict(zip((m.name for m in mutants), pool.map(attempt, mutants)))
    counts = {
        word: [n for n, o in outcomes.items() if o.word == word]
        for word in ('killed', 'survived', 'error')
    }
    parts = {module.partition('/')[0] for module in (m.module for m in mutants)}
    for part in sorted(parts):
        own = [outcomes[m.name] for m in mutants if m.module.startswith(part)]
        print(
            f'{part:<14} {sum(o.word == "killed" for o in own):>3} of {len(own):>3} killed'
        )
    seconds = time.monotonic() - began
    print(f'{len(counts["killed"])} of {len(mutants)} mutants killed in {seconds:.0f} s')
    for word in ('survived', 'error'):
        if counts[word]:
            print(f'{word}: {", ".join(counts[word])}')
    return 2 if counts['error'] else int(bool(counts['survived']))


if __name__ == '__main__':
    sys.exit(main())
