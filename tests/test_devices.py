"""A batch shared by the devices of a mesh: eight simulated ones in a process of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from capfinder.stages import inference
from capfinder.training import devices

TESTS = Path(__file__).parent
TRAINED = ("cnn_lstm device", "resnet host", "tiny stream")


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, TESTS / "eight_devices.py", tmp_path_factory.mktemp("eight")],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", TRAINED)
def test_eight_devices_take_the_steps_of_one(on_eight, name):
    one, eight = (on_eight["trained"][f"{name} {limit}"] for limit in (1, None))
    assert len(set(one["losses"])) == len(one["losses"]) == 24
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_an_evaluation_counts_every_read_once(on_eight, name):
    one, eight = (on_eight["trained"][f"{name} {limit}"]["evaluated"] for limit in (1, None))
    assert eight["count"] == one["count"] == 21
    assert eight["correct"] == one["correct"]
    np.testing.assert_allclose(eight["loss"] / 21, one["loss"] / 21, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_every_device_has_its_rows_and_the_whole_state(on_eight, name):
    one, eight = (on_eight["trained"][f"{name} {limit}"] for limit in (1, None))
    assert set(one["on"]) == {1} and set(eight["on"]) == {8}
    assert one["rows"] == [13, 16] and eight["rows"] == [2, 2]  # 13 are filled up to 16
    assert eight["replicated"]


def test_a_step_is_compiled_once_for_a_mesh(on_eight):
    assert {trained["programs"] for trained in on_eight["trained"].values()} == {1}


def test_a_training_goes_on_with_other_devices_than_it_began_with(on_eight):
    found = on_eight["resumed"]
    assert found["on"] == [8, 1] and found["went_on_at"] > 40
    assert max(found["apart"]) < 1e-5
    whole, *others = found["losses"]
    assert len(whole) == 4
    for losses in others:
        np.testing.assert_allclose(losses, whole, rtol=0, atol=1e-5)


def test_as_many_devices_of_the_mesh_are_used_as_share_a_batch_evenly(on_eight):
    assert on_eight["chosen"] == {
        "16 None": 8,
        "12 None": 6,
        "7 None": 7,
        "30 4": 3,
        "16 2": 2,
        "16 1": 1,
    }


def test_more_devices_than_there_are_can_t_be_asked_for(on_eight):
    assert on_eight["too_many"] == "runtime_params.mesh=9: there are 8 devices"


OF_TWO = """
import json, sys

import jax

from capfinder import models, settings
from capfinder.stages import inference, memory

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
models.ARCHITECTURES["cnn_lstm"] = "tiny_architecture"
scoring = {}
for mesh in (None, 8, 4, 2, 1, 99):
    batching = inference.batching(None, mesh=mesh)
    scoring[str(mesh)] = [batching.placement.num_devices, batching.batch_size]
memory.available_bytes = lambda: 4 * 10**6  # of the host, for the four devices here
texts = []
for every_process, limit in ((True, None), (False, None), (True, 2)):
    changes = {"shared_params.target_length": 32, "shared_params.num_classes": 3,
               "shared_params.batch_size": 65536, "runtime_params.mesh": limit}
    config = settings.checked(settings.default_config(), changes)
    hyperparameters = models.parse_hyperparameters("cnn_lstm", {"units": (64,)})
    texts.append(memory.reason(MemoryError(), config, hyperparameters, every_process=every_process))
print(json.dumps([scoring, texts]))
"""


@pytest.fixture(scope="module")
def on_two_processes() -> list[Any]:
    """What each of two processes of four devices prints, which both take part of a mesh."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", OF_TWO, address, str(number)],
            env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        ended = [process.communicate(timeout=100) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], ended
    return [json.loads(shown.splitlines()[-1]) for shown, _ in ended]


def test_each_process_scores_on_its_part_of_the_mesh(on_two_processes):
    for scoring, _ in on_two_processes:
        devices_of = {mesh: count for mesh, (count, _) in scoring.items()}
        assert devices_of == {"None": 4, "8": 4, "4": 2, "2": 1, "1": 1, "99": 4}
        each = {size / count for count, size in scoring.values()}
        assert each == {inference.BATCH_SIZES["cpu"]}


def test_advice_on_memory_counts_the_devices_that_share_a_batch(on_two_processes):
    for _, (of_all, of_own, of_two) in on_two_processes:
        assert "on each of 8 devices, 1.0 MB can be had" in of_all
        assert "on each of 4 devices, 1.0 MB can be had" in of_own
        assert "on each of 2 devices, 4.0 MB can be had" in of_two


def test_a_single_device_is_left_as_it_is():
    assert devices.spread(16, limit=None, every_process=True) is None
    like = jax.numpy.ones(3)
    assert devices.put_like(np.zeros(3), like).sharding == like.sharding
