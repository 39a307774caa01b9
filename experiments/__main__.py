"""Prints every experiment: its question, command, minutes and result.

    python -m experiments

All of it stands in the table of README.md beside this file, and nowhere else.
"""

import pathlib
import re
import signal
import sys

README = pathlib.Path(__file__).with_name("README.md")
_COLUMNS = ("question", "claim", "command", "minutes", "result")


def questions():
    """A dict for each row of the table, by its columns; links as "text (file)"."""
    rows = []
    for line in README.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(_COLUMNS) and "experiments." in cells[2]:
            rows.append(dict(zip(_COLUMNS, map(_plain, cells), strict=True)))
    return rows


def _plain(cell):
    cell = re.sub(r"\[([^]]*)\]\(([^)]*)\)", r"\1 (experiments/\2)", cell)
    return cell.replace("`", "")


def text():
    """All questions, four lines each."""
    return "\n\n".join(
        f"{row['question']}\n"
        f"  command  {row['command']}\n"
        f"  minutes  {row['minutes']}\n"
        f"  result   {row['result']}"
        for row in questions()
    )


if len(sys.argv) > 1:
    sys.exit(f"error: unexpected argument {sys.argv[1]!r}: python -m experiments.NAME")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
print(text())
