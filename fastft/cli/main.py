"""The command line: finds the verb's file and runs it. Nothing of a verb is imported before it is named."""

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from fastft.lazy import before_imports

ABOUT = """Usage: fastft VERB [OPTIONS] ...

Fine-tune language models at the hardware's limit. `fastft VERB --help` says more of each:
"""


def verbs() -> dict[str, Path]:
    """Files by verb."""
    from fastft.cli.verbs import __path__ as folders

    files = sorted((file for folder in folders for file in Path(folder).glob("*.py")), key=lambda file: file.stem)
    return {file.stem.replace("_", "-"): file for file in files if not file.stem.startswith("_")}


def main(arguments: list[str] | None = None) -> None:
    """Run a verb; a UserError becomes one screen and exit code 1, a signal 128 + its number."""
    arguments = _without_local_rank(sys.argv[1:] if arguments is None else list(arguments))
    if arguments[:1] == ["--version"]:
        from fastft import __version__

        print(__version__)
        return
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        _overview()
        sys.exit(0 if arguments else 2)
    before_imports()
    for stream in (sys.stdout, sys.stderr):  # a shell in another encoding gets escapes, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        _end(e)


def _run(verb: str, arguments: list[str]) -> None:
    from importlib import import_module

    from fastft.errors import UserError, did_you_mean

    known = verbs()
    if verb not in known:
        raise UserError(f"fastft {verb}: no such verb.", did_you_mean(verb, known))
    import typer

    module = import_module(f"fastft.cli.verbs.{known[verb].stem}")
    app = getattr(module, "app", None)
    if app is None:
        from fastft.cli.arguments import check

        check(verb, module.run, arguments)
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(context_settings=getattr(module, "CONTEXT", None))(module.run)
    try:
        app(arguments, prog_name=f"fastft {verb}")
    except SystemExit as e:
        if _by_ctrl_c(e):
            raise KeyboardInterrupt from None
        raise


def _by_ctrl_c(error: BaseException | None) -> bool:
    """Typer ends a verb at Ctrl-C without a word: what it raises was raised while it handled the interrupt."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _overview() -> None:
    print(ABOUT)
    for verb, file in verbs().items():
        first = file.read_text(encoding="utf-8").split('"""', 2)[1].splitlines()[0]
        print(f"  {verb:<14} {first.strip()}")
    print("\nfastft --version prints the version.")


def _without_local_rank(arguments: list[str]) -> list[str]:
    """The deepspeed launcher passes it to every module, before the verb; the environment says the same."""
    while arguments and arguments[0].startswith(("--local_rank", "--local-rank")):
        arguments = arguments[1:] if "=" in arguments[0] else arguments[2:]
    return arguments


def _end(error: Exception) -> NoReturn:
    from fastft.errors import DISK, Interrupted, UserError

    if isinstance(error, UserError):
        _explain(error)
        sys.exit(1)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK):
        where = error.filename or "Standard output or a file of the run"
        _explain(UserError(f"{where}: {error.strerror}.", "Check the path, its permissions and the free space."))
        sys.exit(1)
    if isinstance(error, ImportError) and not (error.name or "").startswith("fastft"):
        what = f"{error.name or 'A package'}: cannot be imported: {error}."
        _explain(UserError(what, "Install it (again) in this environment, on every host."))
        sys.exit(1)
    if isinstance(error, Interrupted):
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    raise error


def _explain(error) -> None:
    from rich.console import Console

    from fastft.launch import protocol

    protocol.write_mistake(str(error))
    console = Console(stderr=True, soft_wrap=True)
    rank = os.environ.get("RANK", "0")
    console.print(f"error{'' if rank == '0' else f' (rank {rank})'}: ", style="bold red", end="")
    console.print(error.message, highlight=False, markup=False)
    if error.hint:
        console.print(error.hint, style="yellow", highlight=False, markup=False)


def command() -> None:
    """``main`` as a process of its own."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    if "FASTFT_AGENT" in os.environ:
        from fastft.launch.rank import settle

        settle()
    try:
        main()
    except SystemExit as e:
        leave(e.code if isinstance(e.code, int) else int(e.code is not None))


def _interrupt(signum: int, frame: Any) -> None:
    """Ctrl-C: KeyboardInterrupt, as ever; but at once while something is imported, where there is nothing to clean up,
    and libraries turn it into errors of theirs or swallow it.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """End this process at once, with its exit handlers run and its output written.

    Gloo's threads outlive their process group wherever something (DeepSpeed, a graph) still holds it. Such a thread,
    letting go of a tensor while the interpreter shuts down, ends the process with an abort ("terminate called without
    an active exception"): a good run would report failure. Seen with torch 2.13 on every second exit of ranks that
    had just gathered.
    """
    import atexit

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as e:
            code = code or 1
            if stream is sys.stdout:
                print(f"error: standard output: {e.strerror}.", file=sys.stderr)
    os._exit(code)
