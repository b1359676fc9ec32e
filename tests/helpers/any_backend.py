"""What tests need of the framework that Keras runs on.

Tests that keep to this and to `keras.ops` run on any: losses/test_backends.py runs them on JAX and
on PyTorch.
"""

import keras
import pytest
from keras.src.backend.common.masking import set_keras_mask

BACKEND = keras.config.backend()
ONLY_TENSORFLOW = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="only TensorFlow has tensors of this kind"
)

# Values of Keras' jit_compile. torch.compile takes half a minute for each network.
JIT = [False] if BACKEND == "torch" else [False, True]

# What refuses wrong values, which only the running program sees.
REFUSED = (ValueError,)
if BACKEND == "tensorflow":
    import tensorflow as tf

    REFUSED += (tf.errors.InvalidArgumentError,)
elif BACKEND == "jax":
    import jax

    REFUSED += (jax.errors.JaxRuntimeError,)


def program(function, compiled=False):
    """A function of arrays as the program that the framework makes of it, if it makes any."""
    if BACKEND == "tensorflow":
        return tf.function(function, jit_compile=compiled)
    if BACKEND == "jax":
        return jax.jit(function)
    return function


def with_mask(y_pred, mask):
    """A tensor with the mask that Keras' layers attach to it."""
    y_pred = keras.ops.convert_to_tensor(y_pred)
    set_keras_mask(y_pred, keras.ops.convert_to_tensor(mask))
    return y_pred
