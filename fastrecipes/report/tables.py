"Rows of text as a table that reads well in a terminal."
from collections.abc import Sequence

__all__ = ['aligned']


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    "A line for each of `rows`, which have equally many cells: columns as wide as their widest cell, two spaces between."
    width = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(c.ljust(w) for c, w in zip(row, width)).rstrip() for row in rows]
