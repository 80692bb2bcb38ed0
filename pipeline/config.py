"""All settings of a run: frozen pydantic models, each setting with a default, a unit and one owner.

A component receives only its own section. `recipe` reads the settings from YAML and the command line; what depends on files,
ranks or the DeepSpeed JSON is checked where those are known (`checks`, `runtime.deepspeed_json`). All checks return sentences,
which are raised together in one `ConfigError`.

Every setting carries a rule (`setting_types.ResumeRule`) that says whether it may differ when a run is resumed: `Free`,
`ChangesResult` or `Fixed`.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from pipeline.data_settings import DataSettings
from pipeline.model_settings import ModelSettings
from pipeline.setting_types import (
    ChangesResult,
    DirectoryName,
    Fraction,
    FractionOverTime,
    Free,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    StepRange,
    TokenCount,
    UserPath,
    WandbSettings,
    WeightsOverTime,
)
from pipeline.storage.location import LocationSetting


class ConfigError(ValueError):
    """All problems of a run's settings, one sentence each, in `problems`. remedy: what helps against all of them."""

    def __init__(self, problems: Sequence[str], remedy: str | None = None):
        self.problems = list(problems)
        self.remedy = remedy
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"{count} with the settings:", *(f"  - {problem}" for problem in self.problems)]
        super().__init__("\n".join(lines if remedy is None else [*lines, remedy]))


class RunSettings(Section):
    """Section `run`."""

    name: Free[DirectoryName] = "run"
    """Name of the run; without --run-dir the run directory is runs/NAME."""
    hang_timeout: Free[PositiveFloat | None] = 300.0
    """Seconds after which a rank that stands still, or is silent, ends the job on all ranks (exit code 4); four times as long
    while a job starts, validates, scores or saves. It must be longer than any step. null: six hours, and a day."""


class ReferenceSettings(Section):
    """Section `reference`: the frozen model whose losses the policy's are compared with."""

    path: Free[UserPath | None] = None
    """Directory of the frozen reference: config.json, model.safetensors (or its index) and tokenizer.json."""
    horizon: ChangesResult[Literal["shifted", "matched", "own"]] = "shifted"
    """The reference loss that head h is compared with: the next-token loss of its target (`shifted`), the loss of the
    reference's own head h (`matched`; the reference then needs all heads), or the policy's own next-token loss of its target
    (`own`: head 0 is the reference; there is no other model and nothing more to compute)."""
    sharding: Free[Literal["auto", "zero3", "replicate"]] = "auto"
    """Partition the reference by ZeRO-3 (`zero3`) or keep it whole on every rank (`replicate`); `auto` replicates it if it
    takes at most a quarter of the memory that is free once the policy is built."""
    cached: Free[UserPath | None] = None
    """Directory of losses computed by launch/score.py, used instead of a live reference model. In float32, and on a GPU with
    the same `training.compile`, the selection is the live reference's, to the bit."""
    training_steps: Free[Positive | None] = None
    """First train a next-token reference of the policy's shape for this many optimizer steps; `path` must be null."""
    training_data: Free[LocationSetting | None] = None
    """Prepared shards to train that reference on; null: the built-in corpus without its noise."""


class TrainingSettings(Section):
    """Section `training`: optimizer, schedule, selection, and the options of the step."""

    steps: ChangesResult[Positive] = 1000
    """Optimizer steps; or set `tokens` or `epochs` instead."""
    tokens: Free[TokenCount | None] = None
    """Length of the run in tokens (`15B`), padding included, instead of `steps`, to which it is rounded up."""
    epochs: Free[PositiveFloat | None] = None
    """Length of the run in epochs of `data.path`, instead of `steps`, to which it is rounded up."""
    learning_rate: ChangesResult[PositiveFloat] = 3e-4
    """Peak learning rate."""
    warmup_steps: ChangesResult[NonNegative] = 100
    """Applied steps of linear warm-up."""
    schedule: ChangesResult[Literal["cosine", "wsd"]] = "cosine"
    """cosine: half a cosine after the warm-up; wsd: constant, then linear decay (warm-up, stable, decay)."""
    decay_fraction: ChangesResult[Fraction] = 0.2
    """Fraction of the steps, at the end, over which `wsd` decays."""
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
    k_percent: ChangesResult[FractionOverTime] = 0.6
    """Fraction of the valid pairs of each of heads 1, 2, … that is trained on; 1 turns the selection off. Over time:
    `[[from_step, fraction], …]`, the first from step 0."""
    k_percent_change: ChangesResult[Literal["stepwise", "linear"]] = "stepwise"
    """Course of a `k_percent` that changes over time: constant from one listed step to the next, or linear between them."""
    selection_warmup_steps: ChangesResult[NonNegative] = 0
    """First steps, in which every valid pair is selected, whatever `k_percent` says."""
    selection_pool: ChangesResult[Literal["global", "step", "rank", "row"]] = "global"
    """Pool in which the top k_percent are selected: the micro-step over all ranks (`global`), all micro-steps of the optimizer
    step over all ranks (`step`; a second policy forward if there are several), the rank's micro-batch (`rank`) or each row
    (`row`)."""
    selection_exchange: Free[Literal["all_gather", "radix", "auto"]] = "auto"
    """Algorithm by which ranks find the top of a shared pool; the result is the same to the bit. `all_gather` sends 4 bytes
    per pair; `radix` sends histograms, whose size does not grow with the tokens; `auto` gathers pools of up to 1 MiB of keys,
    where the two cost the same (`launch/benchmark.py selection`)."""
    selection_score: ChangesResult[Literal["excess", "policy_loss", "random", "external"]] = "excess"
    """Score by which pairs are ranked: policy minus reference loss (`excess`); scores of your own making, a number a token
    (`external`); or, as controls, the policy's loss alone or random numbers."""
    external_scores: Free[UserPath | None] = None
    """Directory of `external` scores of all data sets, made by `launch/score.py --import`. The score of token j is that of
    every pair whose target is j."""
    selection_seed: ChangesResult[NonNegative] = 0
    """Seed of the `random` score."""
    normalize_by: ChangesResult[Literal["valid", "selected"]] = "valid"
    """Divide a head's summed loss by its valid pairs in the step, or by its selected ones (arXiv 2404.07965, equation 4)."""
    loss_phase: ChangesResult[Literal["two_pass", "predicted", "dense"]] = "predicted"
    """Algorithm that computes losses and gradient; the gradient is the same up to rounding. `two_pass` scores all pairs,
    selects, then computes the selected ones again with gradient. `predicted` computes gradients already while scoring, for the
    pairs that earlier steps' thresholds predict, and repairs the rest (without effect in the pools `rank` and `row`, which have
    no common threshold). `dense` holds all logits: the slow oracle of the other two."""
    head_weights: ChangesResult[WeightsOverTime | None] = None
    """Weight of each head's loss; null: 1 for all. Over time: `[[from_step, weights], …]`, the first from step 0, as the
    curricula of arXiv 2505.22757."""
    head_weights_change: ChangesResult[Literal["stepwise", "linear"]] = "stepwise"
    """Course of `head_weights` that change over time: constant from one listed step to the next, or linear between them."""
    detach_heads: ChangesResult[bool] = False
    """Stop the gradients of heads 1, 2, … at the trunk's output: they train themselves and the unembedding alone, and the trunk
    learns of the next token alone."""
    activation_checkpointing: Free[Literal["none", "selective", "full"]] = "none"
    """Activations that are saved for backward: all (`none`), the outputs of matrix products and attention (`selective`), or
    each block's input alone (`full`; its forward runs twice). The others are recomputed; the gradient is the same,
    on CUDA but for rounding (`compile`)."""
    compile: ChangesResult[Literal["auto", "off"]] = "auto"
    """Compile RoPE and SwiGLU's product: `auto` on CUDA, except under `selective` checkpointing. The first step takes some
    seconds longer, later ones up to a fifth less."""
    freeze_trunk_steps: ChangesResult[NonNegative] = 0
    """Applied steps at the beginning in which embedding and trunk stay as they are, to the byte, while all heads, the final
    norm and an unembedding of its own train. Such a step takes as long as any other."""
    deterministic: ChangesResult[bool] = False
    """Take deterministic kernels alone: slower on CUDA, but a repeated run is the same to the bit, as on a CPU anyway."""
    check_ranks_every: Free[Positive | None] = 100
    """Steps between checks that all ranks hold equal values; null: never."""
    max_skipped_steps: Free[Positive] = 10
    """Non-finite steps in a row after which the job stops."""
    rollback_on_spike: ChangesResult[PositiveFloat | None] = None
    """Loss-spike score (standard deviations above the steps before) beyond which the run goes back to a checkpoint from before
    the spike and leaves out the samples around it, as PaLM's training did by hand (arXiv 2204.02311); null: never."""
    rollback_steps: ChangesResult[Positive] = 100
    """Steps before a spike, itself among them, with which the samples that are left out begin."""
    rollback_skip_steps: ChangesResult[Positive] = 300
    """Steps whose samples are left out, those of `rollback_steps` among them."""
    max_rollbacks: Free[NonNegative] = 3
    """Times that a run goes back; with one more spike it stops."""


class LoggingSettings(Section):
    """Section `logging`: intervals, all in optimizer steps."""

    metrics_every: Free[Positive] = 10
    """Steps between lines in metrics.jsonl and TensorBoard."""
    progress_every: Free[Positive] = 10
    """Steps between progress lines."""
    selection_every: Free[Positive] = 100
    """Steps between blocks of selection statistics."""
    histogram_every: Free[Positive | None] = 100
    """Steps between histograms of each head's excess losses in TensorBoard, or fewer, so that a run has ten; null: none."""
    validation_every: Free[Positive] = 500
    """Steps between validations (there is one at the start and one at the end as well)."""
    validation_samples: Free[Positive | None] = None
    """Rows of each held-out folder that a validation reads: always the same ones, spread evenly over the folder; null: all."""
    samples_every: Free[Positive | None] = 1000
    """Steps between samples of the policy (RUN/samples.jsonl and TensorBoard's text): beginnings of held-out documents,
    continued greedily, plainly and self-speculatively; null: none."""
    sample_tokens: Free[Positive] = 32
    """Tokens by which a sample continues its prompt; plainly it takes as many forwards of a few short rows."""
    passage_every: Free[Positive | None] = 500
    """Steps between pictures of a held-out passage whose tokens are coloured by the heads that select them (RUN/passages and
    TensorBoard's images); null: none. There is one at the end as well; none without a live reference."""
    wandb: Free[WandbSettings | None] = None
    """`{project: NAME}` sends the records to Weights & Biases too (`pip install -e '.[wandb]'`); without a login, or with
    WANDB_MODE=offline, they are kept below the run directory. null: not."""
    profile_steps: Free[StepRange | None] = None
    """First and last step that are traced by torch's profiler, `[10, 13]`: RUN/profile/ has a trace a rank, with the phases
    data, reference, policy, loss, exchange, backward and step, and on CUDA the allocator's history; null: none. A run that is
    resumed among them is traced from there."""
    deepspeed_level: Free[Literal["debug", "info", "warning", "error"]] = "error"
    """Lowest level of DeepSpeed's own log messages that are shown."""


class CheckpointSettings(Section):
    """Section `checkpoint`."""

    every: Free[Positive] = 500
    """Steps between checkpoints (there is one at the end as well)."""
    every_minutes: Free[PositiveFloat | None] = None
    """Minutes after which a checkpoint is due as well; null: by steps alone."""
    keep: Free[Positive | None] = 3
    """Newest checkpoints kept; null: all."""
    keep_every: Free[Positive | None] = None
    """Also keep the checkpoints of every step that is a multiple of this; null: none."""
    max_failed_saves: Free[NonNegative] = 3
    """Saves in a row that may fail (a full disk, say) while the run goes on; with one more it ends."""


class Settings(Section):
    """All settings of a run, by section."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    reference: ReferenceSettings = ReferenceSettings()
    training: TrainingSettings = TrainingSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    def with_values(self, **sections: Mapping[str, Any]) -> "Settings":
        """A copy with some values replaced, validated again: `with_values(data={"lanes": 8})`."""
        values = self.model_dump()
        for section, replaced in sections.items():
            values[section] = values[section] | dict(replaced)
        return Settings.model_validate(values)

    def to_yaml(self) -> str:
        """The settings as a recipe: read again they are equal."""
        values = self.model_dump(mode="json")
        if self.training.tokens is not None or self.training.epochs is not None:
            del values["training"]["steps"]  # It follows from the other one.
        return yaml.safe_dump(values, sort_keys=False)


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """The hint for an unknown name: the closest known one, or the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known are: {', '.join(known)}"
