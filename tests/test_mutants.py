"The list of deliberate faults fits the package: `make mutants` runs them."

from __future__ import annotations

import re

from mutants import ROOT, load_mutants


def test_every_fault_has_its_place_and_its_tests() -> None:
    mutants, known = load_mutants(), {}
    modules = {
        mutant.path: (ROOT / mutant.path).read_text(encoding='utf-8') for mutant in mutants
    }
    for path in (ROOT / 'tests').glob('test_*.py'):
        known[path.name] = set(
            re.findall(r'^def (test_\w+)', path.read_text(encoding='utf-8'), re.M)
        )
    wrong = []
    for mutant in mutants:
        try:
            mutant.applied(modules[mutant.path])
        except ValueError as error:
            wrong.append(str(error))
        for test in mutant.tests:
            file, _, name = test.partition('::')
            if file not in known or name and name.partition('[')[0] not in known[file]:
                wrong.append(f'{mutant.name}: there is no test {test}')
    assert not wrong, '\n'.join(wrong)
    assert len(mutants) >= 70 and len({mutant.name for mutant in mutants}) == len(mutants)
    assert all(mutant.old != mutant.new and mutant.tests for mutant in mutants)
    floors = {mutant.module.partition('/')[0] for mutant in mutants}
    tower = {'toolbox', 'foundations', 'dreams', 'generators', 'applications', 'lab'}
    assert floors == tower
