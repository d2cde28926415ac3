"""Labelled outputs of code cells as figures and tables with a number, a caption and
alternative text.
"""

from __future__ import annotations

import html
import re
from typing import Any

import yaml

from . import SiteError
from .labels import NAMES, Labels
from .notebook import markdown, split_options
from .text import joined, source

PICTURES = ('image/svg+xml', 'image/png', 'image/jpeg', 'image/gif')
CAPTIONS = ('label', 'fig-cap', 'fig-alt', 'tbl-cap', 'fig-align')


def raw(page: str) -> str:
    "HTML that passes through Markdown untouched."
    return '````{=html}\n' + page + '\n````'


def unquoted(value: str) -> str:
    "The text of an option, which may be quoted YAML."
    loaded = yaml.safe_load(value) if value.startswith(('"', "'")) else value
    return str(loaded)


def with_alternative(page: str, alternative: str) -> str:
    "HTML in which every picture has alternative text."
    return re.sub(r'<img\b(?![^>]*\balt=)', f'<img alt="{html.escape(alternative)}"', page)


def display(output: dict[str, Any], alternative: str) -> str | None:
    "One displayed output in Markdown; None for what is printed or has nothing to see."
    data = output.get('data', {})
    if 'text/html' in data:
        page = with_alternative(joined(data['text/html']), alternative)
        return raw(f'<div class="cell-output-display">{page}</div>')
    for kind in PICTURES:
        if kind in data:
            content = joined(data[kind]).strip()
            if kind == 'image/svg+xml':
                return raw(
                    '<div role="img"'
                    f' aria-label="{html.escape(alternative)}">{content}</div>'
                )
            return raw(
                f'<img src="data:{kind};base64,{content}" alt="{html.escape(alternative)}"'
                ' class="img-fluid">'
            )
    if 'text/markdown' in data:
        return joined(data['text/markdown'])
    return None


def figure(label: str, caption: str, bodies: list[str], labels: Labels) -> str:
    "A figure or table in Markdown; a table's caption stands above it."
    kind = label.split('-')[0]
    said = f'{NAMES[kind]}\u00a0{labels.number(label)}' + (
        f': {caption}' if caption else ''
    )
    note = '\n\n'.join([raw('<figcaption>'), said, raw('</figcaption>')])
    parts = [note, *bodies] if kind == 'tbl' else [*bodies, note]
    return '\n\n'.join(
        [raw(f'<figure id="{label}" class="book-figure {kind}">'), *parts, raw('</figure>')]
    )


def lift(cell: dict[str, Any], labels: Labels) -> list[dict[str, Any]]:
    """A code cell, and after it the figure or table that its label and caption make of its
    outputs.
    """
    options, code = split_options(source(cell))
    kept = {key: value for key, value in options.items() if key not in CAPTIONS}
    caption = unquoted(options.get('fig-cap') or options.get('tbl-cap') or '')
    alternative = unquoted(options.get('fig-alt') or caption)
    label = options.get('label', '')
    for output in cell.get('outputs', []):
        if 'text/html' in output.get('data', {}):
            output['data']['text/html'] = with_alternative(
                joined(output['data']['text/html']), alternative
            )
    if not label.startswith(('fig-', 'tbl-')):
        if alternative:  # a picture without a number keeps its caption
            return [cell]
        return [
            {
                **cell,
                'source': '\n'.join([*(f'#| {k}: {v}' for k, v in kept.items()), code]),
            }
        ]
    bodies: list[str] = []
    rest: list[dict[str, Any]] = []
    for output in cell.get('outputs', []):
        shown = display(output, alternative)
        if shown is None:
            rest.append(output)
        else:
            bodies.append(shown)
    plain = [output for output in rest if output['output_type'] == 'stream' or not bodies]
    if not bodies and not plain:
        raise SiteError(
            f'{labels.page}: the cell labelled `{label}` has no stored output: run it with'
            ' `make run`'
        )
    above = {
        **cell,
        'source': '\n'.join([*(f'#| {k}: {v}' for k, v in kept.items()), code]),
        'outputs': plain,
    }
    return [above, markdown(figure(label, caption, bodies, labels))]
