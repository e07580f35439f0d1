"""CSV files -> one version of the dataset; a version of the same content and settings is reused."""

from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from capfinder import files
from capfinder.data import loader, records, scan, sources, versions
from capfinder.data.plan import SplitRules
from capfinder.data.sources import Source
from capfinder.data.versions import Dataset
from capfinder.errors import InputError
from capfinder.log import logger
from capfinder.stages.etl_build import Builder, EtlSettings, check_disjoint


@dataclass(frozen=True)
class EtlResult:
    """`why`: for the summary, how this version came to be used."""

    dataset: Dataset
    reused: bool
    why: str


def run(config: ConfigDict) -> EtlResult:
    """The dataset of `config`: the version asked for, one with the same fingerprint, or a new one,
    written whole or not at all.

    Raises: InputError for bad input; StageFailedError when a read would be in two splits."""
    settings = _settings(config)
    output_dir = Path(config.shared_params.output_dir)
    root = output_dir / "dataset" / records.DATASET_NAME
    wanted = config.etl_params.use_remote_dataset_version
    data_dir = Path(config.etl_params.caps_data_dir)
    if wanted not in ("", "latest"):
        result = _named(root, wanted)
    elif not data_dir.exists():
        result = _newest(root, data_dir)
    else:
        found = open_sources(config)
        with files.exclusive_lock(
            output_dir / "dataset" / ".lock", holder="the ETL of another run"
        ):
            result = _from_sources(config, settings, found, root)
    if result.reused:
        _check_fits(result.dataset, settings)
        _check_reused(result.dataset)
    logger.info("Dataset %s: %s", result.dataset.version, result.why)
    return result


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


def _named(root: Path, version: str) -> EtlResult:
    dataset = versions.named(root, version)
    if dataset is None:
        local = ", ".join(versions.list_versions(root)) or "none"
        raise InputError(
            f"etl_params.use_remote_dataset_version={version}: no such version in {root} (there: "
            f"{local}). Only local versions can be used so far: remote ones, which need a "
            "COMET_API_KEY, aren't fetched yet."
        )
    return EtlResult(dataset, True, f"asked for; the local version in {dataset.directory} is used")


def _newest(root: Path, data_dir: Path) -> EtlResult:
    dataset = versions.latest(root)
    if dataset is None:
        raise InputError(
            f"etl_params.caps_data_dir={data_dir}: no such directory, and no dataset version in "
            f"{root} to use instead. Name the directory of the cap-signal CSV files."
        )
    why = f"the newest local version is used, as caps_data_dir {data_dir} doesn't exist"
    logger.warning("etl_params.caps_data_dir=%s doesn't exist", data_dir)
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


def _from_sources(
    config: ConfigDict, settings: EtlSettings, found: list[Source], root: Path
) -> EtlResult:
    """Called under the lock. Files are hashed beforehand only where that may save a pass."""
    root.mkdir(parents=True, exist_ok=True)
    files.remove_partial(root)
    index = sources.DigestIndex(root.parent / "sources.json")
    digests = {source: digest for source in found if (digest := index.get(source))}
    if len(digests) < len(found) and versions.has_sources_of_sizes(root, (s.size for s in found)):
        digests = {s: digests.get(s) or files.sha256_file(s.path) for s in found}
    if len(digests) == len(found):
        existing = _existing(root, _fingerprint(digests, settings))
        if existing is not None:
            index.add(digests)
            return existing
    identities, facts = scan.scan_sources(
        found,
        seed=settings.rules.seed,
        max_reject_fraction=settings.max_reject_fraction,
    )
    digests = {source: fact.sha256 for source, fact in zip(found, facts, strict=True)}
    fingerprint = _fingerprint(digests, settings)
    result = _existing(root, fingerprint)
    if result is None:
        number = versions.next_version(versions.list_versions(root))
        builder = Builder(settings, found, identities, facts)
        with files.atomic_directory(root / number) as partial:
            builder.build(partial, number, fingerprint)
        why = f"built from {config.etl_params.caps_data_dir}; no version had its fingerprint"
        result = EtlResult(versions.open_dataset(root / number), False, why)
    index.add(digests)
    return result


def _existing(root: Path, fingerprint: str) -> EtlResult | None:
    """The one place that says which version stands in for building one.

    A remote one with this fingerprint would be fetched here, when no local one has it."""
    dataset = versions.find(root, fingerprint)
    if dataset is None:
        return None
    return EtlResult(dataset, True, "reused; the local version has the same content and settings")


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
    check_disjoint(
        {split: loader.open_split(dataset.directory, split).read_id for split in records.SPLITS}
    )
