"""The site: what the builder makes of a notebook, and the site as built.

The pages are built in pure Python into a temporary folder. Links, anchors, pictures and
left-over Markdown are always checked; where Chromium is installed, every page is opened at
desktop and phone width.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / 'tools'))
from tools.website import SiteError  # noqa: E402
from tools.website.build import adapt, build, check_sidebar, refine  # noqa: E402
from tools.website.check import check  # noqa: E402
from tools.website.citations import Citations, read_bibliography  # noqa: E402
from tools.website.labels import Labels  # noqa: E402
from tools.website.notebook import process, url  # noqa: E402
from tools.website.symbols import Index, card, definitions  # noqa: E402

EXPLORERS = (
    'applications/continual.html',
    'applications/pruning.html',
    'applications/quantization.html',
    'applications/transfer.html',
    'dreams/competition.html',
    'dreams/competition_toy.html',
    'dreams/inversion.html',
    'dreams/metadata.html',
    'generators/replay.html',
    'generators/replay_explorer.html',
    'lab/explorers.html',
)
BIB = read_bibliography(ROOT / 'nbs/references.bib')


def markdown(text: str) -> dict[str, Any]:
    "A Markdown cell."
    return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


def code(text: str, *outputs: dict[str, Any]) -> dict[str, Any]:
    "A code cell with stored outputs."
    return {
        'cell_type': 'code',
        'metadata': {},
        'source': text,
        'outputs': list(outputs),
        'execution_count': None,
    }


def shown(**data: str) -> dict[str, Any]:
    "A displayed output: `html`, `png` or `markdown`."
    kinds = {'html': 'text/html', 'png': 'image/png', 'markdown': 'text/markdown'}
    return {
        'output_type': 'display_data',
        'metadata': {},
        'data': {kinds[key]: value for key, value in data.items()},
    }


def notebook(*cells: dict[str, Any]) -> dict[str, Any]:
    "A notebook with a title."
    return {
        'cells': [markdown('# Title\n\n> A promise.'), *cells],
        'metadata': {},
        'nbformat': 4,
        'nbformat_minor': 5,
    }


def page(*cells: dict[str, Any]) -> str:
    "What a notebook of these cells says in the end, as Markdown."
    made = adapt(
        process(notebook(*cells), PurePosixPath('part/01_page.ipynb'), Index()),
        'part/01_page.ipynb',
        BIB,
    )
    parts = []
    for cell in made['cells']:
        parts.append(''.join(cell['source']))
        for output in cell.get('outputs', []):
            parts += [''.join(value) for value in output.get('data', {}).values()]
    return '\n\n'.join(parts)


# --- numbers and references ---------------------------------------------------------------


def test_equations_figures_tables_and_sections_are_numbered() -> None:
    text = page(
        markdown(
            '## One\n\nSee @eq-a, @fig-b, @tbl-c and @sec-two.\n\n$$ x $$'
            ' {#eq-z}\n\n$$\ny\n$$ {#eq-a}'
        ),
        code('#| label: fig-b\n#| fig-cap: Dots\nplot()', shown(png='AAAA')),
        markdown('## Two {#sec-two}\n\n| a |\n|---|\n| 1 |\n\n: Numbers {#tbl-c}'),
    )
    assert (
        'See [Equation\u00a02](#eq-a), [Figure\u00a01](#fig-b), [Table\u00a01](#tbl-c) and'
        ' [Section\u00a02](#sec-two).' in text
    )
    assert '::: {#eq-a .equation}\n$$\ny \\tag{2}\n$$\n:::' in text
    assert ': Table\u00a01: Numbers {#tbl-c}' in text
    assert 'id="fig-b"' in text and 'Figure\u00a01: Dots' in text


def test_several_references_in_brackets() -> None:
    text = page(markdown('$$ x $$ {#eq-a}\n$$ y $$ {#eq-b}\n[@eq-a; @eq-b], and [-@eq-b]'))
    assert '[Equation\u00a01](#eq-a), [Equation\u00a02](#eq-b), and [2](#eq-b)' in text


def test_unknown_label_names_page_and_label() -> None:
    with pytest.raises(SiteError, match=r'part/01_page.ipynb.*fig-nowhere'):
        page(markdown('See @fig-nowhere.'))


def test_label_used_twice_is_an_error() -> None:
    with pytest.raises(SiteError, match='eq-a stands there twice'):
        page(markdown('$$ x $$ {#eq-a}\n$$ y $$ {#eq-a}'))


def test_captions_may_refer_and_cite() -> None:
    text = page(
        markdown('$$ x $$ {#eq-a}'),
        code(
            '#| label: fig-b\n#| fig-cap: "Falls with $t$, @eq-a'
            ' [@yin2020deepinversion]"\nplot()',
            shown(png='AAAA'),
        ),
    )
    assert (
        'Falls with $t$, [Equation\u00a01](#eq-a) ([Yin et al.'
        ' 2020](#ref-yin2020deepinversion))' in text
    )


def test_figure_carries_alternative_text() -> None:
    text = page(
        code(
            '#| label: fig-b\n#| fig-cap: Cap\n#| fig-alt: A "rising" line\nplot()',
            shown(png='AAAA'),
        )
    )
    assert 'alt="A &quot;rising&quot; line"' in text


def test_figure_without_output_is_an_error() -> None:
    with pytest.raises(SiteError, match='fig-b.*no stored output'):
        page(code('#| label: fig-b\n#| fig-cap: Cap\nplot()'))


def test_table_from_a_cell_has_its_caption_above() -> None:
    text = page(
        code(
            '#| label: tbl-b\n#| tbl-cap: Numbers\nshow()',
            shown(markdown='| a |\n|---|\n| 1 |'),
        )
    )
    assert text.index('Table\u00a01: Numbers') < text.index('| a |')


def test_code_and_mathematics_are_left_alone() -> None:
    text = (
        '`@fig-a` and $@fig-a$ and\n\n```python\n@torch.no_grad()\ndef f():'
        " '@yin2020deepinversion $$ x $$ {#eq-a}'\n```\n"
    )
    assert text.strip() in page(markdown(text))


def test_addresses_and_decorators_are_no_citations() -> None:
    text = 'Write to a@b.org or <https://x.org/@user>; [link](https://x.org/@user).'
    assert text in page(markdown(text))


def test_heading_numbers_skip_unnumbered() -> None:
    labels = Labels('page')
    labels.collect(
        [markdown('## A\n\n### B {#sec-b}\n\n## No {.unnumbered}\n\n## C {#sec-c}')]
    )
    assert labels.numbers == {'sec-b': '1.1', 'sec-c': '2'}


# --- citations ----------------------------------------------------------------------------


def test_citations_and_their_list() -> None:
    text = page(
        markdown(
            'As @hinton2015distilling say [see @yin2020deepinversion, Eq. 4;'
            ' @zagoruyko2016wrn].'
        )
    )
    assert 'As Hinton et al. ([2015](#ref-hinton2015distilling)) say' in text
    assert (
        '(see [Yin et al. 2020](#ref-yin2020deepinversion), Eq. 4; [Zagoruyko and Komodakis'
        ' 2016](#ref-zagoruyko2016wrn))' in text
    )
    assert (
        text.index('## References')
        < text.index('{#ref-hinton2015distilling')
        < text.index('{#ref-yin2020deepinversion')
    )


def test_list_goes_where_the_page_wants_it() -> None:
    text = page(
        markdown('@kingma2015adam'),
        markdown('## References\n\n::: {#refs}\n:::'),
        markdown('## After'),
    )
    assert text.count('## References') == 1
    assert (
        text.index('## References')
        < text.index('{#ref-kingma2015adam')
        < text.index('## After')
    )


def test_unknown_citation_names_page_and_key() -> None:
    with pytest.raises(SiteError, match=r'part/01_page.ipynb: no reference `nobody1999`'):
        page(markdown('As [@nobody1999] says.'))


def test_bibliography_is_complete() -> None:
    for key, entry in BIB.items():
        assert entry.fields['author'] and entry.year.isdigit(), key
        assert '\\' not in entry.entry() and '{' not in entry.entry(), key
    assert BIB['pedregosa2011sklearn'].authors[1] == 'Varoquaux, Gaël'
    assert (
        Citations(BIB, 'p').resolve('[-@kingma2015adam]') == '([2015](#ref-kingma2015adam))'
    )


# --- a notebook's directives --------------------------------------------------------------


def test_hidden_cells_and_directives_are_gone() -> None:
    text = page(
        code('#| default_exp part.page'),
        code('#| hide\nsecret()'),
        code('#| export\nimport torch'),
        code(
            '#| slow\nlong()', {'output_type': 'stream', 'name': 'stderr', 'text': 'noise'}
        ),
    )
    assert (
        'secret' not in text
        and 'default_exp' not in text
        and 'import torch' not in text
        and 'noise' not in text
    )
    assert 'long()' in text and 'slow' not in text


def test_exports_show_the_source_at_its_address() -> None:
    text = page(code("#| exports\ndef Two() -> int:\n    'Two.'\n    return 2"))
    assert (
        '<a id="two" class="definition">' in text
        and 'return 2' in text
        and '::: {.api' not in text
    )


def test_export_is_documented_and_folded() -> None:
    source = (
        '#| export\ndef add(\n    x: int, # one\n    y: int = 2, # two\n) -> int: # their'
        " sum\n    'Adds.'\n    return x + y"
    )
    text = page(code(source))
    assert (
        '::: {.api #add}' in text and '`add(x, y)`' in text and '#| code-fold: true' in text
    )
    assert (
        '| `x` | `int` |  | one |' in text
        and '| `y` | `int` | `2` | two |' in text
        and '| *returns* | `int` |  | their sum |' in text
    )


def test_comments_above_a_parameter_and_examples_are_read() -> None:
    source = """def scale(
    # images,
    # `(N, C, H, W)`
    x: Tensor,
    by: float,  # factor
    # as large as `x`
) -> Tensor:
    \'\'\'Scales.

    Raises: `ValueError` for a negative factor.

    Example:
        >>> scale(1, 2)
        2
    \'\'\'
"""
    made = card(definitions(source)[0], source)
    assert '| `x` | `Tensor` |  | images, `(N, C, H, W)` |' in made
    assert '| `by` | `float` |  | factor |' in made
    assert '| *returns* | `Tensor` |  | as large as `x` |' in made
    assert '**Raises:** `ValueError`' in made
    assert '```python\n>>> scale(1, 2)\n2\n```' in made


def test_card_of_a_class_lists_fields_and_methods() -> None:
    source = (
        "class A:\n    'An A.'\n    size: int = 3 # how large\n    def grow(self, by: int)"
        " -> None:\n        'Make it larger.'\n"
    )
    made = card(definitions(source)[0], source)
    assert (
        '| `size` | `int` | `3` | how large |' in made
        and '`.grow(by)`{.nolink} — Make it larger.' in made
    )


def test_names_in_backticks_link_to_their_pages() -> None:
    index, here = Index(), PurePosixPath('part/01_page.ipynb')
    index.add(PurePosixPath('other/02_thing.ipynb'), ['Thing', 'make'])
    assert (
        index.link('`Thing` and `make()`', here)
        == '[`Thing`](/other/02_thing.ipynb#thing) and'
        ' [`make()`](/other/02_thing.ipynb#make)'
    )
    for text in (
        '## `Thing`',
        '[`Thing`](x)',
        '```\n`Thing`\n```',
        '`Thing`{.nolink}',
        '`unknown`',
    ):
        assert index.link(text, here) == text
    assert index.link('`Thing`', PurePosixPath('other/02_thing.ipynb')) == '`Thing`'


def test_widgets_and_foreign_style_sheets_are_left_out() -> None:
    widget = shown(html='x')
    widget['data']['application/vnd.jupyter.widget-view+json'] = '{}'
    link = (
        '<link rel="stylesheet"'
        ' href="https://elsewhere.org/font-awesome/4.4.0/css/font-awesome.min.css">'
    )
    text = page(code('show()', widget, shown(html=link + '<img src="data:,"><p>kept</p>')))
    assert 'kept' in text and 'elsewhere' not in text and '<img alt=""' in text


def test_commands_and_printed_columns_are_marked() -> None:
    printed = '<div class="cell-output cell-output-stdout">\n<pre><code>{}</code></pre>'
    table = 'a   b\n1   2\n3   4'
    words = 'one sentence  with a gap\nand another\nand a third'
    assert '<pre class="columns"><code>a   b' in refine(printed.format(table))
    assert refine(printed.format(words)) == printed.format(words)
    assert refine('<td><code>dfkd run x --scale quick</code></td>').startswith(
        '<td><code class="command">dfkd run'
    )


def test_a_wide_picture_gets_a_box_that_scrolls() -> None:
    for width, boxed in ((559, False), (560, True)):
        buffer = io.BytesIO()
        Image.new('L', (width, 2)).save(buffer, 'PNG')
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = (
            f'<img src="data:image/png;base64,{data}" alt="a &gt; b" class="img-fluid">'
        )
        box = '<div class="wide-picture" style="--natural: 560px">'
        expected = f'{box}{picture}</div>' if boxed else picture
        assert refine(picture) == expected


def test_a_spread_stays_beside_its_mean_in_a_table() -> None:
    assert refine('<td>1.0 ± 0.2†</td>') == '<td>1.0\u00a0±\u00a00.2†</td>'
    assert refine('<p>1.0 ± 0.2</p>') == '<p>1.0 ± 0.2</p>'


def test_pages_lose_the_number_of_their_notebook() -> None:
    assert url(PurePosixPath('dreams/03_priors.ipynb')) == PurePosixPath(
        'dreams/priors.html'
    )
    assert url(PurePosixPath('index.ipynb')) == PurePosixPath('index.html')


def test_title_is_needed() -> None:
    with pytest.raises(SiteError, match='must begin with `# Title`'):
        process({'cells': [markdown('No title')]}, PurePosixPath('a.ipynb'), Index())


# --- the site as built --------------------------------------------------------------------


def test_sidebar_lists_exactly_the_notebooks() -> None:
    check_sidebar(yaml.safe_load((ROOT / '_quarto.yml').read_text()), ROOT / 'nbs')


def test_sidebar_that_forgets_a_notebook_is_an_error(tmp_path: Path) -> None:
    (tmp_path / 'a.ipynb').write_text('{}')
    with pytest.raises(
        SiteError,
        match='a.ipynb is not in the sidebar; b.ipynb is in the sidebar and not under nbs',
    ):
        check_sidebar({'website': {'sidebar': {'contents': ['b.ipynb']}}}, tmp_path)


def test_settings_and_site_name_the_same_repository() -> None:
    import configparser

    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    website = yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']
    assert website['repo-url'] == settings['DEFAULT']['git_url']
    assert website['repo-branch'] == settings['DEFAULT']['branch']


def test_quarto_finds_the_configuration() -> None:
    assert (ROOT / 'nbs/_quarto.yml').read_text() == (ROOT / '_quarto.yml').read_text()


def test_check_sees_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / 'a.html').write_text(
        '<h2 id="here">x</h2><a href="#here">1</a><a href="#there">2</a><a'
        ' href="b.html">3</a><img src="c.png" alt=""><img src="data:,"><script'
        ' src="https://elsewhere.org/x.js"></script><p>$$ x $$ and @fig-a</p><a'
        ' href="https://elsewhere.org">4</a><span class="math">x</span>'
    )
    found = '\n'.join(check(tmp_path))
    for wrong in (
        '#there has no such anchor',
        'b.html is not there',
        'c.png is not there',
        'without alternative text',
        'loads https://elsewhere.org/x.js',
        'raw Markdown on the page: $$',
        'raw Markdown on the page: @fig-a',
        'mathematics without KaTeX',
        'nothing to search',
    ):
        assert wrong in found
    assert '#here' not in found and len(found.splitlines()) == 9


@pytest.fixture(scope='session')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The site, built in pure Python."
    folder = tmp_path_factory.mktemp('site')
    build(ROOT, folder / '_site', 'smalldocs', work=folder / '_proc')
    return folder / '_site'


def test_nothing_is_wrong_with_the_site(site: Path) -> None:
    found = check(site)
    assert not found, '\n'.join(found)


def test_edit_links_lead_to_notebooks(site: Path) -> None:
    for path in sorted(site.rglob('*.html')):
        links = re.findall(
            r'href="[^"]*/edit/main/([^"#]+)"', path.read_text(encoding='utf-8')
        )
        assert links, path.name
        for link in links:
            assert (ROOT / link).exists(), link


@pytest.mark.browser
@pytest.mark.timeout(900)
def test_every_page_in_a_browser(site: Path) -> None:
    """No errors on the console, no request to another machine, formulas set, nothing wider
    than the window.
    """
    from look import browser, look

    if browser() is None:
        pytest.skip('Chromium is not installed')
    if os.environ.get('DFKD_NO_BROWSER'):
        pytest.skip('DFKD_NO_BROWSER is set')
    wrong = [
        f'{one.page} ({one.view}): {"; ".join(one.problems)}'
        for one in look(site, views=('desktop', 'phone'))
        if one.problems
    ]
    assert not wrong, '\n'.join(wrong)


@pytest.mark.browser
@pytest.mark.timeout(600)
def test_every_slider_changes_its_picture(site: Path) -> None:
    "Explorers have frames that need no kernel: the page alone has to show them."
    from look import browser, sliders

    if browser() is None:
        pytest.skip('Chromium is not installed')
    if os.environ.get('DFKD_NO_BROWSER'):
        pytest.skip('DFKD_NO_BROWSER is set')
    counts, stuck = sliders(site)
    assert not stuck, '\n'.join(stuck)
    missing = [page for page in EXPLORERS if not counts.get(page)]
    assert not missing, f'no slider on {missing}'


def test_every_explorer_has_frames() -> None:
    "A notebook that makes a live explorer also shows a `FigureSlider` or a `FilmStrip`."
    makes = re.compile(r'\b(\w+_explorer|cluster_browser)\(')
    frames = re.compile(r'\b(FigureSlider|FilmStrip|TraversalStrip)\(')
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        shown = [c for c in cells if c['cell_type'] == 'code']
        sources = [''.join(c['source']) for c in shown]
        live = any(makes.search(s) and not s.startswith('#| export') for s in sources)
        still = any(
            frames.search(s) and 'type=\\"range\\"' in json.dumps(c['outputs'])
            for c, s in zip(shown, sources)
        )
        assert still or not live, f'{path.name}: an explorer without frames'
        assert not any('ipywidgets.' in s for s in sources if '#| export' not in s), path
