"""A batch shared by the devices of a mesh: eight simulated ones in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

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


def test_a_single_device_is_left_as_it_is():
    assert devices.spread(16, limit=None, every_process=True) is None
    like = jax.numpy.ones(3)
    assert devices.put_like(np.zeros(3), like).sharding == like.sharding
