"""What a run says while it trains: `metrics.jsonl`, TensorBoard, and a progress bar where there is a terminal."""

import json
import math
import os
import pathlib
import sys
import time
from typing import IO, Any


class Logs:
    """Writes metrics; a bar is drawn on a terminal only, a line every few seconds elsewhere. Of several processes the
    first one writes (`writing`), the others are silent."""

    def __init__(self, workdir: pathlib.Path, total: int, start: int, unit: str = "examples", writing: bool = True):
        self._writing, self._bar = writing, None
        if not writing:
            return
        from tensorboardX import SummaryWriter

        self._file = _opened(workdir / "metrics.jsonl", start)
        self._board = SummaryWriter(str(workdir / "tensorboard"))
        self._total, self._unit = total, unit
        self._said = 0.0
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[text]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=total, completed=start, text="")
            self._bar.start()

    def write(self, step: int, values: dict[str, Any], kind: str = "train") -> None:
        """One line of `metrics.jsonl` and the same points for TensorBoard. A value that is not finite is null."""
        if not self._writing:
            return
        clean = {name: (float(v) if math.isfinite(float(v)) else None) for name, v in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **clean}) + "\n")
        self._file.flush()
        for name, value in clean.items():
            if value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, loss: float, per_second: float, seconds_left: float) -> None:
        """Shows where the run is."""
        if not self._writing:
            return
        text = f"loss {loss:.4f}  {per_second:,.0f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif time.monotonic() - self._said > 10 or step == self._total:
            self._said = time.monotonic()
            print(f"step {step}/{self._total}  {text}  {seconds_left:.0f} s left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line for the user that does not tear the bar."""
        if not self._writing:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar and the files."""
        if not self._writing:
            return
        if self._bar is not None:
            self._bar.stop()
        self._board.close()
        self._file.close()


def _opened(path: pathlib.Path, start: int) -> IO[str]:
    """The file, without the records of steps after `start`, which will be taken again, and without a last line that a
    kill cut off."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= start and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
    return path.open("a")
