"""Time and memory of a Dice loss and its gradient on a whole volume: dice_op and plain TensorFlow.

    python benchmarks/measure_loss.py labels.npy

Every contender runs in a process of its own, started by `compare`, so that none inherits memory
from another. All get the same labels and logits and are held to the same loss in double precision.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CLASSES = 3
SMOOTH = 1e-5
CONTENDERS = {
    "dice_op": "dice_op",
    "dice_op_xla": "dice_op, XLA",
    "plain": "plain TensorFlow",
    "plain_xla": "plain TensorFlow, XLA",
}
# Sums over millions of voxels in single precision are only so good, so plain TensorFlow is merely
# held to computing the same loss; dice_op is held to computing it accurately.
MAX_ERROR = {"dice_op": 1e-5, "dice_op_xla": 1e-5, "plain": 1e-2, "plain_xla": 1e-2}
WARM_UP_EDGES = (24, 32)


def make_logits(shape):
    """Random logits `[1, D, H, W, C]`, the same in every process."""
    return np.random.default_rng(0).standard_normal((1, *shape, CLASSES), dtype=np.float32)


def reference_loss(labels):
    """The loss in double precision, slice by slice to spare memory."""
    intersection, pred_sum, label_sum = np.zeros((3, CLASSES))
    for logits_slice, labels_slice in zip(make_logits(labels.shape)[0], labels, strict=True):
        exponentials = np.exp(logits_slice.astype(np.float64))
        probabilities = exponentials / exponentials.sum(-1, keepdims=True)
        one_hot = labels_slice[..., None] == np.arange(CLASSES)
        intersection += (probabilities * one_hot).sum((0, 1))
        pred_sum += probabilities.sum((0, 1))
        label_sum += one_hot.sum((0, 1))
    return float(np.mean(1 - (2 * intersection + SMOOTH) / (pred_sum + label_sum + SMOOTH)))


def plain_dice_loss(labels, logits):
    """The Dice loss as one writes it in TensorFlow."""
    import tensorflow as tf

    probabilities = tf.nn.softmax(logits)
    one_hot = tf.one_hot(labels, CLASSES)
    space = (1, 2, 3)
    intersection = tf.reduce_sum(probabilities * one_hot, space)
    cardinality = tf.reduce_sum(probabilities, space) + tf.reduce_sum(one_hot, space)
    return tf.reduce_mean(1 - (2 * intersection + SMOOTH) / (cardinality + SMOOTH))


def make_step(contender):
    """A compiled function from logits and labels to loss and gradient."""
    import tensorflow as tf

    if contender.startswith("dice_op"):
        import dice_op

        loss_function = dice_op.losses.DiceLoss()
    else:
        loss_function = plain_dice_loss

    @tf.function(jit_compile=contender.endswith("_xla"))
    def step(logits, labels):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = loss_function(labels, logits)
        return loss, tape.gradient(loss, logits)

    return step


def memory(field):
    """A field of /proc/self/status in bytes: VmRSS is the resident memory, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak():
    """Start the peak of the resident memory anew; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(contender, labels, repeats):
    """Loss, peak extra memory of one loss with gradient, and median time of `repeats` more."""
    import tensorflow as tf

    step = make_step(contender)
    logits = tf.constant(make_logits(labels.shape))
    labels = tf.constant(labels[None])
    # Small volumes first: tracing, compiling (of the second shape: compiling anew) and starting
    # threads take memory that is not the loss's.
    for edge in WARM_UP_EDGES:
        step(logits[:, :edge, :edge, :edge], labels[:, :edge, :edge, :edge])

    # The first call on the volume shows the peak: the allocator keeps that memory for later calls.
    resident = memory("VmRSS")
    can_measure = reset_peak()
    loss = float(step(logits, labels)[0])
    extra = memory("VmHWM") - resident if can_measure else None

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        float(step(logits, labels)[0])
        seconds.append(time.perf_counter() - start)
    return {
        "loss": loss,
        "seconds": statistics.median(seconds[1:]),
        "extra_bytes": extra,
        "logits_bytes": logits.dtype.size * int(tf.size(logits)),
    }


def measure_in_new_process(contender, labels_path, repeats):
    """What `measure` returns, from a Python process that does nothing else."""
    command = [sys.executable, __file__, str(labels_path)]
    command += ["--contender", contender, "--repeats", str(repeats)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"Measuring {CONTENDERS[contender]} failed:\n{result.stderr.strip()}")
    return json.loads(result.stdout.splitlines()[-1])


def compare(labels, repeats=7):
    """Measure every contender on uint8 labels `[D, H, W]`; stop if their losses are not the same.

    Returns:
      The loss in double precision, and a dict of `measure` results with an `error` each.
    """
    expected = reference_loss(labels)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        labels_path = Path(folder) / "labels.npy"
        np.save(labels_path, labels)
        for contender, title in CONTENDERS.items():
            print(f"  measuring {title}", flush=True)
            result = measure_in_new_process(contender, labels_path, repeats)
            result["error"] = abs(result["loss"] - expected)
            if not result["error"] <= MAX_ERROR[contender]:
                raise SystemExit(
                    f"The losses differ: {title} gives {result['loss']:.7f}, "
                    f"double precision {expected:.7f}."
                )
            results[contender] = result
    return expected, results


def table(expected, results):
    """The comparison as text."""
    lines = [f"{'':24}{'time':>10}{'peak extra memory':>30}{'loss':>14}{'error':>12}"]
    for contender, title in CONTENDERS.items():
        result = results[contender]
        extra = result["extra_bytes"]
        if extra is None:
            memory_text = "not measurable here"
        else:
            memory_text = f"{extra / 1e6:.0f} MB = {extra / result['logits_bytes']:.2f} x logits"
        lines.append(
            f"{title:24}{1000 * result['seconds']:>7.0f} ms{memory_text:>30}"
            f"{result['loss']:>14.7f}{result['error']:>12.1e}"
        )
    lines.append(f"{'double precision':64}{expected:>14.7f}")
    return "\n".join(lines)


def main():
    """Measure one contender and print one line of JSON, or compare all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path, help="uint8 class indices [D, H, W] as a .npy file")
    parser.add_argument("--contender", choices=CONTENDERS, help="default: all, as a table")
    parser.add_argument("--repeats", type=int, default=7, help="calls to take the median time of")
    arguments = parser.parse_args()
    labels = np.load(arguments.labels)
    if arguments.contender:
        print(json.dumps(measure(arguments.contender, labels, arguments.repeats)))
    else:
        print(table(*compare(labels, arguments.repeats)))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
