"""Capfinder 0.4.3's training and inference, a round at a time; models.py starts this with the
Python of its environment and gives the commands:

    warm_up   two steps of fit, which go on counting, and two batches of predict: compiles
    train     one epoch of Keras's fit on arrays in memory, from its begin to its end
    predict   the training reads by Keras's predict
    facts     parameters, versions, peak memory"""

import json
import sys
from pathlib import Path
from typing import Any

import clock
import inputs
from worker import Commands

WARM_UP = 2  # batches, of training and of prediction


def main() -> None:
    commands = Commands()
    told = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    import original_setup

    from capfinder.ml_libs import keras

    keras.utils.set_random_seed(told["seed"])
    signal, cap_class = inputs.load_arrays(Path(told["arrays"]), "train")
    model = original_setup.build(
        told["model_type"],
        told["theirs"],
        target_length=signal.shape[1],
        num_classes=told["num_classes"],
    )
    batch_size = told["batch_size"]

    class Clock(keras.callbacks.Callback):
        """Leaves out what fit does before and after its epoch, which is in its favour."""

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.before = clock.usage()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.taken = clock.since(self.before) | {"loss": float(logs["loss"])}

    def warm_up() -> dict[str, Any]:
        some = slice(WARM_UP * batch_size)
        model.fit(signal[some], cap_class[some], batch_size=batch_size, verbose=0)
        model.predict(signal[some], batch_size=batch_size, verbose=0)
        return {}

    def train() -> dict[str, Any]:
        timed = Clock()
        model.fit(signal, cap_class, batch_size=batch_size, verbose=0, callbacks=[timed])
        return timed.taken | {"examples": len(signal)}

    def predict() -> dict[str, Any]:
        before = clock.usage()
        found = model.predict(signal, batch_size=batch_size, verbose=0)
        return clock.since(before) | {"examples": len(found)}

    def facts() -> dict[str, Any]:
        return {
            "parameters": original_setup.parameters(model),
            "versions": original_setup.versions(),
            "peak_memory": clock.peak_memory(),
        }

    commands.serve({"warm_up": warm_up, "train": train, "predict": predict, "facts": facts})


if __name__ == "__main__":
    main()
