# pyright: strict
"""What is read off logits: log-probabilities of tokens, entropies, cross-entropies."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_log_probs(
    logits: Float[Array, "*dims V"], tokens: Int[Array, "*dims"]
) -> Float[Array, "*dims"]:
    """log softmax(logits)[token], float32, nats.

    The token's logit is picked by comparison, not by a gather: it fuses with the reduction, its
    gradient is a select where a gather's is a scatter, and it shards over the vocabulary.
    """
    picked = jax.nn.one_hot(tokens, logits.shape[-1], dtype=bool)
    chosen = jnp.sum(jnp.where(picked, logits, 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Float[Array, "*dims V"]) -> Float[Array, "*dims"]:
    """Entropy of the distributions that the logits stand for: H = -Σ_v p(v) log p(v).

    Args:
      logits: any real numbers, or -inf for excluded tokens, which add nothing to the entropy and
        get no gradient. A row of -inf alone is no distribution and gives NaN.

    Returns:
      Entropies, float32, nats, between 0 and log V.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return _cross_entropy(jnp.exp(log_probabilities), log_probabilities)


def soft_cross_entropy(
    teacher_logits: Float[Array, "*dims V"], student_logits: Float[Array, "*dims V"]
) -> Float[Array, "*dims"]:
    """Cross-entropy of the student to the stopped distribution of the teacher.

    L = -Σ_v p_teacher(v) log p_student(v), whose least value is the teacher's entropy, not 0.

    Args:
      teacher_logits: any real numbers, or -inf for tokens the teacher excludes. No gradient.
      student_logits: likewise. The loss is inf where the student excludes a token the teacher
        does not.

    Returns:
      Losses, float32, nats.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531, section 2, at temperature 1.
    """
    teacher = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
    return _cross_entropy(
        jax.nn.softmax(teacher), jax.nn.log_softmax(student_logits.astype(jnp.float32))
    )


def _cross_entropy(
    probabilities: Float[Array, "*dims V"], log_probabilities: Float[Array, "*dims V"]
) -> Float[Array, "*dims"]:
    """-Σ p log q with 0 log 0 = 0, in the gradient as well."""
    finite = jnp.where(probabilities > 0, log_probabilities, 0.0)
    return -jnp.sum(probabilities * finite, axis=-1)
