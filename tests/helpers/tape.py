"""Derivatives by TensorFlow's tape."""

import tensorflow as tf


def value_and_gradient(function, x):
    """`function(x)`, and its gradient with respect to x, which is a tensor or a list of tensors."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return value, tape.gradient(value, x)
