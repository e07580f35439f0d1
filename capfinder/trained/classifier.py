"""What `trained.load` gives."""

from dataclasses import dataclass

from capfinder.evaluation.facts import Facts
from capfinder.stages.assembly import TrainedModel


@dataclass(frozen=True)
class Classifier:
    """A model, the storage dtype that its signals go through, its classes' names by number, and
    what else is known of it.

    class_map: class number in files -> the model's, as etl_params.class_map; {}: they are the same.
    batch_size, mesh: what its own evaluation was told to take; None: the machine's."""

    model: TrainedModel
    dtype: str
    class_names: list[str]
    class_map: dict[str, int]
    facts: Facts
    batch_size: int | None = None
    mesh: int | None = None
