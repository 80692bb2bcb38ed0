"""Counts of useful FLOPs, against the weights of real models."""

from pipeline.config import ModelSettings
from pipeline.derived import next_token_model
from pipeline.flops import forward_flops, peak_flops, selective_flops
from pipeline.model.mtp import MTPModel

SHAPE = ModelSettings(
    dim=32, num_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=100, num_prediction_heads=4
)


def weights_of_matrices(shape: ModelSettings) -> int:
    """Values of the matrices that a token is multiplied with; the embedding is looked up."""
    named = MTPModel(shape).named_parameters()
    return sum(weight.numel() for name, weight in named if weight.dim() == 2 and name != "embed.weight")


def test_a_forward_takes_two_flops_a_weight_and_two_products_of_attention() -> None:
    shape = next_token_model(SHAPE)
    assert forward_flops(shape, 0.0) == 2 * weights_of_matrices(shape)
    # Scores and values: two products of D with each of 10 keys, in 3 blocks.
    assert forward_flops(shape, 10.0) - forward_flops(shape, 0.0) == 3 * 2 * 2 * 10 * 32


def test_a_step_that_selects_everything_is_three_forwards_and_the_references() -> None:
    reference = next_token_model(SHAPE)
    logits = 2 * SHAPE.dim * 100
    heads = forward_flops(SHAPE, 7.0, 4)
    assert selective_flops(SHAPE, 7.0, 4, 1.0, None) == 3 * heads
    assert selective_flops(SHAPE, 7.0, 4, 0.6, None) == 3 * heads - 3 * 0.4 * 2 * logits
    assert selective_flops(SHAPE, 7.0, 4, 1.0, reference) == 3 * heads + forward_flops(reference, 7.0)


def test_the_peak_is_known_of_some_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("a device of next year") is None
