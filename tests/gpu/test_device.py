"""What only a device can show, `pytest -m gpu`; what a CPU can show of it runs on a CPU as well."""

import inspect
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import Settings
from pipeline.data.loading.batch import Batch, targets_and_valid
from pipeline.data.loading.prefetch import prefetched
from pipeline.model.elementwise import EAGER, elementwise_for
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.model.transformer import document_mask, flash_attention, masked_attention, rotary_angles
from pipeline.weighting.loss_phase import chunked_losses, dense_losses
from pipeline.weighting.prediction import Prediction
from tests.ranks import run_ranks
from tests.rows import batch_of, random_lengths
from tests.selecting import Given
from tests.stepping import WatchedEngine

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EITHER = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
HEADS, ROWS, TOKENS, VOCAB = 4, 4, 128, 512
ROOT = Path(__file__).parents[2]


def on_cuda(test: Any) -> Any:
    for mark in NEEDS_CUDA:
        test = mark(test)
    return test


def settings_for(**training: Any) -> Settings:
    return Settings.model_validate(
        {
            "data": {"global_batch": 2 * ROWS, "micro_batch": ROWS, "sequence_length": TOKENS},
            "model": {
                "dim": 64,
                "num_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": VOCAB,
            },
            # With this rate a step leaves every weight as it is: one engine serves many cases.
            "training": {"learning_rate": 1e-20, "gradient_clipping": None} | training,
        }
    )


def micro_batches() -> list[Batch]:
    return [batch_of(random_lengths(ROWS, TOKENS, seed), TOKENS, VOCAB, seed) for seed in range(2)]


def model_of(settings: Settings, dtype: torch.dtype, device: str, **changes: Any) -> MTPModel:
    """The dense model in float32 whose weights are those that `dtype` can hold."""
    model = MTPModel(settings.model.model_copy(update=changes))
    initialize_weights(model)
    return model.to(dtype).float().to(device)


def losses_by_formula(model: MTPModel, batch: Batch, heads: int) -> torch.Tensor:
    """[B, T, heads], under the mask, from full logits."""
    targets, valid = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, heads)
    hidden = model.unembed.norm(model.hidden_states(batch.tokens_BT, batch.document_ids_BT))
    logits = hidden @ model.unembed.weight.T
    losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape)
    return losses.where(valid, 0.0)


def gradient_by_formula(settings: Settings, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """The objective's gradient over both micro-steps, in float32 on one process."""
    policy, reference = model_of(settings, dtype, device), model_of(settings, dtype, device, num_prediction_heads=1, seed=1)
    batches = [batch.to(device) for batch in micro_batches()]
    valid = [targets_and_valid(batch.tokens_BT, batch.document_ids_BT, HEADS)[1] for batch in batches]
    totals = sum(valid_BTH.sum((0, 1)) for valid_BTH in valid)
    for batch, valid_BTH in zip(batches, valid, strict=True):
        losses = losses_by_formula(policy, batch, HEADS)
        with torch.no_grad():
            next_token = losses_by_formula(reference, batch, 1)[..., 0]
        objective = losses.new_zeros(())
        for head in range(HEADS):
            chosen = valid_BTH[..., head]
            if head > 0:
                ahead = F.pad(next_token, (0, head))[:, head:]
                excess = (losses[..., head].detach() - ahead).masked_fill(~chosen, -torch.inf)
                count = int(settings.training.k_percent * int(chosen.sum()) + 0.5)
                chosen = torch.zeros_like(chosen).flatten().scatter(0, excess.flatten().topk(count).indices, True)
                chosen = chosen.view(excess.shape)
            objective = objective + losses[..., head][chosen].sum() / totals[head] / HEADS
        objective.backward()
    return {name: parameter.grad.cpu() for name, parameter in policy.named_parameters() if parameter.grad is not None}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum((found[name].double() - expected[name]).pow(2).sum() for name in found)
    return float((difference / sum(gradient.double().pow(2).sum() for gradient in expected.values())).sqrt())


FORMS = {
    "two_pass": Prediction(),
    "predicted": Prediction.of([0.0] * (HEADS - 1)),
    "dense": Prediction(),
}


def errors_of_a_step(device: str, bf16: bool) -> dict[str, float]:
    """For each loss phase and share selected how far the gradient under the engine is from that of the formula."""
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.engine import build_reference, initialize_distributed

    initialize_distributed(torch.device(device), "error")
    content = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": bf16}}
    dtype = torch.bfloat16 if bf16 else torch.float32
    settings = settings_for()
    config = resolve_deepspeed_json(content, settings, 1)
    engine = WatchedEngine(settings, config)
    shape = settings.model.model_copy(update={"num_prediction_heads": 1, "seed": 1})
    reference = build_reference(shape, None, "replicate", config)
    errors = {}
    for k_percent in (1.0, 0.6):
        expected = gradient_by_formula(settings_for(k_percent=k_percent), dtype, device)
        for loss_phase, prediction in FORMS.items():
            training = settings_for(k_percent=k_percent, loss_phase=loss_phase)
            batches = [batch.to(device) for batch in micro_batches()]
            gradients, _ = engine.step(training, reference, batches, prediction, torch.device(device))
            found = {name: gradient.cpu() for name, gradient in gradients.items()}
            errors[f"{loss_phase} {k_percent}"] = relative_error(found, expected)
    return errors


@EITHER
def test_a_step_in_float32_has_the_gradient_of_the_formula(device: str) -> None:
    (errors,) = run_ranks(errors_of_a_step, 1, device, False)
    assert max(errors.values()) < 1e-5, errors


@EITHER
def test_a_step_in_bf16_has_the_gradient_of_the_float32_formula_but_for_its_rounding(device: str) -> None:
    """bf16 has 8 bits: a gradient summed over many of its products is off by a per cent or two, and where losses decide
    what is selected, pairs near the threshold change places."""
    (errors,) = run_ranks(errors_of_a_step, 1, device, True)
    assert max(error for name, error in errors.items() if name.endswith("1.0")) < 0.02, errors
    assert max(errors.values()) < 0.1, errors


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("predicts", [False, True])
def test_every_loss_phase_gives_the_losses_and_gradients_of_the_dense_one(
    device: str, dtype: torch.dtype, predicts: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 64, HEADS, 32, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(VOCAB, 32, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(VOCAB, (2, 64, HEADS), generator=generator).to(device)
    valid = (torch.rand(2, 64, HEADS, generator=generator) < 0.8).to(device)
    selected, predicted = ((torch.rand(2, 64, HEADS - 1, generator=generator) < 0.6).to(device) for _ in range(2))
    selected &= valid[..., 1:]
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)
    selector = Given(selected, predicted if predicts else None, 0.6)
    arguments = hidden, weight, targets, valid, selector, scale
    found, expected = chunked_losses(*arguments, valid.sum((0, 1)).tolist()), dense_losses(*arguments)
    # Logits are summed in float32, whatever is multiplied.
    torch.testing.assert_close(found.policy_loss_BTH, expected.policy_loss_BTH, rtol=1e-5, atol=1e-5)
    both = [torch.autograd.grad(losses.loss, (hidden, weight)) for losses in (found, expected)]
    error = relative_error(*({"hidden": grads[0].cpu(), "weight": grads[1].cpu()} for grads in both))
    assert error < (1e-5 if dtype == torch.float32 else 0.01)


@on_cuda
def test_compiled_elementwise_functions_give_what_eager_ones_do() -> None:
    eager, compiled = EAGER, elementwise_for("auto", "none", "cuda")
    angles = rotary_angles(64, settings_for().model, torch.device("cuda", 0))
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(2, 64, 4, 16, generator=generator).to("cuda", torch.bfloat16) for _ in range(3))
    for found, expected in (
        (compiled.rotate(x, angles), eager.rotate(x, angles)),
        (compiled.gated(gate, up), eager.gated(gate, up)),
    ):
        torch.testing.assert_close(found, expected)


@on_cuda
@pytest.mark.parametrize("groups", [8, 2, 1])
def test_flash_attention_over_spans_is_attention_under_the_mask(groups: int) -> None:
    batch = batch_of(random_lengths(3, 256, seed=3), 256, VOCAB).to("cuda")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, 256, heads, 64, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        for heads in (8, groups, groups)
    )
    present = batch.document_ids_BT >= 0
    upstream = torch.randn(3, 256, 8, 64, generator=generator).to("cuda", torch.bfloat16) * present[..., None, None]
    ways = [
        flash_attention(query, key, value, batch.spans),
        masked_attention(query, key, value, document_mask(batch.document_ids_BT)),
    ]
    found, expected = ([way, *torch.autograd.grad(way, (query, key, value), upstream)] for way in ways)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[present].float(), other[present].float(), rtol=0.02, atol=0.02)


def waits_of_a_step() -> list[str]:
    """Where, in the package, a step over two micro-batches waits for the device, after steps that warm up."""
    from pipeline.progress import Progress
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.engine import build_policy, build_reference, initialize_distributed
    from pipeline.train import advance, fetch_step, train_step
    from tests.stepping import run_of

    device = torch.device("cuda", 0)
    initialize_distributed(device, "error")
    settings = settings_for()
    config = resolve_deepspeed_json({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, settings, 1)
    shape = settings.model.model_copy(update={"num_prediction_heads": 1, "seed": 1})
    reference = build_reference(shape, None, "replicate", config)
    run, progress = run_of(settings, build_policy(settings, config), reference, 2, device), Progress()
    found: list[str] = []

    def note(*details: Any) -> None:
        found.append(place_in_package())

    def fetched() -> Any:
        batches = prefetched(iter(micro_batches()), device, depth=2)
        return fetch_step(run, batches, progress.step, progress.samples)

    following = fetched()
    for step in range(3):
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            if step == 2:
                warnings.simplefilter("always")
                # Where a warning comes from is not where the package asked for what waits.
                patch.setattr(warnings, "showwarning", lambda message, *details: "synchroniz" in str(message) and note())
                patch.setattr(torch.cuda, "synchronize", note)
                patch.setattr(torch.cuda.Event, "synchronize", lambda event: event.query() or note())
                torch.cuda.set_sync_debug_mode("warn")
            current, following = following, fetched()
            advance(progress, train_step(run, current, progress), settings)
            assert not following.pending.read().flags.stop_requested
            torch.cuda.set_sync_debug_mode("default")
    return [place for place in found if place]


def place_in_package() -> str:
    """FILE:LINE of the innermost frame of the package; empty where DeepSpeed's is further in."""
    frame = inspect.currentframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "/deepspeed/" in path:
            return ""
        if path.startswith(f"{ROOT / 'pipeline'}/"):
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@on_cuda
def test_the_host_waits_for_the_device_once_a_micro_batch() -> None:
    """DeepSpeed's waits are its own. A CPU counts them too, in every way to take a step: tests/integration/test_waits.py."""
    (waits,) = run_ranks(waits_of_a_step, 1)
    assert [wait.partition(":")[0] for wait in waits] == ["cross_entropy.py"] * 2, waits


@on_cuda
def test_batches_arrive_on_the_device_as_they_were() -> None:
    batches = [batch_of(random_lengths(ROWS, TOKENS, seed), TOKENS, VOCAB, seed) for seed in range(20)]

    def given() -> Iterator[Batch]:
        yield from batches

    for found, expected in zip(prefetched(given(), torch.device("cuda", 0), depth=3), batches, strict=True):
        assert {tensor.device.type for tensor in found.tensors} == {"cuda"}
        for one, other in zip(found.tensors, expected.tensors, strict=True):
            assert torch.equal(one.cpu(), other)


@on_cuda
def test_batches_are_read_once_they_have_arrived_and_overwritten_once_they_were_read() -> None:
    """So large that a copy takes longer than to ask for it; and a device that lags behind its host."""
    batches = [batch_of([[2**20 - seed, seed]] * 4, 2**20, VOCAB, seed) for seed in range(1, 7)]
    read = []
    for batch in prefetched(iter(batches), torch.device("cuda", 0), depth=1):
        if read:
            torch.cuda._sleep(10**9)  # about half a second
        read.append([tensor.clone() for tensor in reversed(batch.tensors)])
        del batch
    for found, expected in zip(read, batches, strict=True):
        for one, other in zip(found, reversed(expected.tensors), strict=True):
            assert torch.equal(one.cpu(), other)


def finish(command: list[str]) -> None:
    """Run a command to its end; one that hangs says where its threads were."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        output, _ = process.communicate(timeout=10)
    assert process.returncode == 0, output


@on_cuda
def test_a_job_trains_on_the_device_and_goes_on_where_it_stopped(tiny_data: Path, tiny_reference: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "launch/train.py", "--deepspeed", ROOT / "ds_configs/zero3.json"]
    command += ["--run-dir", tmp_path / "run", f"data.path={tiny_data / 'train'}", f"reference.path={tiny_reference}"]
    command += [f"data.validation_path={tiny_data / 'validation'}", "data.sequence_length=16", "data.global_batch=8"]
    command += ["data.micro_batch=4", "model.dim=64", "model.num_layers=2", "model.num_attention_heads=2"]
    command += ["data.builtin=false", "reference.training_steps=null"]
    command += ["training.warmup_steps=1", "logging.metrics_every=1", "checkpoint.every=2"]
    for steps in (4, 8):
        finish(list(map(str, [*command, f"training.steps={steps}", "--allow-changed"])))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line.get("split") != "validation"]
    assert [line["step"] for line in trained] == list(range(1, 9))
    assert all(0 < line["loss_head_0"] < 10 for line in trained)
    assert all(abs(line["selected_ratio_head_1"] - 0.6) < 0.05 for line in trained)
