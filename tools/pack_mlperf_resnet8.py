"""Pack the ResNet-8 of MLPerf Tiny as a teacher of the package.

    DFKD_DATA=DATA python tools/pack_mlperf_resnet8.py FILE

FILE holds the tensors of `pretrainedResnet.h5` (github.com/mlcommons/tiny) as safetensors,
kernels in PyTorch's layout. The accuracy that the packed file states is measured here, on
all test images of CIFAR-10 in DATA.
"""

import sys
from dataclasses import replace
from pathlib import Path

from dfkd_nb.toolbox.datasets import load_data
from dfkd_nb.toolbox.domains import DOMAINS, domain_metadata
from dfkd_nb.toolbox.evaluation import evaluate
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.network_specs import load_network
from dfkd_nb.toolbox.networks import save_weights
from dfkd_nb.toolbox.teachers import Teacher

TARGET = Path(__file__).parent.parent / 'dfkd_nb/weights/cifar10-mlperf-resnet8.safetensors'


def main() -> None:
    domain = replace(DOMAINS['cifar10'], mean=(0.0,) * 3, std=(1 / 255,) * 3)
    network = load_network(build_model('mlperf-resnet8'), sys.argv[1]).model
    test = load_data('cifar10', 'test')
    accuracy = evaluate(Teacher(network, domain), test)
    about = domain_metadata(domain) | {
        'model': 'mlperf-resnet8',
        'accuracy': f'{accuracy:.4f}',
        'source': 'github.com/mlcommons/tiny, pretrainedResnet.h5',
        'licence': 'Apache-2.0',
    }
    save_weights(TARGET, network, about, half=False)
    print(f'{TARGET.name}: {accuracy:.2%} of {len(test):,} test images')


if __name__ == '__main__':
    main()
