"""Figures with a slider: what they carry, what they show first, and what they refuse."""

import base64
import html
import io
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.figures import FigureSlider, figure_pixels


def plain(value: int) -> torch.Tensor:
    "A grey figure of 20 rows and 40 columns."
    return torch.full((3, 20, 40), value, dtype=torch.uint8)


def sheet(page: str) -> np.ndarray:
    "The picture that a page carries."
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', page)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert('RGB'))


def test_all_figures_are_in_one_picture_in_order():
    page = FigureSlider([plain(0), plain(120), plain(255)], ['a', 'b', 'c'])._repr_html_()
    pixels = sheet(page)
    assert pixels.shape == (60, 40, 3)
    assert [int(pixels[row, 0, 0]) for row in (0, 19, 20, 39, 40, 59)] == [
        0,
        0,
        120,
        120,
        255,
        255,
    ]
    assert 'aspect-ratio:40/20' in page and 'max="2"' in page


def test_start_is_what_is_seen_without_a_script():
    slider = FigureSlider([plain(v) for v in (0, 60, 120, 180)], list('abcd'), start=3)
    page = slider._repr_html_()
    assert 'translateY(-75.0%)' in page and 'value="3"' in page
    assert '<output style="min-width:6em">d</output>' in page


def test_names_reach_the_script_and_stay_text():
    names = ['τ < 1', "teacher's", '"both" & <b>']
    page = FigureSlider([plain(v) for v in (0, 1, 2)], names, about='a "b"')._repr_html_()
    script = html.unescape(re.search(r'oninput="([^"]*)"', page)[1])
    assert json.loads(re.search(r'textContent=(\[.*\])\[this', script)[1]) == names
    assert '<b>' not in page and 'alt="a &quot;b&quot;"' in page


def test_figures_of_matplotlib_and_png_files():
    figure = plt.figure(figsize=(2, 1), dpi=50)
    drawn = figure_pixels(figure)
    assert drawn.shape == (3, 50, 100) and drawn.dtype == torch.uint8
    assert not plt.fignum_exists(figure.number)  # nothing is left open
    buffer = io.BytesIO()
    Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(buffer, 'PNG')
    for file in (buffer.getvalue(), memoryview(buffer.getvalue())):
        assert torch.equal(figure_pixels(file), drawn)


@pytest.mark.parametrize(
    ('figures', 'names', 'start', 'message'),
    [
        ([], [], 0, 'at least one figure'),
        ([plain(0)], ['a', 'b'], 0, 'one name a figure'),
        ([plain(0)], ['a'], 1, 'a start among them'),
        ([plain(0), plain(0)[:, 1:]], ['a', 'b'], 0, 'in one size'),
    ],
)
def test_what_it_refuses(figures, names, start, message):
    with pytest.raises(DFKDError, match=message):
        FigureSlider(figures, names, start)
