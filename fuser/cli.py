"""The command line: what to call, what to print, how to exit.  Exit codes: 0 done, 1 a check failed, 2 bad input."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fuser.errors import FuserError, InputError

app = typer.Typer(
    name="fuser",
    help="Optimize ONNX models with verified graph rewrites; say what was done, and why not elsewhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PIPE_WIDTH = 120
"""Columns where there is no terminal to ask."""

_on_terminal = sys.stdout is not None and sys.stdout.isatty()  # it may be closed
out = Console(width=None if _on_terminal or "COLUMNS" in os.environ else PIPE_WIDTH)
err = Console(stderr=True)

In = Annotated[Path, typer.Argument(metavar="IN", help="An .onnx file.")]
Passes = Annotated[str | None, typer.Option("--passes", metavar="A,B", help="Only these passes, in this order.")]
Skip = Annotated[str | None, typer.Option("--skip", metavar="A,B", help="All passes but these.")]
Freeze = Annotated[
    bool, typer.Option("--freeze-inputs", help="Make weights that are also graph inputs constant; drop those inputs.")
]
Shared = Annotated[
    str, typer.Option("--shared-weights", metavar="copy|refuse", help="What to do with a shared weight.")
]
Growth = Annotated[
    int | None,
    typer.Option(
        "--max-growth",
        metavar="N",
        min=0,
        help="Elements that one folded constant may add; default 65536, or a 32nd of the parameters.",
    ),
]

InputShape = Annotated[
    list[str] | None, typer.Option("--input-shape", metavar="NAME:1,3,224,224", help="Of an input; repeatable.")
]
Inputs = Annotated[
    Path | None, typer.Option("--inputs", metavar="FILE", help="Data for the check: .npz, .npy, test_data_set_0/.")
]
AsJson = Annotated[bool, typer.Option("--json", help="The whole story as JSON, instead of the table.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.json", help="Write the whole story to a file, too.")
]


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"graph-fuser {metadata.version('graph-fuser')}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Optimize ONNX models with verified graph rewrites; say what was done, and why not elsewhere."""


_VERIFY: dict[str, Any] = {"auto": True, "whole": "whole", "none": False}


@app.command()
def optimize(
    models: Annotated[list[Path], typer.Argument(metavar="IN [OUT]", help="Default for OUT: IN.fused.onnx.")],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", metavar="DIR", help="Take every argument as an IN; write them to DIR."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", metavar="N", help="With --output-dir: models at a time.")
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json-lines", help="With --output-dir: a JSON line for each.")] = False,
    passes: Passes = None,
    skip: Skip = None,
    then: Annotated[
        str | None, typer.Option("--then", metavar="A,B", help="Other optimizers afterwards: onnxsim, onnxslim, ...")
    ] = None,
    freeze_inputs: Freeze = False,
    shared_weights: Shared = "copy",
    max_growth: Growth = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done; write nothing.")] = False,
    verify: Annotated[
        str, typer.Option("--verify", metavar="auto|whole|none", help="Check before writing; whole: also over 512 MB.")
    ] = "auto",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="The same as --verify=none.")] = False,
    on_failure: Annotated[
        str, typer.Option("--on-failure", metavar="rollback|abort", help="When the result is not equivalent.")
    ] = "rollback",
    input_shape: InputShape = None,
    inputs: Inputs = None,
    single_file: Annotated[bool, typer.Option("--single-file", help="Weights inside OUT; default: as in IN.")] = False,
    external_data: Annotated[bool, typer.Option("--external-data", help="Weights in OUT.data.")] = False,
    threshold: Annotated[
        int | None,
        typer.Option(
            "--threshold", metavar="BYTES", min=0, help="From this size on weights go to OUT.data; default 1024."
        ),
    ] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Also measure the latency before and after.")] = False,
    bench_seconds: Annotated[float, typer.Option("--bench-seconds", help="How long each arm is measured.")] = 10.0,
    json: AsJson = False,
    report: ReportFile = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for each candidate.")] = False,
) -> None:
    """Optimize IN, check that the result is equivalent, and write it to OUT."""
    from fuser import api
    from fuser.sources import default_output

    _writable(report, *models, *(map(default_output, models)))
    if verify not in _VERIFY:
        raise InputError(f"--verify takes auto, whole or none, not {verify!r}")
    no_verify = no_verify or verify == "none"
    _not_both("--no-verify", no_verify, "--verify=whole", verify == "whole")
    _not_both("--no-verify", no_verify, "--inputs", inputs)
    _not_both("--no-verify", no_verify, "--input-shape", input_shape and not bench)
    _not_both("--no-verify", no_verify, "--on-failure=abort", on_failure == "abort")
    _not_both("--single-file", single_file, "--external-data", external_data)
    _not_both("--single-file", single_file, "--threshold", threshold is not None)
    _not_both("--quiet", quiet, "--json", json)
    _not_both("--quiet", quiet, "--json-lines", json_lines)
    _not_both("--quiet", quiet, "--verbose", verbose)
    asked = _asked(passes, skip, freeze_inputs, shared_weights, max_growth)
    checking: dict[str, Any] = {
        "then": _names(then) or (),
        "verify": False if no_verify else _VERIFY[verify],
        "on_failure": on_failure,
        "input_shapes": _shapes(input_shape),
        "inputs": inputs,
        "layout": "single" if single_file else "external" if external_data else "auto",
        "threshold": 1024 if threshold is None else threshold,
    }
    if output_dir is not None:
        if plan or bench or report or json or verbose:
            raise InputError("--plan, --bench, --json, --report and --verbose are for one model, not for --output-dir")
        _optimize_many(models, output_dir, jobs, json_lines, quiet, {**asked, **checking})
        return
    if jobs is not None or json_lines:
        raise InputError("--jobs and --json-lines are for --output-dir")
    if len(models) > 2:
        raise InputError("give IN and OUT, or several models and --output-dir")
    model, output = models[0], models[1] if len(models) > 1 else None
    if bench:
        from fuser.bench import check_seconds

        check_seconds(bench_seconds)
    if bench and not plan and os.path.realpath(output or default_output(model)) == os.path.realpath(model):
        raise InputError("--bench compares IN with OUT, so OUT must be another file")
    if json and bench:
        raise InputError("--json is the story of the rewrites; measure with `fuser bench IN OUT --json`")
    with _progress(quiet or json) as progress:
        if plan:
            story = api.explain(model, progress=progress, **asked)
        else:
            story = api.optimize(model, output, progress=progress, **asked, **checking).report
    if report is not None:
        _write(report, story.to_json())
    if json:
        print(story.to_json())
    elif not quiet:
        out.print(story.render(verbose=verbose, width=out.width))
        if plan:
            out.print(f"a plan: nothing was written{' or measured' if bench else ''}")
    if bench and not plan:
        from fuser.bench import benchmark

        with _progress(quiet) as progress:
            measured = benchmark(
                model,
                story.written[0],
                input_shapes=_shapes(input_shape),
                seconds=bench_seconds,
                progress=progress or _mute,
            )
        out.print(measured.render())


def _optimize_many(
    models: list[Path], folder: Path, jobs: int | None, json_lines: bool, quiet: bool, options: dict[str, Any]
) -> None:
    """Several models into one folder; exit code 1 when one of them fails, whatever becomes of the others."""
    import json

    from fuser.many import Outcome, optimize_many

    def tell(outcome: Outcome) -> None:
        if json_lines:
            print(json.dumps(outcome.to_dict(), default=str), flush=True)

    outcomes = optimize_many(models, folder, jobs=jobs, progress=tell, **options)
    if not json_lines and not quiet:
        table = Table("model", "applied", "missed", "result", box=None, pad_edge=False)
        for one in outcomes:
            story = one.result.report if one.result else None
            counts = ("", "") if story is None else (str(len(story.applied)), str(len(story.missed)))
            table.add_row(
                str(one.path), *counts, Text(f"failed: {one.error}" if one.result is None else str(one.result.model))
            )
        out.print(table)
    if quiet:
        for one in outcomes:
            if not one.ok:
                _tell_error(one.error if one.path in one.error else f"{one.path}: {one.error}")
    if not all(one.ok for one in outcomes):
        raise typer.Exit(1)


@app.command()
def explain(
    model: In,
    passes: Passes = None,
    skip: Skip = None,
    freeze_inputs: Freeze = False,
    shared_weights: Shared = "copy",
    max_growth: Growth = None,
    json: AsJson = False,
) -> None:
    """One line for each candidate in IN: applied, or missed with the code, the reason and the remedy."""
    from fuser import api

    with _progress(quiet=json) as progress:
        asked = _asked(passes, skip, freeze_inputs, shared_weights, max_growth)
        story = api.explain(model, progress=progress, **asked)
    if json:
        print(story.to_json())
        return
    for remark in (*story.applied, *story.missed):
        print(remark)
    out.print(story.change_table(out.width))
    for warning in story.warnings:
        err.print(f"warning: {warning}", markup=False, soft_wrap=True)
    print(f"{len(story.applied)} would be applied, {len(story.missed)} missed; nothing was written")


@app.command()
def verify(
    before: Annotated[Path, typer.Argument(metavar="A", help="The model that is taken as right.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The model that is judged.")],
    input_shape: InputShape = None,
    inputs: Inputs = None,
    exact: Annotated[bool, typer.Option("--exact", help="Ask for bit-identical outputs.")] = False,
    freeze_inputs: Annotated[
        bool, typer.Option("--freeze-inputs", help="Inputs of A that have a default may be missing in B.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the generated inputs.")] = 0,
    json: AsJson = False,
) -> None:
    """Say whether two ONNX models are the same function: equivalent, different, incompatible or unverifiable."""
    import json as encoder

    from fuser import proof

    with _progress(quiet=json):
        found = proof.verify(
            before,
            after,
            inputs=inputs,
            input_shapes=_shapes(input_shape),
            contract="exact" if exact else "rounding",
            seed=seed,
            removed_inputs=_inputs_with_default(before) if freeze_inputs else (),
        )
    if json:
        print(encoder.dumps(found.to_dict(), indent=2, default=str))
    else:
        out.print(found.render(out.width))
    raise typer.Exit({"equivalent": 0, "unverifiable": 2}.get(found.verdict, 1))


@app.command()
def bisect(
    model: In,
    other: Annotated[Path | None, typer.Argument(metavar="[B]", help="A model made from IN by another tool.")] = None,
    passes: Passes = None,
    skip: Skip = None,
    freeze_inputs: Freeze = False,
    shared_weights: Shared = "copy",
    max_growth: Growth = None,
    input_shape: InputShape = None,
    inputs: Inputs = None,
) -> None:
    """Find where a model goes wrong: the first wrong rewrite of IN, or the first tensor in which B differs from IN."""
    from fuser import api

    if other is not None and (passes or skip or shared_weights != "copy" or max_growth is not None):
        raise InputError("--passes, --skip, --shared-weights and --max-growth are for the rewrites of IN; leave out B")
    with _progress(quiet=False) as progress:
        if other is not None:
            from fuser.proof.bisect import first_difference

            found: Any = first_difference(
                model,
                other,
                inputs=inputs,
                input_shapes=_shapes(input_shape),
                removed_inputs=_inputs_with_default(model) if freeze_inputs else (),
            )
        else:
            asked = _asked(passes, skip, freeze_inputs, shared_weights, max_growth)
            found = api.bisect(model, inputs=inputs, input_shapes=_shapes(input_shape), progress=progress, **asked)
    if found is None:
        print("no difference was found" if other else "no wrong rewrite was found")
        return
    print(f"first difference: {found}" if other else f"first wrong rewrite: {found}")
    raise typer.Exit(1)


@app.command()
def bench(
    before: Annotated[Path, typer.Argument(metavar="A", help="An .onnx file, or .pt2 of torch.export.")],
    after: Annotated[Path | None, typer.Argument(metavar="[B]", help="What A is compared with.")] = None,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda")] = "cpu",
    arms: Annotated[
        str | None, typer.Option("--arms", metavar="A,B", help="Only these ways to run the models.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Default: the cores this process may use.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="The size of the first axis.")] = None,
    input_shape: InputShape = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="fp32|fp16|bf16", help="For torch models.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long each arm is measured.")] = 10.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs and of the order of the rounds.")] = 0,
    profile: Annotated[bool, typer.Option("--profile", help="Also the operators that take the time.")] = False,
    json: AsJson = False,
    report: ReportFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="The distributions, .png or .svg.")
    ] = None,
    fail_if_slower: Annotated[
        float | None,
        typer.Option("--fail-if-slower", metavar="[PERCENT]", help="Exit 1 when B is slower, or slower than that."),
    ] = None,
) -> None:
    """Measure the latency of A, or of A against B: faster, slower, no measurable change or inconclusive."""
    import json as encoder

    from fuser.bench import benchmark

    for path in (report, plot):
        _writable(path, before, *([] if after is None else [after]))
    if plot is not None:
        from fuser.bench.plot import check

        check(plot)
    if fail_if_slower is not None and after is None:
        raise InputError("--fail-if-slower compares two models; give A and B")
    with _progress(quiet=json) as progress:
        result = benchmark(
            before,
            after,
            device=device,
            threads=threads,
            batch=batch,
            input_shapes=_shapes(input_shape),
            dtype=dtype,
            seconds=seconds,
            seed=seed,
            arms=_names(arms),
            profile=profile,
            progress=progress or _mute,
        )
    if report is not None or json:
        story = encoder.dumps(result.to_dict(), indent=2, default=str)
    if report is not None:
        _write(report, story)
    if json:
        print(story)
    else:
        out.print(result.render())
    if plot is not None:
        result.plot(plot)
    if result.interrupted:
        raise typer.Exit(130)
    if fail_if_slower is not None and result.slower_than(fail_if_slower):
        raise typer.Exit(1)
    if not result.measured:
        raise typer.Exit(2)


@app.command("passes")
def list_passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A pass to print the page of.")] = None,
    pages: Annotated[
        Path | None, typer.Option("--pages", metavar="DIR", help="Write a page for each pass, DIR/NAME.md.")
    ] = None,
) -> None:
    """The registered passes in the order in which they run; or the page of one: equation, refusals, contract."""
    from fuser import registry
    from fuser.pages import page

    found = registry.load()
    if name is not None and pages is not None:
        raise InputError("--pages writes the page of each pass; leave out its name")
    if name is not None:
        print(page(found.info(name)), end="")
        return
    if pages is not None:
        try:
            pages.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {pages}: {error.strerror}") from None
        for info in found.passes:
            _write(pages / f"{info.name}.md", page(info))
        return
    table = Table("pass", "contract", "hosts", "from", "what it does", box=None, pad_edge=False)
    for info in found.passes:
        table.add_row(info.name, info.cls.contract.value, ", ".join(info.cls.hosts), info.owner, info.summary)
    out.print(table)
    for broken in found.broken:
        err.print(f"warning: {broken}", markup=False)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    gc.disable()  # a graph is many linked objects that stay; the cyclic collector would visit them again and again
    try:
        _run(_with_values(sys.argv[1:]))
    except FuserError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)
    except BrokenPipeError:  # the reader of our output has seen enough
        _close_output()
        sys.exit(0)
    except Exception as error:
        if isinstance(error, OSError) and _output_is_stuck():
            _close_output()
            _fail(f"cannot print the result: {error.strerror}", 2)
        if os.environ.get("FUSER_DEBUG"):
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (FUSER_DEBUG=1 shows where)", 1)
    finally:
        gc.freeze()  # nor is there anything to collect at the end


def _with_values(args: list[str]) -> list[str]:
    """`--fail-if-slower` may stand without its number, which typer does not know how to say: that is 0 %."""
    given = list(args)
    for i, arg in enumerate(args):
        if arg == "--fail-if-slower" and not "".join(args[i + 1 : i + 2]).replace(".", "", 1).isdigit():
            given[i] = "--fail-if-slower=0"
    return given


def _run(args: list[str]) -> None:
    try:
        app(args)
    except SystemExit:  # which is how it ends, in any case
        if sys.stdout is not None:
            sys.stdout.flush()  # where this fails, it can still be told
        raise


def _output_is_stuck() -> bool:
    """Whether standard output takes nothing more: its disk is full, say."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _close_output() -> None:
    """Nothing more is printed, also not at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    _tell_error(message)
    sys.exit(code)


def _tell_error(message: str) -> None:
    err.print(f"error: {' '.join(message.split())}", style="red", markup=False, highlight=False, soft_wrap=True)


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{text!r} names nothing; give names with commas between them")
    return names


def _asked(
    passes: str | None, skip: str | None, freeze_inputs: bool, shared_weights: str, max_growth: int | None
) -> dict[str, Any]:
    """The options that optimize, explain and bisect have in common, as arguments."""
    return {
        "passes": _names(passes),
        "skip": _names(skip) or (),
        "freeze_inputs": freeze_inputs,
        "shared_weights": shared_weights,
        "max_growth": max_growth,
    }


def _inputs_with_default(model: Path) -> set[str]:
    from fuser import files
    from fuser.proof.interface import inputs_with_default

    return inputs_with_default(files.load(model).proto.graph)


def _not_both(one: str, given: Any, other: str, also_given: Any) -> None:
    """Complain of two options of which one would be ignored."""
    if given and also_given:
        raise InputError(f"{one} and {other} contradict each other; leave one of them out")


def _shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    """`name:1,3,224,224` as a dict; the name may hold colons."""
    shapes = {}
    for text in texts or ():
        name, _, dims = text.rpartition(":")
        sizes = dims.split(",") if dims else []
        if not name or not all(size.strip().isdigit() for size in sizes):
            raise InputError(f"--input-shape takes NAME:1,3,224,224, not {text!r}")
        if name in shapes:
            raise InputError(f"--input-shape is given twice for {name!r}; leave one of them out")
        shapes[name] = tuple(int(size) for size in sizes)
    return shapes or None


def _writable(path: Path | None, *models: Path) -> None:
    """Complain before the work, not after it, of a file that cannot be written, or is a model or its data."""
    if path is None:
        return
    if os.path.realpath(path) in {os.path.realpath(f"{model}{end}") for model in models for end in ("", ".data")}:
        raise InputError(f"cannot write {path}: it is the place of a model; choose another name")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; add a file name")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: permission denied")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def _mute(stage: str) -> None:
    """Say nothing."""


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """A line that says what is going on, on a terminal; nothing in a pipe."""
    if quiet or not err.is_terminal:
        yield None
        return
    with err.status("reading") as status:
        yield lambda stage: status.update(stage)
