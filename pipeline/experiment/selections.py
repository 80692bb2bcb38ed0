"""Compare selections on the same rows of training data: by two references, by two seeds; and with the truth of each token.

The models are those at the end of runs; the rows are spread evenly over the mix; a pool is a step's rows, as in training. Two
selections' overlap is the share of pairs that both take among those that either takes. Two that have nothing to do with each
other and take a share k overlap in k / (2 - k).

Shapes: S rows, T tokens, H heads, K = H - 1 the heads that select, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.loading.batch import collate, targets_and_valid
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.tokenizer import load_tokenizer
from pipeline.experiment.corpus import DOCUMENT_FILE, KIND_FILE, NOISE, labels
from pipeline.experiment.plan import Plan, RunName, settings_of
from pipeline.experiment.preparing import REFERENCES, losses_of
from pipeline.model.reference import losses_by_head
from pipeline.saved_model import find_model
from pipeline.weighting.selection import excess_keys, nums_selected, select_top

_MOST_POOLS = 16
_SHIFTED = "rho1_shifted"


class Rows(NamedTuple):
    """Rows of the mix, by their numbers. targets_STH: int64; valid_STH: bool; kinds_STH: uint8, the truth of each target."""

    numbers_S: np.ndarray
    targets_STH: np.ndarray
    valid_STH: np.ndarray
    kinds_STH: np.ndarray


def compare_selections(plan: Plan, directory: Path, rates: Mapping[str, float]) -> dict[str, Any]:
    """Return the overlaps and differences of selections, and the share that each arm selects of each kind of token.

    What a plan has no runs for is left out.
    """
    found: dict[str, Any] = {"chance": _chance(float(plan.base["training"]["k_percent"]))}
    if _SHIFTED not in plan.arms:
        return found
    data = directory / "data" / "corpus" / "mix"
    first = RunName(_SHIFTED, rates[_SHIFTED], 0)
    settings = settings_of(plan, first, directory)
    rows = _rows(data, settings.model.num_prediction_heads, settings.data.global_batch)
    references = {horizon: _reference(directory, horizon, rows) for horizon in REFERENCES}

    # One policy, two references; two policies, one reference.
    policy = _policy_losses(directory, first, rows)[..., 1:]
    by_reference = [_selected(plan, rows, policy - references[horizon], _SHIFTED) for horizon in ("shifted", "matched")]
    found["shifted_and_matched"] = overlap(*by_reference)
    found["differ_on"] = _differences(data, rows, *by_reference)
    if _SHIFTED in plan.main_arms:
        policies = [_policy_losses(directory, first._replace(seed=seed), rows)[..., 1:] for seed in plan.seeds[:2]]
        found["two_seeds"] = overlap(*(_selected(plan, rows, each - references["shifted"], _SHIFTED) for each in policies))

    # Each arm that selects by losses, beside the truth.
    found["selected_by_truth"] = {}
    for arm in plan.arms:
        compared = _compared(plan, RunName(arm, rates[arm], 0), directory, rows, references)
        if compared is not None:
            found["selected_by_truth"][arm] = _by_truth(rows, _selected(plan, rows, compared, arm))
    return found


def _compared(plan: Plan, run: RunName, directory: Path, rows: Rows, references: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The values by which an arm's pairs compete at its end, float32 [S, T, K]; None where these are not losses."""
    training = plan.arms[run.arm].settings.get("training", {})
    horizon = settings_of(plan, run, directory).reference.horizon
    by_policy = training.get("selection_score") == "policy_loss"
    by_excess = "reference" in plan.arms[run.arm].settings
    if not (by_policy or by_excess) or training.get("selection_pool", "global") != "global":
        return None
    losses_STH = _policy_losses(directory, run, rows)
    if by_policy:
        return losses_STH[..., 1:]
    return losses_STH[..., 1:] - (_own(losses_STH) if horizon == "own" else references[horizon])


def overlap(one_STK: np.ndarray, other_STK: np.ndarray) -> list[float]:
    """Return for each head the pairs that both selections take over those that either takes."""
    both, either = (one_STK & other_STK).sum((0, 1)), (one_STK | other_STK).sum((0, 1))
    return (both / np.maximum(either, 1)).tolist()


def select(compared_STK: np.ndarray, valid_STK: np.ndarray, rows_a_pool: int, k_percent: float) -> np.ndarray:
    """Take the top `k_percent` of each head's pairs in each pool of consecutive rows, as training does; bool [S, T, K]."""
    compared, valid = torch.from_numpy(compared_STK), torch.from_numpy(valid_STK)
    selected = torch.zeros_like(valid)
    for first in range(0, len(valid), rows_a_pool):
        pool = slice(first, first + rows_a_pool)
        for head in range(valid.shape[2]):
            valid_P = valid[pool, :, head].flatten()
            keys_P = excess_keys(compared[pool, :, head].flatten(), valid_P)
            taken_P, _ = select_top(keys_P, int(nums_selected(k_percent, valid_P.sum())))
            selected[pool, :, head] = taken_P.view(-1, valid.shape[1])
    return selected.numpy()


def _selected(plan: Plan, rows: Rows, compared_STK: np.ndarray, arm: str) -> np.ndarray:
    training = plan.base["training"] | plan.arms[arm].settings.get("training", {})
    return select(compared_STK, rows.valid_STH[..., 1:], int(plan.base["data"]["global_batch"]), float(training["k_percent"]))


def _chance(k_percent: float) -> float:
    return k_percent / (2 - k_percent)


def _rows(data: Path, num_heads: int, rows_a_pool: int) -> Rows:
    """Whole pools of rows, spread evenly over the data."""
    kinds_ST = labels(data, KIND_FILE)
    num_rows = min(_MOST_POOLS, len(kinds_ST) // rows_a_pool) * rows_a_pool
    numbers = np.arange(num_rows) * len(kinds_ST) // num_rows
    batch = collate(_samples(data, numbers))
    targets_STH, valid_STH = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, num_heads)
    kinds_STH = np.stack([np.roll(kinds_ST[numbers], -1 - head, 1) for head in range(num_heads)], -1)
    documents_ST = labels(data, DOCUMENT_FILE)[numbers]
    assert ((documents_ST >= 0) == (batch.document_ids_BT.numpy() >= 0)).all(), "the labels are those of these rows"
    return Rows(numbers, targets_STH.numpy(), valid_STH.numpy(), kinds_STH)


def _samples(data: Path, numbers: np.ndarray) -> list[Any]:
    manifest = read_manifest(data)
    ends = np.cumsum([shard.samples for shard in manifest.shards])
    shards = np.searchsorted(ends, numbers, side="right")
    within = numbers - np.concatenate([[0], ends])[shards]
    reader = ShardReader(data, manifest)
    found = reader.read_many(shards.tolist(), within.tolist())
    reader.close()
    return found


def _reference(directory: Path, horizon: str, rows: Rows) -> np.ndarray:
    """The cached losses that heads 1… are compared with, float32 [S, T, K]."""
    data = directory / "data" / "corpus" / "mix"
    columns = torch.from_numpy(losses_of(data, directory / "losses" / horizon)[rows.numbers_S].copy())
    return losses_by_head(columns, horizon, rows.valid_STH.shape[2])[..., 1:].numpy()


def _own(losses_STH: np.ndarray) -> np.ndarray:
    """Head 0's losses of the targets of heads 1…, float32 [S, T, K]."""
    of_token = torch.from_numpy(np.pad(losses_STH[:, :-1, :1], ((0, 0), (1, 0), (0, 0))))
    return losses_by_head(of_token, "shifted", losses_STH.shape[2])[..., 1:].numpy()


def _policy_losses(directory: Path, run: RunName, rows: Rows) -> np.ndarray:
    """The losses of a run's model at its end, float32 [S, T, H]; 0 at invalid pairs."""
    data = directory / "data" / "corpus" / "mix"
    model = find_model(directory / "runs" / str(run), None).build(torch.device("cpu"), torch.float32)
    found = []
    for first in range(0, len(rows.numbers_S), 16):
        batch = collate(_samples(data, rows.numbers_S[first : first + 16]))
        targets_BTH, valid_BTH = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, rows.valid_STH.shape[2])
        with torch.no_grad():
            found.append(model(batch.tokens_BT, batch.document_ids_BT, targets_BTH, valid_BTH, spans=batch.spans).numpy())
    return np.concatenate(found)


def _by_truth(rows: Rows, selected_STK: np.ndarray) -> dict[str, float]:
    """The share of the valid pairs of each kind of target that heads 1… select."""
    valid_STK, kinds_STK = rows.valid_STH[..., 1:], rows.kinds_STH[..., 1:]
    found = {}
    for kind, name in enumerate(("clean", *NOISE)):
        of_kind = valid_STK & (kinds_STK == kind)
        if of_kind.any():
            found[name] = float(selected_STK[of_kind].mean())
    return found


def _differences(data: Path, rows: Rows, shifted_STK: np.ndarray, matched_STK: np.ndarray) -> dict[str, dict[str, float]]:
    """By property of the target: its share of all valid pairs, of those that only the shifted reference selects, and of those
    that only the matched one does."""
    valid_STK = rows.valid_STH[..., 1:]
    sets = {"of all": valid_STK, "shifted alone": shifted_STK & ~matched_STK, "matched alone": matched_STK & ~shifted_STK}
    properties = {**_positions_in_word(data, rows), **_frequencies(data, rows)}
    properties |= {f"distance {head + 2}": _of_head(valid_STK, head) for head in range(valid_STK.shape[2])}
    return {
        name: {of: float((of_property & which).sum() / max(1, which.sum())) for of, which in sets.items()}
        for name, of_property in properties.items()
    }


def _of_head(valid_STK: np.ndarray, head: int) -> np.ndarray:
    found = np.zeros_like(valid_STK)
    found[..., head] = True
    return found


def _positions_in_word(data: Path, rows: Rows) -> dict[str, np.ndarray]:
    """Targets that begin a word, go on in one, or have neither letter nor digit; bool [S, T, K]."""
    tokenizer = load_tokenizer(data)
    texts = [tokenizer.decode([number], skip_special_tokens=False) for number in range(tokenizer.get_vocab_size())]
    has_word_V = np.array([any(map(str.isalnum, text)) for text in texts])
    begins_inside_V = np.array([text[:1].isalnum() or text[:1] == "_" for text in texts])
    ends_inside_V = np.array([text[-1:].isalnum() or text[-1:] == "_" for text in texts])
    targets_STK = rows.targets_STH[..., 1:]
    before_STK = rows.targets_STH[..., :-1]
    goes_on = begins_inside_V[targets_STK] & ends_inside_V[before_STK]
    has_word = has_word_V[targets_STK]
    return {"begins a word": has_word & ~goes_on, "within a word": has_word & goes_on, "no word": ~has_word}


def _frequencies(data: Path, rows: Rows) -> dict[str, np.ndarray]:
    """Targets by thirds of the rows' tokens: the ids that are most frequent, the middle ones, the rare ones."""
    counts_V = np.bincount(rows.targets_STH[..., 0][rows.valid_STH[..., 0]], minlength=int(rows.targets_STH.max()) + 1)
    order = np.argsort(-counts_V, kind="stable")
    third_V = np.empty(len(counts_V), np.int64)
    third_V[order] = np.minimum(2, (np.cumsum(counts_V[order]) - counts_V[order]) * 3 // max(1, counts_V.sum()))
    third_STK = third_V[rows.targets_STH[..., 1:]]
    return {name: third_STK == number for number, name in enumerate(("frequent", "of middle frequency", "rare"))}
