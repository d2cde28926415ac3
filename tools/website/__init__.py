"""The book's site: `python -m tools.website` builds it into `_site`.

- `notebook`  a notebook as readers see it: directives obeyed, hidden cells gone, definitions documented
- `symbols`   what the notebooks export, where it is explained, and the cards that document it
- `labels`    numbers for figures, tables, equations and sections, and references to them
- `citations` BibTeX, citations and lists of references
- `build`     the whole: processed notebooks, then Quarto where it is installed, else smalldocs; nothing from the network
- `check`     is every link, anchor and picture of the built site there?
"""


class SiteError(Exception):
    "The site cannot be built; the message names the file and what is wrong with it."
