"""Transformer encoder: python launch.py --config=configs/encoder.py"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.shared_params.model_type = "encoder"
    config.shared_params.batch_size = 64  # attention is the dearest in memory
    return config
