"""Report a run while it trains: metrics, validations and terminal lines, each at its interval."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from pipeline.consumption import data_metrics
from pipeline.data.loading.held_out import HeldOutRows
from pipeline.data.loading.order_record import record_of_order
from pipeline.data.loading.prefetch import EVALUATION_BATCHES_AHEAD, prefetched
from pipeline.evaluate import evaluate
from pipeline.flops import flops_a_token, peak_flops
from pipeline.passage import passage_of
from pipeline.progress import Progress
from pipeline.report.passage_page import passage_html, passage_png
from pipeline.run import Run, StepResult
from pipeline.runtime import heartbeat
from pipeline.runtime.checkpoint.folders import step_name
from pipeline.runtime.distributed import broadcast_from_first, max_over_ranks
from pipeline.runtime.engine import gradient_norm
from pipeline.runtime.events import EventLog, last_event
from pipeline.runtime.logbook import Logbook, trackers_of, without_non_finite
from pipeline.runtime.memory import peak_bytes
from pipeline.runtime.metrics import Record, Totals
from pipeline.runtime.preemption import StoppedError, StopRequest
from pipeline.runtime.sample_log import sample_line
from pipeline.runtime.terminal import Terminal, held_out_text, progress_line, selection_block
from pipeline.samples import RunTexts, Sampler
from pipeline.schedule import objective_at
from pipeline.step_clock import StepClock


class Due(NamedTuple):
    """The parts of a step that are logged (a record, histograms) and printed (the progress, the block about its selection)."""

    metrics: bool
    histogram: bool
    progress: bool
    block: bool


class Reporter:
    """Turns step results into metrics and terminal lines. Reductions run on all ranks; only the first writes and prints.

    first_step: the step that the run resumes from, 0 for a new run.
    """

    def __init__(self, run: Run, first_step: int):
        self.run = run
        self.terminal = Terminal()
        self.events = EventLog(run.run_dir if run.world.is_first else None)
        self.logbook = None
        if run.world.is_first:
            sets = [each.name for each in run.held_out]
            trackers = trackers_of(run.settings, run.run_dir, first_step)
            self.logbook = Logbook(run.run_dir, first_step, run.settings.model.num_prediction_heads, sets, trackers)
        # Held-out folders that were evaluated at this step before, by a start that was then asked to stop.
        self.first_step = first_step
        self.broken_off = False
        self.validated: set[str] = broadcast_from_first(set() if self.logbook is None else self.logbook.validated)

        self.clock, self.texts = StepClock(), RunTexts(run, self.say)
        # FLOP/s that tokens/s are compared with; None where the device's peak is not known.
        self.peak_flops = peak_flops(torch.cuda.get_device_name()) if run.device.type == "cuda" else None
        # The held-out folders of which it was said that they have no bits per byte.
        self.without_bytes: set[str] = set()
        self._say_where_it_begins()

    def _say_where_it_begins(self) -> None:
        last_step = self.run.settings.training.steps
        for note in self.logbook.notes if self.logbook is not None else []:
            self.say(note)
        if self.first_step >= last_step:
            self.say(f"already at step {self.first_step} of {last_step}; to train on raise training.steps")
        elif self.first_step:
            self.say(f"continuing from step {self.first_step}")

    def begin(self, progress: Progress) -> None:
        """Record where training goes on, and in which order it takes samples."""
        run = self.run
        if not run.world.is_first:
            return
        order = record_of_order(run.stream.order, run.stream.sets, run.settings.data.global_batch)
        order["data"] = run.checkpoints.identity["data"]
        last = last_event(run.run_dir, "order")
        if last is None or {key: last.get(key) for key in order} != order:
            self.events.write("order", **order)
        skipped = [list(stretch) for stretch in progress.skipped]
        self.events.write("resume", step=progress.step, samples=progress.samples, skipped=skipped)
        if self.logbook is not None:
            self.logbook.board.write_description(run.settings, progress.step)

    def step(self, progress: Progress, result: StepResult, waited: float) -> None:
        """Report a finished step. waited: seconds for which this rank waited for data."""
        logged = self._report_step(progress, result, waited)
        self.events.write(
            "step",
            step=progress.step,
            samples=progress.samples,
            digest=f"{result.consumed.digest:016x}",
            waited=round(waited, 4),
            applied=result.applied,
            logged=logged,
        )

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Record the block as time in which a checkpoint held up training, and what it has completed."""
        started = time.perf_counter()
        with self.events.timed("save", step) as values:
            yield
            self.clock.seconds_saving += time.perf_counter() - started
            saved, self.run.checkpoints.saved = self.run.checkpoints.saved, None
            if saved is not None:
                values["saved"] = {"name": step_name(saved.step), "bytes": saved.num_bytes, "seconds": round(saved.seconds, 4)}

    def _report_step(self, progress: Progress, result: StepResult, waited: float) -> bool:
        """Log and print what is due; true if metrics.jsonl has it."""
        self.clock.end_step(progress.step, result.consumed.tokens, waited)

        # Events are printed at once.
        for message in result.replaced:
            self.say(f"step {progress.step}: replaced by a row of padding: {message}")
        if result.bad is not None:
            self.say(f"step {progress.step}: discarded on all ranks; what was not finite: {result.bad}")

        # Everything else when it is due. Otherwise the host does not wait for the device.
        due = self._due(progress.step)
        if not any(due):
            return False

        # Collective: every rank takes part in the reductions, then only the first goes on.
        totals = result.sums.over_ranks(self.run.models.group)
        of_each = (self.clock.recent()[2], peak_bytes(self.run.device))
        data_wait, memory = (max_over_ranks(value, self.run.device) for value in of_each)
        if self.logbook is None:
            return False

        k_percent = result.counts.objective.k_percent
        record = self._record(progress, result, totals) | self._of_the_machine(data_wait, memory, k_percent)
        self._show(self.logbook, due, record, totals)
        return due.metrics

    def _due(self, step: int) -> Due:
        """Say what is due after a step: each at its interval, and at the first and the last step; the block at its interval."""
        logging, last_step = self.run.settings.logging, self.run.settings.training.steps
        # At least ten histograms a run.
        histogram_every = logging.histogram_every and min(logging.histogram_every, max(1, last_step // 10))
        metrics, progress, histogram = (
            every is not None and (step % every == 0 or step in (1, last_step))
            for every in (logging.metrics_every, logging.progress_every, histogram_every)
        )
        selects = self.run.settings.model.num_prediction_heads > 1
        block = logging.selection_every is not None and step % logging.selection_every == 0 and selects
        return Due(metrics, histogram, progress, block)

    def _show(self, logbook: Logbook, due: Due, record: Record, totals: Totals) -> None:
        """Write and print what is due of a step's record."""
        if due.metrics:
            logbook.write(record)
            self.clock.seconds_saving = 0.0
        if due.histogram:
            logbook.board.write_histograms(record["step"], totals)
        if due.progress:
            step, last_step = record["step"], self.run.settings.training.steps
            seconds_left = (last_step - step) * self.clock.seconds_a_step(step)
            self.terminal.progress(progress_line(record, last_step, seconds_left))
        if due.block:
            self.say(selection_block(record))

    def validate_if_due(self, progress: Progress, stop: StopRequest) -> bool:
        """Evaluate on the held-out folders at the first step, the last one, and at the interval between. Collective.

        Of a folder that has a record of this step already, no second one is made.

        Returns:
            False if a signal to stop came meanwhile: the next start evaluates what is left.
        """
        settings = self.run.settings
        if progress.step not in (0, settings.training.steps) and progress.step % settings.logging.validation_every:
            return True
        self.run.engine.eval()
        try:
            self._validate(progress, stop)
        except StoppedError:
            self.broken_off = True
            self.say(f"step {progress.step}: the validation was broken off on request; the next start makes up for it")
        finally:
            self.run.engine.train()
            self.clock.restart()
        return not self.broken_off

    def _validate(self, progress: Progress, stop: StopRequest) -> None:
        done = self.validated if progress.step == self.first_step else set()
        for held_out in self.run.held_out:
            if held_out.name not in done:
                with self.events.timed("validation", progress.step), heartbeat.during("validating"):
                    self._report_validation(progress, held_out, *self._evaluate(progress, held_out, stop))

    def _evaluate(self, progress: Progress, held_out: HeldOutRows, stop: StopRequest) -> tuple[Record, list[str]]:
        run = self.run
        batches = prefetched(held_out.batches(), run.device, depth=EVALUATION_BATCHES_AHEAD)
        names = held_out.manifest.source_names or ("",)
        objective = objective_at(run.settings, progress.step)
        return evaluate(run.models, batches, run.settings, objective, names, held_out.token_bytes, run.world, run.device, stop)

    def _report_validation(self, progress: Progress, held_out: HeldOutRows, metrics: Record, replaced: list[str]) -> None:
        """Log and print one folder's metrics. replaced: its damaged rows, a sentence each."""
        of_name = f" of {held_out.name}" if held_out.name else ""
        for message in replaced:
            self.say(f"step {progress.step}: held-out row{of_name} replaced by a row of padding: {message}")
        if self.logbook is None:
            return

        # A line of its own for each folder.
        record = {"step": progress.step, "samples": progress.samples, "split": "validation"}
        record |= ({"set": held_out.name} if held_out.name else {}) | {"rows": held_out.num_rows}
        self.logbook.write(record | without_non_finite(metrics))
        self.say(f"step {progress.step}: held-out loss{of_name} {held_out_text(metrics)}")

        # Why a metric is missing, once.
        if "bits_per_byte" not in metrics and held_out.name not in self.without_bytes:
            self.without_bytes.add(held_out.name)
            self.say(f"no bits per byte{of_name}: {held_out.why_no_bytes}")

    def passage_if_due(self, progress: Progress) -> None:
        """Colour the held-out passage by what heads select, at its interval and after the last step. Collective."""
        every, step = self.run.settings.logging.passage_every, progress.step
        if every is None or (step % every and step != self.run.settings.training.steps):
            return
        passage = passage_of(self.run, step, self.texts)
        if passage is not None and self.logbook is not None:
            self.logbook.write_passage(step, passage_html(passage), passage_png(passage))
        self.clock.restart()

    def sample_if_due(self, progress: Progress) -> None:
        """Take samples of the policy at their interval, and log them. Collective."""
        every = self.run.settings.logging.samples_every
        if every is None or progress.step % every:
            return
        with self.events.timed("validation", progress.step), heartbeat.during("validating"):
            samples = Sampler(self.run, self.texts).take(progress.step)
        if self.logbook is not None and samples:
            self.logbook.write_samples(progress.step, samples)
            self.say(f"step {progress.step}: sample {sample_line(samples[0])}")
        self.clock.restart()

    def sync(self) -> None:
        """Have the records on the disk, before a checkpoint says that they are."""
        self.events.sync()
        if self.logbook is not None:
            self.logbook.sync()

    def say(self, text: str) -> None:
        if self.run.world.is_first:
            self.terminal.say(text)

    def close(self) -> None:
        self.terminal.clear()
        self.events.close()
        if self.logbook is not None:
            self.logbook.close()

    def _record(self, progress: Progress, result: StepResult, totals: Totals) -> Record:
        """All metrics of a step, as metrics.jsonl has them."""
        record = totals.record(result.counts.scale_H, self.run.stream.manifest.source_names or ("",))
        if not result.applied:
            record["loss"] = None
        position = {"step": progress.step, "samples": progress.samples, "tokens": progress.tokens}
        more = {
            "learning_rate": result.learning_rate,
            "grad_norm": gradient_norm(self.run.engine),
            "skipped_steps": progress.skipped_steps,
            "loss_spike_score": progress.losses.score() if result.applied else None,
            "grad_norm_spike_score": progress.gradient_norms.score() if result.applied else None,
            "rollbacks": progress.rollbacks,
            "samples_skipped": progress.samples_skipped,
        }
        data = data_metrics(self.run.stream, progress.samples, progress, result.consumed)
        return without_non_finite(position | record | more | data)

    def _of_the_machine(self, data_wait: float, memory: float, k_percent: float) -> Record:
        """Metrics of time and memory (`metrics.OF_THE_MACHINE`). data_wait, memory: the worst rank's; k_percent: the step's."""
        tokens_per_second, seconds_per_step, _ = self.clock.recent()
        record: Record = {
            "time": time.time(),
            "tokens_per_second": tokens_per_second,
            "seconds_per_step": seconds_per_step,
            "seconds_saving": self.clock.seconds_saving,
            "memory_bytes": int(memory),
            "data_wait": data_wait,
        }
        if self.peak_flops is not None:
            flops = flops_a_token(self.run.settings, k_percent)
            record["mfu"] = tokens_per_second * flops / (self.peak_flops * self.run.world.size)
        return record
