"""A flipped bit in one rank's copy of a weight: noticed where the others have copies too, and named."""

import re

import pytest
import torch
import torch.distributed as dist

from pipeline.model.mtp import MTPModel
from pipeline.progress import Progress
from tests.dense import settings_for, whole_batch
from tests.ranks import run_ranks
from tests.rows import part_of
from tests.stepping import run_of

FLIPPED_ON = 1


def flip(weight: torch.Tensor, value: int, bit: int) -> None:
    """Flip one bit of one value of a float32 tensor."""
    numbers = weight.view(-1).view(torch.int32)
    numbers[value] ^= -(2**31) if bit == 31 else 2**bit


def steps_with_flips(stage: int) -> dict[str, str]:
    """Make a step with each copy's bit flipped before it on one rank, and one with none; what the ranks then say of each."""
    from pipeline.rank_checks import common_values
    from pipeline.runtime.agreement import RanksDisagreeError, check_ranks_agree
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.engine import build_policy, build_reference, initialize_distributed, whole_parameters
    from pipeline.train import advance, fetch_step, train_step

    initialize_distributed(torch.device("cpu"), "error")
    rank = dist.get_rank()
    settings = settings_for(2, 1, check_ranks_every=1, max_skipped_steps=10**6)
    # Of ZeRO-3's parameters those of up to 100 values are kept whole: the norms, not the matrices.
    content = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}}
    config = resolve_deepspeed_json(content, settings, 2)
    engine = build_policy(settings, config)
    shape = settings.model.model_copy(update={"num_prediction_heads": 1, "seed": 1})
    reference = build_reference(shape, None, "replicate", config)
    run, progress = run_of(settings, engine, reference, 1), Progress()
    batch = part_of(whole_batch(), slice(4 * rank, 4 * rank + 4))

    def said_after_a_step() -> str:
        result = train_step(run, fetch_step(run, iter([batch]), progress.step, progress.samples), progress)
        advance(progress, result, settings)
        try:
            check_ranks_agree(common_values(run, progress, result), run.device)
        except RanksDisagreeError as error:
            return str(error)
        return "agreed"

    # ZeRO-3 gathers what it keeps whole in the first step, and writes it elsewhere in each update.
    assert said_after_a_step() == "agreed"
    found = {}
    for prefix, of in (("parameter ", engine), ("reference's ", reference)):
        for number, name in enumerate(whole_parameters(of)):
            weight = whole_parameters(of)[name]
            # Any bit but the exponent's highest, by which a number would become infinite: that is noticed otherwise.
            place = (7 * number % weight.numel(), number % 30)
            if rank == FLIPPED_ON:
                flip(weight, *place)
            found[f"{prefix}{name}"] = said_after_a_step()
            # An update writes a policy's copies anew, so that the next step has one flip again; a reference's stay.
            if rank == FLIPPED_ON and of is reference:
                flip(weight, *place)
    assert said_after_a_step() == "agreed"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_flipped_bit_in_any_copy_is_named_and_in_a_policys_gone_with_the_next_update(stage: int) -> None:
    one, other = run_ranks(steps_with_flips, 2, stage, timeout=1500)
    assert one == other
    for name, said in one.items():
        alone = re.escape(f"ranks that must hold the same values do not: {name}: rank(s) 1 differ from rank(s) 0. Continue ")
        assert re.match(alone, said), (name, said)

    shape = settings_for(2, 1).model
    policy = [f"parameter {name}" for name, weight in MTPModel(shape).named_parameters() if stage < 3 or weight.dim() == 1]
    next_token = MTPModel(shape.model_copy(update={"num_prediction_heads": 1}))
    assert list(one) == policy + [f"reference's {name}" for name, _ in next_token.named_parameters()]
