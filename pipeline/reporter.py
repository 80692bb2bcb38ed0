"""Report a run while it trains: metrics, validations and terminal lines, each at its interval."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

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
from pipeline.samples import Sampler
from pipeline.schedule import objective_at


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
        # At least ten histograms a run.
        least = max(1, run.settings.training.steps // 10)
        histogram_every = run.settings.logging.histogram_every
        self.histogram_every = None if histogram_every is None else min(histogram_every, least)
        # Held-out folders that were evaluated at this step before, by a start that was then asked to stop.
        self.first_step = first_step
        self.broken_off = False
        self.validated: set[str] = broadcast_from_first(set() if self.logbook is None else self.logbook.validated)
        # The last 20 steps: tokens, seconds since the end of the step before, and the part of these spent waiting for data.
        self.recent: deque[tuple[int, float, float]] = deque(maxlen=20)
        self.last_end = time.perf_counter()
        # Seconds in which training has stood still for checkpoints since the last logged step.
        self.seconds_saving = 0.0
        # FLOP/s that tokens/s are compared with; None where the device's peak is not known.
        self.peak_flops = peak_flops(torch.cuda.get_device_name()) if run.device.type == "cuda" else None
        # The held-out folders of which it was said that they have no bits per byte.
        self.without_bytes: set[str] = set()
        # Number and end time of this process's first step.
        self.first: tuple[int, float] | None = None
        for note in self.logbook.notes if self.logbook is not None else []:
            self.say(note)
        if first_step >= run.settings.training.steps:
            self.say(f"already at step {first_step} of {run.settings.training.steps}; to train on raise training.steps")
        elif first_step:
            self.say(f"continuing from step {first_step}")

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
            self.seconds_saving += time.perf_counter() - started
            saved, self.run.checkpoints.saved = self.run.checkpoints.saved, None
            if saved is not None:
                values["saved"] = {"name": step_name(saved.step), "bytes": saved.num_bytes, "seconds": round(saved.seconds, 4)}

    def _report_step(self, progress: Progress, result: StepResult, waited: float) -> bool:
        """Log and print what is due; true if metrics.jsonl has it."""
        logging, step, now = self.run.settings.logging, progress.step, time.perf_counter()
        self.first = self.first or (step, now)
        self.recent.append((result.consumed.tokens, now - self.last_end, waited))
        self.restart_clock()

        # Events are printed at once.
        for message in result.replaced:
            self.say(f"step {step}: replaced by a row of padding: {message}")
        if result.bad is not None:
            self.say(f"step {step}: discarded on all ranks; what was not finite: {result.bad}")

        # Everything else at its interval, and at the first and the last step. Otherwise the host does not wait for the device.
        every = (logging.metrics_every, logging.progress_every, logging.selection_every, self.histogram_every)
        metrics_due, progress_due, selection_due, histogram_due = (
            interval is not None and (step % interval == 0 or step in (1, self.run.settings.training.steps))
            for interval in every
        )
        if not (metrics_due or progress_due or selection_due or histogram_due):
            return False

        # Collective: every rank takes part in the reductions, then only the first goes on.
        totals = result.sums.over_ranks(self.run.models.group)
        of_each = (self._data_wait(), peak_bytes(self.run.device))
        data_wait, memory = (max_over_ranks(value, self.run.device) for value in of_each)
        if self.logbook is None:
            return False

        k_percent = result.counts.objective.k_percent
        record = self._record(progress, result, totals) | self._of_the_machine(data_wait, memory, k_percent)
        if metrics_due:
            self.logbook.write(record)
            self.seconds_saving = 0.0
        if histogram_due:
            self.logbook.board.write_histograms(step, totals)
        if progress_due:
            left = self.run.settings.training.steps - step
            seconds_left = left * self._seconds_a_step(progress)
            self.terminal.progress(progress_line(record, self.run.settings.training.steps, seconds_left))
        if selection_due and step % logging.selection_every == 0 and self.run.settings.model.num_prediction_heads > 1:
            self.say(selection_block(record))
        return metrics_due

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
            self.restart_clock()
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
            reason = held_out.token_bytes.unknown or "its rows have tokens whose text is not known, or none with text"
            self.say(f"no bits per byte{of_name}: {reason}")

    def passage_if_due(self, progress: Progress) -> None:
        """Colour the held-out passage by what heads select, at its interval and after the last step. Collective."""
        every, step = self.run.settings.logging.passage_every, progress.step
        if every is None or (step % every and step != self.run.settings.training.steps):
            return
        passage = passage_of(self.run, step)
        if passage is not None and self.logbook is not None:
            self.logbook.write_passage(step, passage_html(passage), passage_png(passage))
        self.restart_clock()

    def sample_if_due(self, progress: Progress) -> None:
        """Take samples of the policy at their interval, and log them. Collective."""
        every = self.run.settings.logging.samples_every
        if every is None or progress.step % every:
            return
        with self.events.timed("validation", progress.step), heartbeat.during("validating"):
            samples = Sampler(self.run).take(progress.step)
        if self.logbook is not None and samples:
            self.logbook.write_samples(progress.step, samples)
            self.say(f"step {progress.step}: sample {sample_line(samples[0])}")
        self.restart_clock()

    def sync(self) -> None:
        """Have the records on the disk, before a checkpoint says that they are."""
        self.events.sync()
        if self.logbook is not None:
            self.logbook.sync()

    def restart_clock(self) -> None:
        """Exclude the time since the last step (a validation, a checkpoint) from the next step's."""
        self.last_end = time.perf_counter()

    def say(self, text: str) -> None:
        if self.run.world.is_first:
            self.terminal.say(text)

    def close(self) -> None:
        self.terminal.clear()
        self.events.close()
        if self.logbook is not None:
            self.logbook.close()

    def _seconds_a_step(self, progress: Progress) -> float:
        """Mean wall time per step, validations and checkpoints included, the first step with its warm-ups excluded."""
        assert self.first is not None
        step, end = self.first
        return (time.perf_counter() - end) / (progress.step - step) if progress.step > step else self.recent[-1][1]

    def _data_wait(self) -> float:
        """Fraction of the recent steps' time that this rank spent waiting for data."""
        _, seconds, waited = map(sum, zip(*self.recent, strict=True))
        return waited / seconds

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
        tokens, seconds, _ = map(sum, zip(*self.recent, strict=True))
        record: Record = {
            "time": time.time(),
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / len(self.recent),
            "seconds_saving": self.seconds_saving,
            "memory_bytes": int(memory),
            "data_wait": data_wait,
        }
        if self.peak_flops is not None:
            flops = flops_a_token(self.run.settings, k_percent)
            record["mfu"] = tokens / seconds * flops / (self.peak_flops * self.run.world.size)
        return record
