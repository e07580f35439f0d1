import shutil

import pytest

from capfinder import files
from capfinder.data import versions
from capfinder.errors import InputError


def make(root, version, fingerprint="f", sizes=(1, 2)):
    """A version directory with all that `open_dataset` asks for."""
    shard = "cap_data-test.tfrecord-00000-of-00001"
    manifest = {
        "version": version,
        "fingerprint": fingerprint,
        "counts": {"train": {}, "validation": {}, "test": {}},
        "num_classes": 2,
        "target_length": 16,
        "dtype": "float16",
        "warnings": [],
        "sources": [{"size": size} for size in sizes],
        "shards": [{"name": shard, "sha256": "", "num_examples": 1}],
    }
    files.write_json(root / version / versions.MANIFEST, manifest)
    for name in (shard, "features.json", "dataset_info.json"):
        (root / version / name).touch()
    return root / version


def test_versions_sort_as_numbers_and_other_names_are_ignored(tmp_path):
    for version in ("1.2.0", "1.10.0", "1.9.0"):
        make(tmp_path, version)
    for other in (".partial-1.11.0-7", "latest", "1.2", "1.x.0", "notes.txt"):
        (tmp_path / other).mkdir()
    assert versions.list_versions(tmp_path) == ["1.2.0", "1.9.0", "1.10.0"]
    assert versions.latest(tmp_path).version == "1.10.0"
    assert versions.list_versions(tmp_path / "absent") == []
    assert versions.latest(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([], "1.0.0"),
        (["1.0.0"], "1.1.0"),
        (["1.9.0", "1.10.3"], "1.11.0"),
        (["1.5.0", "2.0.1"], "2.1.0"),
    ],
)
def test_the_next_version_raises_the_highest_minor(known, expected):
    assert versions.next_version(known) == expected


def test_the_newest_version_with_the_fingerprint_is_found(tmp_path):
    for version, fingerprint in (("1.0.0", "a"), ("1.1.0", "b"), ("1.2.0", "a"), ("1.3.0", "c")):
        make(tmp_path, version, fingerprint)
    assert versions.find(tmp_path, "a").version == "1.2.0"
    assert versions.find(tmp_path, "b").directory == tmp_path / "1.1.0"
    assert versions.find(tmp_path, "d") is None


def test_a_named_version_is_that_one_or_none(tmp_path):
    make(tmp_path, "1.0.0")
    assert versions.named(tmp_path, "1.0.0").version == "1.0.0"
    assert versions.named(tmp_path, "1.1.0") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: (directory / versions.MANIFEST).unlink(),
        lambda directory: (directory / versions.MANIFEST).write_text("{"),
        lambda directory: (directory / versions.MANIFEST).write_text("[]"),
        lambda directory: (directory / versions.MANIFEST).write_text('{"version": "1.1.0"}'),
        lambda directory: (directory / "features.json").unlink(),
        lambda directory: (directory / "cap_data-test.tfrecord-00000-of-00001").unlink(),
    ],
)
def test_a_damaged_version_is_an_error_when_named_and_else_passed_over(tmp_path, damage):
    make(tmp_path, "1.0.0", "a")
    damage(make(tmp_path, "1.1.0", "a"))
    with pytest.raises(InputError, match=r"1\.1\.0"):
        versions.named(tmp_path, "1.1.0")
    assert versions.latest(tmp_path).version == "1.0.0"
    assert versions.find(tmp_path, "a").version == "1.0.0"
    assert versions.next_version(versions.list_versions(tmp_path)) == "1.2.0"


def test_files_of_the_same_sizes_may_be_the_same_input(tmp_path):
    make(tmp_path, "1.0.0", sizes=(30, 20, 20))
    assert versions.has_sources_of_sizes(tmp_path, [20, 30, 20])
    assert not versions.has_sources_of_sizes(tmp_path, [20, 30])
    shutil.rmtree(tmp_path / "1.0.0")
    assert not versions.has_sources_of_sizes(tmp_path, [20, 30, 20])


def test_the_fingerprint_hangs_on_content_and_settings_and_not_on_order():
    base = versions.make_fingerprint(["a", "b"], ["c"], [], {"x": 1, "y": 2})
    assert versions.make_fingerprint(["b", "a"], ["c"], [], {"y": 2, "x": 1}) == base
    others = [
        versions.make_fingerprint(["a", "b", "b"], ["c"], [], {"x": 1, "y": 2}),
        versions.make_fingerprint(["a", "c"], ["b"], [], {"x": 1, "y": 2}),
        versions.make_fingerprint(["a", "b"], ["c"], ["d"], {"x": 1, "y": 2}),
        versions.make_fingerprint(["a", "b"], ["c"], [], {"x": 1, "y": 3}),
    ]
    assert len({base, *others}) == 5
