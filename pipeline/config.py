"""Settings: frozen, validated, each with a default, a unit and one owner.

A component receives only its own section. `recipe` reads them from YAML and the command line; what depends on files,
ranks or the DeepSpeed JSON is checked where those are known. All such checks return sentences, which end up together
in one `ConfigError`.

Every setting carries a `ResumeRule`, which says whether it may differ when a run is resumed: `Free`, `ChangesResult` or
`Fixed`.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.storage.files import Access
from pipeline.storage.location import LocationSetting


class ConfigError(ValueError):
    """Everything that is wrong with a run's settings, one sentence a problem."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"{count} with the settings:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


def _inside_one_directory(name: str) -> str:
    if not name or name.startswith(".") or "/" in name:
        raise ValueError("expected the name of a directory: no '/', no leading '.'")
    return name


def _above_zero_up_to_one(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError("expected a fraction in (0, 1]")
    return value


class ResumeRule(Enum):
    """What it means that a setting differs between a run and its continuation.

    FREE: nothing for what is computed. Folders may move; the fingerprints of what is in them are compared instead.
    CHANGES_RESULT: something else is computed, so it is refused unless it is asked for.
    FIXED: the position of a run, one integer, is counted in it, so it is refused.
    """

    FREE = "free"
    CHANGES_RESULT = "changes the result"
    FIXED = "fixed"


Value = TypeVar("Value")
Free = Annotated[Value, ResumeRule.FREE]
ChangesResult = Annotated[Value, ResumeRule.CHANGES_RESULT]
Fixed = Annotated[Value, ResumeRule.FIXED]

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, AfterValidator(_above_zero_up_to_one)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        given = value if isinstance(value, list) else [value]
        if any(isinstance(each, bool) for each in given) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("expected a value other than true and false (YAML reads yes, no, on and off so too; quote a name)")
        return value


class RunSettings(Section):
    name: Free[Annotated[str, AfterValidator(_inside_one_directory)]] = "run"
    """Name of the run; without --run-dir the run directory is runs/NAME."""


class MixtureSet(Section):
    path: LocationSetting
    """Folder or URL of prepared shards."""
    weight: PositiveFloat
    """Its part of the rows, in proportion to the weights of the others; exact as written in decimals."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")]
    """What metrics and messages call it; also its source's name where its inputs had none."""


class DataSettings(Section):
    path: Free[LocationSetting | None] = None
    """Folder of prepared shards (launch/prepare.py makes it): a path, https://HOST/FOLDER, s3://BUCKET/FOLDER, or, with
    `allow_pipe`, pipe:COMMAND in which {} is the name of a file."""
    mixture: Free[Annotated[list[MixtureSet], Field(min_length=1)] | None] = None
    """In place of `path`: several data sets, each with `path`, `weight` and `name`, mixed by weight."""
    validation_path: Free[LocationSetting | None] = None
    """Directory of held-out prepared shards; null: no validation."""
    builtin: Free[bool] = False
    """Where `path` is null: prepare the embedded corpus (Python's own documentation and source, and noise) under the
    run directory, as the demo does."""
    sequence_length: ChangesResult[Positive] = 2048
    """T, tokens a row."""
    global_batch: Fixed[Positive] = 256
    """G, rows an optimiser step over all ranks."""
    micro_batch: ChangesResult[Positive] = 8
    """B, rows a rank and micro-step."""
    lanes: Fixed[Positive | None] = None
    """L, independent reading positions of the job; null: the largest divisor of `global_batch` up to 256."""
    seed: ChangesResult[NonNegative] = 0
    """Seed of the order of samples."""
    shuffle_block: ChangesResult[Positive] = 1024
    """Samples of a shard that are permuted among themselves."""
    num_workers: Free[NonNegative] = 2
    """Loader processes a rank; 0 reads in the training process."""
    on_corrupt: Free[Literal["error", "skip"]] = "error"
    """What a damaged sample does: end the job on all ranks, or give its place to a row without valid pairs."""
    max_corrupt: ChangesResult[NonNegative] = 100
    """Damaged samples, over all ranks and the whole run, that `skip` puts up with."""
    retry_seconds: Free[PositiveFloat] = 120.0
    """Time over which a read of remote data is repeated, with growing pauses, before the job ends."""
    cache_dir: Free[Path | None] = None
    """Folder of this machine that keeps what was read of remote data, shared by all its ranks; null: nothing is kept."""
    cache_bytes: Free[Annotated[int, Field(ge=2**20)]] = 64 * 2**30
    """Size that `cache_dir` may reach, in bytes; what was used longest ago goes first."""
    allow_pipe: Free[bool] = False
    """Whether a `pipe:` may run its command, which is a shell's."""

    @property
    def access(self) -> Access:
        """How remote data is reached."""
        return Access(self.retry_seconds, self.cache_dir, self.cache_bytes, self.allow_pipe)


class ModelSettings(Section):
    dim: ChangesResult[Positive] = 512
    """D, width of the hidden states."""
    num_layers: ChangesResult[Positive] = 8
    """Depth of the next-token path: a trunk of num_layers - 1 blocks, then head 0's block."""
    num_attention_heads: ChangesResult[Positive] = 8
    """Attention heads of a block."""
    num_key_value_heads: ChangesResult[Positive | None] = None
    """Key and value heads (grouped-query attention); null: as many as attention heads."""
    head_dim: ChangesResult[Positive | None] = None
    """Width of an attention head; null: dim / num_attention_heads."""
    ffn_dim: ChangesResult[Positive | None] = None
    """Width of the SwiGLU layer; null: 8/3 of dim, rounded up to a multiple of 64."""
    vocab_size: ChangesResult[Positive | None] = None
    """V; null: the data's."""
    num_prediction_heads: ChangesResult[Positive] = 4
    """H: head h predicts the token h + 1 places ahead. 1 is ordinary next-token training."""
    rope_theta: ChangesResult[PositiveFloat] = 10_000.0
    """Base of the rotary position embedding."""
    norm_eps: ChangesResult[PositiveFloat] = 1e-5
    """Added to the mean square in RMSNorm."""
    attention_bias: ChangesResult[bool] = False
    """Bias on query, key and value projections (Qwen2)."""
    qk_norm: ChangesResult[bool] = False
    """RMSNorm on queries and keys, per attention head (Qwen3)."""
    tied_embeddings: ChangesResult[bool] = False
    """The unembedding uses the embedding's matrix."""
    seed: ChangesResult[NonNegative] = 0
    """Seed of the initial weights."""
    pretrained: Free[Path | None] = None
    """Directory of a causal language model (config.json, *.safetensors) to start from; its last block becomes every
    prediction head. Its shape must equal this section's."""


class ReferenceSettings(Section):
    path: Free[Path | None] = None
    """Directory of the frozen reference: config.json, model.safetensors (or its index) and tokenizer.json."""
    horizon: ChangesResult[Literal["shifted", "matched"]] = "shifted"
    """What head h is compared with: the next-token loss of its target (`shifted`), or the loss of the reference's own
    head h (`matched`; the reference then needs all heads)."""
    sharding: Free[Literal["auto", "zero3", "replicate"]] = "auto"
    """How the reference lies on the ranks: partitioned by ZeRO-3, or whole on each; `auto`: whole where it takes at most a
    quarter of the memory that is free once the policy is built."""
    cached: Free[Path | None] = None
    """Directory of losses that launch/score.py computed: no reference model runs or is in memory. In float32 the selection
    is that of the live reference, to the bit."""
    training_steps: Free[Positive | None] = None
    """Where `path` is null: first train a next-token reference of the policy's shape for so many steps."""
    training_data: Free[LocationSetting | None] = None
    """Prepared shards to train that reference on; null: the built-in corpus without its noise."""


class TrainingSettings(Section):
    steps: ChangesResult[Positive] = 1000
    """Optimiser steps."""
    learning_rate: ChangesResult[PositiveFloat] = 3e-4
    """Peak learning rate."""
    warmup_steps: ChangesResult[NonNegative] = 100
    """Applied steps of linear warm-up."""
    schedule: ChangesResult[Literal["cosine", "wsd"]] = "cosine"
    """cosine: half a cosine after the warm-up; wsd: constant, then linear decay (warm-up, stable, decay)."""
    decay_fraction: ChangesResult[Fraction] = 0.2
    """Share of the steps in which `wsd` decays."""
    final_learning_rate_fraction: ChangesResult[Annotated[float, Field(ge=0, le=1)]] = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: ChangesResult[NonNegativeFloat] = 0.1
    """AdamW's decoupled decay, on matrices only."""
    beta1: ChangesResult[Annotated[float, Field(ge=0, lt=1)]] = 0.9
    """AdamW's first-moment decay."""
    beta2: ChangesResult[Annotated[float, Field(ge=0, lt=1)]] = 0.95
    """AdamW's second-moment decay."""
    adam_eps: ChangesResult[PositiveFloat] = 1e-8
    """AdamW's epsilon."""
    gradient_clipping: ChangesResult[PositiveFloat | None] = 1.0
    """Largest L2 norm of the whole gradient; null: no clipping."""
    k_percent: ChangesResult[Fraction] = 0.6
    """Fraction of the valid pairs of heads 1... that is trained on; 1 turns the selection off."""
    selection_pool: ChangesResult[Literal["global", "step", "rank", "row"]] = "global"
    """Over what the top k_percent is taken: the micro-step over all ranks (`global`), all micro-steps of the optimiser
    step over all ranks (`step`; costs a second policy forward where there are several), the rank's micro-batch (`rank`)
    or each row (`row`)."""
    selection_exchange: Free[Literal["all_gather", "radix", "auto"]] = "auto"
    """How ranks that share a pool find its top; the answer is the same to the bit. `all_gather` moves 4 bytes a pair,
    `radix` histograms whose size does not grow with tokens; `auto` gathers pools of up to 1 MiB of keys, where
    `launch/benchmark.py selection` has the two cross."""
    selection_score: ChangesResult[Literal["excess", "policy_loss", "random"]] = "excess"
    """What pairs compete by: policy minus reference loss, or, as controls, the policy's loss alone or nothing."""
    selection_seed: ChangesResult[NonNegative] = 0
    """Seed of the `random` score."""
    normalize_by: ChangesResult[Literal["valid", "selected"]] = "valid"
    """What a head's summed loss is divided by: its valid pairs in the step, or the selected ones (arXiv 2404.07965,
    equation 4)."""
    loss_phase: ChangesResult[Literal["two_pass", "predicted", "dense"]] = "predicted"
    """How the losses of all heads and their gradient are made; the gradient is the same up to rounding. `two_pass` scores
    all pairs, selects, then computes the selected ones again with gradient; `predicted` makes the gradients of what
    earlier thresholds lead to expect in the first pass, and mends the rest (the pools `rank` and `row` have no common
    threshold to follow, so that nothing is expected there); `dense` holds all logits: the slow oracle of the other two."""
    head_weights: ChangesResult[list[NonNegativeFloat] | None] = None
    """Weight of each head's loss; null: 1 for all."""
    activation_checkpointing: Free[Literal["none", "selective", "full"]] = "none"
    """Which activations wait for backward: all (`none`), those of matrix products and attention (`selective`), or each
    block's input alone (`full`; its forward runs twice). The others are made again; the gradient is the same."""
    compile: ChangesResult[Literal["auto", "off"]] = "auto"
    """Whether RoPE and SwiGLU's product are compiled (`auto`: on CUDA, but under `selective` checkpointing); the first step
    takes some seconds longer, those after it a fifth less."""
    check_ranks_every: Free[Positive | None] = 100
    """Steps between comparisons of what all ranks must hold alike; null: never."""
    max_skipped_steps: Free[Positive] = 10
    """Non-finite steps in a row after which the job stops."""


class LoggingSettings(Section):
    metrics_every: Free[Positive] = 10
    """Steps between lines in metrics.jsonl and TensorBoard."""
    progress_every: Free[Positive] = 10
    """Steps between progress lines."""
    selection_every: Free[Positive] = 100
    """Steps between blocks of selection statistics."""
    histogram_every: Free[Positive | None] = 100
    """Steps between histograms of each head's excess losses in TensorBoard; null: none."""
    validation_every: Free[Positive] = 500
    """Steps between validations (there is one at the start and one at the end as well)."""
    validation_samples: Free[Positive | None] = None
    """Held-out rows a validation reads, rounded down to a multiple of the lanes but not below it; null: all."""
    deepspeed_level: Free[Literal["debug", "info", "warning", "error"]] = "error"
    """What of DeepSpeed's own log is shown."""


class CheckpointSettings(Section):
    every: Free[Positive] = 500
    """Steps between checkpoints (there is one at the end as well)."""
    keep: Free[Positive | None] = 3
    """Newest checkpoints kept; null: all."""


class Settings(Section):
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    reference: ReferenceSettings = ReferenceSettings()
    training: TrainingSettings = TrainingSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    def with_values(self, **sections: Mapping[str, Any]) -> "Settings":
        """A copy with some values of some sections replaced, validated again."""
        values = self.model_dump()
        for section, replaced in sections.items():
            values[section] = values[section] | dict(replaced)
        return Settings.model_validate(values)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def head_weights(self) -> list[float]:
        """The weight of each of the H heads."""
        return self.training.head_weights or [1.0] * self.model.num_prediction_heads


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known are: {', '.join(known)}"
