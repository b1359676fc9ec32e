"""build_tools/find_ffi_header.py finds the header that serves the most versions of JAX."""

import re

import pytest

from helpers.ffi_header import finder
from helpers.paths import DOCS


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """Makes packages whose headers name these versions. TensorFlow 2.19 has half of a header."""

    def make(whole=True, **versions):
        folders = {}
        for package, (major, minor) in versions.items():
            folder = tmp_path / package / "include"
            api = folder / "xla" / "ffi" / "api"
            api.mkdir(parents=True)
            lines = f"#define XLA_FFI_API_MAJOR {major}\n#define XLA_FFI_API_MINOR {minor}\n"
            (api / "c_api.h").write_text(lines)
            if whole or package != "tensorflow":
                (api / "ffi.h").touch()
            folders[package] = folder
        monkeypatch.setattr(finder, "include_folder", folders.get)
        monkeypatch.setattr(finder.metadata, "version", {"jaxlib": "9.9.1"}.__getitem__)
        return folders

    return make


def printed(capsys, monkeypatch, *packages):
    monkeypatch.setattr(finder.sys, "argv", ["find_ffi_header.py", *packages])
    finder.main()
    return capsys.readouterr().out.strip().split(";")


@pytest.mark.parametrize(
    ("versions", "package", "version", "own", "jax"),
    [
        ({"tensorflow": (0, 2), "jaxlib": (0, 3)}, "tensorflow", "0.2", "0.2", "0.8.1"),
        ({"tensorflow": (0, 2), "jaxlib": (0, 1)}, "jaxlib", "0.1", "0.2", "0.7"),
        ({"tensorflow": (0, 1), "jaxlib": (0, 1)}, "tensorflow", "0.1", "0.1", "0.7"),
        ({"tensorflow": (0, 1), "jaxlib": (0, 3), "whole": False}, "jaxlib", "0.3", "0.1", "0.9.1"),
        ({"jaxlib": (0, 77)}, "jaxlib", "0.77", "", "9.9.1"),  # not in the table yet
    ],
)
def test_the_earliest_whole_header_is_taken(
    versions, package, version, own, jax, headers, capsys, monkeypatch
):
    folders = headers(**versions)
    wanted = [str(folders[package]), version, own]
    assert printed(capsys, monkeypatch) == wanted
    assert finder.oldest_jax() == jax


def test_without_a_header_nothing_is_said(headers, capsys, monkeypatch):
    headers(tensorflow=(0, 2))
    assert printed(capsys, monkeypatch, "jaxlib") == ["", "", ""]
    assert finder.oldest_jax(["jaxlib"]) is None


def test_the_page_names_the_same_versions_of_jax():
    rows = re.findall(r"\| (0\.\d) \| JAX ([\d.]+) and later", (DOCS / "install.md").read_text())
    table = {".".join(map(str, version)): jax for version, jax in finder.JAX.items()}
    assert rows and all(table[version] == jax for version, jax in rows)
