"""The kinds of `model.rope_scaling`, by the names and keys of Hugging Face's config.json."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from pipeline.setting_types import Positive, PositiveFloat, Section

_EXPECTED = "expected {rope_type: linear, llama3 or yarn, factor: …}"


class Linear(Section):
    """All positions divided by a factor."""

    rope_type: Literal["linear"]
    factor: PositiveFloat
    """Times that rows are longer than the original ones."""


class Llama3(Section):
    """Llama 3.1's: low frequencies divided by the factor, high ones kept."""

    rope_type: Literal["llama3"]
    factor: PositiveFloat
    """Divides the frequencies of less than `low_freq_factor` turns over the original positions."""
    low_freq_factor: PositiveFloat
    """Turns over the original positions below which a frequency is divided."""
    high_freq_factor: PositiveFloat
    """Turns over the original positions above which a frequency is kept."""
    original_max_position_embeddings: Positive
    """Positions that the model was made for before."""

    @model_validator(mode="after")
    def _check_order(self) -> "Llama3":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"expected low_freq_factor below high_freq_factor, {self.high_freq_factor:g}")
        return self


class Yarn(Section):
    """YaRN (arXiv 2309.00071): by frequency as Llama 3.1's, and attention's logits scaled."""

    rope_type: Literal["yarn"]
    factor: PositiveFloat
    """Times that rows are longer than the original ones."""
    original_max_position_embeddings: Positive
    """Positions that the model was made for before."""
    attention_factor: PositiveFloat | None = None
    """Factor of cos and sin, so its square scales attention's logits; null: 0.1 ln(factor) + 1."""
    beta_fast: PositiveFloat = 32.0
    """Turns over the original positions above which a frequency is kept."""
    beta_slow: PositiveFloat = 1.0
    """Turns over the original positions below which a frequency is divided by the factor."""
    truncate: bool = True
    """Round the range between the two to whole pairs."""


def _rope_type(value: Any) -> Any:
    return value.get("rope_type") if isinstance(value, dict) else getattr(value, "rope_type", None)


RopeScaling = Annotated[
    Annotated[Linear, Tag("linear")] | Annotated[Llama3, Tag("llama3")] | Annotated[Yarn, Tag("yarn")],
    Discriminator(_rope_type, custom_error_type="rope_type", custom_error_message=_EXPECTED),
]
ROPE_SCALINGS: dict[str, type[Section]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}
"""The kinds by their `rope_type`."""
