"""Print a script that completes verbs and their options in bash, zsh or fish."""

from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.main import verbs
from fastft.errors import UserError

# Options are those that `--help` names, asked for once a verb and shell; files are the shell's own completion.
BASH = """_fastft() {
    local word=${COMP_WORDS[COMP_CWORD]} verb=${COMP_WORDS[1]}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "VERBS --help --version" -- "$word"))
    elif [[ $word == -* ]]; then
        local known=_fastft_${verb//-/_}
        [ -n "${!known}" ] || printf -v "$known" '%s' \\
            "$(COLUMNS=200 fastft "$verb" --help 2>/dev/null | grep -oE -- '--[a-z][a-z-]+' | sort -u | tr '\\n' ' ')"
        COMPREPLY=($(compgen -W "${!known}" -- "$word"))
    fi
}
complete -o default -o bashdefault -F _fastft fastft
"""
SCRIPTS = {
    "bash": BASH,
    "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + BASH,
    "fish": """complete -c fastft -n __fish_use_subcommand -f -a 'VERBS'
function __fastft_options
    set -l words (commandline -opc)
    COLUMNS=200 fastft $words[2] --help 2>/dev/null | string match -ra -- '--[a-z][a-z-]+' | sort -u
end
complete -c fastft -n 'not __fish_use_subcommand; and string match -q -- "-*" (commandline -ct)' -a '(__fastft_options)'
""",
}


def run(shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")]) -> None:
    """Print a script that completes verbs and their options. In ~/.bashrc: source <(fastft completion bash)"""
    name = Path(shell).name  # $SHELL is a path
    if name not in SCRIPTS:
        raise UserError(f"fastft completion {shell}: no such shell.", f"Known: {', '.join(SCRIPTS)}.")
    print(SCRIPTS[name].replace("VERBS", " ".join(verbs())), end="")
