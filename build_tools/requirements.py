"""What a build needs that pip brings, as pyproject.toml's dependency groups have it."""

from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]


def of_tensorflow(wanted=None):
    """The requirements of a build for one TensorFlow. `wanted` is a version ("2.20"), a requirement
    ("tensorflow==2.21.0"), or None for the default."""
    requirements = list(GROUPS["tensorflow"])
    if wanted:
        requirements = [f"tensorflow-cpu=={wanted}.*" if wanted[0].isdigit() else wanted]
    if any("2.19" in requirement for requirement in requirements):
        requirements += GROUPS["tensorflow_2_19"]
    return requirements
