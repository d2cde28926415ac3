"""Kills at random moments, each resumed, and the same bytes at the end.

    python tests/test_kill.py --kills 100                 every kind of run
    python tests/test_kill.py --kills 10 --kinds cmi,fast  some of them

Every kind is a small run on digits or on drawn scenes. One process imports everything and
forks a child for every attempt, so that most of a child's life is the run itself and the
kills land inside it.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

Settings = dict[str, object]
SMALL: Settings = {'evaluations': 3, 'batch_size': 32, 'test_limit': 100, 'picture': 2}
STUDENT = SMALL | {
    'images': 40,
    'synthesis_batch_size': 20,
    'synthesis_steps': 25,
    'steps': 60,
    'test_limit': 60,
}
METADATA: Settings = {
    'embedding_weight': 1.0,
    'real_data': 'digits',
    'metadata_images': 300,
    'metadata_components': 5,
}
GENERATOR: Settings = {'generator_width': 8, 'latent_size': 16}
GENERATED = SMALL | GENERATOR | {'rounds': 12, 'warmup_rounds': 2, 'steps_per_round': 6}
GENERATED |= {'synthesis_steps': 3, 'synthesis_batch_size': 24}
PRUNED = SMALL | {
    'teacher': 'run:digits-teacher',
    'images': 40,
    'importance_images': 40,
    'timed_networks': 0,
    'steps': 30,
}
BITS = SMALL | {
    'teacher': 'run:digits-teacher',
    'images': 40,
    'images_from': 'noise, none',
    'bits': '4',
}
BITS |= {'steps': 40, 'latency_batch_size': 0}
FILES = SMALL | {
    'teacher': 'run:digits-teacher',
    'student': 'digits-net',
    'test_data': 'digits',
    'recovery_steps': 40,
    'views': 4,
    'epochs': 40,
    'flip': False,
}
CALIBRATED = SMALL | {
    'teacher': 'run:digits-teacher',
    'test_data': 'digits',
    'test_limit': 60,
    'widths': 'W4A4',
    'images': 20,
    'synthesis_steps': 60,
    'synthesis_batch_size': 10,
    'synthesis_flip': False,
    'steps': 60,
}
SCENES = (
    SMALL
    | GENERATOR
    | {
        'limit': 30,
        'test_limit': 6,
        'teacher_steps': 6,
        'steps': 12,
        'batch_size': 8,
    }
)
SCENES |= {
    'picture': 2,
    'rounds': 5,
    'warmup_rounds': 1,
    'synthesis_steps': 2,
    'synthesis_batch_size': 8,
    'pool_size': 20,
}
CLASSES = SMALL | {
    'old_data': 'digits:0-4',
    'test_data': 'digits:0-4',
    'new_data': 'digits:5-9',
    'new_tests': 'digits:5-9',
}
CLASSES |= {
    'old_model': 'digits-net',
    'old_epochs': 1.0,
    'old_limit': 200,
    'steps': 30,
    'binary_tuning_steps': 10,
}
CLASSES |= {
    'images': 40,
    'synthesis_steps': 12,
    'half_size_steps': 0,
    'generator_rounds': 8,
}
KINDS: dict[str, tuple[str, Settings]] = {  # recipe, and what makes it small
    'transfer': ('digits-transfer-deepinversion', STUDENT),
    # two students draw from one set
    'scenes': ('scenes-segmentation', SCENES | {'sources': 'labels, real'}),
    'dropout': (
        'digits-vanilla',
        SMALL
        | {
            'student': 'mobilenetv2',
            'steps': 6,
            'images': 60,
            'batch_size': 8,
            'test_limit': 30,
        },
    ),
    'teacher': ('digits-teacher', {'epochs': 3.0, 'evaluations': 4}),
    'adaptive': (
        'digits-adaptive',
        STUDENT | {'rounds': 2, 'steps_per_round': 30, 'synthesis_steps': 15},
    ),
    'metadata': ('digits-transfer-deepinversion', STUDENT | METADATA),
    'dafl': ('digits-dafl', GENERATED),
    'zskt': (
        'digits-zskt',
        GENERATED | {'warmup_rounds': 0, 'synthesis_schedule': 'cosine'},
    ),
    'dfq': ('digits-dfq', GENERATED),
    'averaged': ('digits-dfq-ema', GENERATED),
    'noise layers': ('digits-nayer', GENERATED | {'generator_life': 2}),
    'mirrored': ('digits-mirror', GENERATED | {'generator_life': 2}),
    'filtered': ('digits-dfq-accept', GENERATED),
    'cmi': ('digits-cmi', GENERATED),
    'fast': ('digits-fast-5', GENERATED),
    'ssd-kd': ('digits-ssd-kd-10', GENERATED | {'pool_size': 60}),
    'scenes painted': (
        'scenes-segmentation',
        SCENES | {'sources': 'noise, dreams, replay'},
    ),
    'pruning': (
        'digits-pruning',
        PRUNED | {'fractions': '0.3', 'sources': {'static': 'noise', 'real': 'digits'}},
    ),
    'pruning while learning': (
        'digits-pruning',
        PRUNED
        | {
            'fractions': '0.2',
            'sources': {'static': 'noise'},
            'removal_interval': 4,
        },
    ),
    'quantization': ('digits-quantization', BITS),
    'calibration': (
        'cifar10-calibration',
        CALIBRATED | {'rows': 'deepinversion, intraq, dfq'},
    ),
    'distilled-data': (
        'cifar10-distilled-data',
        FILES | {'images_from': 'crops, noise', 'images_per_class': '1, 2'},
    ),
    'continual': (
        'cifar10-continual-split',
        CLASSES | {'methods': 'lwf-mc, deepinversion, generator, oracle-distill'},
    ),
}
# words in the names of what a stopwatch says
TIMED = ('seconds', 'latency', 'milliseconds')


def attempt(kind: str, out: Path) -> int:
    """Fork a child that goes on with the run until it is done, whatever its random streams
    were before.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        import torch

        from dfkd_nb.lab.recipes import Recipe
        from dfkd_nb.lab.runs import Run

        torch.manual_seed(os.getpid())
        random.seed(os.getpid())
        recipe, changes = KINDS[kind]
        where = {
            'out': out,
            'results': out / 'results',
            'save_every': 0.02,
            'device': 'cpu',
            'quiet': True,
        }
        Run(Recipe.load(recipe), 'quick', changes, **where).start(resume=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    "The exit code if the child ends within so long, else None."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def where(folder: Path) -> str:
    "What the killed process was doing, as far as its folder tells."
    from dfkd_nb.toolbox.core import load_checkpoint

    if list(folder.glob('**/.*.tmp')):
        return 'writing a file'
    if not (folder / 'journal.jsonl').is_file():
        return 'starting'
    lines = (folder / 'journal.jsonl').read_text().splitlines()[1:]
    phases = [json.loads(line)['phase'] for line in lines if line.endswith('}')]
    checkpoint = folder / 'checkpoint.pt'
    done = list(load_checkpoint(checkpoint)['phases']) if checkpoint.is_file() else []
    inside = not done or phases and phases[-1] not in done
    return (
        f'in {phases[-1] if phases else "the first phase"}'
        if inside
        else f'after {done[-1]}'
    )


def untimed(numbers: object) -> object:
    "Numbers without what a stopwatch said."
    if isinstance(numbers, list):
        return [untimed(part) for part in numbers]
    if not isinstance(numbers, dict):
        return numbers
    return {
        key: untimed(part)
        for key, part in numbers.items()
        if not any(word in key for word in TIMED)
    }


def left(folder: Path) -> dict[str, object]:
    "All that a run left, by file, without its timings: bytes where no time is in them."
    from dfkd_nb.lab.results import read_history

    found: dict[str, object] = {}
    for path in sorted(folder.rglob('*')):
        if path.suffix in ('.safetensors', '.png', '.toml'):
            found[path.name] = path.read_bytes()
    result = json.loads((folder / 'result.json').read_text())
    found['numbers'] = untimed(result['numbers'])
    found['settings'] = result['settings']
    found['history'] = untimed(read_history(folder / 'history.csv'))
    return found


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]


def prepare(root: Path) -> None:
    "What the runs take from others: a network that has seen something, and images."
    import torch
    from tiny import stirred

    from dfkd_nb.toolbox.datasets import load_data
    from dfkd_nb.toolbox.models import build_model
    from dfkd_nb.toolbox.networks import save_weights

    torch.manual_seed(0)
    model, about = (
        stirred(build_model('digits-net', 10, 1)),
        {'model': 'digits-net', 'domain': 'digits'},
    )
    save_weights(
        root / 'digits-teacher/quick/weights.safetensors', model, about, half=False
    )
    load_data('digits', 'train', limit=60).save(
        root / 'digits-transfer-deepinversion/quick/images.safetensors'
    )


def folder_of(kind: str, out: Path, needs: Path) -> Path:
    "The folder of a run of this kind; beside it lies what it needs."
    own = KINDS[kind][0]
    out.mkdir(parents=True, exist_ok=True)
    for name in ('digits-teacher', 'digits-transfer-deepinversion'):
        if name != own and not (out / name).exists():
            (out / name).symlink_to(needs / name)
    return out / own / 'quick'


def kill(kind: str, kills: int, root: Path, draw: random.Random) -> dict[str, object]:
    """One run undisturbed, then others that are killed and resumed; what they left is
    compared with the first.
    """
    whole = folder_of(kind, root / kind / 'whole', root / 'needs')
    begun = time.monotonic()
    assert ended(attempt(kind, root / kind / 'whole'), 300) == 0, kind
    length, expected = time.monotonic() - begun, left(whole)
    assert len(expected['history']) > 2 and any(
        name.endswith('.safetensors') for name in expected
    ), kind
    done, chain, moments, odd = 0, 0, Counter[str](), list[str]()
    while done < kills or chain == 0:
        out = root / kind / str(chain)
        folder = folder_of(kind, out, root / 'needs')
        while True:
            child = attempt(kind, out)
            code = ended(child, draw.uniform(0.05, 0.5) * length if done < kills else 300)
            if code is not None:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            moments[where(folder)] += 1
        assert code == 0, (kind, chain, code)
        odd += [f'{chain}: {key}' for key in differences(left(folder), expected)]
        chain += 1
    return {
        'kind': kind,
        'kills': done,
        'chains': chain,
        'seconds': round(length, 1),
        'moments': moments,
        'differences': odd,
    }


def main(words: list[str]) -> int:
    "Print a line of JSON for each kind; 1 if anything differs."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--kills', type=int, default=100, help='over all kinds (default: 100)'
    )
    parser.add_argument(
        '--kinds', default=','.join(KINDS), help='with commas (default: all)'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: 0)')
    asked = parser.parse_args(words)
    kinds = [kind.strip() for kind in asked.kinds.split(',')]
    if odd := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"unknown kind '{odd[0]}': use {', '.join(KINDS)}")
    import matplotlib.pyplot  # noqa: F401 (children shall not spend their lives importing)
    import sklearn.datasets  # noqa: F401
    import torch

    from dfkd_nb.toolbox.core import import_torchvision

    import_torchvision()
    import torchmetrics.classification  # noqa: F401

    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name) / 'needs')
        for number, kind in enumerate(kinds):
            count = asked.kills // len(kinds) + (number < asked.kills % len(kinds))
            found.append(kill(kind, count, Path(name), random.Random(asked.seed + number)))
            print(json.dumps(found[-1]), flush=True)
    kills = sum(row['kills'] for row in found)
    odd = sum(len(row['differences']) for row in found)
    print(f'{kills} kills, {odd} differences', flush=True)
    return int(odd > 0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_twenty_kills() -> None:
    "The full hundred, over every kind: see above."
    environment = os.environ | {
        'OMP_NUM_THREADS': '1',
        'DFKD_PROGRESS': '0',
        'MPLBACKEND': 'Agg',
    }
    program = [
        sys.executable,
        __file__,
        '--kills',
        '20',
        '--kinds',
        'transfer,scenes,dropout',
    ]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=580, env=environment
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    *rows, last = done.stdout.splitlines()
    assert last == '20 kills, 0 differences'
    moments = Counter[str]()
    for row in rows:
        moments.update(json.loads(row)['moments'])
    inside = sum(n for moment, n in moments.items() if moment != 'starting')
    assert inside >= 10, f'kills must land inside the runs: {moments}'


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
