"""What a build needs that pip brings, as pyproject.toml's dependency groups have it."""

import re
import site
import sysconfig
from importlib import metadata
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]


def of_tensorflow(wanted):
    """The requirements of a build for one TensorFlow, a version ("2.20") or a requirement
    ("tensorflow==2.21.0"); or of a build without it, "none"."""
    if wanted == "none":
        return list(GROUPS["xla_header"])
    requirements = [f"tensorflow-cpu=={wanted}.*" if wanted[0].isdigit() else wanted]
    if "2.19" in requirements[0]:
        requirements += GROUPS["xla_header"]
    return requirements


def tensorflow_beside():
    """The minor version of the TensorFlow that pip would put dice_op beside, or the requirement of
    a nightly build; "none" without one.

    A build in isolation does not see the packages of that environment, but it has its Python.
    """
    folders = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    folders.append(site.getusersitepackages())
    for package in metadata.distributions(path=list(dict.fromkeys(folders))):
        name = re.sub(r"[-_.]+", "-", package.name).lower()
        if name in ("tensorflow", "tensorflow-cpu"):
            return ".".join(package.version.split(".")[:2])
        if name in ("tf-nightly", "tf-nightly-cpu"):
            return f"{name}=={package.version}"
    return "none"
