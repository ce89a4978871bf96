"""Functions of logits: log-probabilities of tokens, entropies, cross-entropies."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_log_probs(
    logits: Float[Array, "*dims V"], tokens: Int[Array, "*dims"]
) -> Float[Array, "*dims"]:
    """log softmax(logits)[token], float32, nats.

    The logit of the token is selected by a comparison, not by a gather: the comparison fuses with
    the reduction, its gradient is a select instead of a scatter, and it shards over the vocabulary.
    """
    is_token = jax.nn.one_hot(tokens, logits.shape[-1], dtype=bool)
    token_logits = jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1)
    return token_logits - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Float[Array, "*dims V"]) -> Float[Array, "*dims"]:
    """Entropy of the distributions given by logits: H = -Σ_v p(v) log p(v).

    Args:
        logits: real numbers, or -inf for excluded tokens, which add nothing to the entropy and get
            no gradient. A row of -inf only is no distribution and gives NaN.

    Returns:
        Entropies, float32, nats, between 0 and log V.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return _cross_entropy(jnp.exp(log_probabilities), log_probabilities)


def soft_cross_entropy(
    teacher_logits: Float[Array, "*dims V"], student_logits: Float[Array, "*dims V"]
) -> Float[Array, "*dims"]:
    """Cross-entropy of the student and the teacher, without a gradient for the teacher.

    L = -Σ_v p_teacher(v) log p_student(v); its minimum is the entropy of the teacher, not 0.

    Args:
        teacher_logits: real numbers, or -inf for tokens that the teacher excludes. No gradient.
        student_logits: real numbers, or -inf for excluded tokens. The loss is inf if the student
            excludes a token that the teacher does not exclude.

    Returns:
        Losses, float32, nats.

    Source:
        Hinton, Vinyals and Dean, arXiv 1503.02531, section 2, at temperature 1.
    """
    teacher = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32))
    return _cross_entropy(teacher, jax.nn.log_softmax(student_logits.astype(jnp.float32)))


def _cross_entropy(
    probabilities: Float[Array, "*dims V"], log_probabilities: Float[Array, "*dims V"]
) -> Float[Array, "*dims"]:
    """-Σ p log q with 0 log 0 = 0, in the gradient as well."""
    finite = jnp.where(probabilities > 0, log_probabilities, 0.0)
    return -jnp.sum(probabilities * finite, axis=-1)
