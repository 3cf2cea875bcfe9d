"""Compiling the glue."""

import ctypes

import pytest
import torch

from quant.integer import glue_build


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_without_a_compiler_there_is_no_library(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(ValueError, match="no C.. compiler was found"):
        glue_build.library()


def test_other_processors_are_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ValueError, match="PyTorch uses DEFAULT here, the glue knows AVX2"):
        glue_build.library()


def compiler_that(tmp_path, does):
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return str(script)


def test_what_a_compiler_says_is_passed_on_and_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", compiler_that(tmp_path, "echo no such flag >&2; exit 1"))
    with pytest.raises(ValueError, match="could not compile the glue: no such flag"):
        glue_build.library()
    assert not list((tmp_path / "tinydm").iterdir())


def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    compiler = compiler_that(
        tmp_path, f"echo once >> {tmp_path}/log; for last; do :; done; : > $last"
    )
    monkeypatch.setenv("CXX", compiler)
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(path) or ctypes.pythonapi)
    for _ in range(2):
        with pytest.raises(AttributeError, match="glue_quantize"):  # an empty library has nothing
            glue_build.library()
    assert (tmp_path / "log").read_text() == "once\n" and len(set(loaded)) == 1
