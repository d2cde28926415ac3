"""The book's site: `python -m tools.website` builds it into `_site`.

- `notebook`  a notebook as readers see it: without hidden cells, definitions documented
- `symbols`   what the notebooks export, where it is explained, and cards that document it
- `labels`    numbers for figures, tables, equations and sections, and references to them
- `citations` BibTeX, citations and lists of references
- `build`     the whole site, by Quarto where it is installed, else by smalldocs
- `check`     is every link, anchor and picture of the built site there?
"""


class SiteError(Exception):
    "The site cannot be built; the message names the file and what is wrong with it."
