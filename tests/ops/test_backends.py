"""The table of backends: who is chosen, who is refused, and that nothing happens silently."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from fastft.ops import BackendError, backends, cross_entropy
from tests.ops.common import NATIVE, NATIVE_BUILT, TRITON_INSTALLED

CPU_F32 = ("cpu", (torch.float32,))


@pytest.fixture
def table(monkeypatch):
    """A table of its own, with an op "twice" that has a broken, a picky and a plain backend."""
    for name in ("_table", "_loaded", "_choices"):
        monkeypatch.setattr(backends, name, {})
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)

    def broken():
        raise ImportError("No module named 'fast'")

    backends.register("twice", "broken", load=broken, refuses=lambda *_: "")
    backends.register(
        "twice", "picky", load=lambda: "picky!", refuses=lambda device, _: "" if device == "cuda" else f"no {device}"
    )
    backends.register("twice", "shy", load=lambda: "shy!", refuses=lambda *_: "", automatic_on=frozenset({"cuda"}))
    backends.register("twice", "plain", load=lambda: "plain!", refuses=lambda *_: "")
    backends.register("once", "plain", load=lambda: "once!", refuses=lambda *_: "")
    return backends


def test_automatic_choice_is_logged_once_with_reasons(table, caplog):
    with caplog.at_level(logging.INFO, logger="fastft.ops.backends"):
        assert table.select("twice", None, *CPU_F32) == "plain"
        assert table.select("twice", None, *CPU_F32) == "plain"
        assert table.select("twice", None, "cpu", (torch.bfloat16,)) == "plain"
    assert [record.getMessage() for record in caplog.records] == [
        "twice on cpu: backend plain; broken: No module named 'fast'; picky: no cpu; shy: chosen unasked only on cuda"
    ]
    assert table.choices()[0] == {
        "op": "twice",
        "backend": "plain",
        "device": "cpu",
        "dtypes": ["float32"],
        "why": "automatic",
        "passed_over": {"broken": "No module named 'fast'", "picky": "no cpu", "shy": "chosen unasked only on cuda"},
    }
    assert table.select("twice", None, "cuda", (torch.float32,)) == "picky"


def test_argument_beats_environment_beats_automatic(table, monkeypatch):
    monkeypatch.setenv(table.ENVIRONMENT_VARIABLE, "twice=shy, once=plain")
    assert table.select("twice", None, *CPU_F32) == "shy"
    assert table.choices()[0]["why"] == "FASTFT_BACKEND"
    assert table.select("twice", "plain", *CPU_F32) == "plain"
    assert table.choices()[0]["why"] == "the argument backend="
    monkeypatch.setenv(table.ENVIRONMENT_VARIABLE, "once=plain")
    assert table.select("twice", None, *CPU_F32) == "plain"
    assert table.choices()[0]["why"] == "automatic"
    monkeypatch.setenv(table.ENVIRONMENT_VARIABLE, "shy")
    assert table.select("twice", None, *CPU_F32) == "shy"


@pytest.mark.parametrize(("backend", "reason"), [("broken", "No module named 'fast'"), ("picky", "no cpu")])
def test_a_backend_that_was_asked_for_never_falls_back(table, backend, reason):
    message = f"asks for backend '{backend}' of op 'twice'.*cpu, float32: {reason}. Available here: shy, plain"
    with pytest.raises(BackendError, match=message):
        table.select("twice", backend, *CPU_F32)


@pytest.mark.parametrize("value", ["nativ", "twice=nativ", "trice=plain", "twice="])
def test_unknown_names_in_the_environment(table, monkeypatch, value):
    monkeypatch.setenv(table.ENVIRONMENT_VARIABLE, value)
    with pytest.raises(ValueError, match=r"unknown .*; known: "):
        table.select("twice", None, *CPU_F32)


def test_unknown_and_duplicate_names(table):
    with pytest.raises(ValueError, match="unknown backend 'nativ' of op 'twice'; known: broken, picky, shy, plain"):
        table.select("twice", "nativ", *CPU_F32)
    with pytest.raises(ValueError, match="unknown op 'trice'; known: twice, once"):
        table.names("trice")
    with pytest.raises(ValueError, match="already registered"):
        table.register("twice", "plain", load=lambda: None, refuses=lambda *_: "")


def test_nothing_fits(table):
    table.register("never", "broken", load=lambda: "x", refuses=lambda *_: "never")
    with pytest.raises(BackendError, match="no backend of op 'never' can be used for cpu, float32: broken: never"):
        table.select("never", None, *CPU_F32)


@pytest.mark.parametrize("backend", [NATIVE])
def test_native_refuses_other_dtypes(backend):
    with pytest.raises(BackendError, match=r"takes float32 and bfloat16, not float16. Available here: .*reference"):
        cross_entropy(torch.zeros(1, 2).half(), torch.zeros(1, dtype=torch.int64), backend=backend)


def run(program, **environment):
    """Output of a Python program in a fresh process."""
    environment = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


CALL = "import torch; from fastft.ops import cross_entropy, choices\n"
CALL += "loss = cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), backend={backend!r}); print(choices()[0])"


@pytest.mark.skipif(not TRITON_INSTALLED or torch.cuda.is_available(), reason="triton on a CPU")
def test_triton_on_a_cpu_only_in_the_interpreter():
    with pytest.raises(AssertionError, match=r"BackendError.*only in its interpreter, with TRITON_INTERPRET=1"):
        run(CALL.format(backend="triton"))
    assert "'backend': 'triton'" in run(CALL.format(backend="triton"), TRITON_INTERPRET="1")
    assert "'backend': 'triton'" not in run(CALL.format(backend=None), TRITON_INTERPRET="1")


def test_missing_triton_names_the_extra():
    hide = "import sys; sys.modules['triton'] = None\n"
    with pytest.raises(AssertionError, match=r"BackendError.*pip install 'fastft\[triton\]'"):
        run(hide + CALL.format(backend="triton"))
    assert "'why': 'automatic'" in run(hide + CALL.format(backend=None))


def test_missing_native_module_is_told():
    hide = "import sys; sys.modules['fastft._C'] = None\n"
    with pytest.raises(AssertionError, match=r"BackendError.*not built: .*fastft._C.*Available here: reference"):
        run(hide + CALL.format(backend="native"))
    output = run(hide + CALL.format(backend=None))
    assert "'backend': 'reference'" in output and "'native': 'not built: " in output


@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
def test_native_is_the_automatic_choice_on_a_cpu():
    assert "'backend': 'native'" in run(CALL.format(backend=None))


def test_importing_the_ops_stays_on_its_floor_and_light():
    program = "import sys, torch; before = set(sys.modules); import fastft.ops, fastft.optim\n"
    program += "print(*sorted(set(sys.modules) - before))"
    modules = run(program).split()
    ours = [m for m in modules if m.startswith("fastft.")]
    assert all(m.startswith(("fastft.ops", "fastft.optim", "fastft._C")) for m in ours), ours
    assert not [m for m in ours if m.startswith("fastft.ops.triton.")]
    assert "torch._dynamo" not in modules  # two seconds
