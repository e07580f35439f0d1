"""Packed datasets: they come back byte for byte, and nothing that was tampered with comes in.

An attacker here writes both the tar and its index, so every checksum in the index may be right."""

import hashlib
import io
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from capfinder import files
from capfinder.data import artifact_check, artifact_index, artifacts, versions
from capfinder.data.artifact_index import INDEX
from capfinder.data.versions import Dataset
from capfinder.errors import InputError

WHERE = "Comet artifact lab/cap_data:1.2.0"
FINGERPRINT = "ab" * 32
SHARDS = {"train": (3, 2), "validation": (1,), "test": (2,)}  # records per shard


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def records(payloads: list[bytes]) -> bytes:
    """A TFRecord file; its CRCs aren't looked at."""
    return b"".join(struct.pack("<Q4x", len(p)) + p + bytes(4) for p in payloads)


def dataset_files(*, fingerprint: str = FINGERPRINT, version: str = "1.2.0") -> dict[str, bytes]:
    rng = random.Random(fingerprint)
    shards = {
        f"cap_data-{split}.tfrecord-{i:05d}-of-{len(counts):05d}": records(
            [rng.randbytes(rng.randrange(900)) for _ in range(count)]
        )
        for split, counts in SHARDS.items()
        for i, count in enumerate(counts)
    }
    manifest = {
        "version": version,
        "fingerprint": fingerprint,
        "counts": {"train": {"0": 3, "1": 2}, "validation": {"0": 1}, "test": {"1": 2}},
        "num_classes": 2,
        "target_length": 500,
        "dtype": "float16",
        "code_version": "1.0",
        "warnings": [],
        "sources": [],
        "shards": [
            {"name": name, "sha256": sha256(data), "num_examples": count}
            for (name, data), count in zip(
                shards.items(), [n for counts in SHARDS.values() for n in counts], strict=True
            )
        ],
    }
    return shards | {
        "features.json": b"{}",
        "dataset_info.json": b'{"name": "cap_data"}',
        "rejects.csv": b"file,line,read_id,reason\n",
        "plots/quality.html": b"<p>",
        "empty.txt": b"",
        "manifest.json": json.dumps(manifest).encode(),
    }


def write_dataset(root: Path, **what: str) -> Dataset:
    contents = dataset_files(**what)
    directory = root / json.loads(contents["manifest.json"])["version"]
    for name, data in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return versions.open_dataset(directory)


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an artifact, parts of 1,000 bytes."""
    directory = tmp_path_factory.mktemp("packed")
    dataset = write_dataset(tmp_path_factory.mktemp("source"))
    artifacts.pack(dataset, directory, chunk_bytes=1000)
    return tree(directory)


def unpack(artifact: dict[str, bytes], root: Path) -> Dataset:
    """As a caller does it who has the files by their names."""
    scratch = root.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, data in artifact.items():
        (scratch / name).write_bytes(data)
    artifact_index.check_format(artifact, WHERE)
    index = artifact_index.parse_index(artifact[INDEX], WHERE)
    index.check_names(artifact, WHERE)
    return artifacts.unpack(index, lambda chunk: scratch / chunk.name, root, WHERE)


def refused(artifact: dict[str, bytes], directory: Path) -> str:
    """The one-line message; nothing may be left behind, inside the root or beside it."""
    root = directory / "deep" / "root"
    with pytest.raises(InputError) as caught:
        unpack(artifact, root)
    shutil.rmtree(root.parent / "scratch")
    left = [path for path in directory.rglob("*") if path not in (root, root.parent)]
    assert left == []
    message = str(caught.value)
    assert "\n" not in message
    assert WHERE in message
    return message


def artifact_of(
    tar: bytes, members: dict[str, bytes], *, cut: int | None = None
) -> dict[str, bytes]:
    """An artifact of any tar, whose index says `members`, with checksums that are right."""
    cut = cut or len(tar)
    chunks = {
        artifact_index.chunk_name(i): tar[at : at + cut]
        for i, at in enumerate(range(0, len(tar), cut))
    }

    def entries(named: dict[str, bytes]) -> list[dict]:
        return [
            {"name": name, "size": len(data), "sha256": sha256(data)}
            for name, data in named.items()
        ]

    index = {
        "format": artifact_index.FORMAT,
        "format_version": artifact_index.FORMAT_VERSION,
        "version": "1.2.0",
        "fingerprint": FINGERPRINT,
        "chunks": entries(chunks),
        "members": entries(members),
    }
    return chunks | {INDEX: json.dumps(index).encode()}


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    size = sum(512 + -(-len(data) // 512) * 512 for _, data in members) + 1024
    return out.getvalue()[:size]  # without tarfile's padding to 10,240 bytes


def plain(contents: dict[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(tarfile.TarInfo(name), data) for name, data in contents.items()]


def with_changes(artifact: dict[str, bytes], change: Callable[[dict], None]) -> dict[str, bytes]:
    index = json.loads(artifact[INDEX])
    change(index)
    return artifact | {INDEX: json.dumps(index).encode()}


@pytest.mark.parametrize("chunk_bytes", [512, 1000, 4096, 10**9])
def test_what_was_packed_comes_back_byte_for_byte(tmp_path: Path, chunk_bytes: int):
    dataset = write_dataset(tmp_path / "source")
    (tmp_path / "packed").mkdir()
    paths = artifacts.pack(dataset, tmp_path / "packed", chunk_bytes=chunk_bytes)
    assert paths[-1].name == INDEX
    assert all(path.stat().st_size <= chunk_bytes for path in paths[:-1])
    back = unpack(tree(tmp_path / "packed"), tmp_path / "there" / "root")
    assert tree(back.directory) == tree(dataset.directory) == dataset_files()
    assert (back.version, back.fingerprint) == ("1.2.0", FINGERPRINT)
    assert [p.name for p in (tmp_path / "there" / "root").iterdir()] == ["1.2.0"]


def test_packing_twice_gives_the_same_bytes_and_plain_tar_opens_them(
    tmp_path: Path, packed: dict[str, bytes]
):
    dataset = write_dataset(tmp_path / "again")
    (dataset.directory / "rejects.csv").touch()
    (dataset.directory / ".hidden").write_text("left out")
    (tmp_path / "packed").mkdir()
    artifacts.pack(dataset, tmp_path / "packed", chunk_bytes=1000)
    assert tree(tmp_path / "packed") == packed
    joined = b"".join(packed[name] for name in sorted(packed) if name != INDEX)
    with tarfile.open(fileobj=io.BytesIO(joined)) as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    assert found == dataset_files()


def test_the_default_parts_stay_below_what_comet_takes():
    assert artifacts.CHUNK_BYTES < 200 * 1024 * 1024


def test_our_own_tar_writer_in_this_test_is_accepted(tmp_path: Path):
    contents = dataset_files()
    back = unpack(artifact_of(tar_of(plain(contents)), contents, cut=777), tmp_path / "d" / "root")
    assert tree(back.directory) == contents


def test_a_version_that_is_there_is_never_replaced(tmp_path: Path, packed: dict[str, bytes]):
    root = tmp_path / "d" / "root"
    unpack(packed, root)
    (root / "1.2.0" / "rejects.csv").write_text("mine")
    with pytest.raises(InputError, match="already there"):
        unpack(packed, root)
    assert (root / "1.2.0" / "rejects.csv").read_text() == "mine"


def test_a_damaged_shard_is_not_packed(tmp_path: Path):
    dataset = write_dataset(tmp_path / "source")
    shard = next(dataset.directory.glob("*test*"))
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    (tmp_path / "packed").mkdir()
    with pytest.raises(InputError, match="SHA-256 differs"):
        artifacts.pack(dataset, tmp_path / "packed", chunk_bytes=1000)


@pytest.mark.parametrize("name", ["link", "space in name"])
def test_what_could_not_be_unpacked_is_not_packed(tmp_path: Path, name: str):
    dataset = write_dataset(tmp_path / "source")
    if name == "link":
        (dataset.directory / name).symlink_to("rejects.csv")
    else:
        (dataset.directory / name).write_text("")
    (tmp_path / "packed").mkdir()
    with pytest.raises(InputError, match="plain files"):
        artifacts.pack(dataset, tmp_path / "packed", chunk_bytes=1000)


BAD_NAMES = (
    "../evil", "/etc/evil", "a/../../evil", "a//b", "./a", "a/.", "", ".hidden", "a/.b", "a\\b",
    "a\nb", "a\0b", "a b", "é", "x" * 101, "..", "/",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_leave_the_directory_is_refused(tmp_path: Path, name: str):
    contents = dataset_files() | {name: b"evil"}
    tar = tar_of(plain(dataset_files())) + bytes(1024)
    assert "index" in refused(artifact_of(tar, contents), tmp_path)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_such_a_name_in_the_tar_alone_is_refused(tmp_path: Path, name: str):
    contents = dataset_files()
    (info, data) = plain({name: contents["features.json"]})[0]
    hostile = [
        (info, data) if member.name == "features.json" else (member, content)
        for member, content in plain(contents)
    ]
    try:
        tar = tar_of(hostile)
    except ValueError:  # too long for a header
        tar = tar_of(plain(contents | {"features.json": b""}))
    refused(artifact_of(tar, contents), tmp_path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "device"),
        (tarfile.DIRTYPE, "device"),
        (tarfile.CONTTYPE, "device"),
        (tarfile.XHDTYPE, "device"),
        (tarfile.XGLTYPE, "device"),
        (tarfile.GNUTYPE_LONGNAME, "device"),
        (tarfile.GNUTYPE_SPARSE, "device"),
        (b"\0", "device"),
    ],
)
@pytest.mark.parametrize("name", ["features.json", "other"])
def test_only_plain_files_are_taken(tmp_path: Path, kind: bytes, said: str, name: str):
    contents = dataset_files()
    blocks = b""
    for member, data in contents.items():
        info = tarfile.TarInfo(member)
        info.size = len(data)
        if member == "features.json":
            info.name, info.type, info.linkname = name, kind, "/etc/passwd"
        blocks += info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
    assert said in refused(artifact_of(blocks + bytes(1024), contents), tmp_path)


def test_a_file_twice_in_the_tar_is_refused(tmp_path: Path):
    contents = dataset_files()
    twice = [
        plain({"features.json": b"[]"})[0] if member.name == "rejects.csv" else (member, data)
        for member, data in plain(contents | {"rejects.csv": b"12"})
    ]
    contents["rejects.csv"] = b"12"
    assert "twice" in refused(artifact_of(tar_of(twice), contents), tmp_path)


@pytest.mark.parametrize("double", ["features.json", "Features.JSON", "plots", "features.json/a"])
def test_a_name_twice_in_the_index_is_refused(tmp_path: Path, double: str):
    contents = plain(dataset_files()) + plain({double: b"x"})
    artifact = artifact_of(tar_of(contents), dataset_files())

    def add(index: dict) -> None:
        index["members"].append({"name": double, "size": 1, "sha256": sha256(b"x")})

    assert "twice" in refused(with_changes(artifact, add), tmp_path)


@pytest.mark.parametrize("size", [0, 1, 3, 2**40, 2**60, -1, 1.0, True, "2", None])
def test_a_size_other_than_the_files_own_is_refused(
    tmp_path: Path, packed: dict[str, bytes], size: object
):
    def lie(index: dict) -> None:
        (member,) = (m for m in index["members"] if m["name"] == "features.json")
        member["size"] = size

    refused(with_changes(packed, lie), tmp_path)


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path):
    contents = dataset_files()
    info = tarfile.TarInfo("features.json")
    info.size = 2**40
    tar = bytearray(tar_of(plain(contents)))
    at = tar.index(b"features.json\0")
    tar[at : at + 512] = info.tobuf(tarfile.GNU_FORMAT)
    assert "bytes, not 2" in refused(artifact_of(bytes(tar), contents), tmp_path)


def test_a_part_that_is_longer_than_it_says_is_refused(tmp_path: Path, packed: dict[str, bytes]):
    last = max(name for name in packed if name != INDEX)
    assert "damaged" in refused(packed | {last: packed[last] + b"\0"}, tmp_path)


def test_bytes_after_the_end_are_refused(tmp_path: Path):
    contents = dataset_files()
    tar = tar_of(plain(contents))
    for extra in (tar + bytes(512), tar[:-1] + b"x"):
        refused(artifact_of(extra, contents), tmp_path)


def test_missing_extra_swapped_and_truncated_parts_are_refused(
    tmp_path: Path, packed: dict[str, bytes]
):
    one, two = artifact_index.chunk_name(1), artifact_index.chunk_name(2)
    without = {name: data for name, data in packed.items() if name != one}
    assert f"lacks {one}" in refused(without, tmp_path)
    assert "more than its index says" in refused(packed | {"extra.tar": b""}, tmp_path)
    swapped = packed | {one: packed[two], two: packed[one]}
    assert f"{one} is damaged" in refused(swapped, tmp_path)
    assert f"{one} is damaged" in refused(packed | {one: packed[one][:-1]}, tmp_path)
    assert f"{one} is damaged" in refused(packed | {one: b""}, tmp_path)

    def reorder(index: dict) -> None:
        index["chunks"][1:3] = index["chunks"][2:0:-1]

    assert "numbered" in refused(with_changes(packed, reorder), tmp_path)


def test_a_part_that_vanishes_while_it_is_read_is_refused(tmp_path: Path, packed: dict[str, bytes]):
    index = artifact_index.parse_index(packed[INDEX], WHERE)
    with pytest.raises(InputError, match="can't be read"):
        artifacts.unpack(index, lambda chunk: tmp_path / "nowhere", tmp_path / "root", WHERE)
    assert list((tmp_path / "root").iterdir()) == []


def test_an_error_of_the_download_leaves_nothing(tmp_path: Path, packed: dict[str, bytes]):
    index = artifact_index.parse_index(packed[INDEX], WHERE)

    def download(chunk: artifact_index.Entry) -> Path:
        if chunk.name.endswith("3"):
            raise RuntimeError("network lost")
        (tmp_path / "part").write_bytes(packed[chunk.name])
        return tmp_path / "part"

    with pytest.raises(RuntimeError):
        artifacts.unpack(index, download, tmp_path / "root", WHERE)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_killed_unpacking_leaves_only_what_the_next_run_clears(
    tmp_path: Path, packed: dict[str, bytes]
):
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
    program = """
import os, signal, sys
from pathlib import Path
from capfinder.data import artifact_index, artifacts
here = Path(sys.argv[1])
def open_chunk(chunk):
    if chunk.name.endswith("3"):
        os.kill(os.getpid(), signal.SIGKILL)
    return here / chunk.name
index = artifact_index.parse_index((here / artifact_index.INDEX).read_bytes(), "it")
artifacts.unpack(index, open_chunk, here / "root", "it")
"""
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    root = tmp_path / "root"
    assert list(root.iterdir())  # it had begun
    assert versions.list_versions(root) == []
    files.remove_partial(root)
    assert list(root.iterdir()) == []


def test_no_room_is_said_before_anything_is_fetched(tmp_path: Path, packed: dict[str, bytes]):
    huge = 2**59
    tar_size = 512 * (2 + 1 + huge // 512)
    index = artifact_index.Index(
        "1.2.0",
        FINGERPRINT,
        (artifact_index.Entry("cap_data.tar.00000", tar_size, "0" * 64),),
        (artifact_index.Entry("a", huge, "0" * 64),),
    )
    with pytest.raises(InputError, match=r"MB free, but .* MB are needed"):
        artifacts.unpack(index, lambda chunk: tmp_path / "never asked for", tmp_path, WHERE)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_flipped_bit_anywhere_in_the_parts_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, packed: dict[str, bytes], data: st.DataObject
):
    name = data.draw(st.sampled_from(sorted(set(packed) - {INDEX})))
    bit = data.draw(st.integers(0, 8 * len(packed[name]) - 1))
    damaged = bytearray(packed[name])
    damaged[bit // 8] ^= 1 << bit % 8
    refused(packed | {name: bytes(damaged)}, tmp_path_factory.mktemp("flip"))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_tar_whose_writer_also_mends_the_checksums_is_refused_or_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    """Bytes of the tar change and the index is made anew: what is then taken has the members that
    the index lists, and shards as in the manifest."""
    contents = dataset_files()
    tar = bytearray(tar_of(plain(contents)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(tar) - 1))
        tar[at] = data.draw(st.integers(0, 255))
    root = tmp_path_factory.mktemp("mended") / "deep" / "root"
    try:
        back = unpack(artifact_of(bytes(tar), contents, cut=2000), root)
    except InputError as error:
        assert "\n" not in str(error)
        assert not root.exists() or list(root.iterdir()) == []
    else:
        assert tree(back.directory) == contents  # only a header's date, mode or owner changed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), junk=JSON)
def test_an_index_that_is_wrong_anywhere_gives_one_line(
    packed: dict[str, bytes], data: st.DataObject, junk: object
):
    index = json.loads(packed[INDEX])
    key = data.draw(st.sampled_from([*index, "chunks.0", "members.1"]))
    if "." in key:
        group, number = key.split(".")
        field = data.draw(st.sampled_from(["name", "size", "sha256"]))
        index[group][int(number)][field] = junk
    else:
        index[key] = junk
    if index == json.loads(packed[INDEX]):
        return
    try:
        artifact_index.parse_index(json.dumps(index).encode(), WHERE)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(junk, str) or key == "chunks.0"  # another name or sum, as good a one


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b"")
@example(b"null")
@example(b'{"format": 1}')
@example(b"\xff\xfe")
def test_bytes_that_are_no_index_give_one_line(data: bytes):
    with pytest.raises(InputError, match=INDEX):
        artifact_index.parse_index(data, WHERE)


def test_an_index_too_large_to_be_one_is_refused():
    with pytest.raises(InputError, match="bytes"):
        artifact_index.parse_index(b" " * (artifact_index.MAX_INDEX_BYTES + 1), WHERE)


def test_the_original_capfinders_csv_artifact_is_named_as_such():
    names = ["dataset.tar.gz.000", "dataset.tar.gz.001", "tar_hash.json"]
    with pytest.raises(InputError, match=r"CSV format of Capfinder 0\.4.*caps_data_dir"):
        artifact_index.check_format(names, WHERE)


@pytest.mark.parametrize("names", [[], ["a.csv"], ["dataset.tar"]])
def test_another_artifact_is_named_as_such(names: list[str]):
    with pytest.raises(InputError, match="isn't a dataset of this program"):
        artifact_index.check_format(names, WHERE)


def changed_manifest(change: Callable[[dict], None]) -> dict[str, bytes]:
    contents = dataset_files()
    manifest = json.loads(contents["manifest.json"])
    change(manifest)
    return contents | {"manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(version="1.3.0"), "its version is '1.3.0'"),
        (lambda m: m.update(fingerprint="cd" * 32), "its fingerprint"),
        (lambda m: m["shards"].pop(), "other shards"),
        (lambda m: m["shards"].append(m["shards"][0]), "other shards"),
        (lambda m: m["shards"][0].update(sha256="0" * 64), "another SHA-256"),
        (lambda m: m["shards"][0].update(num_examples=4), "has 3 records, not 4"),
        (lambda m: m["counts"]["train"].update({"0": 4}), "train has 5 reads"),
        (lambda m: m.pop("counts"), "can't be read"),
        (lambda m: m.update(counts=[]), "can't be read"),
        (lambda m: m.update(shards=[{"name": "../../etc/passwd"}]), "can't be read"),
        (lambda m: m["shards"][0].update(num_examples="three"), "can't be read"),
        (lambda m: m["shards"][0].update(name="x" * 5000), "can't be read"),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(
    tmp_path: Path, change: Callable[[dict], None], said: str
):
    contents = changed_manifest(change)
    assert said in refused(artifact_of(tar_of(plain(contents)), contents), tmp_path)


@pytest.mark.parametrize("manifest", [None, b"", b"[]", b"[" * 100_000, b"\xff"])
def test_a_manifest_that_is_missing_or_none_is_refused(tmp_path: Path, manifest: bytes | None):
    contents = dataset_files()
    del contents["manifest.json"]
    if manifest is not None:
        contents["manifest.json"] = manifest
    assert "manifest.json" in refused(artifact_of(tar_of(plain(contents)), contents), tmp_path)


def test_a_lost_shard_is_noticed_by_the_names_of_the_others(tmp_path: Path):
    contents = changed_manifest(lambda m: m["shards"].pop(1))
    contents = {name: data for name, data in contents.items() if "train.tfrecord-00001" not in name}
    message = refused(artifact_of(tar_of(plain(contents)), contents), tmp_path)
    assert "shards of train aren't all there" in message


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(0, 30))
def test_records_are_counted_and_a_cut_one_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], cut: int
):
    path = tmp_path_factory.mktemp("records") / "shard"
    data = records(payloads)
    path.write_bytes(data[: len(data) - cut] if cut else data)
    whole = {len(records(payloads[:n])): n for n in range(len(payloads) + 1)}
    if path.stat().st_size in whole:
        assert artifact_check.count_records(path) == whole[path.stat().st_size]
    else:
        with pytest.raises(ValueError, match="ends within"):
            artifact_check.count_records(path)


def test_a_record_that_claims_more_than_the_file_is_noticed(tmp_path: Path):
    (tmp_path / "shard").write_bytes(struct.pack("<Q", 2**64 - 1) + bytes(100))
    with pytest.raises(ValueError, match="ends within"):
        artifact_check.count_records(tmp_path / "shard")
