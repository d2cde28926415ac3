"""Data-free knowledge distillation: the names that most programs need, imported when used.

`import dfkd_nb` loads nothing else, not even PyTorch; `from dfkd_nb import DeepInversion`
loads what `DeepInversion` needs.
"""

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfkd_nb.applications.continual import add_classes as add_classes
    from dfkd_nb.applications.pruning import PruningDistiller as PruningDistiller
    from dfkd_nb.applications.pruning import PruningPlan as PruningPlan
    from dfkd_nb.applications.pruning import prune_filters as prune_filters
    from dfkd_nb.applications.quantization import calibrate as calibrate
    from dfkd_nb.applications.quantization import quantize as quantize
    from dfkd_nb.applications.segmentation import segmentation_ssd_kd as segmentation_ssd_kd
    from dfkd_nb.dreams.activation_matching import dream_distillation as dream_distillation
    from dfkd_nb.dreams.inversion import DeepInversion as DeepInversion
    from dfkd_nb.dreams.inversion import deepinversion_preset as deepinversion_preset
    from dfkd_nb.dreams.metadata import Metadata as Metadata
    from dfkd_nb.dreams.priors import Objective as Objective
    from dfkd_nb.dreams.statistics import Statistics as Statistics
    from dfkd_nb.foundations.distillation import Distiller as Distiller
    from dfkd_nb.foundations.distillation import distill as distill
    from dfkd_nb.foundations.distillation import distillation_loss as distillation_loss
    from dfkd_nb.foundations.distillation import train as train
    from dfkd_nb.foundations.loop import AlternatingTrainer as AlternatingTrainer
    from dfkd_nb.foundations.loop import GrowingPool as GrowingPool
    from dfkd_nb.foundations.loop import NoiseSynthesizer as NoiseSynthesizer
    from dfkd_nb.foundations.loop import Pool as Pool
    from dfkd_nb.foundations.loop import Synthesizer as Synthesizer
    from dfkd_nb.foundations.optimization import Callback as Callback
    from dfkd_nb.generators.contrastive import ContrastiveSynthesizer as ContrastiveSynthesizer
    from dfkd_nb.generators.meta import MetaSynthesizer as MetaSynthesizer
    from dfkd_nb.generators.methods import build_method as build_method
    from dfkd_nb.generators.methods import ssd_kd as ssd_kd
    from dfkd_nb.generators.replay import ReplayPool as ReplayPool
    from dfkd_nb.generators.synthesizer import GeneratorSynthesizer as GeneratorSynthesizer
    from dfkd_nb.lab.diagnostics import verify as verify
    from dfkd_nb.toolbox.augmentation import Augment as Augment
    from dfkd_nb.toolbox.core import seed_everything as seed_everything
    from dfkd_nb.toolbox.data import ImageSet as ImageSet
    from dfkd_nb.toolbox.data import ImageSource as ImageSource
    from dfkd_nb.toolbox.data import Sampler as Sampler
    from dfkd_nb.toolbox.data import SyntheticBatch as SyntheticBatch
    from dfkd_nb.toolbox.datasets import load_data as load_data
    from dfkd_nb.toolbox.domains import DOMAINS as DOMAINS
    from dfkd_nb.toolbox.domains import Domain as Domain
    from dfkd_nb.toolbox.domains import resize_images as resize_images
    from dfkd_nb.toolbox.errors import DFKDError as DFKDError
    from dfkd_nb.toolbox.errors import DFKDWarning as DFKDWarning
    from dfkd_nb.toolbox.evaluation import evaluate as evaluate
    from dfkd_nb.toolbox.evaluation import predict_logits as predict_logits
    from dfkd_nb.toolbox.figures import show_images as show_images
    from dfkd_nb.toolbox.models import build_model as build_model
    from dfkd_nb.toolbox.models import count_parameters as count_parameters
    from dfkd_nb.toolbox.network_specs import load_network as load_network
    from dfkd_nb.toolbox.networks import load_weights as load_weights
    from dfkd_nb.toolbox.networks import save_weights as save_weights
    from dfkd_nb.toolbox.sources import as_source as as_source
    from dfkd_nb.toolbox.teachers import Teacher as Teacher
    from dfkd_nb.toolbox.teachers import copy_blocks_from_teacher as copy_blocks_from_teacher
    from dfkd_nb.toolbox.teachers import load_teacher as load_teacher

# module -> the names that it hands out here
_MODULES = {
    'applications.continual': ('add_classes',),
    'applications.pruning': ('PruningDistiller', 'PruningPlan', 'prune_filters',),
    'applications.quantization': ('calibrate', 'quantize',),
    'applications.segmentation': ('segmentation_ssd_kd',),
    'dreams.activation_matching': ('dream_distillation',),
    'dreams.inversion': ('DeepInversion', 'deepinversion_preset',),
    'dreams.metadata': ('Metadata',),
    'dreams.priors': ('Objective',),
    'dreams.statistics': ('Statistics',),
    'foundations.distillation': ('Distiller', 'distill', 'distillation_loss', 'train',),
    'foundations.loop': ('AlternatingTrainer', 'GrowingPool', 'NoiseSynthesizer', 'Pool', 'Synthesizer',),
    'foundations.optimization': ('Callback',),
    'generators.contrastive': ('ContrastiveSynthesizer',),
    'generators.meta': ('MetaSynthesizer',),
    'generators.methods': ('build_method', 'ssd_kd',),
    'generators.replay': ('ReplayPool',),
    'generators.synthesizer': ('GeneratorSynthesizer',),
    'lab.diagnostics': ('verify',),
    'toolbox.augmentation': ('Augment',),
    'toolbox.core': ('seed_everything',),
    'toolbox.data': ('ImageSet', 'ImageSource', 'Sampler', 'SyntheticBatch',),
    'toolbox.datasets': ('load_data',),
    'toolbox.domains': ('DOMAINS', 'Domain', 'resize_images',),
    'toolbox.errors': ('DFKDError', 'DFKDWarning',),
    'toolbox.evaluation': ('evaluate', 'predict_logits',),
    'toolbox.figures': ('show_images',),
    'toolbox.models': ('build_model', 'count_parameters',),
    'toolbox.network_specs': ('load_network',),
    'toolbox.networks': ('load_weights', 'save_weights',),
    'toolbox.sources': ('as_source',),
    'toolbox.teachers': ('Teacher', 'copy_blocks_from_teacher', 'load_teacher',),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605


if not TYPE_CHECKING:  # so that a type checker knows a misspelt name

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)
            globals()[name] = value  # found at once from now on
            return value
        from dfkd_nb.toolbox.errors import closest_word

        hint = closest_word(name, __all__)
        raise AttributeError(f"module 'dfkd_nb' has no name '{name}'{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
