"""Completion as bash does it: the script is loaded and asked."""

import shutil
import subprocess
import sys

import pytest

import launch
from fastft.cli.main import verbs


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    "words, wanted, unwanted",
    [
        (["fastft", "tr"], {"train", "trace"}, {"resume"}),
        (["fastft", ""], {*verbs(), "--version"}, set()),
        (["fastft", "trace", "--"], {"--step", "--json", "--help"}, {"--keep"}),
        (["fastft", "train", "c"], set(), {"config"}),  # files: the shell's own
    ],
)
def test_bash(words, wanted, unwanted, tmp_path):
    (tmp_path / "fastft").write_text(f'#!/bin/sh\nexec {sys.executable} -m fastft "$@"\n')
    (tmp_path / "fastft").chmod(0o755)
    given = " ".join(f"'{word}'" for word in words)
    script = (
        f"PATH={tmp_path}:$PATH; source <(fastft completion bash) || exit; COMP_WORDS=({given}); "
        f"COMP_CWORD={len(words) - 1}; _fastft; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", script], env=launch.ENV, capture_output=True, text=True, timeout=60)
    found = set(done.stdout.split())
    assert done.returncode == 0 and wanted <= found and not unwanted & found, done.stderr


def test_every_shell_and_no_other():
    for shell, part in (("/bin/zsh", "bashcompinit"), ("fish", "__fish_use_subcommand")):
        _, output = launch.fastft("completion", shell)
        assert part in output and "verify-resume" in output and "VERBS" not in output
    code, output = launch.fastft("completion", "tcsh", check=False)
    assert code == 1 and "tcsh: no such shell" in output
