"""`samples.jsonl` of a run: what the policy wrote while it was trained, a prompt a line.

A line has `step`, `prompt`, `plain` and `self_speculative` (the texts, and their token ids under `…_ids`), `accepted_per_step`,
the mean tokens that a step of self-speculative decoding added, and `acceptance_head_h`, the share of steps in which head h's
draft was taken. Greedy, both texts are the same, but where two tokens are as likely up to rounding. When a run resumes, lines
after its checkpoint are dropped, as of metrics.jsonl.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.runtime.metrics import Record
from pipeline.storage.json_lines import read_json_lines
from pipeline.storage.whole_file import naming, write_file

SAMPLES_FILE = "samples.jsonl"


def cut_samples(run_dir: Path, first_step: int) -> Path:
    """Drop the samples after `first_step`, where the run continues, if there is a file; returns its path."""
    path = run_dir / SAMPLES_FILE
    values = [line.value for line in read_json_lines(path)]
    kept = [value for value in values if value is not None and value.get("step", 0) <= first_step]
    if len(kept) < len(values):
        write_file(path, "".join(json.dumps(value) + "\n" for value in kept).encode())
    return path


def append_samples(path: Path, samples: Sequence[Record]) -> None:
    """Append samples, and have them on the disk."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(sample) + "\n" for sample in samples))
        file.flush()
        os.fsync(file.fileno())


def samples_text(samples: Sequence[Record]) -> str:
    """Format samples for TensorBoard's text: a prompt a line, and below it what came after."""
    return "\n".join(line for sample in samples for line in _lines(sample))


def sample_line(sample: Record) -> str:
    """Format a sample as a line on the terminal."""
    return f"{_shown(sample, 'prompt')} -> {_shown(sample, 'plain')}{_figures(sample)}"


def _lines(sample: Record) -> Iterator[str]:
    yield _shown(sample, "prompt")
    yield f"    plain             {_shown(sample, 'plain')}"
    if "self_speculative_ids" in sample:
        yield f"    self-speculative  {_shown(sample, 'self_speculative')}{_figures(sample)}"


def _shown(sample: Record, name: str) -> str:
    """The text in quotes, on one line; the ids where there is none."""
    text = sample[name]
    return " ".join(map(str, sample[f"{name}_ids"])) if text is None else repr(text)


def _figures(sample: Record) -> str:
    accepted = sample.get("accepted_per_step")
    return "" if accepted is None else f" ({accepted:.2f} tokens a step)"
