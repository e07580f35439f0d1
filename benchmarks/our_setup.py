"""Our side of a comparison: the pieces that the stages put together, put together alike."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from capfinder import models, settings
from capfinder.data.versions import open_dataset
from capfinder.stages import assembly
from capfinder.training import loop, schedules


class Setup:
    """A model, and the dataset that it is trained on, in float32; all other settings at their
    defaults: a constant learning rate, data on the device if they fit, no checkpoints. Dropout's
    bits come from a 32-bit hash of counters, so its rate is exact to 2^-33."""

    def __init__(
        self,
        version: Path,
        model_type: str,
        ours: dict[str, Any],
        *,
        batch_size: int,
        seed: int,
        data_residency: str = "auto",
    ) -> None:
        config = settings.default_config()
        config.shared_params.model_type = model_type
        config.shared_params.batch_size = batch_size
        config.shared_params.dtype = "float32"
        config.shared_params.output_dir = str(version)  # nothing is written there
        config.tune_params.seed = seed
        config.runtime_params.data_residency = data_residency
        assembly.configure_jax(config)
        self.config, self.dataset = config, open_dataset(version)
        self.hyperparameters = models.parse_hyperparameters(
            model_type, ours, target_length=config.shared_params.target_length
        )
        self.train_batches = assembly.train_batches(config, self.dataset)
        self._schedule = schedules.make_schedule(
            "constant",
            {},
            learning_rate=self.hyperparameters.learning_rate,
            steps_per_epoch=self.train_batches.steps_per_epoch,
        )
        optimizer = schedules.optimizer(self._schedule.learning_rate)
        state = assembly.initial_state(config, self.hyperparameters, optimizer, seed=seed)
        self.state = self.train_batches.placement.replicate(state)

    def evaluation_batches(self, split: str) -> Iterable[Any]:
        return assembly.evaluation_batches(
            self.config, self.dataset, split, placement=self.train_batches.placement
        )

    def split(self, name: str) -> assembly.Split:
        return assembly.open_split(self.config, self.dataset, name)

    def model(self) -> assembly.TrainedModel:
        """With its first weights: what it predicts doesn't matter here."""
        return assembly.trained_model(
            self.config, self.hyperparameters, self.state.variables, best_epoch=1
        )

    def fit(
        self,
        *,
        max_epochs: int,
        validation_batches: Iterable[Any],
        interrupted: Callable[[], bool] = lambda: False,
        on_epoch: Callable[[loop.Row], None] = lambda row: None,
    ) -> loop.FitResult:
        """The training of the product; val_loss never ends it."""
        return loop.fit(
            self.state,
            train_batches=self.train_batches,
            validation_batches=validation_batches,
            schedule=self._schedule,
            max_epochs=max_epochs,
            patience=max_epochs,
            checkpoints=None,
            interrupted=interrupted,
            on_step=lambda step: None,
            on_epoch=on_epoch,
            steps_per_call=self.config.runtime_params.steps_per_call,
            microbatch=self.config.runtime_params.microbatch,
            max_rollbacks=self.config.train_params.max_rollbacks,
        )
