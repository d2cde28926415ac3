"""Runs of the book on a device that is not the CPU, for machines without a GPU.

    python tests/elsewhere.py LIBRARY FOLDER

`elsewhere.cpp` is such a device: its arithmetic is the CPU's, its rules are a GPU's.
Each task runs on both; what came out is printed as JSON.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from test_applications import TASKS, timed_once
from test_methods import DIFFERENT, tiny

from dfkd_nb.applications import latency
from dfkd_nb.foundations.method_tables import method_head
from dfkd_nb.lab.recipes import Recipe
from dfkd_nb.lab.runs import Run
from dfkd_nb.toolbox.core import pick_device
from dfkd_nb.toolbox.datasets import load_data

RUNS: dict[str, tuple[str, dict[str, object]]] = {
    f'digits-{name}': (f'digits-{name}', tiny(name)) for name in DIFFERENT
} | TASKS
# Adam's first steps have the size of its rate whatever the gradient: with few images and
# large rates last bits of sums, which each processor adds in its own order, become visible
CALM = {'synthesis_batch_size': 32, 'synthesis_learning_rate': 1e-4}
CALM |= {'latent_learning_rate': 1e-3, 'learning_rate': 0.01}
for name in DIFFERENT:
    if method_head(name)['task'] == 'generative':
        RUNS[f'digits-{name}'][1].update(CALM)
# its latents are no parameters
for name in ('digits-nayer', 'digits-mirror'):
    del RUNS[name][1]['latent_learning_rate']


def load(library: str) -> torch.device:
    "Make the device known to PyTorch."
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend('elsewhere')
    module = types.ModuleType('torch.elsewhere')
    for name, value in {
        'is_available': True,
        'device_count': 1,
        'current_device': 0,
        '_is_in_bad_fork': False,
    }.items():
        setattr(module, name, lambda value=value: value)
    module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    torch._register_device_module('elsewhere', module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device('elsewhere:0')


def main(library: str, folder: Path) -> None:
    there, pick = load(library), pick_device

    def picked(name: str | torch.device = 'auto') -> torch.device:
        return there if str(name).startswith('elsewhere') else pick(name)

    # wherever it was imported by name
    for module in list(sys.modules.values()):
        if vars(module).get('pick_device') is pick:
            module.pick_device = picked
    latency.shortest_call = timed_once
    torch.set_num_threads(1)
    outcomes: dict[str, dict[str, object]] = {name: {} for name in RUNS}
    for device in ('cpu', 'elsewhere'):
        where = {'out': folder / device, 'device': device, 'quiet': True}
        Run(
            Recipe.load('digits-teacher'),
            'quick',
            {'epochs': 1.0, 'evaluations': 1},
            **where,
        ).start()
        load_data('digits', 'train', limit=40).save(
            folder / device / 'digits-transfer-deepinversion/quick/images.safetensors'
        )
        for name, (recipe, changes) in RUNS.items():
            try:
                outcomes[name][device] = (
                    Run(Recipe.load(recipe), 'quick', changes, **where)
                    .start(fresh=True)
                    .numbers
                )
            except Exception as error:
                outcomes[name][device] = f'{type(error).__name__}: {error}'
    print(json.dumps(outcomes))


if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]))
