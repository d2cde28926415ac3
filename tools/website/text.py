"""Markdown in pieces: which parts are prose, and which are code, mathematics, links or HTML
that must stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

FENCE = r'^(?P<fence>[ ]{0,3}(?:`{3,}|~{3,}))[^\n]*\n.*?^(?P=fence)[`~]*[ \t]*$'
PARTS = (
    FENCE,
    r'<!--.*?-->',
    r'\$\$.*?\$\$',
    r'(?P<tick>`+)(?!`).*?(?<!`)(?P=tick)(?!`)',
    r'(?<![\\$\w])\$(?![\s$])[^$\n]*?(?<![\s\\])\$(?!\d)',
    r'\]\([^()\s]*(?:\([^()]*\)[^()\s]*)*(?:\s+\"[^\"]*\")?\)',
    r'<(?:https?:|mailto:)[^>\s]*>|https?://[^\s)>\]]+',
    r'</?[A-Za-z][^<>]*>',
    r'\{[#.][^{}\n]*\}',
)
NOT_PROSE = re.compile('|'.join(PARTS), re.S | re.M)
CODE = re.compile(FENCE, re.S | re.M)


def pieces(text: str, pattern: re.Pattern[str] = NOT_PROSE) -> Iterator[tuple[bool, str]]:
    "Split Markdown into (is it prose?, piece); the pieces joined are the text."
    end = 0
    for found in pattern.finditer(text):
        if found.start() > end:
            yield True, text[end : found.start()]
        yield False, found[0]
        end = found.end()
    if end < len(text):
        yield True, text[end:]


def in_prose(
    text: str, change: Callable[[str], str], pattern: re.Pattern[str] = NOT_PROSE
) -> str:
    "Apply `change` to the prose and leave the rest."
    return ''.join(
        change(piece) if prose else piece for prose, piece in pieces(text, pattern)
    )


def outside_code(text: str, change: Callable[[str], str]) -> str:
    "Apply `change` to everything but fenced code."
    return in_prose(text, change, CODE)


def source(cell: dict[str, Any]) -> str:
    "A cell's source as one string."
    return ''.join(cell['source'])


def joined(value: str | list[str]) -> str:
    "An output's text, which a notebook may store as a list of lines."
    return value if isinstance(value, str) else ''.join(value)
