"""What a GPU would be given to do, without one: a CUDA build of torch is enough (`tests.gpu.rehearsal`)."""

import pytest
import torch

from tests.gpu.rehearsal import rehearse, settings_for

# With a device, tests that run in forked processes would find it initialised.
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(), reason="needs a CUDA build of torch on a machine without a device"
)
FEW_LAYERS = 2


@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
@pytest.mark.parametrize("loss_phase", ["predicted", "two_pass", "dense"])
@pytest.mark.parametrize("exchange", ["all_gather", "radix"])
def test_a_step_stays_on_its_device_and_waits_once(vocabulary: int, loss_phase: str, exchange: str) -> None:
    settings = settings_for(vocabulary, FEW_LAYERS, loss_phase=loss_phase, selection_exchange=exchange)
    found = rehearse(settings)
    # On the host are numbers of heads and rows alone.
    assert found.counts.bytes_on["cpu"] < 2**12 < 2**30 < found.counts.bytes_on["cuda"]
    assert found.waits == ([] if loss_phase == "dense" else [2])


@pytest.mark.parametrize("pool", ["rank", "row"])
def test_the_pools_of_a_rank_wait_for_nothing_more(pool: str) -> None:
    assert rehearse(settings_for(32_000, FEW_LAYERS, selection_pool=pool)).waits == [2]


def test_without_flash_attention_a_step_goes_under_a_mask() -> None:
    found = rehearse(settings_for(32_000, FEW_LAYERS), flash=False)
    assert ("policy", "torch_attn::_varlen_attn") not in found.counts.launches
    assert found.waits == [2]


@pytest.mark.parametrize(("vocabulary", "most"), [(32_000, 1_100), (128_256, 2_100)])
def test_the_loss_phase_is_not_given_more_kernels_than_before(vocabulary: int, most: int) -> None:
    """Counted were 1,058 and 2,014; of these, a chunk's rows are moved and exponentiated in 16 steps of two kernels each."""
    launches = rehearse(settings_for(vocabulary, FEW_LAYERS)).counts.launches
    assert sum(number for (phase, _), number in launches.items() if phase == "loss") <= most
