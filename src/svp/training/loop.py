"""One training run from top to bottom: phases, epochs, steps, validation, the one look at the test split."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import operator
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svp.data.sources import open_data
from svp.data.sources.checks import upscale_note
from svp.data.splits import Splits
from svp.data.transforms import mixed_seed
from svp.errors import SvpError
from svp.methods.base import Method, Phase, parts_of
from svp.model import AdaptedModel, adapt, load
from svp.options import changed
from svp.training import checkpoint, machine
from svp.training.checkpoint import Progress, Snapshot
from svp.training.evaluate import Evaluation, adapted_one, in_order_of, predictions, score
from svp.training.facts import card_of, check, check_memory, default_lr, notes_of, result_of, settings_of
from svp.training.feed import (
    FeatureFeed,
    Feed,
    as_made,
    chance,
    evaluation_feed,
    is_random,
    my_batches,
    prepared,
    training_feed,
    training_order,
)
from svp.training.folder import RunFolder
from svp.training.interrupt import Signals
from svp.training.losses import Criterion, Mixer
from svp.training.machine import Amp, Team, autocast
from svp.training.optim import Average, clip_gradients, lr_at, optimizer_for, parameter_groups
from svp.training.recipe import Recipe, recipe_from, resolve
from svp.training.run import Run, RunHandle

LOG_STEPS = 50  # a line in metrics.jsonl every so many optimiser steps, besides one an epoch
REPORT_SECONDS = 0.2  # between two "batch" events
EPOCH_SAVE_SECONDS = 2.0  # epochs shorter than this share a checkpoint
Report = Callable[[dict[str, Any]], None]


def fit(
    model: AdaptedModel,
    data: Splits | str | os.PathLike,
    *,
    recipe: Recipe | str | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    device: str = "auto",
    amp: Amp = "auto",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    compile: bool = False,
    report: Report | None = None,
    deterministic: bool = False,
    checkpoint_seconds: float = 60.0,
) -> Run:
    """Train method and head of `model` on the train split; afterwards it holds the selected epoch's tensors.

    recipe    a Recipe, the name of a row or a YAML file; None: the row "default". Its lr None is the method's own.
    out       the run folder; None: nothing is written. A finished run there is read back instead of run again.
    resume    continue a half run, to the same numbers;  overwrite: start again
    report    called with events {"kind": "start" | "note" | "batch" | "epoch" | "end", …}
    checkpoint_seconds   at most so much work is lost to a kill
    The same seed gives the same numbers on the same machine, whatever `workers` is. The caller's random generators are
    left alone. Under torchrun the processes share each batch, and the first one writes.
    Raises SvpError, after saving what can be resumed. Ctrl-C and SIGTERM are delivered again after saving.
    """
    seed = operator.index(seed)
    adapted_one(model)
    splits = open_data(data) if isinstance(data, (str, os.PathLike)) else data
    chosen = recipe if isinstance(recipe, Recipe) else recipe_from(recipe or "default").recipe
    chosen = resolve(changed(chosen, {}, "the recipe"), default_lr(model.method))
    place = machine.device_named(device)
    machine.git_revision()
    if out is not None and amp == "auto" and not overwrite:
        amp = (RunFolder(out).settings() or {}).get("amp") or amp  # what a run began with, it ends with
    used_amp = machine.precision(amp, chosen.amp, place)
    given = splits
    splits = in_order_of(model, given)
    check(splits, chosen)
    check_memory(model.backbone, len(splits.train), chosen)
    team = machine.join_team(place)
    if chosen.batch_size % team.size:
        raise SvpError(
            f"batch_size {chosen.batch_size} does not divide by {team.size} processes",
            f"--batch-size {math.ceil(chosen.batch_size / team.size) * team.size}", "usage",
        )  # fmt: skip
    model.preprocessing = prepared(as_made(model), splits)
    model.classes = model.classes or splits.classes
    model.task = {**model.task, "source": splits.source, "protocol": splits.protocol.name}
    model.to(place)
    count = machine.default_workers(place) if workers is None else workers
    facts = settings_of(model, given, chosen, seed, used_amp)
    facts["machine"] = {
        "device": str(place), "workers": count, "processes": team.size, "compile": compile,
        "deterministic": deterministic,
    }  # fmt: skip
    folder = RunFolder(out) if out is not None else None
    checkpointing = model.backbone.grad_checkpointing
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(machine.determinism(deterministic))
            machine.forget_peak_memory(place)
            finished = _open(folder, facts, resume, overwrite, team, stack)
            if finished is not None:
                _read_back(model, folder)
                return Run(folder.path if folder else None, finished)
            training = Training(
                model, splits, chosen, seed, place, used_amp, count, team, folder if team.is_main else None, facts,
                stack.enter_context(Signals()), report if team.is_main and report else _silent, compile,
                checkpoint_seconds,
            )  # fmt: skip
            return Run(folder.path if folder else None, training.run(resume and not overwrite))
    finally:
        model.drop_path = 0.0
        model.backbone.set_grad_checkpointing(checkpointing)
        team.close()


class Training:
    """The state of one run while it runs."""

    def __init__(
        self, model: AdaptedModel, data: Splits, recipe: Recipe, seed: int, device: torch.device, amp: str, workers: int,
        team: Team, folder: RunFolder | None, facts: dict[str, Any], signals: Signals, report: Report, compile: bool,
        checkpoint_seconds: float,
    ):  # fmt: skip
        self.model, self.method, self.data, self.recipe, self.seed = model, model.method, data, recipe, seed
        self.device, self.amp, self.workers, self.team, self.folder = device, amp, workers, team, folder
        self.facts, self.signals, self.report, self.compile = facts, signals, report, compile
        self.checkpoint_seconds = checkpoint_seconds
        self.progress = Progress()
        self.entries: dict[int, checkpoint.State] = {}
        self.best: checkpoint.State | None = None
        self.best_saved = 0  # the epoch whose tensors lie in the folder
        self.trained: checkpoint.State | None = None  # what trains, while the average stands in its place
        self.is_ready = False  # a phase has begun: there is a state worth saving
        self.size_in_use = "batch_size"  # or "eval_batch_size": what memory that runs out was asked for
        self.feeds: dict[str, Feed | FeatureFeed] = {}
        self.selects_on = "test" if data.protocol.select == "test_best" else "val"
        self.clock = self.saved_at = self.told_at = time.monotonic()

    # -- the story -----------------------------------------------------------------------------------------------------

    def run(self, resume: bool) -> dict[str, Any]:
        """Train all phases, select an epoch, measure test; the content of result.json."""
        snapshot = self.find_snapshot() if resume else None
        first = snapshot.progress.phase if snapshot else 0
        if snapshot and 0 in snapshot.entries:
            self.go_back(snapshot.entries[0])
        phases = self.method.phases(self.recipe)
        self.epochs = sum(phase.recipe.epochs for phase in phases)
        self.tell("start", **self.facts, epochs=self.epochs, sizes=self.data.sizes, resumed=snapshot is not None)
        self.tell_notes()
        with self.explaining_memory():
            for index, phase in enumerate(phases):
                if index < first:
                    self.replay(index, phase, snapshot)
                    continue
                self.begin(index, phase, snapshot if index == first else None)
                for epoch in range(self.progress.epoch, phase.recipe.epochs):
                    self.train_epoch(epoch)
                    self.validate()
                    self.end_epoch(epoch)
                if index + 1 < len(phases):
                    self.next_phase(phase)
            return self.finish()

    def begin(self, index: int, phase: Phase, snapshot: Snapshot | None) -> None:
        """What `begin` of the phase changes, then optimiser and schedule made anew, then what a checkpoint remembers."""
        recipe = resolve(phase.recipe, self.facts["recipe"]["lr"])
        self.recipe, self.lr = recipe, recipe.base_lr
        self.run_begin(index, phase, snapshot.entries.get(index) if snapshot else None)
        self.team.agree(self.model.state_dict().values())
        self.model.drop_path = recipe.drop_path
        if recipe.grad_checkpointing:
            self.model.backbone.set_grad_checkpointing(True)
        self.groups = parameter_groups(self.model.named_parameters(), recipe, self.method.groups())
        self.optimizer = optimizer_for(self.groups, recipe)
        self.optimizer.zero_grad(set_to_none=True)  # what a loop of the caller's, or a step that failed, has left
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self.average = Average(self.model, recipe.ema) if recipe.ema else None
        self.criterion = Criterion(recipe.label_smoothing)
        self.mixer = Mixer(recipe, self.model.num_classes) if recipe.mixes else None
        self.feeds = {}
        self.forward = self.model
        if self.caches_features():
            self.feeds["train"], self.forward = self.feature_feed("train"), self.model.head  # type: ignore[assignment]
        else:
            self.feeds["train"] = training_feed(self.data, self.model, recipe, self.seed, self.device, self.workers)
            if self.compile:
                self.forward = torch.compile(self.model)  # type: ignore[assignment]
        if snapshot is not None:
            self.restore(snapshot)
        self.is_ready = True

    def train_epoch(self, epoch: int) -> None:
        """The steps of one epoch that are still to do, each with exactly the mean gradient of its pictures."""
        p = self.progress
        p.epoch = epoch
        if p.step == 0:
            p.loss, p.correct, p.seen = 0.0, 0, 0
            with chance(self.device, self.seed, p.phase, epoch):
                self.method.start_epoch(self.handle, epoch)
        steps = training_order(len(self.data.train), self.recipe, self.seed, p.phase, epoch)
        mine = [[self.my_part(batch) for batch in step] for step in steps[p.step :]]
        flow = self.feeds["train"](list(itertools.chain.from_iterable(mine)), p.past_epochs + epoch)
        self.model.train()
        self.set_lr(epoch * len(steps) + max(p.step - 1, 0), len(steps))
        started, before = time.monotonic(), p.images
        for step in steps[p.step :]:
            lr = self.set_lr(epoch * len(steps) + p.step, len(steps))
            with chance(self.device, self.seed, p.phase, epoch, p.step, self.team.rank):
                loss, stop = self.train_step(flow, step)
            p.step += 1
            p.total_steps += 1
            self.tell_step(len(steps), loss, lr, (p.images - before) / max(time.monotonic() - started, 1e-9))
            self.save_if_due(self.checkpoint_seconds, stop)
        self.speed = (p.images - before) / max(time.monotonic() - started, 1e-9) if p.images > before else None
        p.train_seconds += time.monotonic() - started

    def train_step(self, flow: Iterator, step: list[Tensor]) -> tuple[float, bool]:
        """Forward and backward of each batch of the step, then one update; the mean loss, and whether to stop now."""
        total = sum(len(batch) for batch in step)
        sums = torch.zeros(2, dtype=torch.float64)  # mean loss, right answers
        for batch in step:
            try:
                images, labels, _ = next(flow)
            except RuntimeError:
                self.stop_if_asked()  # a worker that was told to end before us
                raise
            weight = len(self.team.share(batch)) / total
            images, target = self.mixer(images, labels) if self.mixer else (images, labels)
            seen = _Seen(self.criterion)
            with autocast(self.device, self.amp):
                loss = self.method.loss(self.forward, images, target, seen)
            self.scaler.scale(loss * weight).backward()
            right = (seen.logits.argmax(-1) == labels).sum() if seen.logits is not None else loss.new_zeros(())
            sums += torch.stack([loss.detach() * weight, right.to(loss.dtype) * (weight > 0)]).cpu().double()
        stop = self.add_over_team(sums)
        loss_value, right_count = sums.tolist()
        if not math.isfinite(loss_value):
            raise self.not_finite("loss", loss_value, self.progress.total_steps + 1)
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.optimizer.param_groups, self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()
        if self.average:
            self.average.update()
        p = self.progress
        p.loss, p.correct, p.seen = p.loss + loss_value * total, p.correct + round(right_count), p.seen + total
        p.images += total
        return loss_value, stop

    def validate(self) -> None:
        """Score the epoch on the split that the protocol selects on; keep the tensors of the best (the first of equals)."""
        p = self.progress
        with self.averaged():
            self.scored = self.measure(self.selects_on)
            if self.selects_on == "val":
                p.last_val = self.scored.accuracy
            if self.scored.accuracy > p.best:
                p.best, p.best_epoch = self.scored.accuracy, p.past_epochs + p.epoch + 1
                p.best_val = p.last_val
                self.best = checkpoint.clone(self.model.state_dict())

    def end_epoch(self, epoch: int) -> None:
        """Write the epoch's line, tell it, save."""
        p = self.progress
        line = {
            "epoch": p.past_epochs + epoch + 1, "step": p.total_steps, "lr": self.lr, "train_loss": p.loss / p.seen,
            "train_accuracy": None if self.mixer else p.correct / p.seen,
            f"{self.selects_on}_loss": self.scored.loss, f"{self.selects_on}_accuracy": self.scored.accuracy,
            "best_epoch": p.best_epoch,
        }  # fmt: skip
        timing = {
            "seconds": self.elapsed(), "images_per_second": self.speed,
            "memory_bytes": machine.peak_memory_bytes(self.device),
        }  # fmt: skip
        self.log({**line, "timing": timing})
        self.tell("epoch", **line, **timing, epochs=self.epochs)
        p.epoch, p.step = epoch + 1, 0
        self.save_if_due(min(EPOCH_SAVE_SECONDS, self.checkpoint_seconds))

    def next_phase(self, phase: Phase) -> None:
        p = self.progress
        p.phase, p.past_epochs, p.epoch, p.step = p.phase + 1, p.past_epochs + phase.recipe.epochs, 0, 0
        p.best, p.best_epoch, p.best_val, self.best = -1.0, 0, None, None  # earlier phases prepare the last one
        self.is_ready = False  # the optimiser is still the last phase's

    def finish(self) -> dict[str, Any]:
        """Take the selected epoch, look at test once, write model/, predictions.csv and, last, result.json."""
        p, model = self.progress, self.model
        assert self.best is not None
        model.load_state_dict(self.best)
        model.eval()
        if self.selects_on == "test" and self.data.val is not self.data.test:
            p.best_val = self.measure("val").accuracy
        last = "val" if self.data.test is None else "test"
        final = self.measure(last)
        self.elapsed()
        test = None if self.data.test is None else final
        result = result_of(model, self.data, self.facts, p, self.epochs, test, self.device, self.caches_features())
        if self.folder is not None:
            split = self.data.split(last)
            self.folder.save_model(model, card_of(result))
            self.folder.write_predictions(
                [split.name(i) for i in range(len(split))], final.labels, final.probabilities, self.data.classes
            )
            self.folder.finish(result)
        self.tell("end", result=result)
        return result

    # -- pieces --------------------------------------------------------------------------------------------------------

    def set_lr(self, step: int, steps_per_epoch: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.recipe, group["base_lr"], step, steps_per_epoch)
        self.lr = lr_at(self.recipe, self.recipe.base_lr, step, steps_per_epoch)
        return self.lr

    def my_part(self, batch: Tensor) -> Tensor:
        """This process's pictures of a batch; where there are fewer than processes, one that counts nothing."""
        part = self.team.share(batch)
        return part if len(part) else batch[:1]

    def add_over_team(self, sums: Tensor) -> bool:
        """Add gradients and sums over the processes; whether any process was asked to stop."""
        if self.team.size == 1:
            return False
        grads = [p.grad for group in self.groups for p in group["params"] if p.grad is not None]
        stop = torch.tensor([float(self.signals.caught is not None)], dtype=torch.float64)
        flat = torch.cat([*(g.reshape(-1) for g in grads), torch.cat([sums, stop]).to(grads[0])])
        self.team.sum(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads] + [3]), strict=False):
            g.copy_(part.view_as(g))
        sums.copy_(flat[-3:-1])
        return bool(flat[-1] > 0)

    def measure(self, name: str) -> Evaluation:
        """Score a split with the tensors as they are."""
        self.size_in_use = "eval_batch_size"
        split = self.data.split(name)
        if name not in self.feeds:
            cached = self.caches_features()
            self.feeds[name] = (
                self.feature_feed(name) if cached else evaluation_feed(split, self.model, self.device, self.workers)
            )
        forward = self.model.head if isinstance(self.feeds[name], FeatureFeed) else None
        batches = self.feeds[name](my_batches(len(split), self.recipe.eval_batch_size, self.team))
        with chance(self.device, self.seed):  # a published method draws in evaluation too
            logits, labels = predictions(
                self.model, batches, self.team, self.device, self.amp, forward, between=self.stop_if_asked
            )
        self.size_in_use = "batch_size"
        if not np.isfinite(logits).all():  # by the last step, whose loss was that before it
            raise self.not_finite(f"{name} loss", math.nan, self.progress.total_steps)
        return score(logits, labels, self.data.classes, name)

    def caches_features(self) -> bool:
        """Whether nothing that trains, and nothing random, stands between a picture and the head."""
        return (
            self.model.frozen_features
            and type(self.method).loss is Method.loss
            and not (self.recipe.mixes or self.recipe.drop_path)
            and not is_random(self.data, self.model.preprocessing, self.recipe)
        )

    def feature_feed(self, name: str) -> FeatureFeed:
        split = self.data.split(name)
        feed = evaluation_feed(split, self.model, self.device, self.workers)
        batches = feed(my_batches(len(split), self.recipe.eval_batch_size, self.team))
        features, labels = predictions(
            self.model, batches, self.team, self.device, self.amp, self.model.features, between=self.stop_if_asked
        )
        found = torch.from_numpy(features).to(self.device, self.model.dtype)
        return FeatureFeed(found, torch.from_numpy(labels).to(self.device))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, where the recipe keeps an average."""
        if self.average is None:
            yield
            return
        self.trained = checkpoint.clone(self.model.state_dict())
        self.model.load_state_dict(self.average.values)
        try:
            yield
        finally:
            self.model.load_state_dict(self.trained)
            self.trained = None

    def run_begin(self, index: int, phase: Phase, entry: checkpoint.State | None) -> None:
        """Call a phase's `begin`; on resuming, with the tensors that it was given the first time."""
        self.handle = RunHandle(self.model, self.data, self.recipe, self.seed, self.device)
        self.handle.generator.manual_seed(mixed_seed(self.seed, index))
        if phase.begin is None:
            return
        if entry is not None:
            self.model.load_state_dict(entry)
        self.entries[index] = checkpoint.clone(self.model.state_dict())
        with chance(self.device, self.seed, index):
            phase.begin(self.handle)
        self.model.specs = [(name, opt) for (name, _), opt in zip(self.model.specs, _options(self.method), strict=True)]
        self.model.probe(self.seed)

    def go_back(self, entry: checkpoint.State) -> None:
        """The method as it was given, where an earlier piece of this run has changed its sizes in this very model."""
        if _shapes(entry) == _shapes(self.model.state_dict()):
            return
        model, parts = self.model, parts_of(self.method)
        specs = [(name, dataclasses.asdict(part.given)) for (name, _), part in zip(model.specs, parts, strict=True)]
        head = model.head if model.head_name == "module" else model.head_name
        fresh = adapt(
            model.backbone, specs, num_classes=model.num_classes, head=head, classes=model.classes, probe=False
        )
        model.method, model.head, model.specs, self.method = fresh.method, fresh.head, fresh.specs, fresh.method

    def replay(self, index: int, phase: Phase, snapshot: Snapshot | None) -> None:
        """A phase that was over before the checkpoint: only what its `begin` made."""
        self.run_begin(index, phase, snapshot.entries.get(index) if snapshot else None)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def find_snapshot(self) -> Snapshot | None:
        found = None
        if self.folder is not None and (path := self.folder.snapshot_file()):
            found = checkpoint.from_file(path)
            if found.progress.best_epoch:
                self.best = checkpoint.load_state(self.folder.best_file(found.progress.best_epoch))
            self.best_saved = found.progress.best_epoch
        if self.folder is not None:
            self.folder.cut_log(found.progress.metrics_bytes if found else 0)
        found, self.best = self.team.gather((found, self.best))[0]
        return found

    def restore(self, snapshot: Snapshot) -> None:
        self.progress = snapshot.progress
        self.model.load_state_dict(snapshot.model)
        self.optimizer.load_state_dict(snapshot.optimizer)
        if snapshot.scaler:
            self.scaler.load_state_dict(snapshot.scaler)
        if self.average:
            self.average.load(snapshot.average)
        if snapshot.generator is not None:
            self.handle.generator.set_state(snapshot.generator)

    def save_if_due(self, seconds: float, stop: bool = False) -> None:
        self.stop_if_asked(stop)
        if time.monotonic() - self.saved_at >= seconds:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, unless what trains is no longer finite: then the last good one stays."""
        self.saved_at = time.monotonic()
        state = self.trained or self.model.state_dict()
        if self.folder is None or not self.is_ready:
            return
        if not all(t.isfinite().all() for t in state.values() if t.is_floating_point()):
            return
        p = self.progress
        self.elapsed()
        snapshot = Snapshot(
            p, state, self.optimizer.state_dict(), self.scaler.state_dict(), self.average.values if self.average else {},
            self.handle.generator.get_state(), self.entries,
        )  # fmt: skip
        best = None
        if self.best is not None and p.best_epoch != self.best_saved:
            best, self.best_saved = checkpoint.state_bytes(self.best), p.best_epoch
        self.folder.save_snapshot(checkpoint.to_bytes(snapshot), best, p.best_epoch)
        self.saved_at = time.monotonic()

    def stop_if_asked(self, certainly: bool = False) -> None:
        """Save and deliver the signal again; of several processes all do at the same step, where one was asked (certainly)."""
        if certainly or (self.signals.caught is not None and self.team.size == 1):
            self.save()
            self.signals.deliver()

    # -- news ----------------------------------------------------------------------------------------------------------

    def tell(self, kind: str, **news: Any) -> None:
        self.report({"kind": kind, **news})

    def tell_notes(self) -> None:
        for text in (*notes_of(self.data), upscale_note(self.data, self.model.preprocessing)):
            if text:
                self.tell("note", text=text)
        count = len(self.data.train)
        if self.recipe.batch_size > count:
            self.tell("note", text=f"batch_size {self.recipe.batch_size} is larger than the {count} training pictures")
        usual = default_lr(self.method)
        if not usual / 1000 <= self.recipe.base_lr <= usual * 1000:
            self.tell("note", text=f"the learning rate {self.recipe.base_lr:g} is far from this method's {usual:g}")

    def tell_step(self, steps: int, loss: float, lr: float, speed: float) -> None:
        p, now = self.progress, time.monotonic()
        if p.total_steps % LOG_STEPS == 0:
            self.log({"epoch": p.past_epochs + p.epoch + 1, "step": p.total_steps, "lr": lr, "loss": loss})
        if now - self.told_at >= REPORT_SECONDS:
            self.told_at = now
            self.tell("batch", epoch=p.past_epochs + p.epoch + 1, epochs=self.epochs, step=p.step, steps=steps, loss=loss,
                      lr=lr, images_per_second=speed)  # fmt: skip

    def log(self, line: dict[str, Any]) -> None:
        if self.folder is not None:
            self.progress.metrics_bytes = self.folder.log(line)

    def elapsed(self) -> float:
        """Seconds of training so far, over all pieces of a resumed run."""
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now
        return self.progress.seconds

    def not_finite(self, what: str, value: float, step: int) -> SvpError:
        p = self.progress
        kept = "; the last good checkpoint is kept" if self.folder and self.folder.snapshot_file() else ""
        remedy = "--amp off" if self.amp != "off" else "-r clip_grad=1"
        return SvpError(
            f"the {what} is {value} at step {step} (epoch {p.past_epochs + p.epoch + 1}, learning rate {self.lr:.3g}, "
            f"precision {self.amp}){kept}",
            f"train again with --lr {self.facts['recipe']['lr'] / 10:.3g}, or {remedy}",
        )

    @contextlib.contextmanager
    def explaining_memory(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as err:
            if isinstance(err, NotImplementedError) or not machine.is_out_of_memory(err):
                raise
            self.save()
            (h, w), name = self.model.preprocessing.crop, self.size_in_use
            n, ways = getattr(self.recipe, name), []
            if name == "eval_batch_size":
                ways += [f"-r eval_batch_size={n // 2} gives the same numbers"] if n > 1 else []
            else:
                if n % (4 if self.recipe.mixes else 2) == 0:
                    same = (
                        "steps by as many pictures" if self.recipe.mixes or self.recipe.drop_path else "trains the same"
                    )
                    ways.append(f"--batch-size {n // 2} --accumulate {self.recipe.accumulate * 2} {same}")
                ways.append("-r grad_checkpointing=true takes less memory and more time")
            ways.append("--amp bf16 halves the activations on a GPU")
            raise SvpError(
                f"memory ran out on {self.device} with {name} {n} of {h} x {w} pixels", "; ".join(ways)
            ) from err


class _Seen:
    """A criterion that remembers the logits of its first call."""

    def __init__(self, criterion: Criterion):
        self.criterion = criterion
        self.logits: Tensor | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.logits is None:
            self.logits = logits.detach()
        return self.criterion(logits, target)


# -- opening -----------------------------------------------------------------------------------------------------------


def _open(
    folder: RunFolder | None, settings: dict[str, Any], resume: bool, overwrite: bool, team: Team,
    stack: contextlib.ExitStack,
) -> dict[str, Any] | None:  # fmt: skip
    """Open the folder on the first process; its result if the run is finished. What it refuses, all processes raise."""
    trouble, finished = None, None
    if team.is_main and folder is not None:
        try:
            stack.enter_context(folder.opened(settings, resume, overwrite))
            finished = folder.result()
        except SvpError as err:
            trouble = err
    trouble, finished = team.gather((trouble, finished))[0]
    if trouble is not None:
        raise trouble
    return finished


def _read_back(model: AdaptedModel, folder: RunFolder | None) -> None:
    """The selected epoch's tensors of a finished run, into the model."""
    assert folder is not None
    state = folder.model_tensors()
    if _shapes(model.state_dict()) == _shapes(state):
        model.load_state_dict(state)
    else:  # a phase has changed sizes
        found = load(folder.path, backbone=model.backbone)
        model.method, model.head, model.specs = found.method, found.head, found.specs
    model.eval()


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in state.items()}


def _options(method: Method) -> list[dict[str, Any]]:
    return [dataclasses.asdict(part.opt) for part in parts_of(method)]


def _silent(event: dict[str, Any]) -> None:
    pass
