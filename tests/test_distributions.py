"""What is read off logits, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from occ_jax.models.distributions import entropy, soft_cross_entropy


def array(values):
    return jnp.asarray(values, jnp.float32)


def test_soft_cross_entropy_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2): L = ln 2. Gradient p_student - p_teacher.
    teacher, student = array(np.log([3.0, 1.0])), array([0.0, 0.0])
    value, gradients = jax.value_and_grad(soft_cross_entropy, argnums=(0, 1))(teacher, student)
    np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
    np.testing.assert_array_equal(gradients[0], 0.0)
    np.testing.assert_allclose(gradients[1], [-0.25, 0.25], rtol=1e-6)


def test_soft_cross_entropy_is_least_at_the_teacher():
    teacher = array(np.random.default_rng(0).normal(size=(4, 5)))
    gradient = jax.jit(jax.grad(lambda student: jnp.sum(soft_cross_entropy(teacher, student))))
    # Logits are the teacher's up to a constant: the same distribution, and its entropy is left.
    np.testing.assert_allclose(gradient(teacher + 2.0), 0.0, atol=1e-6)
    np.testing.assert_allclose(soft_cross_entropy(teacher, teacher + 2.0), entropy(teacher), 1e-5)
    moved = np.asarray(gradient(teacher + 0.1 * jnp.eye(5)[:1]))
    assert np.all(np.abs(moved).max(axis=-1) > 1e-3)


def test_soft_cross_entropy_with_excluded_tokens():
    # The teacher is sure of token 0, the student halves between 0 and 1, both exclude token 2.
    teacher, student = array([0.0, -np.inf, -np.inf]), array([0.0, 0.0, -np.inf])
    value, gradient = jax.value_and_grad(soft_cross_entropy, argnums=1)(teacher, student)
    np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [-0.5, 0.5, 0.0], rtol=1e-6)


def test_entropy_by_hand():
    # Uniform over V: ln V, wherever the logits lie. (3/4, 1/4): 0.5623351.
    jitted = jax.jit(entropy)
    for size in (1, 7):
        np.testing.assert_allclose(
            jitted(array(np.full((2, size), 1e4))), math.log(size), atol=1e-6
        )
    np.testing.assert_allclose(jitted(array(np.log([3.0, 1.0]))), 0.5623351, rtol=1e-6)
    # Excluded tokens do not count; a certain token has none; bf16 comes out as float32.
    excluded = array([[0.0, -np.inf, 0.0], [5.0, -np.inf, -np.inf], [1e5, 0.0, -1e5]])
    result = jitted(excluded.astype(jnp.bfloat16))
    np.testing.assert_allclose(result, [math.log(2), 0.0, 0.0], rtol=1e-6)
    assert result.dtype == jnp.float32


def test_entropy_gradient():
    # dH/dx = -p (ln p + H). For (3/4, 1/4): H = 0.5623351, -+0.2059898. Excluded: 0.
    gradient = jax.jit(jax.grad(entropy))
    logits = array([math.log(3.0), 0.0, -np.inf])
    np.testing.assert_allclose(gradient(logits), [-0.2059898, 0.2059898, 0.0], rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(gradient(array([1e5, 0.0, -np.inf])), 0.0)
