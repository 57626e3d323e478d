"""What a run tells while it runs: a live line in a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from svp.cli.words import note, percent, say

PLAIN_SECONDS = 60.0  # a plain line at least so often


class Progress:
    """The `report` callback of one or several runs; each note is told once."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.noted: dict[str, None] = {}
        self.is_live = sys.stderr.isatty() and not quiet
        self.live: Any = None
        self.said_at = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        handle = getattr(self, f"on_{event['kind']}", None)
        if handle is not None:
            handle(event)

    def on_note(self, event: dict[str, Any]) -> None:
        if event["text"] not in self.noted:
            self.noted[event["text"]] = None
            note(event["text"], self.quiet)

    def on_start(self, event: dict[str, Any]) -> None:
        sizes = " / ".join(f"{event['sizes'][name]:,} {name}" for name in ("train", "val", "test"))
        machine, recipe = event["machine"], event["recipe"]
        verb = "continues" if event["resumed"] else "trains"
        epochs = f"{event['epochs']} epoch{'s' if event['epochs'] > 1 else ''}"
        say(f"{verb} {epochs} on {sizes} pictures; batch {recipe['batch_size']}"
            f"{'' if recipe['accumulate'] == 1 else ' x ' + str(recipe['accumulate'])}, learning rate {event['lr_used']:g}, "
            f"seed {event['seed']}, {machine['device']}", self.quiet)  # fmt: skip
        self.said_at = time.monotonic()
        if self.is_live:
            self._open(event["epochs"])

    def on_batch(self, event: dict[str, Any]) -> None:
        done = event["epoch"] - 1 + event["step"] / event["steps"]
        words = f"loss {event['loss']:.3f}  {event['images_per_second']:,.0f} images/s"
        if self.live is not None:
            self.live.update(0, completed=done, words=words)
        elif time.monotonic() - self.said_at > PLAIN_SECONDS:
            say(f"epoch {event['epoch']}/{event['epochs']}, step {event['step']}/{event['steps']}  {words}", self.quiet)
            self.said_at = time.monotonic()

    def on_epoch(self, event: dict[str, Any]) -> None:
        split = "val" if "val_accuracy" in event else "test"
        speed = "" if event["images_per_second"] is None else f"  {event['images_per_second']:,.0f} images/s"
        words = f"loss {event['train_loss']:.3f}  {split} {percent(event[f'{split}_accuracy'])} %{speed}"
        if self.live is not None:
            self.live.update(0, completed=event["epoch"], words=words)
        else:
            say(f"epoch {event['epoch']:>3}/{event['epochs']}  {words}", self.quiet)
            self.said_at = time.monotonic()

    def on_end(self, event: dict[str, Any]) -> None:
        self.close()
        r = event["result"]
        test = "" if r["test_accuracy"] is None else f", test {percent(r['test_accuracy'])} %"
        say(f"epoch {r['selected_epoch']} is kept: val {percent(r['val_accuracy'])} %{test}", self.quiet)

    def close(self) -> None:
        """End the live line, also after an error."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _open(self, epochs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.live = Bar(
            TextColumn("epoch {task.completed:.1f}/{task.total:.0f}"), BarColumn(), TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.live.add_task("", total=epochs, words="")
        self.live.start()
