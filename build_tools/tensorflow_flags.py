"""Prints, as a CMake list, what a build against the installed TensorFlow needs: its version, its
include folder, its library, the library of its compiler XLA, and the other compiler flags."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf  # noqa: E402

flags = [f for f in tf.sysconfig.get_compile_flags() if not f.startswith(("-I", "--std", "-std"))]
directory = tf.sysconfig.get_lib()
library = next(f[3:] for f in tf.sysconfig.get_link_flags() if f.startswith("-l:"))
libraries = [os.path.join(directory, name) for name in (library, "libtensorflow_cc.so.2")]
print(";".join([tf.__version__, tf.sysconfig.get_include(), *libraries, *flags]))
