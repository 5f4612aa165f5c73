"""The command line, ``cggr``: race, advise, score, show, bench and info."""

from __future__ import annotations

import datetime
import math
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(
        f"cggr: the command line needs {error.name}: pip install 'cggr[race]' for PyTorch, "
        "or 'cggr[race-jax]' for JAX"
    ) from None

from cggr import RoutingConfig, __version__
from cggr.bench.settings import BENCHMARKS, BenchError, BenchSettings
from cggr.race.settings import (
    BACKENDS,
    DEFAULT_LANES,
    LANES,
    SCORINGS,
    SELECTIONS,
    Budget,
    RaceError,
    RaceSettings,
)
from cggr.reference import ReferenceFileError

# Frameworks take seconds to import: commands import the one they need, when they need it.

BAD_INPUT, INTERRUPTED = 2, 130


class _Group(click.Group):
    """A group of commands whose every complaint is one line on stderr and exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except (click.ClickException, RaceError, BenchError, ReferenceFileError) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else error
            click.echo(f"cggr: {' '.join(str(message).split())}", err=True)
            sys.exit(BAD_INPUT)
        except OSError as error:
            if error.filename is None:
                raise
            click.echo(f"cggr: {error.filename}: {error.strerror}", err=True)
            sys.exit(BAD_INPUT)
        except (click.Abort, KeyboardInterrupt):
            click.echo("cggr: interrupted", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(code or 0)


class _Amount(click.ParamType):
    """An amount of training, such as 60s or 500steps."""

    name = "AMOUNT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Budget:
        try:
            return value if isinstance(value, Budget) else Budget.parse(value)
        except RaceError as error:
            self.fail(str(error), param, ctx)


def _a_number(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuses NaN, which is in every range."""
    if math.isnan(value):
        raise click.BadParameter("nan is no number")
    return value


class _Names(click.ParamType):
    """Names separated by commas, or a sequence of them."""

    name = "NAMES"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(name.strip() for name in parts)


class _Numbers(click.ParamType):
    """Numbers separated by commas, or a list of a configuration."""

    name = "NUMBERS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(float(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a list of numbers, such as 1e-3,3e-3", param, ctx)


def _configure(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Takes the options of a TOML file for defaults, and its lanes for the lanes there are."""
    if path is None:
        return
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}", ctx, param) from None
    options = {key.replace("-", "_"): value for key, value in options.items()}
    lanes = options.get("lanes", {})
    ctx.obj = {} if isinstance(lanes, str) else options.pop("lanes", {})
    if not isinstance(ctx.obj, dict):
        raise click.BadParameter(f"{path}: lanes must be tables [lanes.NAME]", ctx, param)
    known = {option.name: option for option in ctx.command.params if option is not param}
    if unknown := sorted(options.keys() - known.keys()):
        raise click.BadParameter(f"{path}: race has no option {unknown[0]!r}", ctx, param)
    # As the command line has them: what reads that refuses all that is wrong.
    for key, value in options.items():
        is_multiple = known[key].multiple
        is_list = is_multiple or isinstance(known[key].type, _Numbers)
        if isinstance(value, dict) or (isinstance(value, list) and not is_list):
            raise click.BadParameter(f"{path}: {key} must be one value, got {value}", ctx, param)
        value = [value] if is_multiple and not isinstance(value, list) else value
        options[key] = [str(item) for item in value] if isinstance(value, list) else str(value)
    if ctx.obj:
        options["lanes"] = tuple(ctx.obj)  # not joined: a table's name may have a comma
    ctx.default_map = options


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="cggr")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Confidence-Gated Gradient Routing: spend the backward pass on the tokens worth learning."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Applies option decorators in reading order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_PATH = click.Path(exists=True, path_type=Path)
_POSITIVE = click.IntRange(min=1)
_MODEL = click.option(
    "--model",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Local folder of a Hugging Face causal language model, with its tokenizer.",
)
_TEXT = click.option(
    "--text",
    type=_PATH,
    multiple=True,
    show_default="the Python standard library's source",
    help="File or folder; repeatable.",
)
_PROMPT = click.option(
    "--prompt",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Part of every sequence without labels, as a prompt has none.",
)


@main.command(context_settings={"show_default": True})
@_options(
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        callback=_configure,
        is_eager=True,
        expose_value=False,
        help="TOML file of these options, and of lanes as tables [lanes.NAME].",
    ),
    click.option("--budget", type=_Amount(), default="60s", help="Training per lane and seed."),
    click.option(
        "--lanes",
        type=_Names(),
        default=",".join(DEFAULT_LANES),
        help=f"Who races, separated by commas: {', '.join(LANES)}.",
    ),
    click.option(
        "--scoring",
        type=click.Choice(SCORINGS),
        default="combined",
        help="How hard a token is, for cggr.",
    ),
    click.option(
        "--selection",
        type=click.Choice(SELECTIONS),
        default="importance",
        help="What cggr trains on; stratified and importance are recommended.",
    ),
    click.option(
        "--ratio",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.25,
        help="Part of each batch that random and cggr train on.",
    ),
    click.option(
        "--router-layers", type=_POSITIVE, default=1, help="Layers of the router that scores."
    ),
    _TEXT,
    click.option(
        "--model",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Local folder of a Hugging Face causal language model to fine-tune.",
    ),
    click.option("--seeds", type=_POSITIVE, default=1, help="Number of repetitions."),
    click.option(
        "--eval-every",
        type=_Amount(),
        show_default="a tenth of the budget",
        help="Training between evaluations.",
    ),
    click.option("--batch-size", type=_POSITIVE, default=16),
    click.option("--sequence-length", type=click.IntRange(min=2), default=64),
    click.option(
        "--learning-rate",
        type=click.FloatRange(0, min_open=True),
        show_default="6e-3; 5e-5 with --model",
        help="Peak; it decays over the budget.",
    ),
    click.option(
        "--learning-rates",
        type=_Numbers(),
        default=(),
        show_default="none",
        help="Peaks of which every lane has its best, by its first seed.",
    ),
    _PROMPT,
    click.option(
        "--pairs",
        is_flag=True,
        help='The text is JSON lines of "prompt" and "completion"; completions have labels.',
    ),
    click.option(
        "--noise",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        help="Part of the lines to train on whose words are random.",
    ),
    click.option(
        "--reference",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder of the model whose losses excess_loss is in excess of.",
    ),
    click.option(
        "--compiled",
        is_flag=True,
        help="Compiled steps, on a GPU in CUDA graphs and bfloat16; one lane after the other.",
    ),
    click.option(
        "--memory",
        type=click.FloatRange(0, min_open=True),
        metavar="GIB",
        show_default="all",
        help="GPU memory that a lane may take.",
    ),
    click.option("--save", metavar="LANE", help="Leave this lane's model in the run's folder."),
    click.option("--hidden-size", type=_POSITIVE, default=192),
    click.option("--head-size", type=_POSITIVE, default=32),
    click.option(
        "--kv-heads",
        type=_POSITIVE,
        show_default="as many as of queries",
        help="Heads of keys and values.",
    ),
    click.option("--layers", type=_POSITIVE, default=4),
    click.option("--vocab-size", type=click.IntRange(min=257), default=4096),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto"),
    click.option(
        "--backend", type=click.Choice(BACKENDS), default="torch", help="PyTorch or JAX with Flax."
    ),
    click.option(
        "--threads", type=_POSITIVE, show_default="the backend's choice", help="CPU threads."
    ),
    click.option("--name", show_default="date, time and settings", help="Name of the run."),
    click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("runs"),
        help="Folder of the runs.",
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with the race of this --name; with more lanes or seeds.",
    ),
)
@click.pass_context
def race(
    ctx: click.Context,
    name: str | None,
    output: Path,
    threads: int | None,
    resume: bool,
    **options: Any,
) -> None:
    """Race dense, random and CGGR training at an equal budget.

    Trains one small language model on real text in several lanes and shows which learns fastest.
    The report goes to runs/NAME: report.png, results.json and table.txt.
    """
    if options["model"] is not None:
        for option in ("hidden_size", "head_size", "kv_heads", "layers", "vocab_size"):
            if ctx.get_parameter_source(option) is not click.core.ParameterSource.DEFAULT:
                raise click.UsageError(
                    f"--{option.replace('_', '-')} shapes a new model; --model brings its own"
                )
    settings = RaceSettings(**options, tables=ctx.obj or {})
    if resume and name is None:
        raise click.UsageError("--resume needs the --name of the race to go on with")
    if name is None:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{now}-{settings.selection}-{settings.ratio:g}-{settings.budget}"
    elif Path(name).name != name or name in ("", ".", ".."):
        raise click.BadParameter(f"{name!r} is not a plain name", param_hint="--name")
    if not resume and (output / name / "results.json").exists():
        raise click.BadParameter(
            f"{output / name} holds the results of an earlier race", param_hint="--name"
        )
    # Threads that wait by spinning slow a shared machine down several times; torch reads this once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from cggr.race.backend import load_backend
        from cggr.race.main import race as run

        backend = load_backend(settings.backend)
    except ModuleNotFoundError as error:
        extra = "race" if settings.backend == "torch" else "race-jax"
        raise click.UsageError(
            f"cggr race --backend {settings.backend} needs {error.name}: "
            f"pip install 'cggr[{extra}]'"
        ) from None

    folder = output / name
    complete = run(settings, backend, folder, Console(), threads=threads, resume=resume)
    ctx.exit(0 if complete else INTERRUPTED)


@main.command(context_settings={"show_default": True})
@_options(
    click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)), metavar="[NAME]..."),
    click.option("--list", "listing", is_flag=True, help="Say what can be measured, and stop."),
    click.option("--quick", is_flag=True, help="Few rounds, and the first shape only."),
    click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("benchmarks") / "results",
        help="Folder of the results.",
    ),
    click.option(
        "--cggr-050",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder with the modules of cggr 0.5.0, to compare with.",
    ),
    click.option(
        "--case",
        "cases",
        type=click.IntRange(min=1),
        multiple=True,
        metavar="NUMBER",
        help="A shape to measure, by its number; repeatable. All of them otherwise.",
    ),
    click.option(
        "--only",
        multiple=True,
        metavar="PATTERN",
        help="Measure contestants of this name, like 'token*'; repeatable.",
    ),
)
def bench(
    names: tuple[str, ...],
    listing: bool,
    quick: bool,
    out: Path,
    cggr_050: Path | None,
    cases: tuple[int, ...],
    only: tuple[str, ...],
) -> None:
    """Measure the kernels and losses on a CUDA device, against the peers that are installed.

    Shows a table for every shape and writes OUT/NAME.json; all benchmarks when none is named.
    """
    if listing:
        table = Table(show_header=False, box=None, pad_edge=False)
        for row in BENCHMARKS.items():
            table.add_row(*row)
        Console().print(table, highlight=False)
        return
    settings = BenchSettings(quick=quick, cggr_050=cggr_050, cases=cases, only=only)
    from cggr.bench.main import run_benchmarks

    run_benchmarks(names, settings, out, Console())


@main.command(context_settings={"show_default": True})
@_options(
    _MODEL,
    _TEXT,
    click.option(
        "--output",
        required=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for tokens and losses; one that was begun is gone on with.",
    ),
    click.option("--context", type=_POSITIVE, default=1024, help="Tokens seen at once."),
    click.option(
        "--stride", type=_POSITIVE, show_default="half of --context", help="New tokens at once."
    ),
    click.option("--batch-size", type=_POSITIVE, default=8),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto"),
    click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32"
    ),
)
def score(**options: Any) -> None:
    """Compute a reference model's loss of every token of a text, for scoring="excess_loss".

    Writes OUTPUT/tokens.npy and OUTPUT/losses.npy, which cggr.reference.ReferenceLosses reads for
    PyTorch and Flax alike. Stopped, it goes on where it was when it is called again.
    """
    if options["stride"] is not None and options["stride"] > options["context"]:
        raise click.BadParameter("more than --context", param_hint="--stride")
    try:
        from cggr.score import score_text
    except ModuleNotFoundError as error:
        raise click.UsageError(f"cggr score needs {error.name}: pip install 'cggr[race]'") from None
    score_text(**options, console=Console())


@main.command(context_settings={"show_default": True})
@_options(
    click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    _MODEL,
    click.option("--scoring", type=click.Choice(SCORINGS), default="combined"),
    click.option("--selection", type=click.Choice(SELECTIONS), default="importance"),
    click.option("--ratio", type=click.FloatRange(0, 1, min_open=True), default=0.25),
    click.option(
        "--router-layers", type=_POSITIVE, show_default="the whole model", help="Layers that score."
    ),
    click.option("--context", type=click.IntRange(min=2), default=512, help="Tokens a sequence."),
    click.option("--max-tokens", type=click.IntRange(min=2), default=2048, help="From the start."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto"),
    click.option(
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        show_default="FILE.html",
        help="The page.",
    ),
)
def show(file: Path, output: Path | None, **options: Any) -> None:
    """Show which tokens of a text a model would be trained on, coloured by difficulty, as HTML."""
    try:
        from cggr.show import show_text
    except ModuleNotFoundError as error:
        raise click.UsageError(f"cggr show needs {error.name}: pip install 'cggr[race]'") from None
    output = Path(f"{file}.html") if output is None else output
    if not output.parent.is_dir():  # before the model runs
        raise click.BadParameter(f"no folder {output.parent}", param_hint="--output")
    found = show_text(file=file, output=output, **options)
    click.echo(
        f"{output}: {found['n_selected']:,} of {found['n_tokens']:,} tokens selected, of loss "
        f"{found['selected_loss']:.3f}; of all {found['loss']:.3f} nats"
    )


@main.command(context_settings={"show_default": True})
@_options(
    _MODEL,
    _TEXT,
    click.option(
        "--scoring",
        type=click.Choice([name for name in SCORINGS if name != "excess_loss"]),
        default="error_norm",
        help="What tokens are drawn by.",
    ),
    click.option(
        "--importance-floor",
        type=click.FloatRange(1e-30, 1e30),
        callback=_a_number,
        default=RoutingConfig().importance_floor,
        help="Added to every score.",
    ),
    click.option("--tokens", "n_tokens", type=_POSITIVE, default=65536, help="Tokens to score."),
    click.option("--context", type=click.IntRange(min=2), default=512, help="Tokens a sequence."),
    _PROMPT,
    click.option("--batch-size", type=_POSITIVE, default=8),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto"),
)
def advise(**options: Any) -> None:
    """Say what training a model on drawn tokens of a text would be worth, and at which ratio.

    Scores some of the text by the model as it is, trains nothing, and compares what drawn tokens
    are worth with the operations that their steps take.
    """
    try:
        from cggr.advise import advise_text
    except ModuleNotFoundError as error:
        raise click.UsageError(
            f"cggr advise needs {error.name}: pip install 'cggr[race]'"
        ) from None
    advise_text(**options, console=Console())


@main.command()
def info() -> None:
    """Show what this machine can use."""
    from cggr.race.machine import capabilities

    table = Table(show_header=False, box=None, pad_edge=False)
    for row in capabilities():
        table.add_row(*row)
    Console().print(table, highlight=False)
