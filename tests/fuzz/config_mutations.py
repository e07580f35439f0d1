"""What goes wrong in settings: one value, a name, the groups, the text of the file, an option."""

import copy
import json
import math
import random
from typing import Any

from config_values import HERE, Flat, bounds_of, options_of, whole_bounds

from capfinder.settings import BY_KEY, GROUPS, SETTINGS, Setting

Rng = random.Random
DEEP = 100_000  # brackets
ODD_TEXTS = (
    "", " ", "\n", "a\nb", "\x00", "\x1b[31mred", "\ud800", "\udcff", "\u2028", "\u202e", "é",
    "🧬", "None", "null", "true", "nan", "1", "0x10", "~", "~nobody-of-this-name/x", "/", "..",
    "a" * 5000, "%s%n", "{}", "[red]", "$HOME", "'; --", "\\", '"',
)  # fmt: skip
ODD_NUMBERS: tuple[Any, ...] = (
    0, -0.0, 1, -1, 0.5, 1.5, 1e-300, 5e-324, 1e300, -1e300, 2**31 - 1, 2**31, 2**53, 2**64,
    -(2**70), 10**400, math.nan, math.inf, -math.inf, 1e15, 0.1 + 0.2,
)  # fmt: skip
ODD_NAMES = (
    "", ".", "..", "a.b", "__class__", "_fields", "_locked", "get", "items", "lock", "0", "é",
    "a b", "a\nb", "\x00", "\ud800", "*", "[", "[z-a]", "*" * 50, "n" * 101, "n" * 100_000,
    "learning_rate",
)  # fmt: skip
# Of the program whose settings these were, and of others like it.
FOREIGN_KEYS = (
    "etl_params.dataset_version", "etl_params.n_workers", "tune_params.objective",
    "train_params.epochs", "shared_params.classes", "shared_params.num_layers", "classifier",
    "lr_scheduler_params.one_cycle.max_lr", "comet_api_key", "wandb.project", "_comment", "//",
)  # fmt: skip


def odd_value(rng: Rng, depth: int = 0) -> Any:
    """Any JSON value, mostly an odd one."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(ODD_NUMBERS)
    if kind < 0.6:
        return rng.choice(ODD_TEXTS)
    if kind < 0.75 or depth > 3:
        return rng.choice([None, True, False])
    many = rng.choice([0, 1, 2, 3, 300]) if depth == 0 else rng.randint(0, 3)
    if kind < 0.9:
        return [odd_value(rng, depth + 1) for _ in range(many)]
    return {rng.choice(ODD_NAMES): odd_value(rng, depth + 1) for _ in range(min(many, 5))}


def wrong_value(rng: Rng, setting: Setting) -> Any:
    """A value that the words of a setting don't allow."""
    words = setting.allowed.text
    of_no_use: list[Any] = [{"a": 1}, [[1]], [None], -1.5]
    if not setting.nullable:
        of_no_use.append(None)
    if words == "true | false":
        return rng.choice([*of_no_use, 0, 1, "true", "false", "", "yes"])
    if words.startswith("a whole number"):
        low, high = whole_bounds(words)
        outside = [low - 1, -(10**400), 10**400, high + 2, low + 0.5, 1e300, math.nan, math.inf]
        return rng.choice([*of_no_use, *outside, True, str(low), "many", ""])
    if words.startswith("a number"):
        bounds = bounds_of(words)
        outside = [bounds[word] for word in ("above", "below") if word in bounds]
        outside += [bounds[word] - 1e-9 for word in ("at least",) if word in bounds]
        outside += [bounds[word] + 1e-9 for word in ("at most",) if word in bounds]
        return rng.choice([*of_no_use, *outside, math.nan, -math.inf, True, "0.5", "", -7])
    if words == '"" | latest | X.Y.Z':
        versions = ["1.2", "v1.2.3", "1.2.3.4", "LATEST", "1.2.\u0663", " ", "9" * 200 + ".0.0"]
        return rng.choice([*of_no_use, *versions, 1.2, True])
    if words.startswith("a list of some of"):
        name = options_of(words)[0]
        return rng.choice([*of_no_use, name, [name, name], ["pickle"], [3], "", {}, 3, True])
    if words.startswith("a list of options"):
        return rng.choice([*of_no_use, "--runner=x", ["runner"], [3], ["--\x00"], 3, True])
    if words.startswith("a mapping onto classes"):
        maps: list[Any] = [{"0": 1}, {"a": 0}, {"-1": 0}, {"0": True}, {"0": 0, "00": 1}]
        maps += [{"0": 0.5}, {"1" * 5000: 0}, {"1.5": 0}, {"0": 0, "1": 0}]
        return rng.choice([None, [], 3, "0", *maps])
    if words.startswith("a mapping from hyperparameter"):
        deep = {"a": [[[[[[1]]]]]]}
        named = [{name: 1} for name in ("a.b", "__class__", "_fields", "", "n" * 101)]
        many = {f"n{i}": 1 for i in range(300)}
        return rng.choice([None, [], 3, "x", deep, many, {"a": math.nan}, {"a": 10**400}, *named])
    if " | " in words:
        name = options_of(words)[0]
        return rng.choice([*of_no_use, name.upper(), f" {name}", "", "\ud800", 3, True, [name]])
    if words in ("a directory", "text") or words.startswith("a run's directory"):
        return rng.choice([*of_no_use, 3, True, "\x00", "\ud800", "a" * 5000])
    assert words in ("HOST:PORT", "an Optuna storage URL"), f"{setting.key}: {words!r}"
    return rng.choice([*of_no_use, 3, True, "", "host", ":", "host:", ":1", "host:99999", "a b:1"])


def misspelled(rng: Rng, key: str) -> str:
    """One slip in the name of a setting, its group left as it is."""
    group, dot, name = key.rpartition(".")
    at = rng.randrange(len(name))
    slip = rng.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + name[at] + name[at:],
            name[:at] + rng.choice("abcxyz_ ") + name[at:],
            name.upper(),
            name.replace("_", "-"),
            f"{name}s",
        ]
    )
    wrong = f"{group}{dot}{slip}"
    return f"{wrong}x" if wrong in BY_KEY or wrong in GROUPS or not slip else wrong


def odd_settings(rng: Rng, values: Flat) -> Any:
    """A few changes of any kind, to the groups as well as within them."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        change = rng.random()
        key = rng.choice([setting.key for setting in SETTINGS])
        *groups, name = key.split(".")
        place: Flat = values
        for group in groups:
            inner: Any = place.setdefault(group, {})
            if not isinstance(inner, dict):
                inner = place[group] = {}
            place = inner
        if change < 0.55:
            place[name] = odd_value(rng)
        elif change < 0.65:
            place[rng.choice(ODD_NAMES)] = odd_value(rng)
        elif change < 0.75:
            values[rng.choice([*GROUPS, *BY_KEY, *FOREIGN_KEYS])] = odd_value(rng)
        elif change < 0.85:
            values.pop(rng.choice(list(values)), None)
        elif change < 0.9:
            values[rng.choice(sorted(GROUPS))] = odd_value(rng)
        elif change < 0.95:
            values = {f"junk{number}": number for number in range(20_000)} | values
        else:
            return rng.choice([None, [], [values], 3, "text", True, {}, {"settings": values}])
        if not values:
            break
    return values


def as_json(rng: Rng, value: Any) -> bytes:
    """In one of the ways that programs and people write JSON."""
    indent, separators = rng.choice([(None, None), (4, None), (None, (",", ":")), ("\t", None)])
    is_ascii = rng.random() < 0.5
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=is_ascii)
    if rng.random() < 0.1:
        text = text.replace("Infinity", "1e400")
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair is written as \ud800 or not at all
        return json.dumps(value).encode()


def _repeated(text: bytes) -> bytes:
    """With its first key a second time."""
    start = text.index(b'"')
    end = text.index(b'"', start + 1) + 1
    return text[:start] + text[start:end] + b":1," + text[start:]


def _spoiled(rng: Rng, text: bytes) -> bytes:
    at = rng.randrange(len(text))
    parts = (b"\x00", b",", b":", b"{", b"}", b"[", b'"', b"\\", b"-", b"\xff", b"1e400", b"NaN")
    return rng.choice(
        [
            text[:at] + rng.choice(parts) + text[at:],
            text[:at] + text[at + 1 :],
            text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :],
            text[:at] + text[at:].swapcase(),
            text[:at] + text[min(len(text), at + 40) :],
        ]
    )


def file_text(rng: Rng, text: bytes) -> tuple[bytes, str, str]:
    """Another text of the file, whether it is still "valid", and what an error must say."""
    cut = text[: rng.randrange(1, len(text) - 1)].decode(errors="ignore").encode()
    deep = rng.choice([b"[", b'{"a":', b'{"model_params":']) * rng.choice([400, DEEP])
    digits = b'{"shared_params": {"batch_size": ' + b"1" * rng.choice([400, 5000]) + b"}}"
    return rng.choice(
        [
            (b"\xef\xbb\xbf" + text, "valid", ""),
            (b" \n" + text.replace(b"\n", b"\r\n") + b"\n\n", "valid", ""),
            (b" " * 10**6 + text, "valid", ""),
            (b"", "refused", "line 1"),
            (b" \n", "refused", "not valid JSON"),
            (cut, "refused", "not valid JSON"),
            (cut, "refused", "not valid JSON"),
            (text + text, "refused", "not valid JSON"),
            (text.replace(b'"', b"'"), "refused", "not valid JSON"),
            (b"// settings\n" + text, "refused", "not valid JSON"),
            (text[:-1] + b",}", "refused", "not valid JSON"),
            (text.decode().encode("utf-16"), "refused", "UTF-8"),
            (text[:-1] + b'}"\xe9"', "refused", "UTF-8"),
            (rng.randbytes(rng.randint(1, 3000)), "refused", ""),
            (deep, "refused", ""),
            (deep + b"1" + b"]" * deep.count(b"[") + b"}" * deep.count(b"{"), "refused", ""),
            (digits, "refused", ""),
            (_repeated(text), "refused", "given twice"),
            *[(_spoiled(rng, text), "either", "")] * 5,
        ]
    )


def odd_arguments(rng: Rng) -> list[str]:
    """Options of the command line that are wrong in form or, some of them, odd but right."""
    key = rng.choice([setting.key for setting in SETTINGS])
    digits = rng.choice(["9" * 5000, "0x" + "f" * 5000, "1" + "_0" * 50, "-" * 3000 + "1"])
    brackets = rng.choice(["(" * 3000, "[" * 100 + "]" * 100, "{" * 500, "[1,"])
    odd = rng.choice([text for text in ODD_TEXTS if "\x00" not in text and "\ud800" not in text])
    name = rng.choice([text for text in ODD_NAMES if "\x00" not in text and "\ud800" not in text])
    open_group = rng.choice(["model_params", "search_params"])
    return rng.choice(
        [
            [f"--config.{key}={odd}"],
            [f"--config.{key}", odd],
            [f"--config.{key}"],
            [f"--config.{key}={digits}"],
            [f"--config.{key}={brackets}"],
            [f"--config.{key}.{name}=1"],
            [f"--config.{name}={odd}"],
            [f"--config.{misspelled(rng, key)}=1"],
            [f"--config.{key.rpartition('.')[0]}=3"],
            [f"--config.{open_group}.{name}={odd}"],
            [f"--config.{open_group}.a=1", f"--config.{open_group}.a.b=2"],
            [f"--config.{open_group}={{1: 2}}"],
            [f"--config.{open_group}.x={{1: 2, 'a': {{3}}}}"],
            [f"--config.{open_group}.learning_rate={rng.choice(['nan', '1e999', '0.01', digits])}"],
            ["--config."],
            ["--config.=1"],
            [f"--konfig.{key}=1"],
            [f"--stage={rng.choice(['', ',', 'elt', 'etl,,train', 'ETL', 'etl etl', odd])}"],
            ["--output_dir="],
            ["--output_dir", odd],
            [rng.choice(["-x", "x", "--", "--dry_run=3", "--config", "--stage", odd, f"--{odd}"])],
        ]
    )


def odd_command(rng: Rng) -> list[str]:
    """What else may stand behind the options of either command."""
    odd = rng.choice([text for text in ODD_TEXTS if "\x00" not in text and "\ud800" not in text])
    return rng.choice(
        [
            [odd],
            [f"--{odd}"],
            [f"--stage={odd}"],
            ["--stage", "etl", "--stage", "train"],
            ["--dry_run=3"],
            ["--config_file"],
            ["--config_file", odd],
            [f"--config_file={HERE}/nowhere/config.json"],
            ["--config", odd],
            [f"--config={HERE}/good2"],
            [f"--config={HERE}/file"],
            [f"--config={HERE}/nowhere/config.json"],
            ["--output_dir", "--dry_run"],
        ]
    )


def odd_model(rng: Rng) -> Flat:
    """model_params and search_params as somebody may write them who knows their names a little."""
    names = (
        "conv_filters", "conv_kernels", "conv_dropouts", "lstm_units", "lstm_dropouts",
        "dense_units", "dense_dropout", "learning_rate", "stage_filters", "stage_kernels",
        "stage_blocks", "dropout", "num_heads", "head_size", "num_blocks", "d_model", "mlp_units",
        "conv_layers", "lstm_layers", "stages", "mlp_layers", "conv_filters_1",
        "conv_filters_99", "*_filters", "*", "*_dropout*", "learning_rte", "units",
    )  # fmt: skip
    limits = (0, 1, 2, 3, 8, 64, 65, 500, 4096, 4097, 10**9, 2**53, 10**400, -1, 0.0, 0.1, 0.5, 1.5)
    odd: tuple[Any, ...] = (1e-320, 1e300, math.nan, math.inf, "8", None, True, [], [1], {})

    def number() -> Any:
        return rng.choice(limits if rng.random() < 0.8 else odd)

    def override() -> Any:
        low, high = number(), number()
        if rng.random() < 0.6 and isinstance(low, int | float) and isinstance(high, int | float):
            low, high = (high, low) if low > high else (low, high)
        parts = {"low": low, "high": high, "step": number(), "log": rng.choice([True, False, 1])}
        parts |= {"choices": [number() for _ in range(rng.randint(0, 3))]}
        wanted = rng.choice(
            [("low", "high"), ("low", "high"), ("low", "high", "step"), ("low", "high", "log"),
             ("high",), ("low",), ("choices",), ("choices",), ("choices", "low"), ("step",), ()]
        )  # fmt: skip
        shape = {name: parts[name] for name in wanted}
        return rng.choice([shape] * 9 + [number()])

    many = rng.choice([1, 2, 3, 64, 65, 30_000])
    lists = [[number() for _ in range(rng.randint(0, 5))], [rng.choice(limits)] * many]
    flat: Flat = {
        "shared_params.model_type": rng.choice(
            ["cnn_lstm", "attention_cnn_lstm", "encoder", "resnet"]
        ),
        "shared_params.target_length": rng.choice([16, 17, 64, 500, 500, 32_768]),
    }
    if rng.random() < 0.6:
        flat["model_params"] = {
            rng.choice(names): rng.choice([number(), number(), *lists])
            for _ in range(rng.randint(1, 3))
        }
    if rng.random() < 0.8:
        flat["search_params"] = {rng.choice(names): override() for _ in range(rng.randint(1, 3))}
    return flat


def odd_path(rng: Rng) -> Flat:
    """A directory that is none, or an odd one."""
    key = rng.choice(
        [
            "etl_params.caps_data_dir",
            "shared_params.output_dir",
            "shared_params.output_dir",
            "split_params.test_caps_data_dir",
            "runtime_params.compilation_cache_dir",
            "tune_params.storage",
        ]
    )
    if key == "tune_params.storage":
        return {key: rng.choice(ODD_STORAGES)}
    return {key: rng.choice(ODD_PATHS)}


ODD_PATHS = (
    *ODD_TEXTS, "/dir/", f"{HERE}/nowhere", f"{HERE}/file", f"{HERE}/file/below", f"{HERE}/loop",
    f"{HERE}/loop/below", f"{HERE}/dangling", f"{HERE}/good2/../good3", f"{HERE}//good4/", "new",
    "./new", f"{HERE}/" + "a" * 300, f"{HERE}/" + "a/" * 2040, "/dev/null", "/dev/null/x",
    "/proc/self/x", "/proc/self/mem", f"{HERE}/pipe", f"{HERE}/ümlaut", f"{HERE}/good4", HERE,
    "/root/x/y",
)  # fmt: skip
ODD_STORAGES = (
    "sqlite://", f"sqlite:///{HERE}/study.db", f"sqlite:///{HERE}/nowhere/study.db", "sqlite:///",
    "postgresql://me:s3cret@host/db", "mysql://me:s3cret@host:99999/db", "mysql+nodriver://h/db",
    "redis://localhost", "oracle://h", "http://x", "://", "sqlite:", "x", "sqlite:///a\nb",
    "sqlite+://x", "postgresql://me:s3cret@[::1/db", "sqlite:////proc/self/x/y.db", "mssql://?odbc",
)  # fmt: skip
SECRET = "s3cret"
