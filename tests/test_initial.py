"""First weights: drawn as Keras would, from one seed, without compiling anything."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from capfinder import models
from capfinder.libraries import keras
from capfinder.models import initial

SIGNAL = jax.ShapeDtypeStruct((1, 64, 1), np.float32)
KEY = jax.random.key(3)


def new(model_type: str) -> nn.Module:
    hyperparameters = models.parse_hyperparameters(model_type, {}, target_length=64)
    architecture = models.architecture(model_type)
    return architecture.build(hyperparameters, num_classes=3, dtype=np.float32)


class Foreign(nn.Module):
    """With the initialisers that Flax takes by itself."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(5)(x.reshape(len(x), -1))


@pytest.mark.parametrize("shape", [(300, 400), (5, 64, 128)])
def test_kernels_spread_as_keras_spreads_them(shape):
    theirs = np.asarray(keras().initializers.GlorotUniform(seed=1)(shape))
    ours = np.asarray(initial.glorot_uniform(KEY, shape))
    limit = np.sqrt(6 / (shape[-2] * np.prod(shape[:-2]) + shape[-1] * np.prod(shape[:-2])))
    for drawn in (ours, theirs):
        assert 0.99 * limit < np.abs(drawn).max() <= limit
        assert drawn.std() == pytest.approx(limit / np.sqrt(3), rel=0.02)
    assert ours.dtype == np.float32 and abs(ours.mean()) < 0.02 * limit


@pytest.mark.parametrize("shape", [(32, 128), (64, 64), (9, 4)])
def test_recurrent_kernels_are_orthogonal(shape):
    kernel = np.asarray(initial.orthogonal(KEY, shape))
    if shape[0] < shape[1]:
        kernel = kernel.T
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(min(shape)), atol=1e-6)
    assert (np.diag(kernel) < 0).any()  # not made positive, as a plain QR would have it


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_a_seed_gives_the_variables_of_flax_s_init_without_a_program(model_type):
    module = new(model_type)
    one, again, other = (initial.variables(module, SIGNAL, seed=seed) for seed in (1, 1, 2))
    theirs = jax.eval_shape(lambda x: module.init(KEY, x, train=False), SIGNAL)

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(one) == shapes(theirs)
    leaves = jax.tree.leaves(one)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert all(np.array_equal(*pair) for pair in zip(leaves, jax.tree.leaves(again), strict=True))
    drawn = [leaf for leaf in leaves if leaf.ndim > 1 and np.unique(leaf).size > leaf.size / 2]
    assert len({leaf.ravel()[0] for leaf in drawn}) == len(drawn)  # no two from the same draws
    assert not all(np.array_equal(*p) for p in zip(leaves, jax.tree.leaves(other), strict=True))


def test_an_architecture_may_bring_its_own_initialisers():
    one, again, other = (initial.variables(Foreign(), SIGNAL, seed=seed) for seed in (1, 1, 2))
    kernels = [np.asarray(found["params"]["Dense_0"]["kernel"]) for found in (one, again, other)]
    assert kernels[0].shape == (64, 5) and kernels[0].std() > 0
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_within_a_program_weights_follow_from_flax_s_key():
    draw = jax.jit(lambda key: initial.glorot_uniform(key, (4, 4)))
    outside = initial.glorot_uniform(KEY, (4, 4))
    np.testing.assert_array_equal(draw(KEY), outside)
    assert not np.array_equal(draw(jax.random.key(4)), outside)
