"""Work from outside the package: a folder with a module and recipes, and `dfkd run` in it.

The module registers a synthesizer, a pool and a task, about twenty lines each.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfkd_nb.lab.results import Result
from dfkd_nb.toolbox.data import ImageSet

ROOT = Path(__file__).resolve().parents[1]
MODULE = '''
from dataclasses import dataclass

import torch

from dfkd_nb import DOMAINS, Pool, SyntheticBatch, Synthesizer, Teacher, build_method
from dfkd_nb import build_model, evaluate, load_data
from dfkd_nb.generators.methods import register_pool, register_synthesizer
from dfkd_nb.lab.recipes import task
from dfkd_nb.lab.settings import setting


class Brightening(Synthesizer):
    "Noise that gets brighter, step by step."

    def __init__(self, domain, batch_size, steps_per_batch):
        self.domain, self.batch_size, self.limit = domain, batch_size, steps_per_batch
        self.generator, self.steps = torch.Generator().manual_seed(0), 0
        self.pixels = torch.zeros(0, *domain.shape)

    def step(self):
        if not self.steps:
            shape = (self.batch_size, *self.domain.shape)
            self.pixels = torch.rand(shape, generator=self.generator)
        self.pixels, self.steps = self.pixels.sqrt(), self.steps + 1

    @property
    def batch_done(self):
        return self.steps == self.limit

    def pop(self):
        self.steps = 0
        labels = torch.arange(self.batch_size) % self.domain.num_classes
        return SyntheticBatch((255 * self.pixels).round().to(torch.uint8), labels)

    def state_dict(self):
        rng = self.generator.get_state()
        return {'pixels': self.pixels, 'steps': self.steps, 'rng': rng}

    def load_state_dict(self, state):
        self.pixels, self.steps = state['pixels'], state['steps']
        self.generator.set_state(state['rng'])


class Newest(Pool):
    "The newest images alone."

    def __init__(self, domain, size):
        self.domain, self.size = domain, size
        self.images = torch.empty(0, *domain.shape, dtype=torch.uint8)
        self.labels = torch.empty(0, dtype=torch.long)

    def add(self, images, labels=None, teacher_logits=None, student_logits=None):
        self.images = torch.cat([self.images, images])[-self.size :]
        self.labels = torch.cat([self.labels, labels])[-self.size :]

    def sample(self, batch_size, generator):
        where = torch.randint(len(self), (batch_size,), generator=generator)
        return self.images[where], self.labels[where]

    def state_dict(self):
        return {'images': self.images, 'labels': self.labels}

    def load_state_dict(self, state):
        self.images, self.labels = state['images'], state['labels']


@register_synthesizer('brightening')
def brightening(parts):
    settings = parts.settings
    sizes = settings.synthesis_batch_size, settings.synthesis_steps
    return Brightening(parts.teacher.domain, *sizes)


@register_pool('newest')
def newest(parts):
    return Newest(parts.teacher.domain, parts.settings.pool_size)


@dataclass(frozen=True)
class BrightenSettings:
    rounds: int = setting(2, 'batches of images', low=1)
    seed: int = setting(0, 'of the networks')


@task('brighten', BrightenSettings)
def brighten(run):
    "A student of an untrained teacher: its accuracy on digits."
    torch.manual_seed(run.settings.seed)
    teacher = Teacher(build_model('digits-net', 10, 1), DOMAINS['digits'])
    row = {'synthesizer': 'brightening', 'pool': 'newest', 'pool_size': 12}
    row |= {'rounds': run.settings.rounds, 'steps_per_round': 3, 'synthesis_steps': 2}
    row |= {'synthesis_batch_size': 8, 'batch_size': 4}
    student = build_model('digits-net', 10, 1)
    trainer = build_method(row, teacher, student, device=run.device).run()
    test = load_data('digits', 'test', limit=50)
    return {
        'accuracy': evaluate(trainer.student, test),
        'kept': len(trainer.pool),
        'steps': trainer.done,
    }
'''
OWN_TASK = """
title = "Brighter and brighter"
task = "brighten"
plugins = ["brightening"]
[quick]
rounds = 4
"""
OWN_PARTS = """
title = "Parts of one's own in the generative task"
task = "generative"
plugins = ["brightening"]
[quick]
synthesizer = "brightening"
pool = "newest"
pool_size = 12
teacher = "cifar10-resnet20"
student = "resnet8"
test_data = "cifar10-mini"
test_limit = 20
rounds = 3
steps_per_round = 2
synthesis_steps = 2
synthesis_batch_size = 8
batch_size = 4
padding = 0
picture = 4
evaluations = 1
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "What somebody has who wrote a module and two recipes."
    here = tmp_path_factory.mktemp('outside')
    (here / 'brightening.py').write_text(MODULE)
    (here / 'own-task.toml').write_text(OWN_TASK)
    (here / 'own-parts.toml').write_text(OWN_PARTS)
    (here / 'no-plugin.toml').write_text(OWN_PARTS.replace('plugins', '# plugins'))
    return here


def dfkd(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    "The command, in a process of its own that works in the folder."
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    changes = {'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'DFKD_PROGRESS': '0'}
    program = [sys.executable, '-m', 'dfkd_nb.lab.commands', *words]
    settings = {'cwd': folder, 'env': os.environ | changes, 'timeout': 300}
    return subprocess.run(program, capture_output=True, text=True, **settings)


def test_a_task_of_ones_own_ends_with_a_result(folder: Path) -> None:
    done = dfkd(folder, 'run', 'own-task.toml', '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    result = Result.load(folder / 'runs' / 'own-task' / 'quick')
    assert result.numbers['kept'] == 12 and result.numbers['steps'] == 12
    assert 0 <= result.numbers['accuracy'] <= 1
    again = dfkd(folder, 'run', 'own-task.toml', '--set', 'rounds=0')
    assert again.returncode != 0 and again.stderr.count('\n') == 1
    assert "'rounds' is 0: give at least 1" in again.stderr


def test_registered_parts_in_a_recipe_of_the_generative_task(folder: Path) -> None:
    done = dfkd(folder, 'run', 'own-parts.toml', '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    where = folder / 'runs' / 'own-parts' / 'quick'
    assert Result.load(where).numbers['images'] == 24
    images = ImageSet.load(where / 'images.safetensors')
    assert len(images) == 12 and images.images.dtype == torch.uint8
    # twice the root of noise is bright
    assert images.images.float().mean() > 180


def test_without_its_plugin_the_recipe_is_refused_in_one_line(folder: Path) -> None:
    done = dfkd(folder, 'run', 'no-plugin.toml')
    assert done.returncode != 0 and done.stderr.count('\n') == 1
    assert "unknown pool 'newest'" in done.stderr and 'plugins' in done.stderr
