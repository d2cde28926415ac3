"""What all tests share: one thread each, and the same examples every time.

Notebooks run beside the other tests, for they take as long as everything else together. So
they begin with the first test, in processes of their own on the cores that the other tests
leave (`DFKD_JOBS` sets another number of them), and are asked for their outcome at the end;
then they have the core of the other tests as well.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue

# before PyTorch is loaded: many small tests gain nothing from more
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from notebook_server import ROOT as ROOT  # noqa: E402
from notebook_server import Outcome, Server  # noqa: E402

# The same examples on every machine and in every run, however busy it is: a failure is a
# failure for everybody.
settings.register_profile(
    'repeatable',
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile('repeatable')


@pytest.fixture(autouse=True)
def same_draws() -> None:
    "What a test draws from the global streams does not depend on the tests before it."
    random.seed(0)
    if 'torch' in sys.modules:
        sys.modules['torch'].manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Notebooks are asked last."
    items.sort(key=lambda item: item.get_closest_marker('notebook') is not None)


class Notebooks(dict[str, Future[Outcome]]):
    "What becomes of every notebook; so many run at a time."

    def __init__(
        self, names: list[str], jobs: int, folders: pytest.TempPathFactory
    ) -> None:
        self.places, self.waiting = threading.Semaphore(jobs), False
        self.pool = ThreadPoolExecutor(jobs + 1)
        self.servers: LifoQueue[Server] = LifoQueue()
        for _ in range(jobs + 1):
            self.servers.put(Server())
        super().__init__(
            (name, self.pool.submit(self.run, name, folders.mktemp(Path(name).stem)))
            for name in names
        )

    def run(self, name: str, directory: Path) -> Outcome:
        with self.places:
            server = self.servers.get()
            try:
                return server.run(name, directory)
            finally:
                self.servers.put(server)

    def outcome(self, name: str) -> Outcome:
        "Wait for one. Whoever waits has nothing else to do: one more may run from now on."
        if not self.waiting:
            self.places.release()
        self.waiting = True
        return self[name].result()


@pytest.fixture(scope='session', autouse=True)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Notebooks]:
    "All notebooks that were asked for, begun at once."
    asked = [
        item.callspec.params['name']
        for item in request.session.items
        if item.get_closest_marker('notebook')
    ]
    alone = len(asked) == len(request.session.items)
    jobs = int(
        os.environ.get('DFKD_JOBS', min(4, max(1, (os.cpu_count() or 1) - (not alone))))
    )
    notebooks = Notebooks(asked, jobs, tmp_path_factory)
    notebooks.waiting = alone  # then nothing is freed by waiting
    yield notebooks
    notebooks.pool.shutdown(cancel_futures=True)
    while not notebooks.servers.empty():
        notebooks.servers.get().close()
