"""What a run tells: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
from typing import IO, Any, Protocol

import jax

from hypenet_jax.errors import HypenetError

METRICS_NAME = "metrics.jsonl"


def drop_lines_after(path: str, step: int) -> None:
    """Keeps the lines of a metrics file up to `step`, atomically; a last line torn by a kill goes too.

    Raises:
      HypenetError: a line in the middle is not JSON, so this is no metrics file.
    """
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise HypenetError(f"{path} line {number} is not a metrics line; move the file away") from error
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=METRICS_NAME, suffix=".tmp")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class ReporterLike(Protocol):
    """What `train` needs of a reporter."""

    def open(self, name: str, directory: str, steps: int, restored_step: int) -> Any: ...
    def log(self, record: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class SilentReporter:
    """Writes nothing; keeps the records in `records` and the messages in `messages`."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.messages: list[str] = []

    def open(self, name: str, directory: str, steps: int, restored_step: int) -> SilentReporter:
        return self

    def __enter__(self) -> SilentReporter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class Reporter:
    """Appends metrics.jsonl, writes TensorBoard events beside it, and shows progress on `stream`.

    One reporter serves one stage after the other: `with reporter.open(...)`, then `log` in the order of the steps. On a
    terminal it draws a bar, elsewhere it prints one line a record. Only process 0 writes.

    Args:
      tensorboard: write event files.
      stream: where progress goes; None is standard error.
    """

    def __init__(self, *, tensorboard: bool = True, stream: IO[str] | None = None):
        self._wants_tensorboard = tensorboard
        self._stream = stream
        self._file: IO[str] | None = None
        self._events: Any = None
        self._bar: Any = None
        self._task: Any = None
        self._name = ""
        self._steps = 0

    def open(self, name: str, directory: str, steps: int, restored_step: int) -> Reporter:
        """Starts a stage of `steps` steps in `directory`; what was written past `restored_step` is dropped."""
        self.close()
        self._name, self._steps = name, steps
        if jax.process_index() != 0:
            return self
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, METRICS_NAME)
        drop_lines_after(path, restored_step)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed by close()
        if self._wants_tensorboard:
            import tensorboardX

            purge = restored_step + 1 if restored_step else None
            self._events = tensorboardX.SummaryWriter(directory, purge_step=purge)
        if self._out.isatty():
            self._start_bar(restored_step)
        return self

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def _out(self) -> IO[str]:
        return sys.stderr if self._stream is None else self._stream

    def _start_bar(self, restored_step: int) -> None:
        from rich import console, progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[facts]}"),
            progress.TimeRemainingColumn(),
            console=console.Console(file=self._out),
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task(self._name, total=self._steps, completed=restored_step, facts="compiling")
        self._bar.start()

    def log(self, record: dict[str, Any]) -> None:
        """Records one step: a flat dict of numbers with "step"; see `loop.train` for its other keys.

        A record without "loss" is of a batch in which nothing was to be learned.
        """
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        if self._events is not None:
            for key, value in record.items():
                if key != "step":
                    self._events.add_scalar(f"{self._name}/{key}", value, record["step"])
        facts = f"loss {record['loss']:.4f}" if "loss" in record else "no token to learn"
        rate = record.get("tokens_per_second")
        if rate:
            facts += f"  {rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], facts=facts)
            return
        if rate and record.get("tokens"):
            left = (self._steps - record["step"]) * record["tokens"] / record["step"] / rate
            facts += f"  {datetime.timedelta(seconds=round(left))} left"
        print(f"{self._name}  step {record['step']}/{self._steps}  {facts}", file=self._out, flush=True)

    def message(self, text: str) -> None:
        """One line to the user, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        elif jax.process_index() == 0:
            print(text, file=self._out, flush=True)

    def flush(self) -> None:
        """Everything logged so far is on the disk when this returns."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Ends the stage; harmless when none is open."""
        if self._bar is not None:
            self._bar.stop()
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            self._file.close()
        self._bar = self._events = self._file = None
