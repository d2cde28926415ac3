"""Device operations and waits of an update, counted on a device that is made for it.

    python tests/operations.py [inversion] [generator] [student] ...

The device is called `counted`: its tensors hold a tensor of the CPU each, so that numbers
are right, and all that is done with them passes `Counter`. Code takes the path that any
device but the CPU takes.

An *operation* is one call of an ATen operator on the device that computes or copies:
about a kernel on a GPU, a `_foreach_` or fused operator is one. Views, `detach`, empty
memory and numbers of the CPU are none.

A *wait* is what makes the processor stand still until the device is done: a value or a
tensor that is read back, an operator whose result has a size that depends on values
(`nonzero`, a boolean index), a comparison that answers True or False (`equal`), and a
tensor of the CPU that is copied to the device, unless `non_blocking=True` was asked for.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

NAME = 'counted'
# what makes a device known that is written in Python; None where PyTorch has none
register = getattr(backend_registration, '_setup_privateuseone_for_python_backend', None)
MISSING = f'PyTorch {torch.__version__} knows no device that is written in Python'
# what neither computes nor copies
FREE = {
    'alias', 'as_strided', 'detach', 'diagonal', 'empty', 'empty_like', 'empty_strided',
    'expand', 'lift_fresh', 'new_empty', 'new_empty_strided', 'permute', 'select',
    'set_', 'slice', 'split', 'split_with_sizes', 'squeeze', 't', 'transpose', 'unbind',
    'unfold', 'unsqueeze', 'view', '_unsafe_view', '_reshape_alias', 'unsafe_split',
}  # fmt: skip
# what has to know values before it returns
READS = {
    '_local_scalar_dense', 'equal', 'is_nonzero', 'masked_select', 'nonzero', 'unique2',
    '_unique2', 'unique_dim', 'unique_consecutive', 'bincount',
}  # fmt: skip
COPIES = {'_to_copy', 'copy_'}


class Held(Tensor):
    "A tensor of the device, which holds one of the CPU."

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f'{NAME}:0',
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None: ...

    def __repr__(self) -> str:  # type: ignore[override]
        return f'Held({self.held})'

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f'{func} on a tensor of a Counter, outside of it')


class Counter(TorchDispatchMode):
    "The device: inside, `device='counted'` exists, and what it does is counted."

    def __init__(self) -> None:
        super().__init__()
        self.operations: Tally[str] = Tally()
        self.waits: Tally[str] = Tally()

    def clear(self) -> None:
        self.operations, self.waits = Tally(), Tally()

    def __enter__(self) -> Counter:
        # torch.tensor(..., device=...) makes its copy where we see it
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        here: list[Tensor] = []
        cpu: list[Tensor] = []

        def inner(v: Any) -> Any:
            if isinstance(v, torch.device):
                return torch.device('cpu') if v.type == NAME else v
            if isinstance(v, Held):
                here.append(v)
                return v.held
            if isinstance(v, Tensor):
                cpu.append(v)
            return v

        plain, named = tree_map(inner, args), tree_map(inner, kwargs)
        wanted = kwargs.get('device')
        target = bool(here) if wanted is None else wanted.type == NAME
        if name == 'copy_':
            target = isinstance(args[0], Held)
        self._check(name, here, cpu)
        result = func(*plain, **named)
        if not here and not target:
            return result
        blocks = not (
            kwargs.get('non_blocking') or (name == 'copy_' and args[2:] == (True,))
        )
        self._count(name, args, cpu, target, blocks)
        if target:
            result = tree_map(lambda v: Held(v) if isinstance(v, Tensor) else v, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if here else result

    def _check(self, name: str, here: list[Tensor], cpu: list[Tensor]) -> None:
        "As a GPU, the device takes from the CPU numbers without dimensions and indices."
        if here and name not in COPIES and 'index' not in name:
            wrong = [v for v in cpu if v.ndim]
            assert not wrong, f'{name} of tensors on two devices'

    def _count(
        self,
        name: str,
        args: Any,
        cpu: list[Tensor],  # those of the CPU
        target: bool,  # whether the result is on the device
        blocks: bool,  # whether a copy waits
    ) -> None:
        if name in READS or (name in COPIES and not target):
            self.waits[name] += 1
        elif name in ('index', 'index_put_', '_index_put_impl_'):
            kinds = [v.dtype for v in args[1] if v is not None]
            if torch.bool in kinds or torch.uint8 in kinds:
                self.waits['boolean index'] += 1
        moved = [v for v in cpu if v.ndim or name in COPIES]
        if target and moved and (blocks or name not in COPIES):
            self.waits['copy from the CPU'] += 1
        if name not in FREE and name != '_local_scalar_dense':
            self.operations[name] += 1


def prepare() -> torch.device:
    "Make the device known to PyTorch and to the book; once a process."
    if register is None:
        raise SystemExit(MISSING)
    register(NAME)
    there = torch.device(NAME, 0)
    import dfkd_nb.generators.methods  # noqa: F401
    from dfkd_nb.toolbox.core import pick_device

    def picked(name: str | torch.device = 'auto') -> torch.device:
        return there if str(name).startswith(NAME) else pick_device(name)

    # wherever it was imported by name
    for module in list(sys.modules.values()):
        if vars(module).get('pick_device') is pick_device:
            module.pick_device = picked  # type: ignore[attr-defined]
    _optimize_as_on_cuda()
    return there


def _optimize_as_on_cuda() -> None:
    "Several tensors at once where CUDA does so, and fused where CUDA was asked to be."
    from torch.optim import optimizer

    optimizer._foreach_supported_types.append(Held)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        _fuse(kind)


def _fuse(kind: Any) -> None:
    plain = kind.__init__

    def build(self: Any, *args: Any, **settings: Any) -> None:
        # `device.type in ('cpu', 'cuda')` was false
        if settings.get('fused') is False:
            settings['fused'] = True
        plain(self, *args, **settings)

    kind.__init__ = build


def _networks() -> tuple[Any, Any]:
    "WRN-40-2 as teacher, WRN-16-1 as student, both with fresh weights."
    from dfkd_nb.toolbox.domains import DOMAINS
    from dfkd_nb.toolbox.models import build_model
    from dfkd_nb.toolbox.teachers import Teacher

    torch.manual_seed(0)
    network = build_model('wrn40-2')
    with torch.no_grad():
        for _ in range(3):  # running statistics that are of something
            network(torch.randn(8, 3, 32, 32))
    teacher = Teacher(network, DOMAINS['cifar10'])
    return teacher, build_model('wrn16-1')


BATCH = 4


@dataclass
class Update:
    "A step to count, how many go before, and numbers that it leaves."

    step: Callable[[], Any]
    before: int = 2
    losses: Callable[[], Any] = lambda: None


def inversion(device: torch.device) -> Update:
    "A step of DeepInversion."
    from dfkd_nb.dreams.inversion import DeepInversion, deepinversion_preset

    made = DeepInversion(
        _networks()[0].to(device),
        **deepinversion_preset('deepinversion'),
        batch_size=BATCH,
        device=device,
    )
    return Update(made.step, losses=lambda: made._log._pending[0].tolist())  # the first


def _trainer(device: torch.device, method: str) -> Any:
    from dfkd_nb.generators.methods import build_method

    teacher, student = _networks()
    return build_method(
        method,
        teacher.to(device),
        student,
        device=device,
        synthesis_batch_size=BATCH,
        synthesis_steps=3,
        batch_size=BATCH,
        generator_width=8,
        synthesis_precision='float32',
        precision='float32',
    )


def generator(device: torch.device, method: str = 'fast-5') -> Update:
    """A step of a meta-learned generator: in the middle of the second batch, when there are
    running statistics and a student to compete with.
    """
    trainer = _trainer(device, method)
    maker = trainer.synthesizer
    maker.begin_round(0, competing=True)
    for _ in range(maker.steps):
        maker.step()
    batch = maker.pop()
    trainer.pool.add(batch.images, batch.labels, batch.teacher_logits, batch.student_logits)
    return Update(maker.step, before=1)


def student(device: torch.device, method: str = 'fast-5') -> Update:
    "A step of the student on images of a pool."
    trainer = _trainer(device, method)
    images = torch.randint(256, (4 * BATCH, 3, 32, 32)).to(torch.uint8)
    labels = torch.arange(len(images)) % 10
    trainer.pool.add(images.to(device), labels.to(device))
    return Update(trainer.distiller.step)


def running(device: torch.device) -> Update:
    "The running statistics of a finished batch: one question, whether all are finite."
    from dfkd_nb.dreams.moment_rows import MomentRow
    from dfkd_nb.dreams.running_statistics import RunningStatistics

    pairs = {str(i): (torch.zeros(4), torch.ones(4)) for i in range(40)}
    row = MomentRow.join(pairs)
    batch, kept = row.with_tensor(row.tensor.to(device)), RunningStatistics()
    return Update(lambda: kept.update(batch))


def measuring(device: torch.device) -> Update:
    "Statistics of a batch of images: all layers are read together."
    from dfkd_nb.dreams.statistics import measure_moments

    network = _networks()[0].model.to(device)
    images = torch.randn(BATCH, 3, 32, 32).to(device)
    return Update(lambda: measure_moments(network, images), before=1)


def known(device: torch.device) -> Update:
    "Six operations and seven waits."
    x = torch.ones(3, device=device)
    numbers = torch.rand(3)

    def step() -> None:
        y = x.mul(2).view(3, 1).t().detach()  # one operation; views are none
        assert y.sum() > 0  # the sum, the comparison, and a wait for its answer
        assert torch.equal(x, x)  # counts as both
        y.cpu()  # both
        x.nonzero()  # both
        x[x > 0]  # comparison, index: and a wait for how many there are
        torch.tensor([1.0], device=device)  # both
        numbers.to(device)  # both
        numbers.to(device, non_blocking=True)  # no wait

    return Update(step)


PARTS: dict[str, Callable[[torch.device], Update]] = {
    'known': known,
    'running': running,
    'measuring': measuring,
    'inversion': inversion,
    'generator': generator,
    'generator-ssd-kd': lambda device: generator(device, 'ssd-kd-10'),
    'student': student,
    'student-ssd-kd': lambda device: student(device, 'ssd-kd-10'),
}


def count(build: Callable[[torch.device], Update], device: torch.device) -> dict[str, Any]:
    "Operations and waits of one step, after some that go before."
    with Counter() as counter:
        update = build(device)
        for _ in range(update.before):
            update.step()
        counter.clear()
        update.step()
        found = {
            'operations': counter.operations.total(),
            'waits': counter.waits.total(),
            'operations by name': dict(counter.operations.most_common()),
            'waits by name': dict(counter.waits),
        }
        return found | {'losses': update.losses()}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    device = prepare()
    found = {name: count(PARTS[name], device) for name in names or PARTS}
    for name, counts in found.items():
        short = {k: v for k, v in counts.items() if k != 'operations by name'}
        print(name, short, file=sys.stderr)
    print(json.dumps(found))


if __name__ == '__main__':
    main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Autograd has a thread for the device, which PyTorch does not join: an exit that
    # destroys it would end in an abort.
    os._exit(0)
