"""The model card of an export, README.md: what the model is, how and on what it was trained, its figures, how to run it."""

from typing import Any

import torch
import yaml

from pipeline.model.drafter import SGLANG, VERIFIER, VLLM
from pipeline.model.export import TextConventions
from pipeline.model.model_config import config_of
from pipeline.model.weight_files import HEADS_FILE
from pipeline.runtime.logbook import read_records
from pipeline.saved_model import SavedModel
from pipeline.storage.location import Url, parse_location

CARD_FILE = "README.md"

# Settings that a reader compares models by; the run directory has all of them.
_SETTINGS = (
    "data.sequence_length",
    "data.global_batch",
    "training.steps",
    "training.learning_rate",
    "training.schedule",
    "training.weight_decay",
    "training.k_percent",
    "training.selection_warmup_steps",
    "training.selection_pool",
    "training.selection_score",
    "training.normalize_by",
    "training.head_weights",
    "training.detach_heads",
    "reference.horizon",
)
_FIGURES = ("loss_head_", "perplexity_head_", "bits_per_byte")

_HEADER = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["multi-token-prediction"]}
_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("…", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""
_GENERATE = """```bash
python launch/generate.py {name} --prompt "…" --max-tokens 64{speculate}
```"""

_SERVE = {
    VLLM: """```bash
vllm serve {name}/{verifier} --speculative-config '{{"method": "eagle3", "model": "{name}", "num_speculative_tokens": 1}}'
```""",
    SGLANG: """```bash
python -m sglang.launch_server --model-path {name}/{verifier} --speculative-algorithm EAGLE3 \\
    --speculative-draft-model-path {name} --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
```""",
}


def model_card(model: SavedModel, name: str, dtype: torch.dtype, text: TextConventions, difference: float) -> str:
    """Write the card of a model that is exported as the folder `name`.

    difference: largest relative difference of a loss between the export and the model, when it was verified.
    """
    sections = [
        f"---\n{yaml.safe_dump(_HEADER, sort_keys=False)}---\n\n# {name}",
        _description(model, dtype, text),
        _data(model),
        _training(model),
        _figures(model, difference),
        _use(model, name),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def drafter_card(name: str, engine: str) -> str:
    """Write the card of a drafter that is exported as the folder `name`, for a serving engine."""
    description = (
        f"Prediction head 1 of the model in `{VERIFIER}`, as an EAGLE-3 drafter (arXiv 2503.01840) of one token for {engine}. "
        f"Its drafts are those of the head; the model in `{VERIFIER}` verifies them, so the text is the model's own."
    )
    heading = f"---\n{yaml.safe_dump(_HEADER, sort_keys=False)}---\n\n# {name}"
    return "\n\n".join([heading, description, f"## Use\n\n{_SERVE[engine].format(name=name, verifier=VERIFIER)}"]) + "\n"


def _description(model: SavedModel, dtype: torch.dtype, text: TextConventions) -> str:
    config, heads = config_of(model.settings), model.settings.num_prediction_heads
    sentences = [
        f"A causal language model in the form of {config['model_type']}: {config['num_hidden_layers']} layers, width "
        f"{config['hidden_size']}, {config['num_attention_heads']} attention heads, {config['vocab_size']} ids, "
        f"{str(dtype).removeprefix('torch.')}."
    ]
    if heads > 1:
        sentences.append(
            f"`{HEADS_FILE}` holds prediction heads 1 to {heads - 1}, which predict up to {heads} tokens ahead (arXiv "
            "2404.19737); they draft tokens for faster generation, and other programs ignore them."
        )
    bos = "without a BOS token" if text.bos_id is None else f"with id {text.bos_id}"
    sentences.append(
        f"A text may have {text.context_length} tokens; documents begin {bos} and end with id {text.end_of_document_id}."
    )
    return " ".join(sentences)


def _data(model: SavedModel) -> str:
    identity = _identity(model)
    sets = identity.get("data.mixture") or [{"path": identity.get("data.path")}]
    places = [f"- {_place(each['path'])}{_weight(each)}" for each in sets if each.get("path")]
    if not places:
        return ""
    fingerprint = identity.get("data")
    known = f"\n\nSHA-256 of the manifest: `{fingerprint}`" if isinstance(fingerprint, str) else ""
    return "## Data\n\n" + "\n".join(places) + known


def _place(path: str) -> str:
    """A folder's path, or what of a URL holds no secret."""
    location = parse_location(path)
    if not isinstance(location, Url):
        return f"`{path}`"
    address = "(the output of a command)" if location.is_pipe else location.partition("?")[0].rpartition("@")[2]
    return f"`{location.scheme}`: `{address.removeprefix(f'{location.scheme}://')}`"


def _weight(each: dict[str, Any]) -> str:
    return f", weight {each['weight']}" if "weight" in each else ""


def _training(model: SavedModel) -> str:
    identity = _identity(model)
    if model.state is None:
        return ""
    progress = model.state.progress
    lines = [f"| {key} | {identity[key]}{_course(identity, key)} |" for key in _SETTINGS if key in identity]
    done = f"Step {model.state.step:,} of the run" + (f", {progress['tokens']:,} tokens" if "tokens" in progress else "")
    return f"## Training\n\n{done}.\n\n| setting | value |\n|---|---|\n" + "\n".join(lines)


def _course(identity: dict[str, Any], key: str) -> str:
    """The course between the listed steps of a setting that changes over them; nothing for any other setting."""
    by_steps = isinstance(identity[key], list) and isinstance(identity[key][0], list)
    return f", {identity[f'{key}_change']}" if by_steps else ""


def _figures(model: SavedModel, difference: float) -> str:
    exact = f"Losses of four rows differ by at most {difference:.1g} from those of the checkpoint, relatively."
    if model.state is None or model.run_dir is None:
        return f"## Figures\n\n{exact}"
    step = model.state.step
    held_out = [
        record for record in read_records(model.run_dir) if record.get("split") == "validation" and record["step"] <= step
    ]
    if not held_out:
        return f"## Figures\n\n{exact}"
    last = held_out[-1]
    rows = [f"| {key} | {value:.4f} |" for key, value in last.items() if key.startswith(_FIGURES) and value is not None]
    table = "\n".join(rows)
    return f"## Figures\n\nHeld out, at step {last['step']:,}:\n\n| figure | value |\n|---|---|\n{table}\n\n{exact}"


def _use(model: SavedModel, name: str) -> str:
    speculate = " --speculate" if model.settings.num_prediction_heads > 1 else ""
    return f"## Use\n\n{_TRANSFORMERS.format(name=name)}\n\n{_GENERATE.format(name=name, speculate=speculate)}"


def _identity(model: SavedModel) -> dict[str, Any]:
    return {} if model.state is None else model.state.identity
