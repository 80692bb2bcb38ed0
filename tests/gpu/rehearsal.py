"""A step in bf16 at the size of real models, on a CUDA device that is not there: `python -m tests.gpu.rehearsal`.

The tensors are fake (`torch._subclasses.fake_tensor`): they have shapes, dtypes and the device cuda:0, and hold nothing. A
tensor on a wrong device raises, and so does all for which the host would wait for the device, but for the one wait that a
micro-batch has, whose answer is handed in. What runs are the three stages of `pipeline.micro_step`, the metrics and AdamW; the
ranks are two of torch's process group for tests, which moves nothing. It needs a CUDA build of torch, and no driver.

The backward pass wants a device, so its kernels are counted by running the same with fake tensors of the CPU (`--device cpu`).
DeepSpeed's hooks and ZeRO-3's collectives are missing.

Counted are kernels and the bytes that they read and write, each operation by itself; a function that is compiled on CUDA counts
as one kernel.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import record_function

from pipeline.config import ModelSettings, Settings
from pipeline.data.loading.batch import Batch
from pipeline.micro_step import Models, comparisons, count_step, load_micro_batches, policy_losses, selectors_of
from pipeline.model import mtp
from pipeline.model.elementwise import Elementwise, gated, rotate
from pipeline.model.mtp import MTPModel
from pipeline.model.transformer import RMSNorm
from pipeline.model_sizes import MODEL_SIZES
from pipeline.runtime.metrics import SelectionSums
from pipeline.schedule import objective_at
from pipeline.weighting.objective import StepCounts
from pipeline.weighting.pools import SHARED_POOLS
from pipeline.weighting.prediction import Prediction
from tests.counting import CountLaunches, Fused
from tests.rows import batch_of, random_lengths

ROWS, TOKENS, HEADS, RANKS = 8, 2048, 4, 2
MISTAKES = 0.02
"""The share of the selected pairs that a prediction is said to get wrong."""


@dataclasses.dataclass
class Rehearsal:
    """What a step showed.

    counts: kernels and bytes by phase. waits: for each that was answered, how many numbers were asked for.
    """

    counts: CountLaunches
    waits: list[int]


def settings_for(vocabulary: int, num_layers: int | None = None, **training: Any) -> Settings:
    """The model of 1.1B values, or fewer of its layers."""
    shape = MODEL_SIZES["1b"] | {"vocab_size": vocabulary, "num_prediction_heads": HEADS}
    shape |= {} if num_layers is None else {"num_layers": num_layers}
    data = {"global_batch": RANKS * ROWS, "micro_batch": ROWS, "sequence_length": TOKENS}
    return Settings.model_validate({"data": data, "model": shape, "training": training})


def rehearse(settings: Settings, device: str = "cuda:0", flash: bool = True) -> Rehearsal:
    """Run a step of one micro-batch; with backward where `device` is the CPU. flash: as on an H100, else under a mask."""
    vocabulary, rows, tokens = settings.model.vocab_size, settings.data.micro_batch, settings.data.sequence_length
    assert vocabulary is not None
    assert isinstance(rows, int)
    batch = batch_of(random_lengths(rows, tokens, 0), tokens, vocabulary)
    counted, num_valid = counts_of(settings, batch)

    rehearsal = Rehearsal(CountLaunches(), [])
    with pretended(rehearsal.counts, device, flash), FakeTensorMode(allow_non_fake_inputs=True):
        one_head = settings.model.model_copy(update={"num_prediction_heads": 1})
        policy, reference = (model_on(device, shape, rehearsal.counts) for shape in (settings.model, one_head))
        models = Models(policy, reference.requires_grad_(False), "shifted", dist.group.WORLD)
        with answered(rehearsal, counted, settings), rehearsal.counts:
            take_step(settings, models, batch, counted, num_valid, torch.device(device))
    return rehearsal


def take_step(
    settings: Settings, models: Models, batch: Batch, counted: StepCounts, num_valid: SimpleNamespace, device: torch.device
) -> None:
    """Do as `pipeline.train.train_step`, without an engine: AdamW has float32 copies of the whole model."""
    training, policy = settings.training, models.policy
    assert isinstance(policy, MTPModel)

    # The batch arrives and is compared, scored and trained on.
    (loaded,) = load_micro_batches([batch], 0, HEADS, RANKS, 0, device)
    micro_batches = [dataclasses.replace(loaded, num_valid_BH=num_valid)]
    prediction = Prediction.of([0.0] * (HEADS - 1))
    compared = comparisons(models, micro_batches, training)
    selectors = selectors_of(models, micro_batches, compared, counted, training, prediction)
    (losses,) = policy_losses(models, micro_batches, selectors, counted, training)
    with record_function("metrics"):
        sums = SelectionSums(HEADS, 1, device)
        sums.add(losses, micro_batches[0].valid_BTH, micro_batches[0].batch.sources_BT)

    if device.type == "cpu":
        with record_function("backward"):
            losses.loss.backward()

    with record_function("optimizer's states"):
        masters = [parameter.detach().float() for parameter in policy.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer.step()
    with record_function("optimizer"):
        optimizer.step()


def counts_of(settings: Settings, batch: Batch) -> tuple[StepCounts, SimpleNamespace]:
    """Count the pairs of a step on this rank alone; and those of each row, as a tensor on the host that can be read still when
    all tensors are fake."""
    (loaded,) = load_micro_batches([batch], 0, HEADS, 1, 0, torch.device("cpu"))
    counts = count_step([loaded], objective_at(settings, 0), 1, None).read().counts
    return counts, SimpleNamespace(numpy=loaded.num_valid_BH.numpy().copy)


def model_on(device: str, shape: ModelSettings, counts: CountLaunches) -> MTPModel:
    """Build a model in bf16, since `to` cannot swap fake parameters."""
    functions = Elementwise(Fused(rotate, counts, 1), Fused(gated, counts, 2))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return MTPModel(shape, elementwise=functions)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def pretended(counts: CountLaunches, device: str, flash: bool) -> Iterator[None]:
    """Have an H100 and a second rank, as far as they are asked about."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def normalized(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return Fused(rms_norm, counts, 2)(x, norm.weight, norm.eps)

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0) if flash else (7, 0)))
        enter(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        if device == "cpu":
            # What a GPU has.
            enter(mock.patch.object(mtp, "can_use_flash", return_value=flash))
            enter(mock.patch.object(RMSNorm, "forward", normalized))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
        stack.callback(dist.destroy_process_group)
        yield


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`RMSNorm`'s single kernel."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@contextmanager
def answered(rehearsal: Rehearsal, counted: StepCounts, settings: Settings) -> Iterator[None]:
    """Answer the one wait of a micro-batch: how many pairs there are to repair, and how many are wanted."""
    first, *others = counted.num_selected_H
    is_predicted = settings.training.loss_phase == "predicted" and counted.objective.pool in SHARED_POOLS
    different = round(MISTAKES * sum(others)) if is_predicted else sum(others)

    def answer(asked: torch.Tensor) -> list[int]:
        rehearsal.waits.append(asked.numel())
        return [different, first + sum(others)]

    with mock.patch.object(FakeTensor, "tolist", answer):
        yield


def table(counts: CountLaunches, num_operations: int) -> str:
    """A line a phase, and below it the operations that move most."""
    lines = []
    for phase in dict.fromkeys(phase for phase, _ in counts.launches):
        mine = [name for of, name in counts.launches if of == phase]
        lines.append(
            _line(phase, sum(counts.launches[phase, name] for name in mine), sum(counts.bytes[phase, name] for name in mine))
        )
        for name in sorted(mine, key=lambda name: -counts.bytes[phase, name])[:num_operations]:
            lines.append(_line(f"  {name}", counts.launches[phase, name], counts.bytes[phase, name]))
    return "\n".join(lines)


def _line(name: str, launches: int, num_bytes: int) -> str:
    return f"{name:36}{launches:7} kernels{num_bytes / 1e9:9.2f} GB"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--loss-phase", nargs="+", default=["predicted", "two_pass", "dense"])
    parser.add_argument("--layers", type=int, help="of the model, for a quick look (default: all 22)")
    parser.add_argument("--operations", type=int, default=0, metavar="N", help="the N operations of a phase that move most")
    parser.add_argument("--device", choices=["cuda:0", "cpu"], default="cuda:0", help="cpu: with backward")
    options = parser.parse_args()
    for vocabulary in options.vocabulary:
        for loss_phase in options.loss_phase:
            print(f"V = {vocabulary}, {loss_phase}, {options.device}")
            settings = settings_for(vocabulary, options.layers, loss_phase=loss_phase)
            print(table(rehearse(settings, options.device).counts, options.operations))


if __name__ == "__main__":
    main()
