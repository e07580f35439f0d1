"""CSV files -> one version of the dataset; a version of the same content and settings is reused."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from capfinder import compiled, files
from capfinder.data import cache, records, versions
from capfinder.data.versions import Dataset
from capfinder.errors import InputError
from capfinder.etl import engines, hashing, scan, sources
from capfinder.etl.leaks import LeakCheck
from capfinder.etl.plan import SplitRules
from capfinder.etl.sources import Source
from capfinder.log import logger
from capfinder.stages import etl_estimate, remote
from capfinder.stages.etl_build import Builder, EtlSettings
from capfinder.stages.etl_estimate import Estimate
from capfinder.stages.remote import Remote

COMPILING = "Compiling the inner loops for this machine (once, some 20 seconds)"
Comet = Callable[[], Remote | None]


@dataclass(frozen=True)
class EtlResult:
    """`why`: for the summary, how this version came to be used; `is_unpublished`: it was built
    here, by this run or by one that was stopped before it had logged and sent it."""

    dataset: Dataset
    reused: bool
    why: str
    is_unpublished: bool = False


def run(config: ConfigDict) -> EtlResult:
    """The dataset of `config`: the version asked for, one with the same fingerprint, or a new one,
    written whole or not at all.

    Raises: InputError for bad input; StageFailedError when a read would be in two splits;
    SettingsError when a version would have to be fetched without a key."""
    settings = _settings(config)
    root = versions_root(config)
    wanted = config.etl_params.use_remote_dataset_version
    data_dir = Path(config.etl_params.caps_data_dir)
    with (
        compiled.announced(lambda: logger.info(COMPILING)),
        files.exclusive_lock(
            root.parent / ".lock",
            holder="the ETL of another run",
            waiting=lambda owner: logger.info("Waiting for %s, which uses %s", owner, root.parent),
        ),
    ):
        files.remove_partial(root)
        files.remove_partial(root.parent)
        remote.clear_upload(root)
        if wanted not in ("", "latest"):
            result = _named(config, root, wanted)
        elif data_dir.exists():
            result = _from_sources(config, settings, open_sources(config), root)
        else:
            result = _newest(config, root, data_dir)
        if result.reused:
            _check_fits(result.dataset, settings)
            _check_reused(result.dataset)
        mark = unpublished(root)
        is_unpublished = mark.exists() and mark.read_text() == result.dataset.fingerprint
    logger.info("Dataset %s: %s", result.dataset.version, result.why)
    return dataclasses.replace(result, is_unpublished=is_unpublished)


def unpublished(root: Path) -> Path:
    """The file that holds the fingerprint of the last version built, until it was published."""
    return root.parent / ".unpublished"


def versions_root(config: ConfigDict) -> Path:
    """Where an output directory keeps its dataset versions."""
    return Path(config.shared_params.output_dir) / "dataset" / records.DATASET_NAME


def _settings(config: ConfigDict) -> EtlSettings:
    shared, etl, split = config.shared_params, config.etl_params, config.split_params
    return EtlSettings(
        rules=SplitRules(
            num_classes=shared.num_classes,
            examples_per_class=etl.examples_per_class,
            train_test_fraction=shared.train_test_fraction,
            train_val_fraction=shared.train_val_fraction,
            keep_all=split.keep_all,
            group_by=split.group_by,
            seed=config.tune_params.seed if split.seed is None else split.seed,
        ),
        target_length=shared.target_length,
        dtype=shared.dtype,
        class_map={int(key): value for key, value in etl.class_map.items()},
        max_reject_fraction=etl.max_reject_fraction,
    )


def _named(config: ConfigDict, root: Path, wanted: str) -> EtlResult:
    dataset = versions.named(root, wanted)
    if dataset is not None:
        why = f"asked for; the local version in {dataset.directory} is used"
        return EtlResult(dataset, True, why)
    comet = remote.required(config, root)
    dataset = comet.fetch_named(wanted)
    return EtlResult(dataset, True, f"asked for; fetched {comet.label(dataset.version)}")


def _newest(config: ConfigDict, root: Path, data_dir: Path) -> EtlResult:
    logger.warning("etl_params.caps_data_dir=%s doesn't exist", data_dir)
    comet = remote.connect(config, root)
    if comet is not None and (dataset := comet.fetch_latest()) is not None:
        label = comet.label(dataset.version)
        why = f"the newest in Comet, {label}, is used, as caps_data_dir {data_dir} doesn't exist"
        return EtlResult(dataset, True, why)
    dataset = versions.latest(root)
    if dataset is None:
        raise InputError(
            f"etl_params.caps_data_dir={data_dir}: no such directory, and no dataset version in "
            f"{root} {'' if comet is None else 'or in Comet '}to use instead. Name the directory "
            "of the cap-signal CSV files."
        )
    why = f"the newest local version is used, as caps_data_dir {data_dir} doesn't exist"
    return EtlResult(dataset, True, why)


def open_sources(config: ConfigDict) -> list[Source]:
    """The CSV files with their classes. Raises: InputError for a bad file or a missing class."""
    settings = _settings(config)
    found = sources.open_sources(
        Path(config.etl_params.caps_data_dir),
        setting="etl_params.caps_data_dir",
        class_map=settings.class_map,
        num_classes=settings.rules.num_classes,
    )
    if config.split_params.test_caps_data_dir is not None:
        found += sources.open_sources(
            Path(config.split_params.test_caps_data_dir),
            setting="split_params.test_caps_data_dir",
            class_map=settings.class_map,
            num_classes=settings.rules.num_classes,
            is_test=True,
        )
    return found


def expect(config: ConfigDict) -> Estimate:
    """What building the dataset would take. Raises: InputError for a bad file or missing class;
    SettingsError when the engine can't be had."""
    engines.check(config.etl_params.engine, config.etl_params.beam_options)
    with compiled.announced(lambda: logger.info(COMPILING)):
        return etl_estimate.estimate(open_sources(config), _settings(config))


def _from_sources(
    config: ConfigDict, settings: EtlSettings, found: list[Source], root: Path
) -> EtlResult:
    """Called under the lock. Files are hashed beforehand only where that may save a pass."""
    root.mkdir(parents=True, exist_ok=True)
    # Comet's client takes seconds to load: asked only when no local version will do, and once.
    comet = functools.cache(lambda: remote.connect(config, root))
    index = sources.DigestIndex(root.parent / "sources.json")
    digests = {source: digest for source in found if (digest := index.get(source))}
    if len(digests) < len(found) and versions.has_sources_of_sizes(root, (s.size for s in found)):
        digests = {s: digests.get(s) or files.sha256_file(s.path) for s in found}
    if len(digests) == len(found):
        existing = _existing(root, comet, _fingerprint(digests, settings))
        if existing is not None:
            index.add(digests)
            return existing
    engine_name, beam_options = config.etl_params.engine, config.etl_params.beam_options
    engines.check(engine_name, beam_options)
    expected = etl_estimate.estimate(found, settings)
    expected.check_space(root)
    with (
        tempfile.TemporaryDirectory(prefix=files.PARTIAL, dir=root) as scratch,
        engines.make(engine_name, beam_options, scratch=Path(scratch)) as engine,
    ):
        scanned = scan.scan_sources(
            found,
            scan_files=engine.scan_files,
            reads=expected.reads,
            seed=settings.rules.seed,
            max_reject_fraction=settings.max_reject_fraction,
            scratch=Path(scratch),
        )
        digests = {source: fact.sha256 for source, fact in zip(found, scanned.facts, strict=True)}
        fingerprint = _fingerprint(digests, settings)
        result = _existing(root, comet, fingerprint)
        if result is None:
            builder = Builder(settings, found, scanned, engine, Path(scratch))
            result = _new_version(root, comet, builder, fingerprint)
    index.add(digests)
    return result


def _new_version(root: Path, comet: Comet, builder: Builder, fingerprint: str) -> EtlResult:
    other = comet()
    taken = versions.list_versions(root) + ([] if other is None else other.numbers())
    number = versions.next_version(taken)
    with files.atomic_directory(root / number) as partial:
        builder.build(partial, number, fingerprint)
        files.write_text(unpublished(root), fingerprint)
    why = f"built from {builder.sources[0].path.parent}; no version had its fingerprint"
    return EtlResult(versions.open_dataset(root / number), False, why)


def _existing(root: Path, comet: Comet, fingerprint: str) -> EtlResult | None:
    """The one place that says which version stands in for building one."""
    dataset = versions.find(root, fingerprint)
    if dataset is not None:
        why = "reused; the local version has the same content and settings"
        return EtlResult(dataset, True, why)
    other = comet()
    if other is not None and (dataset := other.fetch_same(fingerprint)) is not None:
        why = f"fetched {other.label(dataset.version)}, of the same content and settings"
        return EtlResult(dataset, True, why)
    return None


def _fingerprint(digests: dict[Source, str], settings: EtlSettings) -> str:
    directories = sorted({source.path.parent for source in digests})
    metadata: list[Path] = []
    if settings.rules.group_by == "parent_read":
        metadata = sources.metadata_files(directories)
    return versions.make_fingerprint(
        [digest for source, digest in digests.items() if not source.is_test],
        [digest for source, digest in digests.items() if source.is_test],
        [files.sha256_file(path) for path in metadata],
        settings.as_json(),
    )


def _check_fits(dataset: Dataset, settings: EtlSettings) -> None:
    """Raises: InputError when the version can't serve these settings."""
    wanted = {
        "num_classes": settings.rules.num_classes,
        "target_length": settings.target_length,
        "dtype": settings.dtype,
    }
    for key, value in wanted.items():
        if dataset.manifest[key] != value:
            raise InputError(
                f"{dataset.directory}: has {key} {dataset.manifest[key]}, but "
                f"shared_params.{key}={value}. Change the setting or name another version."
            )


def _check_reused(dataset: Dataset) -> None:
    """The check for leaks that a build ends with, over what a reused version holds."""
    total = sum(shard["num_examples"] for shard in dataset.manifest["shards"])
    root = dataset.directory.parent
    with tempfile.TemporaryDirectory(prefix=files.PARTIAL, dir=root) as scratch:
        check = LeakCheck(Path(scratch), what="read_id", entries=total)
        for number, split in enumerate(records.SPLITS):
            for read_ids in cache.read_ids(dataset.directory, split):
                hashes = hashing.keyed_hash(read_ids, seed=0)
                check.add(number, hashes[:, hashing.CHOOSE], hashes[:, hashing.IDENTITY])
        check.check()
