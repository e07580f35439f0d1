"""The settings table: one vocabulary for JSON, ConfigDict, command line, help and README."""

import importlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfinder import models, settings
from capfinder.errors import InputError, SettingsError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))

# The JSON file of the guide that the users already have, key for key.
GUIDE_TEMPLATE = {
    "etl_params": {
        "use_remote_dataset_version": "latest",
        "caps_data_dir": "/dir/",
        "examples_per_class": 100000,
        "comet_project_name": "dataset",
    },
    "tune_params": {
        "comet_project_name": "capfinder_tune",
        "patience": 0,
        "max_epochs_hpt": 3,
        "max_trials": 5,
        "factor": 2,
        "seed": 42,
        "tuning_strategy": "hyperband",
        "overwrite": False,
    },
    "train_params": {
        "comet_project_name": "capfinder_train",
        "patience": 120,
        "max_epochs_final_model": 300,
    },
    "shared_params": {
        "num_classes": 4,
        "model_type": "cnn_lstm",
        "batch_size": 32,
        "target_length": 500,
        "dtype": "float16",
        "train_test_fraction": 0.95,
        "train_val_fraction": 0.8,
        "use_augmentation": False,
        "output_dir": "/dir/",
    },
    "lr_scheduler_params": {
        "type": "reduce_lr_on_plateau",
        "reduce_lr_on_plateau": {"factor": 0.5, "patience": 5, "min_lr": 1e-06},
        "cyclic_lr": {
            "base_lr": 0.001,
            "max_lr": 0.05,
            "step_size_factor": 8,
            "mode": "triangular2",
        },
        "sgdr": {
            "min_lr": 0.001,
            "max_lr": 0.002,
            "lr_decay": 0.9,
            "cycle_length": 5,
            "mult_factor": 1.5,
        },
    },
    "debug_code": False,
}


def test_the_guides_json_runs_unchanged_and_states_the_defaults():
    assert settings.check(GUIDE_TEMPLATE) == settings.check({})


def test_the_template_holds_every_setting_at_its_default():
    values = json.loads(settings.template())
    assert settings.check(values) == settings.check({})
    for group, content in GUIDE_TEMPLATE.items():
        if isinstance(content, dict):
            assert content.keys() <= values[group].keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_that_ships_is_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    checked = settings.checked(config)
    assert checked.shared_params.model_type in models.ARCHITECTURES
    with pytest.raises(AttributeError):
        config.train_params.patienc = 3


def test_every_architecture_has_a_config_of_its_name():
    assert set(models.ARCHITECTURES) <= set(CONFIGS)


def test_json_and_config_dict_are_the_same_settings(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train_params": {"patience": 20}}))
    from_json = settings.read_json_config(path)
    from_flag = settings.checked(
        settings.default_config(), dict([settings.parse_override("train_params.patience", "20")])
    )
    assert settings.to_dict(from_json) == settings.to_dict(from_flag)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_params": {"patiense": 3}}, "did you mean train_params.patience"),
        ({"patience": 3}, "did you mean tune_params.patience"),
        ({"trane_params": {}}, "did you mean train_params"),
        ({"train_params": 3}, "must be a group"),
        ({"train_params": {"patience": "20"}}, "train_params.patience='20': must be a whole"),
        ({"train_params": {"patience": -1}}, "at least 0"),
        ({"train_params": {"patience": True}}, "whole number"),
        ({"train_params": {"patience": None}}, "whole number"),
        ({"shared_params": {"train_test_fraction": 1.0}}, "above 0 and below 1"),
        ({"shared_params": {"model_type": "cnn"}}, "cnn_lstm | attention_cnn_lstm"),
        ({"shared_params": {"dtype": "float8"}}, "float16 | float32 | float64"),
        ({"debug_code": 1}, "true | false"),
        ({"etl_params": {"class_map": {"0": 0, "3": 2}}}, "0, 1"),
        ({"etl_params": {"use_remote_dataset_version": "1.2"}}, "X.Y.Z"),
        ({"export_params": {"formats": ["keras", "pickle"]}}, "keras, h5, saved_model"),
        (
            {"lr_scheduler_params": {"cyclic_lr": {"base_lr": 0.1, "max_lr": 0.01}}},
            "base_lr=0.1: must be at most",
        ),
        ({"etl_params": {"class_map": {"0": 0, "3": 1}}}, "num_classes is 4"),
        ({"etl_params": {"class_map": {"1" * 5000: 0}}}, "a mapping onto classes"),
        ({"etl_params": {"use_remote_dataset_version": "1.2.\u0663"}}, "X.Y.Z"),
        ({"shared_params": {"batch_size": 1e300}}, f"at least 1 (reads); {2**31 - 1} is the most"),
        ({"shared_params": {"batch_size": 10**5000}}, "(int too long to be shown): must be"),
        ({"shared_params": {"batch_size": [[]] * 999}}, "[]]: must be a whole number"),
        ({"shared_params": {"output_dir": "a\x00"}}, "it isn't text that UTF-8 can write"),
        ({"shared_params": {"output_dir": "\ud800"}}, "it isn't text that UTF-8 can write"),
        ({"tune_params": {"comet_project_name": "é" * 101}}, "200 bytes are the most"),
        ({"tune_params": {"storage": "study.db"}}, "an Optuna storage URL"),
        ({"runtime_params": {"coordinator_address": "host"}}, "HOST:PORT"),
        ({"model_params": {"a.b": 1}}, "model_params={'a.b': 1}: must be a mapping"),
        ({"model_params": {"__class__": 1}}, "'__class__' is no name"),
        ({"model_params": {"a": [[[[1]]]]}}, "it is nested too deep"),
        ({"model_params": {"a": float("nan")}}, "nan is no number that JSON knows"),
        ({"search_params": {f"n{i}": {} for i in range(201)}}, "200 names are the most"),
        ({"train_params.patience": 1, "train_params": {"patience": 2}}, "patience: given twice"),
        (
            {
                "etl_params": {"examples_per_class": 9},
                "shared_params": {"train_val_fraction": 0.1},
            },
            "train_val_fraction=0.1: of etl_params.examples_per_class=9 reads",
        ),
        (
            {"runtime_params": {"distributed": True, "num_processes": 3}},
            "shared_params.batch_size=32: must be a multiple of runtime_params.num_processes=3",
        ),
        (
            {"runtime_params": {"distributed": True, "num_processes": 4, "mesh": 2}},
            "runtime_params.mesh=2: must be at least runtime_params.num_processes=4",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(values, message):
    with pytest.raises(SettingsError) as error:
        settings.check(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


def test_whole_numbers_are_taken_to_the_last_digit_and_minus_nothing_is_nothing():
    values = {"shared_params.batch_size": 2**31 - 1, "etl_params.max_reject_fraction": -0.0}
    checked = settings.flat(settings.check(values))
    assert checked["shared_params.batch_size"] == 2**31 - 1
    assert json.dumps(checked["etl_params.max_reject_fraction"]) == "0.0"


def test_null_is_taken_only_where_it_means_something():
    config = settings.checked(
        settings.default_config(),
        dict([settings.parse_override("etl_params.examples_per_class", "None")]),
    )
    assert config.etl_params.examples_per_class is None
    assert settings.checked(config).etl_params.examples_per_class is None
    with pytest.raises(SettingsError, match="whole number"):
        settings.parse_override("shared_params.num_classes", "None")


def test_open_groups_take_new_keys_from_config_file_and_command_line():
    config = settings.default_config()
    config.model_params.learning_rate = 0.01
    key, value = settings.parse_override("model_params.conv_filters", "(8, 16)")
    checked = settings.checked(config, {key: value})
    assert checked.model_params.to_dict() == {"learning_rate": 0.01, "conv_filters": (8, 16)}


@pytest.mark.parametrize(
    ("key", "literal", "message"),
    [
        ("shared_params.batch_size", "0x" + "f" * 5000, "too long to be shown"),
        ("shared_params.batch_size", "(" * 5000, "must be a whole number"),
        ("shared_params.batch_size", "'\\d'", "must be a whole number"),
        ("search_params", '{"a": {"low": 1, "low": 2}}', "low: given twice"),
        ("train_params", "3", "a group of settings; give one of them, such as train_params."),
        ("", "3", "no such setting"),
        ("n" * 100_000, "3", "no such setting"),
    ],
)
def test_a_wrong_option_is_a_settings_error(key, literal, message):
    with pytest.raises(SettingsError) as error:
        settings.parse_override(key, literal)
    assert message in str(error.value)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("literal", ["{1: 2}", "{'a': {3}}", "{'a': {'b.c': 1}}", "b'x'", "..."])
def test_what_json_cant_hold_is_no_hyperparameter(literal):
    override = dict([settings.parse_override("model_params.a", literal)])
    with pytest.raises(SettingsError, match=r"^model_params="):
        settings.checked(settings.default_config(), override)


def test_an_option_below_a_value_is_a_settings_error():
    with pytest.raises(SettingsError, match=r"^model_params\.a\.b: a=1 holds no settings"):
        settings.checked(settings.default_config(), {"model_params.a": 1, "model_params.a.b": 2})


def test_a_file_and_the_options_beside_it_are_judged_together(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"lr_scheduler_params": {"cyclic_lr": {"base_lr": 0.1}}, "debug_code": true}')
    key = "lr_scheduler_params.cyclic_lr.max_lr"
    config = settings.read_json_config(path, {key: 0.2, "debug_code": False})
    assert config.lr_scheduler_params.cyclic_lr.max_lr == 0.2 and not config.debug_code
    with pytest.raises(SettingsError, match=r"config\.json: .*base_lr=0\.1: must be at most"):
        settings.read_json_config(path)
    path.write_text(f'{{"{key}": 0.3}}')
    assert settings.read_json_config(path, {key: 0.2}).lr_scheduler_params.cyclic_lr.max_lr == 0.2


def test_of_ten_thousand_problems_the_first_few_are_told():
    with pytest.raises(SettingsError) as error:
        settings.check({f"patience{number}": number for number in range(10_000)})
    assert str(error.value).count("no such setting") == settings.MOST_PROBLEMS


@pytest.mark.parametrize("literal", ['{"low": 1, "log": true}', "{'low': 1, 'log': True}"])
def test_an_option_is_spelled_as_in_json_or_as_in_python(literal):
    key, value = settings.parse_override("search_params.dense_units", literal)
    assert (key, value) == ("search_params.dense_units", {"low": 1, "log": True})


def test_several_problems_are_told_at_once():
    with pytest.raises(SettingsError) as error:
        settings.check({"train_params": {"patience": -1}, "shared_params": {"batch_size": 0}})
    assert "train_params.patience" in str(error.value)
    assert "shared_params.batch_size" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1, column 1: not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "one JSON object"),
        (b"3", "one JSON object"),
        (b"\x00", "not valid JSON"),
        (b'{"a": NaN}', "a: no such setting"),
        (b'"text"', "one JSON object"),
        (b"[" * 100_000, "too deep"),
        (b'{"shared_params": {"batch_size": ' + b"1" * 5000 + b"}}", "not valid JSON"),
        (b'{"shared_params": {"batch_size": 3, "batch_size": 4}}', "batch_size: given twice"),
        ("{}".encode("utf-16"), "isn't text in UTF-8"),
        (b'{"\xe9": 1}', "isn't text in UTF-8"),
    ],
)
def test_a_file_that_is_no_settings_object_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises((SettingsError, InputError)) as error:
        settings.read_json_config(path)
    assert str(path) in str(error.value) and message in str(error.value)
    assert error.value.exit_code == 2


def test_a_file_from_an_editor_of_windows_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{\r\n"debug_code": true\r\n}\r\n')
    assert settings.read_json_config(path).debug_code


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@given(st.sampled_from(settings.SETTINGS), json_values)
def test_any_value_is_either_valid_or_a_settings_error_that_names_the_key(setting, value):
    *groups, name = setting.key.split(".")
    nested = {name: value}
    for group in reversed(groups):
        nested = {group: nested}
    try:
        checked = settings.check(nested)
    except SettingsError as error:
        assert setting.key.split(".")[-1] in str(error) or setting.key.split(".")[0] in str(error)
    else:
        assert settings.check(checked) == checked
        settings.to_config(checked)


@given(st.dictionaries(st.text(max_size=12), json_values, max_size=4))
def test_any_json_object_is_either_valid_or_a_settings_error(values):
    try:
        settings.check(values)
    except SettingsError:
        return


@given(st.sampled_from(settings.SETTINGS))
def test_a_default_survives_the_command_line(setting):
    if setting.is_open:
        return
    text = json.dumps(setting.default).strip('"')
    assert settings.parse_override(setting.key, text) == (
        setting.key,
        setting.convert(setting.default),
    )


def test_a_password_in_a_storage_url_is_never_shown():
    config = settings.checked(
        settings.default_config(), {"tune_params.storage": "postgresql://me:s3cret@host/db"}
    )
    shown = settings.to_shown(config)
    assert shown["tune_params"]["storage"] == "postgresql://me:***@host/db"
    assert config.tune_params.storage == "postgresql://me:s3cret@host/db"
    for url in ("mysql://me:s3/c:ret@host/db", "postgresql:///db?user=me&password=s3cret&x=1"):
        safe = settings.without_password(url)
        assert "***" in safe and "ret" not in safe
    wrong = "postgresql://me:s3cret@host/\x00" + "d" * 300
    with pytest.raises(SettingsError, match=r"storage='postgresql://me:\*\*\*@host") as error:
        settings.check({"tune_params": {"storage": wrong}})
    assert "s3cret" not in str(error.value)


def test_the_table_in_readme_is_the_settings_table():
    assert settings.markdown_table() in (ROOT / "README.md").read_text(encoding="utf-8")
