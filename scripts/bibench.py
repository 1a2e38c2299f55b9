"""BiBench's score of the binary variants of finished comparisons, relative to full precision.

    uv run scripts/bibench.py --rows=results/mnist1d_binary/rows.jsonl[,MORE/rows.jsonl] [--reference=float]
        [--stored=packed] [--out=runs/bibench]

Reads what compare.py wrote: each task of each file is a comparison, in which the variant `--reference` is the
full-precision network, and the rows behind the transform `--stored` are scored. evaluation/bibench.py has the formulas.
Prints a table a comparison, and one over all where there are several; --out gets them and the rows.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence


def run(files: Sequence[str], *, reference: str = "float", stored: str = "packed", out: str | None = None) -> list:
    """The scored rows, printed and written."""
    from lissom.eval import check_writable
    from lissom.evaluation.bibench import scored
    from lissom.evaluation.rows import read_rows
    from lissom.evaluation.tables import shown_text, tables, write_report

    if out:
        check_writable(out, "--out")
    if len(set(files)) < len(files):
        raise UserError(f"--rows={','.join(files)} names one file twice")
    comparisons = []
    try:
        for file in files:
            rows = read_rows(file)
            tasks = dict.fromkeys(row.identity.task for row in rows)
            comparisons += [[row for row in rows if row.identity.task == task] for task in tasks]
        if not comparisons:
            raise UserError(f"--rows={','.join(files)}: there are no rows")
        found = scored(comparisons, reference, stored)
        text = shown_text(tables(found))
    except OSError as error:
        raise UserError(f"--rows={error.filename} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    print(text)
    if out:
        write_report(found, pathlib.Path(out), plot=False)
    return found


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("rows", [], "rows.jsonl of finished comparisons")
    flags.DEFINE_string("reference", "float", "the label of the full-precision variant")
    flags.DEFINE_string("stored", "packed", "the transform behind which networks are stored")
    flags.DEFINE_string("out", None, "write rows.jsonl, table.md and table.csv there")
    with one_sentence():
        if command_line.parse(argv, recipe=False):
            raise UserError("--config is no flag of bibench.py, which reads finished rows")
        given = flags.FLAGS
        if not given.rows:
            raise UserError("--rows=FILE is missing, for example --rows=results/mnist1d_binary/rows.jsonl")
        run(given.rows, reference=given.reference, stored=given.stored, out=given.out)


if __name__ == "__main__":
    main(sys.argv)
