"""Every setting at its default; the other configs start from this."""

from ml_collections import ConfigDict

from capfinder import settings


def get_config() -> ConfigDict:
    return settings.default_config()
