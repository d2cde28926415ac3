"The card of a network says what its result says, and claims no more."

import dataclasses

import pytest
import torch
from cases import each

from dfkd_nb.lab.cards import model_card, teacher_licence, training_images, write_card
from dfkd_nb.lab.results import Result
from dfkd_nb.lab.settings import TransferSettings
from dfkd_nb.toolbox.core import save_tensors
from dfkd_nb.toolbox.evaluation import wilson_interval


def result(changed=(), **settings):
    "What result.json would hold of a transfer that never was."
    numbers = {
        'student_accuracy': 0.7,
        'teacher_accuracy': 0.9,
        'test_images': 100,
        'images': 512,
        'r_feature': 3.5,
    }
    found = Result(
        recipe='cifar10-transfer-deepinversion',
        scale='quick',
        task='transfer',
        title='A title',
        paper='A paper',
        settings=dataclasses.asdict(TransferSettings(**settings)),
        numbers=numbers,
        seconds={'total': 12.0},
        environment={'processor': 'a processor', 'torch': '2', 'dfkd_nb': '0'},
        changed=list(changed),
    )
    return dataclasses.asdict(found)


def test_numbers_come_with_the_interval_of_their_number_of_images():
    card = model_card(result())
    low, high = wilson_interval(70, 100)
    assert f'| student accuracy | 70.00 % | {100 * low:.1f} to {100 * high:.1f} % |' in card
    assert (
        '| images | 512 | |' in card
        and '| r feature | 3.5 | |' in card
        and 'On 100 real test images' in card
    )


@each(
    ('settings', 'claim', 'real'),
    [
        ({}, 'the network was trained on no real image.', False),
        (
            {'images_from': 'run:cifar10-dream-pool'},
            'the run `cifar10-dream-pool` made',
            False,
        ),
        ({'source': 'real'}, 'Real images: 256 training images of cifar10', True),
        ({'statistics_images': 100}, 'measured on 100 real images', True),
        (
            {'embedding_weight': 1.0},
            'metadata of 5000 real training images took part',
            True,
        ),
    ],
)
def test_data_free_is_claimed_only_where_it_is_true(settings, claim, real):
    told = training_images(dataclasses.asdict(TransferSettings(**settings)))
    assert claim in told
    assert (told.startswith('Real') or ', but ' in told) == real


def test_other_peoples_images_are_real_and_noise_is_not():
    assert training_images({'images_from': 'flowers'}) == 'Real images of flowers.'
    assert 'Random noise' in training_images({'images_from': 'noise'})


def test_several_networks_of_one_run_are_told_apart():
    told = training_images(
        {
            'methods': ['lwf-mc', 'oracle-distill'],
            'new_data': ['digits'],
            'source': 'dreams',
        }
    )
    assert (
        'One network for each of: lwf-mc, oracle-distill' in told
        and 'real images of the new classes, digits' in told
    )
    assert 'run:a, noise' in training_images({'images_from': ['run:a', 'noise']})
    assert 'labels, dreams' in training_images(
        {'sources': ['labels', 'dreams'], 'data': 'scenes'}
    )


def test_licences():
    assert 'Apache-2.0' in teacher_licence(
        'cifar10-resnet20'
    ) and 'non-commercial' in teacher_licence('imagenet-resnet18')
    assert 'unknown' in teacher_licence(
        'my-network'
    ) and 'terms of its training images' in teacher_licence('run:digits-teacher')


def test_the_seed_is_part_of_the_command():
    assert 'dfkd run cifar10-transfer-deepinversion --scale quick --seed 2' in model_card(
        result(['seed'], seed=2)
    )
    assert "open_teacher('run:cifar10-transfer-deepinversion/quick-seed2')" in model_card(
        result(['seed'], seed=2)
    )


def test_a_card_is_written_only_beside_networks(tmp_path):
    save_tensors(tmp_path / 'images.safetensors', {'x': torch.zeros(1)})
    assert (
        write_card(tmp_path, result()) is None and not (tmp_path / 'model-card.md').exists()
    )
    save_tensors(tmp_path / 'weights.safetensors', {'x': torch.zeros(1)})
    save_tensors(tmp_path / 'weights-half.safetensors', {'x': torch.zeros(1)})
    card = write_card(tmp_path, result())
    assert (
        card is not None
        and '`weights-half.safetensors`, `weights.safetensors`' in card.read_text()
    )


OPENED = [
    ('transfer', 'open_teacher'),
    ('pruning', "load_pruned('a.st')"),
    ('quantization', "load_integers('a.st'"),
]


@pytest.mark.parametrize(('task', 'call'), OPENED)
def test_the_card_says_how_to_open_the_file(task, call):
    assert call in model_card(result() | {'task': task}, ['a.st'])
