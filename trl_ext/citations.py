"""What is said of a paper, and its BibTeX: for pages and model cards."""

from typing import Any, NamedTuple


class Paper(NamedTuple):
    """
    A paper, or a note, with the data of its citation.

    Args:
        cite (`str`):
            Key of its BibTeX entry.
        title (`str`):
            Title.
        authors (`str`):
            Names, joined by "and" as BibTeX wants it.
        year (`int`):
            Year of the first version.
        arxiv (`str`, *optional*):
            Identifier there, such as `"2402.03300"`.
        source (`dict[str, str]`, *optional*):
            Where it appeared, if not on arXiv: further entries of its BibTeX, among them `doi` or `url`.
    """

    cite: str
    title: str
    authors: str
    year: int
    arxiv: str | None = None
    source: dict[str, str] = {}

    @property
    def url(self) -> str:
        """The link that docstrings and docs give."""
        if self.arxiv is not None:
            return f"https://huggingface.co/papers/{self.arxiv}"
        return f"https://doi.org/{self.source['doi']}" if "doi" in self.source else self.source["url"]

    def for_card(self) -> dict[str, Any]:
        """In the form of `_paper` of TRL's trainers."""
        source = self.source if self.arxiv is None else {"eprint": f"arXiv:{self.arxiv}"}
        entries = {"title": f"{{{self.title}}}", "author": self.authors, "year": self.year, **source}
        lines = "".join(f"    {name:<7} = {{{value}}},\n" for name, value in entries.items())
        return {"title": self.title, "id": self.arxiv, "citation": f"@article{{{self.cite},\n{lines}}}"}
