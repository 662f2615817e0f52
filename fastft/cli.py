"""The command line: a table of verbs."""

import atexit
import errno
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from fastft import __version__
from fastft import config as configuration
from fastft.errors import Interrupted, UserError
from fastft.files import replacing

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)  # Python names no file where a write fails

ConfigArg = Annotated[Path, typer.Argument(help="Configuration file (YAML).")]
OverridesArg = Annotated[list[str] | None, typer.Argument(help="Overrides, such as optim.lr=2e-5.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def train(
    config: ConfigArg,
    overrides: OverridesArg = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over when run.dir already holds a run.")
    ] = False,
) -> None:
    """Train a model as a configuration says."""
    _run(configuration.load(config, overrides or []), overwrite=overwrite)


def resume(
    run_dir: Annotated[Path, typer.Argument(help="run.dir of the run.")], overrides: OverridesArg = None
) -> None:
    """Go on from the newest usable checkpoint, exactly where the run stopped."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir}: not a run folder (no config.yaml).", "Give the run.dir of a run that `fastft train` began."
        )
    loaded = configuration.load(run_dir / "config.yaml", overrides or [])
    _run(loaded.model_copy(update={"run": loaded.run.model_copy(update={"dir": str(run_dir)})}), resume=True)


def evaluate(
    target: Annotated[
        str, typer.Argument(help="Run folder (its exported model) or configuration file (its model.path).")
    ],
    overrides: OverridesArg = None,
    as_json: JsonOpt = False,
) -> None:
    """Metrics of a model on the evaluation sets."""
    from fastft.evaluate.metrics import evaluate_model, run_config_path

    path, is_run = run_config_path(target)
    config = configuration.load(path, overrides or [])
    if is_run and not any(o.startswith("model.path=") for o in overrides or []):
        exported = {"path": str(Path(target) / "model"), "init": "pretrained", "tokenizer": None}
        config = config.model_copy(update={"model": config.model.model_copy(update=exported)})
    results = evaluate_model(config)
    if as_json:
        print(json.dumps(results))
    for name, metrics in {} if as_json else results.items():
        print(
            f"{name}: " + "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        )


def predict(
    model: Annotated[str, typer.Argument(help="Run folder, exported model folder, or hub id.")],
    source: Annotated[str | None, typer.Argument(help="Data file; - reads lines from standard input.")] = None,
    text: Annotated[str | None, typer.Option(help="One text, instead of a file.")] = None,
    pair: Annotated[str | None, typer.Option(help="The second text, for models of text pairs.")] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the text; default: the run's data.text, or 'text'.")
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option(help="Column of the second text; default: the run's data.text_pair.")
    ] = None,
    format: Annotated[str, typer.Option(help="txt, jsonl, csv, tsv, parquet, hf; auto goes by the name.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of a saved DatasetDict.")] = None,
    documents: Annotated[str, typer.Option(help="txt: blank_line, line or file ends a document.")] = "line",
    header: Annotated[
        str | None, typer.Option(help="csv/tsv without a header line: its columns, separated by commas.")
    ] = None,
    quoting: Annotated[str, typer.Option(help="csv/tsv: standard, or none: quote characters are text.")] = "standard",
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here instead of standard output.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Classifiers: longest text in tokens; default: the run's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
) -> None:
    """Labels (classifiers) or generated text (causal models), a JSON object a line."""
    from fastft.evaluate.predict import predict as run

    if (source is None) == (text is None):
        raise UserError(
            "Give either a data file or --text.", "For example: fastft predict runs/x --text 'My card was stolen'"
        )
    settings = Path(model) / "config.yaml"
    data = (
        configuration.load(settings).data
        if (Path(model) / "model").is_dir() and settings.is_file()
        else configuration.Data()
    )
    if text is not None:
        rows = [("--text", text, pair)]
    elif source == "-":
        rows = _lines()
    else:
        wanted = {
            "path": source,
            "format": format,
            "split": split,
            "documents": documents,
            "header": header and header.split(","),
            "quoting": quoting,
        }
        rows = _rows(
            configuration.section(configuration.Source, wanted, "fastft predict"),
            column or data.text,
            pair_column or data.text_pair,
        )
    results = run(
        model,
        rows,
        batch_size=batch_size,
        max_length=max_length or data.max_length,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    if out is None:
        for record in results:
            print(json.dumps(record, ensure_ascii=False))
        return
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder.", "Name a file in it.")
    out = out.resolve()  # a link stays one, and what it points to is written
    whole = (
        replacing(out) if out.is_file() or not out.exists() else nullcontext(out)
    )  # a pipe or a device is written as it is
    with whole as scratch, open(scratch, "w", encoding="utf-8") as stream:
        for record in results:
            print(json.dumps(record, ensure_ascii=False), file=stream)


def _lines():
    try:
        yield from ((f"stdin:{n}", line.rstrip("\n"), None) for n, line in enumerate(sys.stdin, 1) if line.strip())
    except UnicodeDecodeError as e:
        raise UserError(f"standard input: {e}.", "It must be UTF-8 text.") from None


def _rows(source: configuration.Source, column: str, pair_column: str | None):
    from fastft.data import formats

    for where, record in formats.read(source):
        for name, option in ((column, "--column"), (pair_column, "--pair-column")):
            if name is not None and not isinstance(record.get(name), str):
                raise UserError(f"{where}: no text in column {name!r}.", f"Columns: {', '.join(record)}. Set {option}.")
        yield where, record[column], record[pair_column] if pair_column else None


def export(
    run_dir: Annotated[Path, typer.Argument(help="run.dir of the run.")],
    to: Annotated[Path, typer.Argument(help="New folder.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; default: the run's.")] = None,
) -> None:
    """A Hugging Face folder from a training checkpoint."""
    from fastft.evaluate.export import export_checkpoint

    if dtype not in (None, "fp32", "bf16"):
        raise UserError(f"--dtype {dtype}: unknown.", "Known: fp32, bf16.")
    print(export_checkpoint(run_dir, to, step, dtype))


def validate(config: ConfigArg, overrides: OverridesArg = None, as_json: JsonOpt = False) -> None:
    """Check configuration, data and model without training."""
    from fastft.evaluate.validate import validate_run

    report = validate_run(configuration.load(config, overrides or []))
    if as_json:
        print(json.dumps(report))
        return
    table = Table("set", "rows", "empty", "truncated", "split", "dropped", "sequences", "longest", "tokens", "targets")
    for name, s in report["splits"].items():
        c = s["counts"]
        table.add_row(
            name,
            *(
                f"{v:,}"
                for v in (
                    c["rows"],
                    c["empty"],
                    c["truncated"],
                    c["split"],
                    c["dropped"],
                    s["sequences"],
                    s["longest"],
                    s["tokens"],
                    s["targets"],
                )
            ),
        )
    console = (
        Console() if sys.stdout.isatty() else Console(width=160)
    )  # a pipe has no width, and numbers must not be cut
    console.print(table)
    console.print(
        f"{report['steps']:,} steps of {report['sequences_per_step']:,} sequences, at most {report['max_length']:,} tokens each; "
        f"{report['parameters']:,} parameters, {report['trained']:,} trained."
        + (f" Drawn anew: {', '.join(report['drawn_anew'])}." if report["drawn_anew"] else ""),
        highlight=False,
    )


def trace(
    target: Annotated[Path, typer.Argument(help="Run folder or configuration file.")],
    overrides: OverridesArg = None,
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, counted from 1.")] = 1,
    as_json: JsonOpt = False,
) -> None:
    """Which documents a training step learns from."""
    from fastft.evaluate.trace import trace as run

    samples = run(target, overrides or [], step)
    if as_json:
        print(json.dumps(samples))
        return
    for sample in samples:
        print(f"sample {sample['sample']}: " + "; ".join(sample["documents"]))


def replay(
    run_dir: Annotated[Path, typer.Argument(help="run.dir of the run.")],
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, counted from 1.")],
    as_json: JsonOpt = False,
) -> None:
    """Loss and gradient norm of every sample of a step, with the weights of the checkpoint before it."""
    from fastft.evaluate.replay import replay as run

    found = run(run_dir, step)
    if as_json:
        print(json.dumps(found))
        return
    print(f"weights: {found['weights']}")
    for s in found["samples"]:
        print(
            f"sample {s['sample']}  loss {s['loss']:.4f}  grad_norm {s['grad_norm']:.4g}  {'; '.join(s['documents'])}"
        )


def verify_resume(
    config: ConfigArg,
    overrides: OverridesArg = None,
    folder: Annotated[Path, typer.Option(help="New folder for both runs.")] = Path("runs/verify-resume"),
    nproc: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    at: Annotated[int | None, typer.Option(min=1, help="Step to interrupt after; default: one at random.")] = None,
    kill: Annotated[bool, typer.Option("--kill", help="SIGKILL a rank instead of SIGTERM.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Run twice, once interrupted, and compare losses and weights bit for bit."""
    from fastft.evaluate.verify_resume import verify_resume as run

    found = run(configuration.load(config, overrides or []), folder, nproc, at, kill)
    if as_json:
        print(json.dumps(found))
    else:
        print(
            f"{found['steps']} steps, interrupted after step {found['interrupted_after']}: "
            + (
                "losses and weights are bit-identical."
                if found["equal"]
                else "they DIFFER: " + "; ".join(found["differences"])
            )
        )
    raise typer.Exit(0 if found["equal"] else 1)


def doctor(as_json: JsonOpt = False) -> None:
    """What is built, what is picked, versions, and a numeric self-check of every op."""
    from fastft.doctor import main as run

    raise typer.Exit(run(json=as_json))


def quickstart(
    run_dir: Annotated[Path, typer.Option(help="Folder for corpus, runs and report.")] = Path("runs/quickstart"),
    configs: Annotated[Path, typer.Option(help="Folder of general.yaml and domain.yaml.")] = Path("configs/quickstart"),
) -> None:
    """Train and adapt a small model on text that is on every machine; no network needed."""
    from fastft.quickstart import quickstart as run

    run(run_dir, configs)


def launch(
    arguments: Annotated[list[str], typer.Argument(help="train CONFIG [OVERRIDES...] or resume RUN_DIR.")],
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks on this machine; default: its GPUs, or 1.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Many hosts: lines of `name slots=N`.")] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="The first host's address for the others; default: what its name means here.")
    ] = None,
    master_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one.")] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts without a newer checkpoint in between before giving up.")
    ] = 3,
    backoff: Annotated[float, typer.Option(min=0.0, help="Seconds before the first restart; doubles.")] = 5.0,
    watchdog: Annotated[
        float, typer.Option(min=0.0, help="Seconds without a step after which a run counts as hung; 0: never.")
    ] = 600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, start nothing.")] = False,
) -> None:
    """Train on many ranks, here or on the hosts of a file: all end together, and go on from the newest checkpoint after a failure."""
    from fastft.launch import hostfile as hosts_of
    from fastft.launch import launcher

    if hostfile is not None and nproc is not None:
        raise UserError(
            "--hostfile and --nproc exclude each other.", "The host file's slots say how many ranks a host has."
        )
    hosts = hosts_of.read(hostfile) if hostfile else [hosts_of.Host("localhost", nproc or _gpus() or 1)]
    chosen = launcher.plan(
        arguments,
        hosts,
        _run_dir_of(arguments),
        master_addr=master_addr,
        master_port=master_port,
        max_restarts=max_restarts,
        backoff=backoff,
        watchdog=watchdog,
    )
    if dry_run:
        print("\n".join(launcher.describe(chosen)))
        return
    raise typer.Exit(launcher.launch(chosen))


def preflight(
    config: ConfigArg,
    overrides: OverridesArg = None,
    hostfile: Annotated[Path | None, typer.Option(help="Lines of `name slots=N`; default: this machine.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="The first host's address for the others.")] = None,
    master_port: Annotated[int, typer.Option(min=1, max=65535)] = 29500,
    as_json: JsonOpt = False,
) -> None:
    """Whether the hosts can train this configuration together: versions, code, model and data, clocks, disks, network."""
    from fastft.launch import hostfile as hosts_of
    from fastft.launch import launcher
    from fastft.launch import preflight as checks

    loaded = configuration.load(config, overrides or [])
    hosts = hosts_of.read(hostfile) if hostfile else [hosts_of.Host("localhost", _gpus() or 1)]
    chosen = launcher.plan([], hosts, Path(loaded.run.dir), master_addr=master_addr, master_port=master_port)
    found, wrong = checks.preflight(
        chosen,
        checks.checkpoint_bytes(Path(loaded.model.path), loaded.model.dtype, loaded.checkpoint.keep),
        configuration.inputs(loaded),
    )
    if as_json:
        print(json.dumps({"hosts": found, "problems": wrong}))
    else:
        table = Table(*checks.COLUMNS)
        for row in checks.describe(found):
            table.add_row(*row)
        (Console() if sys.stdout.isatty() else Console(width=160)).print(table)
        print("\n".join(wrong) if wrong else f"{len(hosts)} host{'s' * (len(hosts) > 1)}: nothing is wrong.")
    raise typer.Exit(1 if wrong else 0)


def _gpus() -> int:
    """GPUs of this machine, without importing torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _run_dir_of(arguments: list[str]) -> Path:
    verb, *rest = arguments
    given = [a for a in rest if not a.startswith("-")]
    if verb not in ("train", "resume") or not given:
        raise UserError(
            f"fastft launch: {' '.join(arguments)}: starts `train CONFIG` or `resume RUN_DIR`.",
            "For example: fastft launch --nproc 8 train config.yaml",
        )
    return Path(given[0]) if verb == "resume" else Path(configuration.load(given[0], given[1:]).run.dir)


def plan(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub id; or give --params.")] = None,
    params: Annotated[
        float | None, typer.Option(help="Number of parameters, such as 7e9, of a dense decoder of usual shape.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs, all data-parallel.")] = 8,
    zero: Annotated[
        list[int] | None, typer.Option(help="ZeRO stage; can be given several times; default: all.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="a100, h100, h200, b200.")] = "h100",
    micro_batch: Annotated[int, typer.Option(help="Sequences per GPU and micro-step.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 2048,
    accumulation: Annotated[int, typer.Option(help="Micro-steps per optimizer step.")] = 1,
    recompute: Annotated[bool, typer.Option("--recompute", help="Full activation recomputation.")] = False,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, such as 1e12.")] = None,
    save_seconds: Annotated[float, typer.Option(help="Seconds that training stands still per checkpoint.")] = 60.0,
    restart_seconds: Annotated[float, typer.Option(help="Seconds from a failure to the next step.")] = 600.0,
    stall: Annotated[float, typer.Option(help="Seconds per step that nothing hides (data, logging).")] = 0.0,
    efficiency: Annotated[
        float | None, typer.Option(help="Share of peak FLOP/s in matrix products; default: fitted on H100 runs.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Default: 8.")] = None,
    node_gbits: Annotated[
        float | None, typer.Option(help="Gbit/s and direction between nodes, all cards of a node together.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Memory, step time, communication and days of a run on more GPUs than are here."""
    from fastft.plan import report

    request = report.Request(
        gpus,
        tuple(zero or (0, 1, 2, 3)),
        hardware,
        micro_batch,
        sequence_length,
        accumulation,
        recompute,
        tokens,
        save_seconds,
        restart_seconds,
        stall,
        efficiency,
        gpus_per_node,
        node_gbits,
    )
    result = report.plan(report.shape(model, params), request)
    if as_json:
        print(json.dumps(result))
        return
    table = Table(*report.COLUMNS)
    for row in result["stages"]:
        table.add_row(*report.cells(row, gpus))
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    shape = result["model"]
    console.print(
        f"{shape['parameters']:,} parameters, {shape['layers']} layers of {shape['hidden']:,}; {gpus:,} {hardware}, a failure every "
        f"{report.duration(result['mtbf'])}. The constants are those of published H100 runs (benchmarks/results/plan.md).",
        highlight=False,
    )


def schema() -> None:
    """The configuration's JSON Schema: every key, its type, default and meaning."""
    print(json.dumps(configuration.Config.model_json_schema(), indent=2))


VERBS = {
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "predict": predict,
    "export": export,
    "validate": validate,
    "doctor": doctor,
    "quickstart": quickstart,
    "launch": launch,
    "preflight": preflight,
    "trace": trace,
    "replay": replay,
    "verify-resume": verify_resume,
    "plan": plan,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a verb; a UserError becomes one screen and exit code 1, a signal 128 + its number."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Fine-tune language models at the hardware's limit.",
    )
    for name, function in VERBS.items():
        app.command(
            name,
            context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
            if name == "launch"
            else None,
        )(function)
    config_app = typer.Typer(help="About the configuration file.", no_args_is_help=True)
    config_app.command("schema")(schema)
    app.add_typer(config_app, name="config")
    app.callback()(_common)
    try:
        app(arguments)
    except UserError as e:
        _explain(e)
        sys.exit(1)
    except OSError as e:
        if e.filename is None and e.errno not in DISK:
            raise
        _explain(
            UserError(
                f"{e.filename or 'Standard output or a file of the run'}: {e.strerror}.",
                "Check the path, its permissions and the free space.",
            )
        )
        sys.exit(1)
    except Interrupted as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def command() -> None:
    """``main`` as a process of its own."""
    if "FASTFT_AGENT" in os.environ:
        from fastft.launch.rank import settle

        settle()
    try:
        main()
    except SystemExit as e:
        leave(e.code or 0)


def leave(code: int) -> NoReturn:
    """End this process at once, with its exit handlers run and its output written.

    Gloo's threads outlive their process group wherever something (DeepSpeed, a graph) still holds it. Such a thread, letting go of a tensor
    while the interpreter shuts down, ends the process with an abort ("terminate called without an active exception"): a good run would
    report failure. Seen with torch 2.13 on every second exit of ranks that had just gathered.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as e:
            code = code or 1
            if stream is sys.stdout:
                print(f"error: standard output: {e.strerror}.", file=sys.stderr)
    os._exit(code)


def _common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    # --local_rank: the deepspeed launcher passes it to every module; the environment says the same
    if version:
        print(__version__)
        raise typer.Exit()
    # Read when torch and transformers are imported, which every verb does for itself. The spin count: OpenMP threads that wait in a
    # busy loop take the core from the thread they wait for when something else runs too (30 times slower, seen on 2 busy cores).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _explain(error: UserError) -> None:
    if os.environ.get("FASTFT_MISTAKE"):  # tells the launcher that another try would meet the same
        Path(os.environ["FASTFT_MISTAKE"]).write_text(str(error), encoding="utf-8")
    console = Console(stderr=True, soft_wrap=True)
    rank = os.environ.get("RANK", "0")
    console.print(f"error{'' if rank == '0' else f' (rank {rank})'}: ", style="bold red", end="")
    console.print(error.message, highlight=False, markup=False)
    if error.hint:
        console.print(error.hint, style="yellow", highlight=False, markup=False)


def _run(config: configuration.Config, **how) -> None:
    from fastft.train.engine import stop_process_group
    from fastft.train.loop import train as run

    try:
        result = run(config, **how)
    finally:
        stop_process_group()
    if os.environ["RANK"] != "0":
        return
    for name, metrics in result["eval"].items():
        print(
            f"{name}: " + "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        )
    print(f"{result['step']} steps, {result['tokens_per_second']:,.0f} tokens/s. Model: {result['model']}")
