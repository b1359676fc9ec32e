"""For workers that need a framework: their arguments, and whether it is there and sees a GPU."""

import argparse
import importlib
import importlib.util
import math
import time

_GPUS = {
    "tensorflow": lambda tf: tf.config.list_physical_devices("GPU"),
    "torch": lambda torch: torch.cuda.is_available(),
    "jax": lambda jax: jax.default_backend() == "gpu",
}


def why_not(framework, place="gpu"):
    """Why nothing can be tried in "tensorflow", "torch" or "jax", or None.

    place: "gpu", or "cpu" to try a worker without a GPU.
    """
    try:
        module = importlib.import_module(framework)
    except (ImportError, OSError) as error:
        return f"{framework} cannot be imported: {_in_one_line(error)}"
    try:
        if place == "gpu" and not _GPUS[framework](module):
            return f"{framework} {module.__version__} sees no GPU"
    except RuntimeError as error:  # of JAX, where it is told to use one
        return f"{framework} {module.__version__} sees no GPU: {_in_one_line(error)}"
    return _why_no_op(place) if framework == "tensorflow" else None


def _in_one_line(error):
    return " ".join(str(error).split())


def _why_no_op(place):
    """Only `make build` builds an op for TensorFlow, so that it may be without, or without CUDA."""
    try:
        import dice_op

        if dice_op.dice_sums and (place == "cpu" or dice_op.core.build_info()["cuda"]):
            return None
    except (ImportError, RuntimeError, OSError) as error:
        return f"dice_op cannot be imported: {_in_one_line(error)}"
    return "dice_op is built here without CUDA"


def why_not_compiled(framework, place="gpu"):
    """Why a framework that is there cannot compile programs, or None."""
    if framework == "torch" and place == "gpu" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton for a GPU, which is not installed"
    return None


def parse_arguments(description, frameworks):
    """Reads a worker's command line: the framework, the place, and the deadline."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("framework", choices=frameworks)
    parser.add_argument(
        "--place", choices=("gpu", "cpu"), default="gpu", help="cpu tries the worker without a GPU"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start nothing after this time"
    )
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + arguments.seconds
    return arguments
