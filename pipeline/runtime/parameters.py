"""Shapes and optimizer groups of a model's parameters, whole or partitioned by ZeRO-3."""

from typing import Any

import torch
from torch import nn

from pipeline.config import ModelSettings, TrainingSettings
from pipeline.model.mtp import MTPModel
from pipeline.model.transformer import Block


def num_parameters(settings: ModelSettings) -> int:
    """The number of parameters of a model of this shape."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MTPModel(settings).parameters())


def gathered_block_size(settings: ModelSettings, persistence_threshold: float) -> int:
    """The number of a block's values that ZeRO-3 gathers: those of parameters above `stage3_param_persistence_threshold`."""
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in Block(settings).parameters()]
    return sum(size for size in sizes if size > persistence_threshold)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter.

    Under zero.Init a parameter's own shape is (0,) and its dim() is 1, on a single rank too, so code that groups by
    `parameter.dim() >= 2` silently skips weight decay and initialisation. `ds_shape` has the true shape.
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_groups(model: nn.Module, training: TrainingSettings) -> list[dict[str, Any]]:
    """AdamW's parameter groups: weight decay on matrices, none on norms and biases.

    Where the trunk is frozen at first its parameters have groups of their own, with "is_trunk".
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for is_trunk in (False, True):
        members = [each for name, each in named if is_trunk == (training.freeze_trunk_steps > 0 and _is_of_trunk(name))]
        matrices = [parameter for parameter in members if len(full_shape(parameter)) >= 2]
        vectors = [parameter for parameter in members if len(full_shape(parameter)) < 2]
        groups += [
            {"params": each, "weight_decay": decay, "is_trunk": is_trunk}
            for each, decay in ((matrices, training.weight_decay), (vectors, 0.0))
            if each
        ]
    return groups


def _is_of_trunk(name: str) -> bool:
    return name.startswith(("embed.", "trunk."))
