"A notebook that fails, dies or hangs is reported, and does not keep the next one."

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from notebook_server import FORKS, LIMIT, Server

ENDS = {
    'print(1)': '',
    'input()': 'EOFError',  # there is nobody to ask
    '1 / 0': 'ZeroDivisionError',
    'import os; os.kill(os.getpid(), 9)': 'exit -9',
    'import time; time.sleep(600)': 'took more than 1 s',
}


@pytest.mark.skipif(not FORKS, reason='needs fork')
def test_however_a_notebook_ends_the_next_one_runs(tmp_path: Path) -> None:
    server, file = Server(), tmp_path / 'one.ipynb'
    for number, (source, reported) in enumerate(ENDS.items()):
        cell = nbformat.v4.new_code_cell(source)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)
        (tmp_path / str(number)).mkdir()
        limit = 1 if 'sleep' in source else LIMIT
        outcome = server.run(str(file), tmp_path / str(number), limit)
        assert outcome.passed == (not reported) and reported in outcome.text, outcome
    server.close()
