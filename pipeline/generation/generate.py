"""Continue the prompts of `launch/generate.py`, in one way or in both, and print what comes."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from pipeline.data.tokenizer import load_tokenizer
from pipeline.generation.decoding import Completion, Counts, Listener, decode
from pipeline.generation.prompts import PromptError, TextStream, encode_prompts, read_prompts, stop_ids, text_of
from pipeline.generation.report import COUNTED, figures, table
from pipeline.generation.sampling import Sampling
from pipeline.model.mtp import MTPModel
from pipeline.model_options import dtype_of
from pipeline.saved_model import SavedModel, find_model

PLAIN, SPECULATIVE = "plain", "speculative"


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Continue the prompts, print completions and figures, and return them.

    options: of `launch/generate.py`.

    Raises:
        PromptError: a prompt cannot be continued, or the model has no heads that draft. ModelFilesError, CheckpointError,
            DataError: as `find_model` and `SavedModel.tokenizer`.
    """
    texts = _texts(options)
    source = find_model(options.model, options.step)
    for note in source.notes:
        print(note, flush=True)
    ways = ways_of(source, options.speculate)
    file, special = source.tokenizer(options.tokenizer)
    tokenizer = load_tokenizer(file)
    prompts = encode_prompts(tokenizer, special, texts, source.context_length)
    ends = stop_ids(tokenizer, special, options.stop)

    model = _built(source, options)
    limits = [_limit(prompt, options.max_tokens, source.context_length) for prompt in prompts]
    counted: dict[str, Any] = {}
    completions: list[Completion] = []
    for way, num_drafts in ways.items():
        # The last way is the one that was asked for; one before it is there to be compared.
        listener = _Printer(tokenizer) if options.stream and way == list(ways)[-1] else None
        completions, counts = _in_batches(model, prompts, limits, ends, options, num_drafts, listener)
        if listener is not None:
            print(listener.stream.rest(), end="")
        counted[way] = figures(completions, counts)

    listed = [_listed(text, completion, tokenizer) for text, completion in zip(texts, completions, strict=True)]
    for each in listed:
        print("" if options.stream else f"{each['prompt']}{each['text']}\n")
    print(f"{table(counted)}\n{COUNTED}", flush=True)
    return {"model": str(source.directory), "completions": listed, **counted}


def _texts(options: argparse.Namespace) -> list[str]:
    texts = options.prompt if options.prompt is not None else read_prompts(options.prompt_file)
    if options.stream and len(texts) > 1:
        raise PromptError(f"--stream: got {len(texts)} prompts; expected one")
    return texts


def _listed(text: str, completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    token_ids = completion.token_ids
    return {"prompt": text, "token_ids": token_ids, "text": text_of(tokenizer, token_ids), "finish": completion.finish}


def ways_of(source: SavedModel, speculate: bool | None) -> dict[str, int]:
    """Return the drafts of each way of decoding, the way that was asked for last.

    Raises:
        PromptError: the model has no heads that draft.
    """
    num_drafts = source.settings.num_prediction_heads - 1
    if speculate and not num_drafts:
        raise PromptError(f"--speculate: {source.directory} has head 0 alone, and no head that could draft; leave it out")
    if speculate:
        return {PLAIN: 0, SPECULATIVE: num_drafts}
    return {PLAIN: 0} if speculate is False or not num_drafts else {SPECULATIVE: num_drafts}


def _built(source: SavedModel, options: argparse.Namespace) -> MTPModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return source.build(device, dtype_of(options, source.dtype if device.type == "cuda" else torch.float32))


def _limit(prompt: list[int], max_tokens: int, context_length: int | None) -> int:
    return max_tokens if context_length is None else min(max_tokens, context_length - len(prompt))


def _in_batches(
    model: MTPModel,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    ends: frozenset[int],
    options: argparse.Namespace,
    num_drafts: int,
    listener: Listener | None,
) -> tuple[list[Completion], Counts]:
    """Decode some prompts at a time; returns the completions of all, and the sums of what was counted."""
    completions, total = [], Counts(accepted=[0] * num_drafts)
    sampling = Sampling(options.temperature, options.top_p)
    for first in range(0, len(prompts), options.batch):
        rows = slice(first, first + options.batch)
        part, counts = decode(model, prompts[rows], limits[rows], ends, sampling, num_drafts, options.seed + first, listener)
        completions += part
        total += counts
    return completions, total


class _Printer:
    """Prints the text of the only row as it comes."""

    def __init__(self, tokenizer: Tokenizer):
        self.stream = TextStream(tokenizer)

    def __call__(self, row: int, token_ids: list[int]) -> None:
        print(self.stream.add(token_ids), end="", flush=True)
