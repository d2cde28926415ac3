"""Time every method's two steps on one device: a step of synthesis, and one of the student.

    python tools/bench_gpu.py                                   # one GPU, at most 9 minutes
    python tools/bench_gpu.py --device cpu --rounds 1 --modes eager --batch 8 --width 4 \
        --teacher resnet8 --student resnet8                     # a try

All rows of the methods' table at full settings, with untrained networks: eager, eager with
deterministic algorithms, compiled, and captured in CUDA graphs. The table is saved after
each row, so a run that is stopped leaves what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.method_tables import method_settings, method_tables
from dfkd_nb.generators.methods import build_method, distiller_keywords, read_method
from dfkd_nb.lab.reproducibility import deterministic
from dfkd_nb.lab.speed import fresh_teacher
from dfkd_nb.lab.timing import describe_machine, stopwatch
from dfkd_nb.toolbox.core import atomic_path, seeded
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model

MODES = 'eager', 'deterministic', 'compiled', 'captured'
COUNT = 2048  # random images in a pool, or in place of real ones
Steps = dict[str, Callable[[], Any]]  # 'synthesis' and 'student'


def methods() -> list[str]:
    "Names of all rows."
    return [name for name, row in method_tables()[1].items() if 'task' in row]


def random_images(teacher: Any, device: torch.device) -> ImageSet:
    "Noise with labels, in place of real or of finished images."
    rng = torch.Generator().manual_seed(0)
    shape = COUNT, *teacher.domain.shape
    images = torch.randint(256, shape, dtype=torch.uint8, generator=rng)
    labels = torch.arange(COUNT) % teacher.domain.num_classes
    return ImageSet(images.to(device), labels.to(device), teacher.domain)


def build(name: str, mode: str, options: argparse.Namespace) -> Steps:
    "The steps of a method, ready to be called again and again."
    device = torch.device(options.device)
    teacher = fresh_teacher(options.teacher).to(device)
    with seeded(1):
        student = build_model(options.student, teacher.domain.num_classes).to(device)
    changes: dict[str, Any] = {}
    if options.batch:
        changes = {'batch_size': options.batch, 'synthesis_batch_size': options.batch}
    if options.width:
        changes['generator_width'] = options.width
    compiled = {'compile': True} if mode in ('compiled', 'captured') else {}
    images = random_images(teacher, device)
    row = method_settings(name)
    if row.get('source') == 'real':
        return real_step(row | changes, teacher, student, images, compiled)
    trainer = build_method(
        name,
        teacher,
        student,
        device=device,
        synthesizer_options=compiled,
        distiller_options=compiled,
        **changes,
    )
    if trainer.pool is not None:
        trainer.pool.add(images.images, images.labels)
    synthesizer = trainer.synthesizer
    synthesizer.begin_round(max(trainer.warmup_rounds, 1), True)
    if mode == 'captured' and isinstance(synthesizer, DeepInversion):
        keep_losses(synthesizer)

    def synthesize() -> None:
        if synthesizer.batch_done:
            synthesizer.pop()
        synthesizer.step()

    return {'synthesis': synthesize, 'student': trainer.distiller.step}


def keep_losses(inversion: DeepInversion) -> None:
    "It reads the losses of many steps at once; the next replay would write over them."
    compute = inversion.loss._call

    def kept(*of: Any) -> Any:
        total, values = compute(*of)
        return total, values.clone()

    inversion.loss._call = kept


def real_step(
    row: dict[str, Any], teacher: Any, student: Any, images: ImageSet, compiled: dict
) -> Steps:
    "Of the two methods that make no images."
    settings, _ = read_method({k: v for k, v in row.items() if k != 'source'})
    keywords = distiller_keywords(settings, images.images.device) | compiled
    learned = row.get('learn_from') == 'labels'
    learner = Distiller(
        None if learned else teacher, student, images, domain=teacher.domain, **keywords
    )
    return {'student': learner.step}


@contextmanager
def in_mode(mode: str) -> Iterator[None]:
    "Deterministic algorithms, or a torch.compile that captures what it compiled."
    torch.compiler.reset()
    original = torch.compile
    graphs = 'reduce-overhead' if mode == 'captured' else None

    def compile_in_mode(*of: Any, **settings: Any) -> Any:
        # the parts choose for themselves otherwise
        return original(*of, **settings | {'mode': graphs})

    torch.compile = compile_in_mode  # type: ignore[assignment]
    try:
        with deterministic() if mode == 'deterministic' else nullcontext():
            yield
    finally:
        torch.compile = original


def marked(step: Callable[[], Any]) -> Callable[[], Any]:
    "A step that gives the graphs' memory of the step before it free."

    def marked_step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step()

    return marked_step


def measure(step: Callable[[], Any], options: argparse.Namespace) -> dict[str, float]:
    "Median milliseconds of a step, and what the steps before it took."
    device = torch.device(options.device)
    began = time.perf_counter()
    for _ in range(options.warm_up):
        step()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    warm_up = time.perf_counter() - began
    seconds = [stopwatch(step, device, calls=options.calls) for _ in range(options.rounds)]
    found = {'ms': 1000 * statistics.median(seconds), 'warm_up_s': round(warm_up, 2)}
    if device.type == 'cuda':
        found['memory_gb'] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def time_row(name: str, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    "The steps of a method in one mode; what cannot be built or run says why."
    if mode == 'captured' and not options.device.startswith('cuda'):
        return [{'method': name, 'mode': mode, 'error': 'CUDA graphs need a GPU'}]
    rows: list[dict[str, Any]] = []
    about = {'method': name, 'mode': mode}
    with in_mode(mode):
        try:
            for part, step in build(name, mode, options).items():
                if mode == 'captured':
                    step = marked(step)
                rows.append(about | {'part': part} | measure(step, options))
        # one row that fails must not end a run on a machine that was waited for
        except Exception as error:
            reason = (str(error).splitlines() or [''])[0][:150]
            rows.append(about | {'error': f'{type(error).__name__}: {reason}'})
    gc.collect()
    if options.device.startswith('cuda'):
        torch.cuda.empty_cache()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    "One line a method and part, milliseconds in each mode and the speed over eager."
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if 'ms' in row:
            cells.setdefault((row['method'], row['part']), {})[row['mode']] = row['ms']
    lines = [f'{"method":<14}{"part":<11}' + ''.join(f'{mode:>22}' for mode in MODES)]
    for (method, part), times in cells.items():
        line = f'{method:<14}{part:<11}'
        for mode in MODES:
            if mode not in times:
                line += f'{"-":>22}'
                continue
            ratio = f' ({times["eager"] / times[mode]:.2f}x)' if 'eager' in times else ''
            line += f'{times[mode]:.2f} ms{ratio}'.rjust(22)
        lines.append(line)
    lines += [
        f'{row["method"]}, {row["mode"]}: {row["error"]}' for row in rows if 'error' in row
    ]
    return '\n'.join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    "All modes of all methods, until the time is up."
    end = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {
        'settings': {k: v for k, v in vars(options).items() if k != 'out'},
        'machine': describe_machine(torch.device(options.device)),
        'rows': [],
    }
    for mode in options.modes:
        for name in options.methods:
            if time.monotonic() > end:
                late = {'method': name, 'mode': mode, 'error': 'the time was up'}
                found['rows'].append(late)
                continue
            found['rows'] += time_row(name, mode, options)
            print(f'{mode} {name}', file=sys.stderr, flush=True)
            with atomic_path(options.out) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + '\n')
    return found


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--device', default='cuda')
    add('--teacher', default='wrn40-2')
    add('--student', default='wrn16-1')
    add('--methods', nargs='+', default=methods(), choices=methods(), metavar='NAME')
    add('--modes', nargs='+', default=list(MODES), choices=MODES, metavar='MODE')
    add('--rounds', type=int, default=5, help='turns that count')
    add('--calls', type=int, default=10, help='steps in a turn')
    add('--warm-up', type=int, default=5, help='steps before them')
    add('--batch', type=int, default=0, help='images in a batch, in place of the full ones')
    add('--width', type=int, default=0, help='of the generator, in place of the full one')
    # the row in hand is finished after that
    add('--minutes', type=float, default=8.0, help='until no new row is begun')
    add('--out', type=Path, default=Path('results/bench-gpu/methods.json'))
    options = parser.parse_args(words)
    if min(options.rounds, options.calls, options.warm_up) < 1:
        raise DFKDError('give 1 or more of --rounds, --calls and --warm-up')
    if options.device.startswith('cuda') and not torch.cuda.is_available():
        raise DFKDError('there is no GPU here: use --device cpu')
    return options


def main(words: list[str] | None = None) -> int:
    "Measure, print and save."
    try:
        options = read_options(words)
        print(table(run(options)['rows']))
    except DFKDError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'saved in {options.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
