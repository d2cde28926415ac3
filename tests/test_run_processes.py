"""Several processes run a recipe together, to the images and the student of one, and stop
together whatever happens to one of them.

One process imports everything and forks the workers, with the variables that torchrun would
set; a last test calls torchrun itself.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'DFKD_PROGRESS': '0', 'MPLBACKEND': 'Agg'}
COMMON = """
teacher = "run:digits-teacher"
student = "digits-net"
test_data = "digits"
test_limit = 100
batch_size = 9
learning_rate = 0.02
warmup = 0.0
padding = 1
flip = false
evaluations = 1
picture = 1
synthesis_batch_size = 5
synthesis_steps = 4
"""
TRANSFER = 'jitter = 0\nsynthesis_flip = false\n'
GENERATIVE = 'generator_width = 8\nlatent_size = 8\nsteps_per_round = 2\nseed = 1\n'
# task and settings: a batch of images for each process and one over, a batch of the
# student's that does not divide evenly
RECIPES = {
    'dreams': ('transfer', TRANSFER + 'images = 15\nsteps = 4\n'),
    'rounds': (
        'transfer',
        TRANSFER + 'images = 30\nrounds = 2\nsteps = 6\nsteps_per_round = 2\n',
    ),
    'meta': (
        'generative',
        GENERATIVE
        + 'rounds = 3\nsynthesizer = "meta"\ninit = "meta"\nadversarial_weight = 1.0\n'
        + 'class_weight = 1.0\npool = "replay"\npool_size = 12\nprioritised = true\n',
    ),
    'drawn': ('generative', GENERATIVE + 'rounds = 3\npool = "none"\nclass_weight = 1.0\n'),
    'long': ('transfer', TRANSFER + 'images = 15\nsteps = 100000\n'),
    'dreaming': ('transfer', TRANSFER + 'images = 15\nsteps = 4\n'),
}


def write_recipes(root: Path) -> None:
    for name, (task, settings) in RECIPES.items():
        text = f'title = "{name}"\ntask = "{task}"\n[settings]\n{COMMON}{settings}'
        if name == 'dreaming':
            text = text.replace('synthesis_steps = 4', 'synthesis_steps = 100000')
        text += '[quick]\n[full]\n'
        (root / f'{name}.toml').write_text(text)


def spoiled(calls: int, method, fault):
    "A method that does something at its call of that number."
    left = [calls]

    def spoiling(self, *given, **named):
        left[0] -= 1
        if not left[0]:
            fault()
        return method(self, *given, **named)

    return spoiling


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise MemoryError('none left')


FAULTS = {'die': die, 'end': end, 'fail': fail}
# batches of a generator that two processes share
SHARED = 'plain', 'dropout', 'meta', 'fomaml', 'contrast', 'nayer', 'mirror'
# while a student learns, or while images are made: what happens, and to which process
ENDS = [
    ('long', 'die', 0),
    ('long', 'end', 1),
    ('long', 'fail', 1),
    ('dreaming', 'die', 1),
    ('dreaming', 'end', 0),
]


def fork(root: Path, name: str, count: int, work) -> dict:
    "Let so many processes do some work; their exit codes, seconds and messages."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    children, begun, heard = [], time.monotonic(), root / f'{name}.txt'
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            file = os.open(heard, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.environ |= {
                'RANK': str(rank),
                'LOCAL_RANK': str(rank),
                'WORLD_SIZE': str(count),
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(port),
            }
            code = work(rank)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    seconds = time.monotonic() - begun
    return {'codes': codes, 'seconds': seconds, 'heard': heard.read_text()}


def commands(
    root: Path,
    name: str,
    count: int,
    *words: str,
    out: str,
    fault: str = '',
    spoil: int = 1,
) -> dict:
    "Let so many processes run a recipe; `fault` happens to process number `spoil`."

    def work(rank: int) -> int:
        from dfkd_nb.dreams.inversion import DeepInversion
        from dfkd_nb.foundations.distillation import Distiller
        from dfkd_nb.lab.commands import main

        if fault and rank == spoil:
            where = DeepInversion if 'dreaming' in words[0] else Distiller
            where.step = spoiled(25, where.step, FAULTS[fault])
        more = ['--out', str(root / out), '--results', str(root / out / 'results')]
        return main(['run', *words, '--device', 'cpu', *more])

    return fork(root, name, count, work)


def distil(root: Path, kind: str):
    "A few steps in double precision, and all that they leave, as the work of a process."

    def work(rank: int) -> int:
        import torch
        from tiny import DIGITS, network

        from dfkd_nb.foundations.distillation import Distiller
        from dfkd_nb.generators.replay import ReplayPool
        from dfkd_nb.toolbox.augmentation import Augment
        from dfkd_nb.toolbox.data import ImageSet
        from dfkd_nb.toolbox.models import build_model
        from dfkd_nb.toolbox.processes import joined_processes, rank_and_world_size
        from dfkd_nb.toolbox.teachers import Teacher

        with joined_processes():
            count = rank_and_world_size()[1]
            rng = torch.Generator().manual_seed(0)
            images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8, generator=rng)
            teacher = Teacher(network(1).double(), DIGITS)
            # another one in each process: it begins as in the first
            torch.manual_seed(rank if kind == 'images' else 0)
            student = build_model('digits-net', 10, 1).double()
            source = ImageSet(images, torch.arange(30) % 10, DIGITS)
            more = {'label_weight': 0.5, 'mixup_alpha': 1.0, 'label_smoothing': 0.1}
            if kind == 'replay':
                pool = ReplayPool(DIGITS, 30, teacher, student)
                seen: list[int] = []
                hooks = [
                    network.register_forward_pre_hook(
                        lambda _, given: seen.append(len(given[0]))
                    )
                    for network in (teacher.model, student)
                ]
                pool.add(images[:29])  # asks both networks
                for hook in hooks:
                    hook.remove()
                source, more = pool, {}
            distiller = Distiller(
                teacher,
                student,
                source,
                steps=4,
                batch_size=7,
                augment=Augment(1),
                device='cpu',
                **more,
            ).run(log_every=2)
            left = {f'student.{k}': v for k, v in student.state_dict().items()}
            left |= {
                f'{key} {row["step"]}': torch.tensor(value)
                for row in distiller.history
                for key, value in row.items()
            }
            if kind == 'replay':
                left['priorities'] = source.priorities
                left['confidences'] = source.confidences
                left['seen'] = torch.tensor(seen)
            torch.save(left, root / f'{kind}-{rank}-of-{count}.pt')
        return 0

    return work


def share(root: Path, kind: str):
    "Three batches of a generator, and all that they leave, as the work of a process."

    def work(rank: int) -> int:
        import torch
        from tiny import DIGITS, network, stirred

        from dfkd_nb.dreams.priors import LossInputs
        from dfkd_nb.generators.contrastive import ContrastiveSynthesizer
        from dfkd_nb.generators.generators import Generator
        from dfkd_nb.generators.meta import MetaSynthesizer
        from dfkd_nb.generators.mirror import MirrorSynthesizer, mirror_of
        from dfkd_nb.generators.nayer import NayerSynthesizer
        from dfkd_nb.generators.synthesizer import GeneratorSynthesizer
        from dfkd_nb.toolbox.augmentation import Augment, random_flip
        from dfkd_nb.toolbox.models import build_model
        from dfkd_nb.toolbox.processes import joined_processes, rank_and_world_size
        from dfkd_nb.toolbox.teachers import Teacher

        def crowd(inputs: LossInputs) -> torch.Tensor:  # a loss that is no mean over rows
            return torch.cdist(inputs.logits, inputs.logits).add(1e-3).log().sum()

        builders = {
            'plain': GeneratorSynthesizer,
            'dropout': GeneratorSynthesizer,
            'meta': MetaSynthesizer,
            'fomaml': MetaSynthesizer,
            'contrast': ContrastiveSynthesizer,
            'nayer': NayerSynthesizer,
            'mirror': MirrorSynthesizer,
        }
        own = {
            'dropout': {'augment': random_flip},
            'meta': {'momentum': 0.1, 'latent_reuse': 2},
            'fomaml': {'meta_update': 'fomaml'},
            'contrast': {'bank_size': 40, 'negatives': 8, 'head_size': 8},
            'nayer': {'latent_learning_rate': 0.0},
            'mirror': {'latent_learning_rate': 0.0},
        }
        with joined_processes():
            count = rank_and_world_size()[1]
            teacher = Teacher(stirred(network(1)), DIGITS)
            torch.manual_seed(3)
            student = stirred(build_model('digits-net', 10, 1))
            generator: torch.nn.Module = Generator((1, 8, 8), latent_size=8, width=8)
            if kind == 'dropout':  # it draws, so each process has to draw for all
                torch.nn.Module.__setattr__(generator, 'row_by_row', False)
                generator.linear = torch.nn.Sequential(
                    generator.linear, torch.nn.Dropout(0.3)
                )
            if kind == 'mirror':
                generator = mirror_of(teacher, 8)
            settings = {
                'generator': generator,
                'steps': 3,
                'batch_size': 13,
                'student': student,
                'adversarial_weight': 0.5,
                'feature_weight': 1.0,
                'class_weight': 1.0,
                'balance_weight': 0.3,
                'activation_weight': 0.1,
                'tv_l2': 1e-3,
                'latent_learning_rate': 0.01,
                'augment': Augment(1),
                'terms': {'crowd': (1e-3, crowd)},
                'device': 'cpu',
            }
            maker = builders[kind](teacher, **(settings | own.get(kind, {})))
            rows, images = [], []
            maker.extractor.network.register_forward_pre_hook(
                lambda _, given: rows.append(len(given[0]))
            )
            for _ in range(3):
                for _ in range(maker.steps):
                    maker.step()
                images.append(maker.pop().images)
            drawn: list[int] = []
            maker.network.register_forward_pre_hook(
                lambda _, given: drawn.append(len(given[0]))
            )
            fresh = maker.sample_images(13, torch.Generator().manual_seed(5))
            left = {'images': torch.cat(images), 'rows': torch.tensor(rows[0])}
            left |= {'fresh': fresh, 'drawn': torch.tensor(drawn)}
            left |= {f'weight {k}': v.detach() for k, v in maker.weights.items()}
            left |= {f'buffer {k}': v for k, v in maker.buffers.items()}
            left |= {
                f'{key} {row["batch"]}': torch.tensor(value)
                for row in maker.history
                for key, value in row.items()
            }
            torch.save(left, root / f'share-{kind}-{rank}-of-{count}.pt')
        return 0

    return work


def main(root: Path) -> None:
    "All kinds of runs; prints what came of them as JSON."
    import torch
    from tiny import stirred

    from dfkd_nb.dreams import inversion  # noqa: F401
    from dfkd_nb.lab import run_command  # noqa: F401
    from dfkd_nb.lab.tasks import generative, pruning, transfer  # noqa: F401
    from dfkd_nb.toolbox.core import import_torchvision
    from dfkd_nb.toolbox.models import build_model
    from dfkd_nb.toolbox.networks import save_weights

    import_torchvision()
    write_recipes(root)
    torch.manual_seed(0)
    model = stirred(build_model('digits-net', 10, 1))
    for out in ('one', 'two', 'other'):
        path = root / out / 'digits-teacher' / 'quick' / 'weights.safetensors'
        save_weights(path, model, {'model': 'digits-net', 'domain': 'digits'})
    found = {}
    for kind in ('images', 'replay'):
        for count in (1, 2):
            name = f'distil-{kind}-{count}'
            found[name] = fork(root, name, count, distil(root, kind))
    for kind in SHARED:
        for count in (1, 2):
            name = f'share-{kind}-{count}'
            found[name] = fork(root, name, count, share(root, kind))
    for recipe in ('dreams', 'rounds', 'meta', 'drawn'):
        for count, out in ((1, 'one'), (2, 'two')):
            name, words = f'{recipe}-{count}', [str(root / f'{recipe}.toml')]
            found[name] = commands(root, name, count, *words, out=out)
    for recipe, fault, rank in ENDS:
        name, words = f'{recipe}-{fault}-{rank}', [str(root / f'{recipe}.toml')]
        how = {'out': name, 'fault': fault, 'spoil': rank}
        path = root / name / 'digits-teacher' / 'quick' / 'weights.safetensors'
        save_weights(path, model, {'model': 'digits-net', 'domain': 'digits'})
        found[name] = commands(root, name, 2, *words, '--save-every', '1e-9', **how)
    for recipe in ('dreams', 'rounds'):
        words = [str(root / f'{recipe}.toml'), '--resume', '--max-minutes', '1e-9']
        stopped = [
            commands(root, f'{recipe}-stopped', count, *words, out='other')
            for count in (2, 1)
        ]
        found[f'{recipe}-stopped'] = {'codes': [s['codes'] for s in stopped]}
        words = words[:2]
        found[f'{recipe}-resumed'] = commands(
            root, f'{recipe}-resumed', 2, *words, out='other'
        )
    found['refused'] = commands(root, 'refused', 2, 'digits-pruning', out='two')
    words = [str(root / 'dreams.toml')]
    found['again'] = commands(root, 'again', 2, *words, out='two')
    print(json.dumps(found))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The folders that all kinds of runs left, their exit codes and messages."
    if not hasattr(os, 'fork'):
        pytest.skip('needs fork')
    root = tmp_path_factory.mktemp('processes')
    done = subprocess.run(
        [sys.executable, __file__, str(root)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads(done.stdout.splitlines()[-1])


def reports(heard: str) -> list[str]:
    return [line for line in heard.splitlines() if line.startswith('dfkd: ')]


@pytest.mark.parametrize('kind', ['images', 'replay'])
def test_two_processes_take_the_steps_of_one(made, kind):
    "In double precision: BatchNorm, mixup, labels, priorities, an uneven batch, losses."
    import torch

    root, found = made
    assert found[f'distil-{kind}-1']['codes'] == [0]
    assert found[f'distil-{kind}-2']['codes'] == [0, 0], found[f'distil-{kind}-2']['heard']
    one = torch.load(root / f'{kind}-0-of-1.pt')
    if kind == 'replay':  # each process asks the networks about its own images
        assert one.pop('seen').tolist() == [29, 29]
    for rank in (0, 1):
        two = torch.load(root / f'{kind}-{rank}-of-2.pt')
        if kind == 'replay':
            assert two.pop('seen').tolist() == [14 + rank] * 2
        assert two.keys() == one.keys()
        for name, value in one.items():
            # the teacher's logits are float32: its kernels round by the size of a batch
            near = 1e-7 if name.startswith('student.') else 1e-5
            assert torch.allclose(two[name], value, rtol=near, atol=near), name


@pytest.mark.parametrize('kind', SHARED)
def test_two_processes_share_the_batch_of_a_generator(made, kind):
    "An uneven one, with losses that are no means over its rows."
    import torch

    root, found = made
    assert found[f'share-{kind}-1']['codes'] == [0], found[f'share-{kind}-1']['heard']
    assert found[f'share-{kind}-2']['codes'] == [0, 0], found[f'share-{kind}-2']['heard']
    one = torch.load(root / f'share-{kind}-0-of-1.pt')
    assert one.pop('rows') == 13 and one.pop('drawn').tolist() == [13]
    for rank, rows in ((0, 6), (1, 7)):
        two = torch.load(root / f'share-{kind}-{rank}-of-2.pt')
        assert two.pop('rows') == rows
        # fresh images for a student without a pool, too
        whole = kind in ('dropout', 'nayer', 'mirror')  # networks that draw
        assert two.pop('drawn').tolist() == [13 if whole else rows]
        assert two.keys() == one.keys()
        away = (two.pop('images').int() - one['images'].int()).abs()
        assert int(away.max()) <= 1 and away.float().mean() < 1e-3
        for name, value in two.items():
            assert torch.allclose(value, one[name], rtol=1e-4, atol=2e-5), name


@pytest.mark.parametrize('recipe', ['dreams', 'rounds', 'meta', 'drawn'])
def test_a_recipe_ends_with_the_images_of_one_and_nearly_its_student(made, recipe):
    from safetensors.torch import load_file

    root, found = made
    assert found[f'{recipe}-2']['codes'] == [0, 0], found[f'{recipe}-2']['heard']
    one, two = (root / out / recipe / 'quick' for out in ('one', 'two'))
    files = [sorted(p.name for p in folder.iterdir()) for folder in (one, two)]
    assert files[0] == files[1] and 'result.json' in files[0]
    images, others = (load_file(f / 'images.safetensors') for f in (one, two))
    away = (images['images'].int() - others['images'].int()).abs()
    # where images compete with the student, as near as the student is
    assert int(away.max()) <= (recipe not in ('dreams', 'drawn'))
    student, other = (load_file(f / 'weights.safetensors') for f in (one, two))
    for name, weight in student.items():
        assert other[name].allclose(weight, atol=2e-3), name
    rows = [
        {
            tuple(line.split(',')[:3])
            for line in (f / 'history.csv').read_text().splitlines()
        }
        for f in (one, two)
    ]
    assert rows[0] == rows[1]
    assert (root / 'two' / 'results' / recipe / 'quick' / 'result.json').is_file()
    noted = json.loads((two / 'result.json').read_text())['environment']
    assert noted['processes'] == 2 and noted['threads'] == 1
    assert found[f'{recipe}-2']['heard'].count('saved in') == 1


@pytest.mark.parametrize('recipe, fault, rank', ENDS)
def test_what_ends_one_ends_all_at_once(made, recipe, fault, rank):
    "With one line that says why, and a checkpoint."
    root, found = made
    name = f'{recipe}-{fault}-{rank}'
    ended = found[name]
    codes = {'die': [-signal.SIGKILL, 3], 'end': [3, 3], 'fail': [2, 3]}[fault]
    assert ended['codes'] == (codes[::-1] if rank else codes), ended['heard']
    assert ended['seconds'] < 60
    words = {
        'die': r'stopped \(another process has ended\)',
        'end': r'stopped \(SIGTERM\) with everything saved in .*--resume',
        'fail': 'error: there is not enough memory',
    }[fault]
    said = reports(ended['heard'])
    assert re.search(words, said[0])
    assert len(said) == 1
    assert (root / name / recipe / 'quick' / 'checkpoint.pt').is_file()


@pytest.mark.parametrize('recipe', ['dreams', 'rounds'])
def test_a_run_goes_on_with_another_number_of_processes(made, recipe):
    from safetensors.torch import load_file

    root, found = made
    assert found[f'{recipe}-stopped']['codes'] == [[3, 3], [3]]
    assert found[f'{recipe}-resumed']['codes'] == [0, 0], found[f'{recipe}-resumed']
    one, other = (root / out / recipe / 'quick' for out in ('one', 'other'))
    images, others = (load_file(f / 'images.safetensors') for f in (one, other))
    away = (images['images'].int() - others['images'].int()).abs()
    assert int(away.max()) <= (recipe == 'rounds')
    student, others = (load_file(f / 'weights.safetensors') for f in (one, other))
    assert all(others[k].allclose(weight, atol=2e-3) for k, weight in student.items())
    assert not (other / 'batches').exists()
    noted = json.loads((other / 'environment.json').read_text())
    assert (noted['processes'], noted['processes_before']) == (2, 1)


def test_what_one_refuses_all_refuse(made):
    _, found = made
    refused, again = found['refused'], found['again']
    assert refused['codes'] == [2, 2] and len(reports(refused['heard'])) == 1
    assert 'runs in one process: start it without torchrun' in refused['heard']
    assert again['codes'] == [0, 0] and again['heard'].count('is finished') == 1


def test_torchrun_is_asked_to_stop(made, tmp_path):
    root, _ = made
    torchrun = '-m torch.distributed.run --nproc-per-node 2 --standalone -m'.split()
    recipe = str(root / 'long.toml')
    command = ['dfkd_nb.lab.commands', 'run', recipe, '--out', str(root / 'two')]
    more = ['--device', 'cpu', '--save-every', '1e-9', '--results', str(tmp_path)]
    running = subprocess.Popen(
        [sys.executable, *torchrun, *command, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    checkpoint, begun = root / 'two' / 'long' / 'quick' / 'checkpoint.pt', time.monotonic()
    while not checkpoint.is_file() and time.monotonic() < begun + 240:
        time.sleep(0.1)
    running.terminate()
    heard = running.communicate(timeout=120)[0]
    assert running.returncode and checkpoint.is_file()
    said = reports(heard)
    assert len(said) == 1 and 'stopped (SIGTERM) with everything saved' in said[0], heard


if __name__ == '__main__':
    main(Path(sys.argv[1]))
