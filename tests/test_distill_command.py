"`dfkd distill` on networks that nobody has seen, at the size of a toy."

from __future__ import annotations

import html.parser
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import stirred

from dfkd_nb import load_network
from dfkd_nb.lab import distill, distill_plan
from dfkd_nb.lab.commands import STOPPED, main
from dfkd_nb.lab.distill_settings import distill_methods
from dfkd_nb.lab.runs import Run
from dfkd_nb.lab.tasks.distill import check_export
from dfkd_nb.toolbox.core import load_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.evaluation import evaluate
from dfkd_nb.toolbox.models import count_parameters
from dfkd_nb.toolbox.teachers import Teacher

CODE = """
import time

from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=4, width=6, norm=True, pause=0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.fc = nn.Linear(width, num_classes)
        self.pause = pause

    def forward(self, x):
        time.sleep(self.pause)
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class Four(Net):
    def __init__(self):
        super().__init__(4)


class Seven(Net):
    def __init__(self):
        super().__init__(7)


class Grey(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 8)

    def forward(self, x):
        return self.conv(x).flatten(1)


class Frozen(Net):
    def __init__(self, num_classes=4):
        super().__init__(num_classes)
        self.requires_grad_(False)


class AskedOnly(Net):
    def forward(self, x):
        if self.training:
            raise RuntimeError('this one is never trained')
        return super().forward(x)
"""
NAMES = '<b>bold</b>', 'a & "b"', '$x$ and $y', 'plain'
DOMAIN = Domain('own', (3, 8, 8), (0.5, 0.4, 0.5), (0.25,) * 3, NAMES)
NETWORK = ['--model', 'nets.py:Net', '--checkpoint', 'best.pth', '--size', '8']
NETWORK += ['--mean', '0.5,0.4,0.5', '--std', '0.25,0.25,0.25']
NETWORK += ['--class-names', 'names.txt']
STUDENT = ['--student', 'nets.py:Net(width=5)']
SMALL = {'batch_size': 8, 'synthesis_batch_size': 8, 'evaluations': 2, 'held_out': 12}
SMALL |= {'held_out_steps': 4}
GENERATOR = SMALL | {'generator_width': 4, 'latent_size': 8, 'synthesis_steps': 2}
PIXELS = SMALL | {'synthesis_steps': 4}


def settings(values: dict[str, Any]) -> list[str]:
    return [word for k, v in values.items() for word in ('--set', f'{k}={v}')]


def command(method: str = 'fast-5', *more: str, steps: int = 10) -> list[str]:
    small = PIXELS if method in ('deepinversion', 'adaptive', 'deepdream') else GENERATOR
    words = ['distill', *NETWORK, *STUDENT, '--method', method, '--steps', str(steps)]
    return [*words, *settings(small), '--out', 'out', '--device', 'cpu', *more]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A folder with a foreign network: code, a checkpoint with a prefix, names of classes."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill_plan, 'TIMED', 2)
    (tmp_path / 'nets.py').write_text(CODE)
    (tmp_path / 'names.txt').write_text('\n'.join(NAMES))
    torch.manual_seed(1)
    net = stirred(load_network('nets.py:Net').model)
    with torch.no_grad():
        net.fc.weight.mul_(8)  # so that classes differ
    state = {f'module.{k}': v for k, v in net.state_dict().items()}
    torch.save({'epoch': 3, 'state_dict': state}, tmp_path / 'best.pth')
    return tmp_path


def teacher() -> Teacher:
    found = load_network('nets.py:Net', 'best.pth')
    return Teacher(found.model, DOMAIN)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'result.json').read_text())


def failure(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    "The one line of a command that fails."
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('dfkd: error: ') and 'unexpected' not in line, line
    assert len(line) < 420, line
    return line


class Tags(html.parser.HTMLParser):
    "Tags of a page, and what it would fetch."

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ''

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v or '' for k, v in attrs if k in ('src', 'href', 'srcset')]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_foreign_network_from_begin_to_end(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command()) == 0
    said = capsys.readouterr()
    words = 'teacher:', 'updates:', 'numbers:', 'memory:', 'results:  out'
    for word in (*words, 'agree on held-out'):
        assert word in said.out, said.out
    folder, numbers = here / 'out', result(here / 'out')['numbers']
    left = {p.name for p in folder.iterdir()}
    assert left >= {
        'student.safetensors',
        'images.safetensors',
        'images.png',
        'report.html',
        'model-card.md',
        'recipe.toml',
    }
    assert not [name for name in left if name.startswith('.')] and 'parts' not in left
    # the student in the file is the one that was measured
    student = load_network('nets.py:Net(width=5)', folder / 'student.safetensors').model
    held_out = ImageSet.load(folder / 'held-out.safetensors')
    assert held_out.domain.classes == NAMES and len(held_out) == 12
    labels = teacher().predict(held_out.images).argmax(1)
    assert held_out.labels is not None and labels.equal(held_out.labels)
    agreement = evaluate(student, held_out, domain=DOMAIN)
    assert numbers['agreement'] == pytest.approx(agreement)
    assert numbers['student_parameters'] == count_parameters(student) != 202
    tensors, about = load_tensors(folder / 'student.safetensors')
    assert (
        tensors['fc.weight'].dtype == torch.float32 and tensors['fc.weight'].shape[0] == 4
    )
    assert about['classes'].split('\n') == list(NAMES)
    # nothing that is held out was learned from
    pool = ImageSet.load(folder / 'images.safetensors')
    learned = {image.numpy().tobytes() for image in pool.images}
    assert len(pool) == 40 and not learned & {i.numpy().tobytes() for i in held_out.images}


def test_the_report_escapes_and_asks_for_nothing(here: Path) -> None:
    assert main(command('deepinversion', '--images', '16')) == 0
    page = (here / 'out' / 'report.html').read_text()
    seen = Tags()
    seen.feed(page)
    assert 'b' not in seen.tags and 'script' not in seen.tags
    assert len(seen.fetched) > 20 and all(s.startswith('data:image') for s in seen.fetched)
    for name in NAMES:
        assert name in seen.text
    for words in ('nets.py:Net(width=5)', '--steps 10', 'seed', torch.__version__):
        assert words in seen.text
    for words in ('agree on held-out', 'Curves', 'deepinversion'):
        assert words in seen.text
    card = (here / 'out' / 'model-card.md').read_text()
    assert '<b>' not in card and '&lt;b&gt;bold' in card
    assert 'tested on no real image' in card and 'no real one was used' in card


class Killed(BaseException):
    "As sudden as a signal that cannot be caught."


@pytest.mark.parametrize('method', ['fast-5', 'ssd-kd-10', 'dafl', 'adaptive'])
def test_killed_and_resumed_to_the_same_bits(
    method: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command(method)
    assert main([*whole, '--out', 'whole']) == 0
    tick, left = Run.tick, 0

    def dies(self: Run, *words: Any, **more: Any) -> bool:
        nonlocal left
        found = tick(self, *words, **more)
        left -= 1
        if left == 0:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Run, 'tick', dies)
        # a resumed process never times anything: its numbers of updates are recorded
        kills = 0
        for left in (2, 5, 6, 7, 1000):  # noqa: B007 - `dies` counts it down
            try:
                code = main([*whole, '--resume', '--save-every', '1e-9'])
            except Killed:
                kills += 1
                assert not (here / 'out' / 'result.json').exists()
                continue
            assert code == 0
            break
        patch.setattr(distill, 'measure_costs', None)
    assert kills >= 3
    for name in ('student', 'images', 'held-out'):
        one, other = (
            (here / n / f'{name}.safetensors').read_bytes() for n in ('whole', 'out')
        )
        assert one == other, name
    assert result(here / 'out')['numbers'] == result(here / 'whole')['numbers']
    assert (here / 'out' / 'model-card.md').exists()


def stopped_after_each_phase(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    "Resume a command until it is done; a signal comes at the end of each phase."
    save, stops = Run.save, 0

    def then_a_signal(self: Run) -> None:
        save(self)
        self.stop_reason = 'SIGTERM'

    with monkeypatch.context() as patch:
        patch.setattr(Run, 'save', then_a_signal)
        while (code := main([*words, '--resume'])) != 0:
            assert code == STOPPED
            stops += 1
    return stops


@pytest.mark.parametrize('method', ['fast-5', 'deepinversion'])
def test_stopped_after_each_phase(
    method: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*command(method), '--out', 'whole']) == 0
    # held-out images, the student, the inspection of its images, the evaluation
    assert stopped_after_each_phase(command(method), monkeypatch) >= 4
    assert result(here / 'out')['numbers'] == result(here / 'whole')['numbers']
    files = [here / n / 'student.safetensors' for n in ('whole', 'out')]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_changed_settings_are_refused_and_change_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = command('fast-5', '--max-minutes', '1e-9')
    assert main(stopped) == STOPPED
    assert '--resume' in capsys.readouterr().err
    folder = here / 'out'
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    changes = {
        "'learning_rate' was": ['--set', 'learning_rate=0.2'],
        "'student' was": ['--student', 'nets.py:Net(width=7)'],
        "'steps' was": ['--steps', '11'],
        "'seed' was": ['--seed', '5'],
        "'mean' was": ['--mean', '0.5,0.5,0.5'],
    }
    for word, options in changes.items():
        line = failure(capsys, [*command('fast-5', '--resume'), *options])
        assert word in line and 'was started with other settings' in line, line
    line = failure(capsys, command('deepinversion', '--resume'))
    assert 'with --method fast-5, now deepinversion' in line
    torch.save(load_network('nets.py:Net').model.state_dict(), 'best.pth')
    assert "'weights' was" in failure(capsys, command('fast-5', '--resume'))
    assert 'unfinished run' in failure(capsys, command('fast-5'))
    after = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert after == before


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    'an unknown method': (['--method', 'fast-6'], ('--method', 'fast-5')),
    'a method of real images': (['--method', 'vanilla'], ('learns from real images',)),
    'an unknown student': (['--student', 'resnet21'], ('--student', 'resnet20')),
    'a file as the student': (['--student', 'net.pt2'], ('is a file',)),
    'a student of other classes': (
        ['--student', 'nets.py:Seven'],
        ('--student', '7 outputs', 'teacher 4 classes'),
    ),
    'a student of other channels': (
        ['--student', 'nets.py:Grey'],
        ('--student', '(3, 8, 8)'),
    ),
    'a student that is frozen': (['--student', 'nets.py:Frozen'], ('no weights',)),
    'a student that is only asked': (
        ['--student', 'nets.py:AskedOnly'],
        ('training mode', 'never trained'),
    ),
    'a teacher of other classes': (['--num-classes', '5'], ('5', '4')),
    'no minutes': (['--minutes', '0'], ("'0' is not a positive number",)),
    'endless minutes': (['--minutes', 'inf'], ("'inf' is not a positive number",)),
    'too few minutes': (['--minutes', '1e-6'], ('smallest run', 'give --minutes')),
    'minutes and steps': (['--minutes', '3', '--steps', '3'], ('not allowed with',)),
    'no steps': (['--steps', '0'], ('--steps 0',)),
    'few steps': (['--steps', '3'], ('10 or more',)),
    'one image': (['--images', '1'], ('--images 1',)),
    'images that are not kept': (['--method', 'dafl', '--images', '32'], ('keeps none',)),
    'a setting with an option': (['--set', 'steps=5'], ('use --steps',)),
    'an unknown setting': (['--set', 'batchsize=5'], ('batch_size',)),
    'a setting out of range': (['--set', 'temperature=0'], ('temperature',)),
    'no network': (['--model', ''], ('no network is named',)),
    'a test that is not there': (['--test', 'nowhere'], ('--test nowhere',)),
    'a test of other classes': (['--test', 'others'], ('--test others', "'cat'")),
    'a test of few classes': (['--test', 'few'], ('2 classes', '4')),
    'a test without images': (['--test', 'empty'], ('--test empty',)),
    'a damaged test': (['--test', 'damaged'], ('--test damaged', '0001.png', 'replace')),
    'weights for a test': (['--test', 'best.pth'], ('no file of labelled images',)),
    'noise for a test': (['--test', 'x.safetensors'], ('no safetensors file',)),
    'a rate beyond use': (['--set', 'learning_rate=1e30'], ('learning_rate', 'most 1000')),
    'a weight beyond use': (['--set', 'class_weight=1e38'], ('class_weight', 'at most')),
    'a negative seed': (['--seed', '-1'], ('--seed', "'-1' is not a seed")),
    'a range upside down': (['--range', '-1..-2'], ("--range '-1..-2'",)),
    'a batch for no memory': (
        ['--set', 'batch_size=10000000000'],
        ('--set batch_size', 'GB'),
    ),
    'a folder in use': (['--out', 'others'], ('--out others', 'not empty')),
    'a file for a folder': (['--out', 'names.txt'], ('is a file',)),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for folder, classes in {
        'others': ('cat', 'dog', 'elk', 'fox'),
        'few': ('a', 'b'),
    }.items():
        domain = Domain('x', (3, 8, 8), (0.5,) * 3, (0.25,) * 3, classes)
        ImageSet(images, torch.arange(4) % len(classes), domain).to_folder(here / folder)
    (here / 'empty').mkdir()
    (here / 'x.safetensors').write_bytes(b'junk' * 30)
    ImageSet(images, torch.arange(4), DOMAIN).to_folder(here / 'damaged')
    broken = next(here.glob('damaged/0001/*.png')).with_name('0001.png')
    broken.write_bytes(next(here.glob('damaged/0001/*.png')).read_bytes()[:40])
    options, words = BAD[name]
    given = command()
    if '--minutes' in options:
        place = given.index('--steps')
        del given[place : place + 2]
    line = failure(capsys, [*given, *options])
    assert all(word in line for word in words), line
    assert not (here / 'out').exists()


@pytest.mark.parametrize('method', ['fast-5', 'deepinversion'])
def test_a_loss_that_is_not_finite_stops_the_run(
    method: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command(method, steps=40), '--set', 'learning_rate=1000']
    line = failure(capsys, [*words, '--set', 'momentum=0.999', '--set', 'weight_decay=9'])
    assert 'not finite' in line or 'loss is' in line, line
    assert 'learning_rate' in line and '--fresh' in line, line
    # what had been made before stays
    assert len(ImageSet.load(here / 'out' / 'held-out.safetensors')) == 12
    assert not (here / 'out' / 'result.json').exists()
    assert main([*command(method), '--fresh']) == 0


def test_without_batchnorm(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = load_network('nets.py:Net(norm=False)').model
    torch.save(plain.state_dict(), 'plain.pth')
    words = command('fast-5', '--model', 'nets.py:Net(norm=False)')
    words += ['--checkpoint', 'plain.pth', '--student', 'nets.py:Net(norm=False)']
    line = failure(capsys, words)
    assert 'no BatchNorm' in line and '--statistics none' in line
    assert not (here / 'out').exists()
    assert main([*words, '--statistics', 'none']) == 0
    assert 'learn much less' in capsys.readouterr().out
    assert result(here / 'out')['settings']['feature_weight'] == 0.0


def test_a_folder_that_nobody_may_write_is_told_first(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(distill, 'measure_costs', None)  # it does not come to that
    monkeypatch.setattr(distill.os, 'access', lambda path, _: bool(asked.append(path)))
    line = failure(capsys, [*command(), '--out', 'a/b/c'])
    assert '--out a/b/c: nothing can be written there' in line and asked == [here]


def test_a_plan_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob('*'))
    assert main([*command(), '--plan']) == 0
    lines = dict(line.split(':', 1) for line in capsys.readouterr().out.splitlines()[-10:])
    assert list(lines) == [
        'teacher',
        'student',
        'method',
        'images',
        'updates',
        'held out',
        'numbers',
        'time',
        'memory',
        'results',
    ]
    assert '10 of the student' in lines['updates'] and '5 batches of 8' in lines['images']
    now = [p for p in sorted(here.rglob('*')) if '__pycache__' not in p.parts]
    assert now == before


@pytest.mark.parametrize('method', ['fast-5', 'deepinversion'])
def test_the_plan_times_the_real_networks(method: str, here: Path) -> None:
    "A student that takes a while at each pass, and then a teacher that does."
    words = command(method, '--student', 'nets.py:Net(width=5, pause=0.05)', '--plan')
    parser = distill.argparse.ArgumentParser()
    distill.add_arguments(parser)

    def costs(words: list[str]) -> distill.Costs:
        found = distill.prepare(parser.parse_args(words[1:]))[2]
        assert found is not None
        return found

    slow = costs(words)
    assert 0.05 < slow.student < 0.2
    quick = costs(command(method, '--plan'))
    assert quick.student < 0.04
    paused = costs(command(method, '--model', 'nets.py:Net(pause=0.03)', '--plan'))
    # one batch of images is timed by its updates
    batch = paused.synthesis * 8 if method == 'deepinversion' else paused.synthesis / 2
    assert 0.03 < batch < 0.2
    assert paused.held_out * 12 > 0.03


def test_minutes_are_counted_once_and_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in command() if w not in ('--steps', '10')]
    costs = distill.Costs(0.01, 1e-3, 1e-6, (2, 2))
    monkeypatch.setattr(distill, 'measure_costs', lambda *_: costs)
    timed = [*words, '--minutes', '0.01', '--max-minutes', '1e-9']
    assert main(timed) == STOPPED
    recorded = tomllib.loads((here / 'out' / 'recipe.toml').read_text())['hour']
    seconds = recorded['rounds'] * 0.01 + recorded['steps'] * 0.001
    assert recorded['minutes'] == 0.01 and 20 < recorded['steps']
    assert 0.5 < seconds < 0.6  # of 0.6, the held-out images taken away
    monkeypatch.setattr(distill, 'measure_costs', None)  # never again
    capsys.readouterr()
    longer = failure(capsys, [*words, '--minutes', '0.02', '--resume'])
    assert "('minutes' was 0.01, now 0.02)" in longer
    assert main([*words, '--minutes', '0.01', '--resume']) == 0
    assert result(here / 'out')['numbers']['steps'] == recorded['steps']


def test_real_images_are_for_the_end(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    "Accuracies of both networks, from a folder or Parquet; the student does not change."
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = teacher().predict(images).argmax(1)
    labels[::3] = (labels[::3] + 1) % 4
    real = ImageSet(images, labels, DOMAIN)
    real.to_folder(here / 'numbered')  # names that no folder can have
    real.to_parquet(here / 'real.parquet')
    assert main([*command(), '--out', 'none']) == 0
    for number, path in enumerate(('numbered', 'real.parquet')):
        assert main([*command(), '--test', path, '--out', f'out{number}']) == 0
        numbers = result(here / f'out{number}')['numbers']
        student = load_network(
            'nets.py:Net(width=5)', here / f'out{number}' / 'student.safetensors'
        ).model
        assert numbers['student_accuracy'] == pytest.approx(
            evaluate(student, real, domain=DOMAIN)
        )
        assert numbers['teacher_accuracy'] == pytest.approx(16 / 24)
        assert numbers['test_images'] == 24
        page = (here / f'out{number}' / 'report.html').read_text()
        assert 'teacher on 24 real test images' in page
        one, other = (
            (here / name / 'student.safetensors').read_bytes()
            for name in (f'out{number}', 'none')
        )
        assert one == other


def test_an_exported_student_answers_alike(here: Path) -> None:
    onnx = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    assert main(command('fast-5', '--export', 'onnx', '--export', 'pt2')) == 0
    folder = here / 'out'
    student = load_network('nets.py:Net(width=5)', folder / 'student.safetensors').model
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = student(x)
        program = torch.export.load(folder / 'student.pt2').module()(x)
    session = onnx.InferenceSession(str(folder / 'student.onnx'))
    (answer,) = session.run(None, {'images': x.numpy()})
    assert torch.allclose(program, expected, atol=1e-4)
    assert torch.allclose(torch.from_numpy(answer), expected, atol=1e-4)
    numbers = result(folder)['numbers']
    assert numbers['export_error_onnx'] < 1e-4 > numbers['export_error_pt2']
    assert 'student.onnx' in (folder / 'model-card.md').read_text()
    with pytest.raises(DFKDError, match='differs by 0.5'):
        check_export({'ONNX': 0.5}, folder)
    with pytest.raises(DFKDError):
        check_export({'ONNX': float('nan')}, folder)


def test_terms_that_dwarf_others_are_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    "In a printed line, in the result, in the report and in the card."
    loud = ['--set', 'feature_weight=1000', '--set', 'synthesis_learning_rate=1e-6']
    loud += ['--set', 'feature_scale=absolute']
    assert main([*command('deepinversion'), *loud]) == 0
    out = capsys.readouterr().out
    assert 'ALARM: the features term' in out
    alarm = result(here / 'out')['numbers']['alarm']
    assert 'feature_scale=relative' in alarm
    assert 'dwarfs the class term' in (here / 'out' / 'report.html').read_text()
    quiet = ['--set', 'feature_weight=0.001', '--out', 'quiet']
    assert main([*command('deepinversion'), *quiet]) == 0
    assert 'features term' not in capsys.readouterr().out
    assert 'alarm' not in result(here / 'quiet')['numbers']


def test_every_method_has_settings() -> None:
    from dfkd_nb.lab.distill_settings import method_values, with_updates

    methods = distill_methods()
    assert {'deepinversion', 'adaptive', 'fast-5', 'ssd-kd-10', 'dafl', 'cmi'} <= set(
        methods
    )
    assert not {'scratch', 'vanilla', 'metadata'} & set(methods)
    for method in methods:
        for size in (8, 32, 224):
            for updates in (10, 37, 4000):
                values = with_updates(method_values(method, size), updates)
                values |= {'method': method, 'shape': [3, size, size]}
                recipe = distill.distill_recipe(values, {})
                assert recipe.resolve('hour').steps == updates


def test_a_finished_run_is_left_as_it_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command()) == 0
    first = (here / 'out' / 'student.safetensors').read_bytes()
    capsys.readouterr()
    assert main(command()) == 0
    assert 'is finished' in capsys.readouterr().out
    assert main(command('fast-5', '--fresh', '--seed', '1')) == 0
    assert (here / 'out' / 'student.safetensors').read_bytes() != first
    (here / 'mine').mkdir()
    (here / 'mine' / 'thesis.txt').write_text('years of work')
    assert 'not empty' in failure(capsys, command('fast-5', '--fresh', '--out', 'mine'))
    assert (here / 'mine' / 'thesis.txt').exists()
