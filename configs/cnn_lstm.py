"""CNN-LSTM, the default: python launch.py --config=configs/cnn_lstm.py"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.shared_params.model_type = "cnn_lstm"
    config.shared_params.batch_size = 1024  # smaller batches leave an accelerator idle
    return config
