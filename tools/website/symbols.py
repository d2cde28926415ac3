"""What the notebooks export: where each name is explained, and a card that documents it,
read from the source alone.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from .text import in_prose

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Parameter:
    "One row of a card."

    name: str
    type: str
    default: str
    comment: str


def definitions(code: str) -> list[Definition]:
    "The public functions and classes that a cell defines at its top level."
    try:
        body = ast.parse(code).body
    except SyntaxError:  # magics
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        node for node in body if isinstance(node, kinds) and not node.name.startswith('_')
    ]


def names(code: str) -> list[str]:
    "The public names that a cell binds at its top level: functions, classes and constants."
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return []
    found = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
    return [name for name in found if not name.startswith('_')]


def anchor(name: str) -> str:
    "The address of a name on its page, as nbdev writes it."
    return name.lower()


def comments(code: str) -> dict[int, str]:
    "Line number to the comment that ends the line."
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {
        token.start[0]: token.string.lstrip('# ').strip()
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def parameters(
    node: ast.FunctionDef | ast.AsyncFunctionDef, notes: dict[int, str]
) -> list[Parameter]:
    """A function's parameters and what it returns (the last row, without a name), with
    their comments.
    """
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (
        len(positional) - len(given.defaults)
    ) + list(given.defaults)
    pairs: list[tuple[str, ast.arg, ast.expr | None]] = [
        ('', one, default) for one, default in zip(positional, defaults)
    ]
    if given.vararg:
        pairs.append(('*', given.vararg, None))
    pairs += [
        ('', one, default) for one, default in zip(given.kwonlyargs, given.kw_defaults)
    ]
    if given.kwarg:
        pairs.append(('**', given.kwarg, None))
    rows = [
        Parameter(
            star + one.arg,
            ast.unparse(one.annotation) if one.annotation else '',
            ast.unparse(default) if default else '',
            notes.get((default or one).end_lineno or 0, ''),
        )
        for star, one, default in pairs
        if one.arg not in ('self', 'cls')
    ]
    if node.returns and ast.unparse(node.returns) != 'None':
        line = node.returns.end_lineno or 0
        inline = line == node.lineno and any(one.comment == notes.get(line) for one in rows)
        rows.append(
            Parameter(
                '', ast.unparse(node.returns), '', '' if inline else notes.get(line, '')
            )
        )
    return rows


def fields(node: ast.ClassDef, notes: dict[int, str]) -> list[Parameter]:
    "A dataclass's fields, or else the parameters of a class's `__init__`."
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == '__init__':
            return [row for row in parameters(item, notes) if row.name]
    return [
        Parameter(
            item.target.id,
            ast.unparse(item.annotation),
            ast.unparse(item.value) if item.value else '',
            notes.get(item.end_lineno or 0, ''),
        )
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not item.target.id.startswith('_')
    ]


def literal(code: str) -> str:
    "Code inside a table's cell."
    return '`' + code.replace('|', '\\|') + '`' if code else ''


def card(node: Definition, code: str) -> str:
    """What a definition is, takes and returns, in Markdown.

    Its name, its one line, a table of its parameters.
    """
    notes = comments(code)
    rows = (
        fields(node, notes) if isinstance(node, ast.ClassDef) else parameters(node, notes)
    )
    arguments = ', '.join(row.name for row in rows if row.name)
    kind = 'class ' if isinstance(node, ast.ClassDef) else ''
    lines = [
        f'::: {{.api #{anchor(node.name)}}}',
        '',
        f'[{kind}`{node.name}({arguments})`{{.nolink}}]{{.api-name}}',
        '',
    ]
    doc = ast.get_docstring(node)
    if doc:
        lines += [doc, '']
    if rows:
        lines += ['| | type | default | |', '|:--|:--|:--|:--|']
        for row in rows:
            name = literal(row.name) if row.name else '*returns*'
            lines.append(
                f'| {name} | {literal(row.type)} | {literal(row.default)} |'
                f' {row.comment.replace("|", chr(92) + "|")} |'
            )
        lines.append('')
    methods = [
        item
        for item in node.body
        if isinstance(node, ast.ClassDef)
        and isinstance(item, ast.FunctionDef)
        and not item.name.startswith('_')
        and ast.get_docstring(item)
    ]
    for method in methods:
        assert isinstance(method, ast.FunctionDef)
        property_ = any(
            isinstance(one, ast.Name) and one.id == 'property'
            for one in method.decorator_list
        )
        inside = ', '.join(row.name for row in parameters(method, {}) if row.name)
        call = method.name if property_ else f'{method.name}({inside})'
        lines.append(
            f'- `.{call}`{{.nolink}} — {(ast.get_docstring(method) or "").splitlines()[0]}'
        )
    return '\n'.join([*lines, '', ':::'])


class Index:
    "Where each exported name is explained."

    def __init__(self) -> None:
        self.pages: dict[str, PurePosixPath] = {}

    def add(self, page: PurePosixPath, exported: Iterable[str]) -> None:
        "Note the names that `page` (a notebook's path under nbs) exports."
        for name in exported:
            self.pages.setdefault(name, page)

    def link(self, text: str, page: PurePosixPath) -> str:
        """Turn names in backticks that other pages explain into links to them; headings and
        link texts stay as they are.
        """

        def change(line: str) -> str:
            if re.match(r'\s*(#{1,6}\s|\||:::)', line):
                return line
            return re.sub(
                r'(?<![\[`\w])`([A-Za-z_][\w.]*)(\(\))?`(?![\]`{])', replace, line
            )

        def replace(found: re.Match[str]) -> str:
            name = found[1].split('.')[0]
            target = self.pages.get(name)
            if (
                target is None
                or target == page
                or (name != found[1] and not name[0].isupper())
            ):
                return found[0]
            return f'[{found[0]}](/{target}#{anchor(name)})'

        fences = re.compile(
            r'^(?P<fence>[ ]{0,3}(?:`{3,}|~{3,}))[^\n]*\n.*?^(?P=fence)[`~]*['
            r' \t]*$|\$\$.*?\$\$',
            re.S | re.M,
        )
        return in_prose(
            text, lambda part: ''.join(map(change, part.splitlines(keepends=True))), fences
        )
