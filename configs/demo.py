"""Small, on simulated caps: make demo, or python launch.py --config=configs/demo.py"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.etl_params.caps_data_dir = "runs/demo_caps"
    config.etl_params.use_remote_dataset_version = ""  # never asks a server
    config.etl_params.examples_per_class = 1000
    config.shared_params.output_dir = "runs/demo"
    config.shared_params.model_type = "cnn_lstm"
    config.shared_params.batch_size = 64
    config.shared_params.train_test_fraction = 0.8  # 200 test reads a class: a narrower interval
    config.tune_params.max_trials = 2
    config.search_params.conv_layers = {"low": 2, "high": 4}  # what two cores train in minutes
    config.search_params.lstm_layers = {"low": 1, "high": 2}
    config.train_params.max_epochs_final_model = 20  # a few minutes on two cores
    config.train_params.patience = 8
    config.tracking_params.mode = "offline"
    return config
