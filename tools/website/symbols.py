"""What the notebooks export: where each name is explained, and a card that documents it,
read from the source alone.
"""

from __future__ import annotations

import ast
import io
import re
import textwrap
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


class Comments:
    "The comments of a piece of code."

    def __init__(self, code: str) -> None:
        self.trailing: dict[int, str] = {}  # by line number: the comment that ends a line
        self.own: dict[int, str] = {}  # the comment that is the whole line
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT:
                whole = not token.line[: token.start[1]].strip()
                text = token.string.lstrip('# ').strip()
                (self.own if whole else self.trailing)[token.start[0]] = text

    def of(
        self,
        first: int,  # line on which a parameter, a field or what is returned begins
        last: int,  # and ends
    ) -> str:
        "The comment at the end of the last line, or on the lines above the first."
        if last in self.trailing:
            return self.trailing[last]
        lines = []
        while first - 1 in self.own:
            first -= 1
            lines.insert(0, self.own[first])
        return ' '.join(lines)


def parameters(
    node: ast.FunctionDef | ast.AsyncFunctionDef, notes: Comments
) -> list[Parameter]:
    """A function's parameters and their comments.

    The last row, without a name, is what it returns.
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
            notes.of(one.lineno, (default or one).end_lineno or 0),
        )
        for star, one, default in pairs
        if one.arg not in ('self', 'cls')
    ]
    if node.returns and ast.unparse(node.returns) != 'None':
        note = notes.of(node.returns.lineno, node.returns.end_lineno or 0)
        # a function on one line has one comment, which belongs to its parameter
        one_line = node.returns.end_lineno == node.lineno
        if one_line and any(row.comment == note for row in rows):
            note = ''
        rows.append(Parameter('', ast.unparse(node.returns), '', note))
    return rows


def fields(node: ast.ClassDef, notes: Comments) -> list[Parameter]:
    "A dataclass's fields, or else the parameters of a class's `__init__`."
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == '__init__':
            return [row for row in parameters(item, notes) if row.name]
    return [
        Parameter(
            item.target.id,
            ast.unparse(item.annotation),
            ast.unparse(item.value) if item.value else '',
            notes.of(item.lineno, item.end_lineno or 0),
        )
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not item.target.id.startswith('_')
    ]


def literal(code: str) -> str:
    "Code inside a table's cell."
    return '`' + code.replace('|', '\\|') + '`' if code else ''


def docstring(text: str) -> str:
    "A docstring in Markdown: errors and sources marked, the example as code."
    text, _, example = text.partition('\nExample:\n')
    text = re.sub(r'^(Raises|Source): ', r'**\1:** ', text, flags=re.M).rstrip()
    if not example:
        return text
    code = textwrap.dedent(example).strip('\n')
    return f'{text}\n\n```python\n{code}\n```'


def card(node: Definition, code: str) -> str:
    """What a definition is, takes and returns, in Markdown.

    Its name, its docstring, a table of its parameters.
    """
    notes = Comments(code)
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
        lines += [docstring(doc), '']
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
        inside = ', '.join(row.name for row in parameters(method, notes) if row.name)
        call = method.name if property_ else f'{method.name}({inside})'
        summary = (ast.get_docstring(method) or '').splitlines()[0]
        lines.append(f'- `.{call}`{{.nolink}} — {summary}')
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
