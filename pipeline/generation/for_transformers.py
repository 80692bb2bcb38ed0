"""Self-speculative decoding for `generate` of transformers, as a callable: no code lies in the model's folder.

    model = AutoModelForCausalLM.from_pretrained(DIR)
    model.generate(**inputs, max_new_tokens=64, custom_generate=self_speculative(DIR))

The tokens are those of `model.generate` without it. The model of transformers only says device, dtype and settings; what runs
is the same model of this package, which has the drafting heads and is in memory beside it. That they are the same is checked
tensor by tensor. A `streamer` is not handed to a callable by transformers, and hears the prompt alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.generation.decoding import Counts, decode
from pipeline.generation.sampling import Sampling
from pipeline.model.layout import export_name
from pipeline.model.mtp import MTPModel
from pipeline.saved_model import find_model

# What transformers makes of `temperature` and `top_p`, which are computed here.
_COMPUTED = ("TemperatureLogitsWarper", "TopPLogitsWarper", "InfNanRemoveLogitsProcessor")
_STOPS = ("MaxLengthCriteria", "EosTokenCriteria")
# Settings that would be another search, or another result than the sequences.
_ALONE = {"num_return_sequences": 1, "num_beams": 1, "return_dict_in_generate": False, "penalty_alpha": 0.0}


class SelfSpeculative:
    """Decodes by the model in a folder (any MODEL of the commands), instead of transformers' own loop.

    counts: of the last call: steps, drafts of each head that were accepted, seconds. None before the first.

    Raises:
        ValueError: the folder holds no model with drafting heads; or, when it is called, the model of transformers is another
            one, or settings of the generation mean something that is not computed here.
    """

    def __init__(self, directory: Path | str):
        self.source = find_model(Path(directory))
        self.num_drafts = self.source.settings.num_prediction_heads - 1
        if not self.num_drafts:
            raise ValueError(f"{directory}: has head 0 alone, and no head that could draft")
        self.counts: Counts | None = None
        self._model: MTPModel | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_inputs: Any,
    ) -> Tensor:
        """Continue rows of ids, padded on the left; returns prompts and completions, int64 [B, longest].

        model_inputs: of which `attention_mask` is used. As a parameter of its own transformers would pass it twice.
        """
        _check(logits_processor, stopping_criteria, generation_config)
        own = self._built(model)
        mask = model_inputs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts = [ids[of_row.bool()].tolist() for ids, of_row in zip(input_ids, mask, strict=True)]

        limit, ends = generation_config.max_length - input_ids.shape[1], generation_config.eos_token_id
        stop_ids = frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])
        sampling = Sampling()
        if generation_config.do_sample:
            sampling = Sampling(_given(generation_config.temperature), _given(generation_config.top_p))
        seed = int(torch.randint(2**31, ()))
        completions, self.counts = decode(own, prompts, [limit] * len(prompts), stop_ids, sampling, self.num_drafts, seed)

        # Shorter rows end with padding, as transformers has it.
        padding = generation_config.pad_token_id or 0
        longest = max(len(completion.token_ids) for completion in completions)
        added = [each.token_ids + [padding] * (longest - len(each.token_ids)) for each in completions]
        return torch.cat([input_ids, torch.tensor(added, device=input_ids.device)], dim=1)

    def _built(self, model: Any) -> MTPModel:
        device, dtype = model.device, model.dtype
        if self._model is None or (self._model.embed.weight.device, self._model.embed.weight.dtype) != (device, dtype):
            own = self.source.build(device, dtype)
            _check_model(own, model, self.source.directory)
            self._model = own
        return self._model


def _check_model(own: MTPModel, model: Any, directory: Path) -> None:
    """Compare head 0's path with the model of transformers, which may have been trained on or changed."""
    theirs = dict(model.named_parameters())
    for name, parameter in own.named_parameters():
        their_name = export_name(name, own.settings)
        if not their_name.startswith("prediction_heads.") and not _is_equal(parameter, theirs.get(their_name)):
            raise ValueError(
                f"the model that generates differs from {directory} in {their_name}; export the model that is to generate"
            )


def _is_equal(own: Tensor, other: Tensor | None) -> bool:
    return other is not None and own.shape == other.shape and torch.equal(own, other)


def _given(value: float | None) -> float:
    return 1.0 if value is None else value


def _check(logits_processor: Any, stopping_criteria: Any, generation_config: Any) -> None:
    """Refuse what would be left out."""
    for known, found in ((_COMPUTED, logits_processor), (_STOPS, stopping_criteria)):
        others = [type(each).__name__ for each in found if type(each).__name__ not in known]
        if others:
            remedy = "; pass top_k=0" if "TopKLogitsWarper" in others else ""
            raise ValueError(f"self-speculative decoding does not compute {', '.join(others)}{remedy}")
    for name, alone in _ALONE.items():
        value = getattr(generation_config, name, None)
        if value not in (None, alone):
            raise ValueError(f"self-speculative decoding does not compute {name}={value!r}; leave it at {alone!r}")
