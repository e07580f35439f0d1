"""Run by a Python that has Capfinder 0.4.3: its own functions load each model and name the caps of
a CSV file, as its predict-cap-types does with --custom_model_path.

python -P original_cell.py --caps F.csv --models NAME=M.keras ... --dtypes D ... --output_dir O
Writes O/<name>-<dtype>/predictions.csv."""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

SAMPLES, BATCH = 500, 128  # what its command line gives these functions


def main() -> int:
    given = _parsed()
    from capfinder.inference import batched_inference, create_dataset, get_model

    for named in given.models:
        name, _, path = named.partition("=")
        try:
            model = get_model(path)
            for dtype in given.dtypes:
                # Its dataset, loop and writing of names, without the task runner round them.
                batched_inference.fn(
                    create_dataset(str(given.caps), SAMPLES, BATCH, dtype),
                    model,
                    output_dir=str(given.output_dir / f"{name}-{dtype}"),
                    csv_file_path=str(given.caps),
                )
        except Exception as error:  # whatever it raises, it can't use the model
            text = " ".join(str(error).split())[:300]
            print(f"error: {name}: {type(error).__name__}: {text}", file=sys.stderr)
            return 1
    versions = {name: importlib.metadata.version(name) for name in ("capfinder", "jax", "numpy")}
    import keras

    (given.output_dir / "versions.json").write_text(
        json.dumps({**versions, "keras": keras.__version__})
    )
    return 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Names caps with Capfinder 0.4.3")
    parser.add_argument("--caps", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH")
    parser.add_argument("--dtypes", nargs="+", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
