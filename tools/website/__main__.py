"`python -m tools.website [--out _site] [--builder auto|quarto|smalldocs] [--check-only]`"

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from . import SiteError
from .build import build
from .check import check

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    "Build the site and check it; returns 1 if something is wrong."
    parser = argparse.ArgumentParser(
        prog='python -m tools.website',
        description="Build the book's site and check its links.",
    )
    parser.add_argument(
        '--out', type=Path, default=ROOT / '_site', help='where the pages go'
    )
    parser.add_argument(
        '--builder', choices=['auto', 'quarto', 'smalldocs'], default='auto'
    )
    parser.add_argument(
        '--check-only', action='store_true', help='check a site that is there'
    )
    options = parser.parse_args()
    start = time.time()
    try:
        if not options.check_only:
            builder = build(ROOT, options.out.resolve(), options.builder)
    except (SiteError, subprocess.CalledProcessError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    wrong = check(options.out.resolve())
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(f'error: {len(wrong)} things are wrong with the site', file=sys.stderr)
        return 1
    pages = len(list(options.out.rglob('*.html')))
    made = '' if options.check_only else f' by {builder}'
    print(
        f'{pages} pages{made} in {time.time() - start:.1f} s, links checked:'
        f' {options.out / "index.html"}'
    )
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
