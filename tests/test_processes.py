"""Several processes make the images that one makes, also when one of them is killed.

One process imports everything and forks the workers, with the variables that torchrun would
set; a last test calls torchrun itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

NETWORK = (
    '--model digits-net --num-classes 10 --mean 0.3 --std 0.4 --size 8 --device cpu'.split()
)
SETTINGS = (
    '--images 10 --set synthesis_batch_size=2 --set synthesis_steps=6'
    ' --save-every 1e-9'.split()
)
COMMAND = ['invert', *NETWORK, *SETTINGS]
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'DFKD_PROGRESS': '0', 'MPLBACKEND': 'Agg'}


def dying_after(updates: int, step):
    "An update that kills its process when it has been made so often."
    left = [updates]

    def dying(self):
        step(self)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return dying


def slow(seconds: float, work):
    "The share of a process, which takes so much longer."

    def waiting(self):
        time.sleep(seconds)
        return work(self)

    return waiting


def workers(
    root: Path, count: int, *words: str, killed: int | None = None, late: int | None = None
) -> list[int]:
    """Fork so many processes that run the command together. Returns exit codes.

    `killed` kills itself in its second batch. `late` takes 2.5 seconds more than the
    others, while gloo's own limit on waiting, half an hour, is one second.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.environ |= {
                'RANK': str(rank),
                'LOCAL_RANK': str(rank),
                'WORLD_SIZE': str(count),
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(port),
            }
            from torch.distributed import distributed_c10d

            from dfkd_nb.dreams.inversion import DeepInversion
            from dfkd_nb.lab.commands import main
            from dfkd_nb.lab.invert import DreamWorker

            if rank == killed:
                DeepInversion.step = dying_after(9, DeepInversion.step)
            if late is not None:
                distributed_c10d.default_pg_timeout = timedelta(seconds=1)
            if rank == late:
                DreamWorker.work = slow(2.5, DreamWorker.work)
            code = main([*COMMAND, '--checkpoint', str(root / 'own.safetensors'), *words])
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(root: Path) -> None:
    "Every way to the same images; prints exit codes as JSON."
    import torch
    from tiny import stirred

    from dfkd_nb.dreams import inversion  # noqa: F401
    from dfkd_nb.lab import invert  # noqa: F401
    from dfkd_nb.toolbox.core import import_torchvision
    from dfkd_nb.toolbox.models import build_model
    from dfkd_nb.toolbox.networks import save_weights

    import_torchvision()
    torch.manual_seed(0)
    model = stirred(build_model('digits-net', 10, 1))
    save_weights(root / 'own.safetensors', model, half=False)
    latents = {
        'one': workers(root, 1, '--out', str(root / 'one')),
        'two': workers(root, 2, '--out', str(root / 'two')),
        'parquet': workers(root, 2, '--out', str(root / 'parquet'), '--format', 'parquet'),
    }
    for rank in range(2):
        latents[f'late-{rank}'] = workers(
            root, 2, '--out', str(root / f'late-{rank}'), late=rank
        )
    for rank in range(2):
        folder, begun = str(root / f'killed-{rank}'), time.monotonic()
        latents[f'killed-{rank}'] = workers(root, 2, '--out', folder, killed=rank)
        latents[f'seconds-{rank}'] = time.monotonic() - begun
        (root / f'left-{rank}.json').write_text(
            json.dumps(sorted(p.name for p in Path(folder).iterdir()))
        )
        latents[f'resumed-{rank}'] = workers(root, 2 - rank, '--out', folder, '--resume')
    latents['refused'] = workers(root, 2, '--out', str(root / 'two'))
    print(json.dumps(latents))


def images(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob('*.png'))
    }


def lines(folder: Path) -> list[dict]:
    return json.loads((folder / 'manifest.json').read_text())['images']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The folders that all kinds of runs left, and their exit codes."
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
    return root, json.loads(done.stdout.splitlines()[-1]), done


def test_two_processes_make_the_images_of_one(made):
    root, latents, _ = made
    assert latents['one'] == [0] and latents['two'] == [0, 0]
    assert len(images(root / 'one')) == 10
    assert images(root / 'two') == images(root / 'one') and lines(root / 'two') == lines(
        root / 'one'
    )
    assert sorted(p.name for p in (root / 'two').iterdir()) == sorted(
        p.name for p in (root / 'one').iterdir()
    )


def test_and_the_table_of_one(made):
    from dfkd_nb.toolbox.formats import read_parquet

    root, latents, _ = made
    assert latents['parquet'] == [0, 0]
    encoded, labels = read_parquet([root / 'parquet/images.parquet'])
    expected = lines(root / 'one')
    assert encoded == [(root / 'one' / line['file']).read_bytes() for line in expected]
    assert labels.tolist() == [line['class'] for line in expected]


@pytest.mark.parametrize('rank', [0, 1])
def test_the_first_that_is_ready_waits_as_long_as_it_takes(made, rank):
    root, latents, _ = made
    assert latents[f'late-{rank}'] == [0, 0]
    assert images(root / f'late-{rank}') == images(root / 'one')


@pytest.mark.parametrize('rank', [0, 1])
def test_one_is_killed_and_all_are_resumed(made, rank):
    "The other one finishes its share and stops, soon; two, or one alone, make the rest."
    root, latents, done = made
    assert latents[f'seconds-{rank}'] < 20
    assert (
        latents[f'killed-{rank}'][rank] == -signal.SIGKILL
        and latents[f'killed-{rank}'][1 - rank] == 3
    )
    assert 'another process has ended' in done.stderr
    left = json.loads((root / f'left-{rank}.json').read_text())
    finished = [
        name for name in left if name.startswith('unfinished-') and name.endswith('.json')
    ]
    assert (
        len(finished) == (3 if rank == 0 else 4)
        and sum(name.endswith('.pt') for name in left) == 1
    ), left
    assert set(latents[f'resumed-{rank}']) == {0}
    assert images(root / f'killed-{rank}') == images(root / 'one')
    assert lines(root / f'killed-{rank}') == lines(root / 'one')


def test_what_one_refuses_all_refuse(made):
    _, latents, done = made
    assert latents['refused'] == [2, 2] and done.stderr.count('is not empty') == 1


def test_torchrun(made, tmp_path):
    root, _, _ = made
    torchrun = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nproc-per-node',
        '2',
        '--standalone',
        '-m',
        'dfkd_nb.lab.commands',
    ]
    words = [
        *COMMAND,
        '--checkpoint',
        str(root / 'own.safetensors'),
        '--out',
        str(tmp_path / 'dreams'),
    ]
    done = subprocess.run(
        [*torchrun, *words],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('10 images in') == 1
    assert images(tmp_path / 'dreams') == images(root / 'one')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
