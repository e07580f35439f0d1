"""Where a training starts from when not from random weights: those of another model."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from capfinder import capmap, models
from capfinder.allowed import shortened
from capfinder.errors import SettingsError
from capfinder.models.layers import HEAD
from capfinder.stages import assembly
from capfinder.stages.assembly import TrainedModel

SETTING = "train_params.init_from"
_STEPS = "steps"  # of BatchNorm's running averages


@dataclass(frozen=True)
class Start:
    """A model to go on from.

    variables: its own, without the layer that gives the scores where that can't be kept
    (`has_new_head`). hyperparameters: to train with. freeze: as train_params.freeze."""

    path: str
    variables: dict[str, Any]
    hyperparameters: Any
    class_names: list[str]
    weights_sha256: str
    has_new_head: bool
    freeze: str

    @property
    def is_frozen(self) -> bool:
        return self.freeze == "trunk"

    @property
    def key(self) -> dict[str, Any]:
        """What the weights of a training from here depend on."""
        return {
            "weights": self.weights_sha256,
            "new_head": self.has_new_head,
            "freeze": self.freeze,
        }

    def as_record(self) -> dict[str, Any]:
        """For metrics.json and the report."""
        return {
            "path": self.path,
            "weights_sha256": self.weights_sha256,
            "class_names": self.class_names,
            "new_head": self.has_new_head,
            "freeze": self.freeze,
        }

    def sentence(self) -> str:
        head = "a new last layer" if self.has_new_head else "its last layer kept"
        trunk = "all before the dense layers frozen" if self.is_frozen else "all of it trained"
        return f"fine-tuned from {self.path}: {head}, {trunk}"

    def in_place_of(self, fresh: Mapping[str, Any]) -> dict[str, Any]:
        """`fresh` variables ({"params", "batch_stats"}) with the model's own in their place, in the
        types of the fresh ones.

        What is trained averages its batch statistics anew, over the new reads: BatchNorm's count
        of steps is as in `fresh`. A frozen trunk keeps what it has."""
        taken = flatten_dict(dict(fresh))
        for path, value in flatten_dict(self.variables).items():
            if self.is_frozen or path[-1] != _STEPS:
                taken[path] = np.asarray(value, taken[path].dtype)
        return dict(unflatten_dict(taken))


def from_model(
    config: ConfigDict,
    source: TrainedModel,
    *,
    class_names: Sequence[str],
    class_map: Mapping[str, int],
) -> Start:
    """The start that train_params.init_from asks for.

    class_names, class_map: of `source`; its last layer is kept when files call its classes by the
    same numbers as those to train, in the same order.
    Raises: SettingsError when the model isn't of the architecture and the shapes to train."""
    path, shared = config.train_params.init_from, config.shared_params
    if source.model_type != shared.model_type:
        raise SettingsError(
            f"shared_params.model_type={shared.model_type}: {SETTING}={path} is of the "
            f"architecture {source.model_type}; set model_type to that"
        )
    given = config.model_params.to_dict()
    hyperparameters = models.parse_hyperparameters(
        source.model_type,
        dataclasses.asdict(source.hyperparameters) | given,
        target_length=shared.target_length,
    )
    known = capmap.class_numbers(class_map, source.num_classes)
    wanted = capmap.class_numbers(config.etl_params.class_map.to_dict(), shared.num_classes)
    has_new_head = known != wanted
    variables = {
        name: {layer: value for layer, value in source.variables.get(name, {}).items()}
        for name in ("params", "batch_stats")
    }
    if has_new_head:
        variables["params"].pop(HEAD)
    start = Start(
        path=path,
        variables=variables,
        hyperparameters=hyperparameters,
        class_names=list(class_names),
        weights_sha256=assembly.weights_sha256(source.variables),
        has_new_head=has_new_head,
        freeze=config.train_params.freeze,
    )
    _check_shapes(config, source, start, given)
    return start


def _check_shapes(
    config: ConfigDict, source: TrainedModel, start: Start, given: Mapping[str, Any]
) -> None:
    fresh = flatten_dict(assembly.initial_variables(config, start.hyperparameters, seed=0))
    expected = {
        path: np.shape(value)
        for path, value in fresh.items()
        if not (start.has_new_head and path[1] == HEAD)
    }
    own = {path: np.shape(value) for path, value in flatten_dict(start.variables).items()}
    if own == expected:
        return
    if source.target_length != config.shared_params.target_length:
        raise SettingsError(
            f"shared_params.target_length={config.shared_params.target_length}: the model of "
            f"{SETTING}={start.path} takes {source.target_length} samples and has weights for each "
            "position; set target_length to that"
        )
    raise SettingsError(
        f"model_params={shortened(str(dict(given)))}: would change the layers of "
        f"{SETTING}={start.path}, whose weights are to be kept; leave out all but the learning "
        "rate and the dropouts"
    )
