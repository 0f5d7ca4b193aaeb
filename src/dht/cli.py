"""The `dht` command. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import DHTError

app = typer.Typer(
    name="dht",
    help="Transformers that decide for every input how many layers and head units to run.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Data = Annotated[
    str,
    typer.Option(
        help="Embedded name (vader), a folder with train|validation|test files or a saved data set, or a Hub id."
    ),
]
Model = Annotated[
    str,
    typer.Option(help="Embedded name (minilm, mpnet), a folder, a Hub id, or preset:tiny|preset:small (from scratch)."),
]
Budget = Annotated[float, typer.Option(help="Mean FLOPs at inference as a fraction of the dense model's, in (0, 1].")]
TextColumn = Annotated[
    str | None, typer.Option(help="Column of the text; two with a comma for sentence pairs. Default: inferred, said.")
]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label. Default: inferred, said.")]
BatchSize = Annotated[int, typer.Option(help="Rows per batch.")]
MaxLength = Annotated[int, typer.Option(help="Tokens that a text is cut to.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16 (autocast).")]
Limit = Annotated[
    str | None,
    typer.Option(help="At most so many rows of train,validation,test: three numbers; drawn by a hash of the texts."),
]
Seed = Annotated[int, typer.Option(help="Seed of data order, initial heads and exploration.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already in the folder.")]


def _say(message: str) -> None:
    typer.echo(f"dht: {message}", err=True)


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"dht {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    processes, command = os.environ.get("WORLD_SIZE", "1"), context.invoked_subcommand
    several = "LOCAL_RANK" in os.environ and processes.isdecimal() and int(processes) > 1
    if several and command not in ("train", "doctor"):
        raise DHTError(
            f"dht {command} was started in {processes} processes (WORLD_SIZE), but runs in one; start it without "
            "torchrun or accelerate launch (dht train takes several)"
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for both runs and the page.")] = Path("runs/demo"),
    data: Data = "vader",
    model: Model = "minilm",
    budget: Budget = 0.26,
    epochs: Annotated[float, typer.Option(help="Passes over the training split.")] = 1.0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train dense and dynamic on embedded data, compare them in one table, and draw the page."""
    from rich.console import Console

    from .config import TrainSettings
    from .demo import demo as run
    from .report.table import summary_table

    settings = TrainSettings(
        data=data, model=model, out=out, budget=budget, epochs=epochs, seed=seed, task="single",
        train_budget=max(budget, 0.5),  # a quarter of a single epoch would teach little
    )  # fmt: skip
    rows = run(settings, overwrite=overwrite, say=_say)
    Console().print(summary_table(rows, title=f"{data} test split, {model}, budget {budget:g}"))
    _say(f"page: {out / 'page.html'}; model: {out / 'dht'}; try: echo 'what a film' | dht predict {out / 'dht'}")


@app.command()
def train(
    data: Data = "vader",
    out: Annotated[Path, typer.Option(help="Folder that the run is written to.")] = Path("runs/train"),
    model: Model = "minilm",
    budget: Budget = 0.26,
    train_budget: Annotated[
        float | None,
        typer.Option(help="FLOPs of the whole training, of dense training; unset = --budget. Fewer steps meet it."),
    ] = None,
    search: Annotated[str, typer.Option(help="tree (decide after every layer) or integrated (decide once).")] = "tree",
    ffn: Annotated[
        str, typer.Option(help="coupled (units carry FFN neurons) or dense (attention heads alone).")
    ] = "coupled",
    epochs: Annotated[float, typer.Option(help="Passes over the training split that dense training takes.")] = 3.0,
    seed: Seed = 0,
    batch_size: Annotated[
        int, typer.Option(help="Rows per batch; in training fewer, 8 at least, where the budget leaves few steps.")
    ] = 32,
    lr: Annotated[
        float,
        typer.Option(help="Peak learning rate, decaying linearly to 0; up to twice that for narrow layers."),
    ] = 1e-4,
    max_length: MaxLength = 128,
    device: Device = "auto",
    dtype: Dtype = "float32",
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    warm_start: Annotated[float, typer.Option(help="Budget of the first training step, in (0, 1].")] = 0.4,
    settle: Annotated[
        float, typer.Option(help="Share of the steps after which a step's budget is 1.4 times --budget.")
    ] = 0.35,
    crop: Annotated[
        int, typer.Option(help="Tokens that longer texts are cut to in the first 70% of the steps; 0 = never.")
    ] = 64,
    lexical: Annotated[
        bool, typer.Option(help="An exit before layer 1 that reads words and short phrases; sure rows run no layer.")
    ] = True,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 = once an epoch.")] = 0,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    class_weights: Annotated[
        str, typer.Option(help="none, or balanced: every class counts alike in the loss, however rare it is.")
    ] = "none",
    task: Annotated[
        str,
        typer.Option(
            help="single, multi (labels are lists), regression, token (a tag a word), auto (one of these, as the data "
            "look, said), or embedding."
        ),
    ] = "auto",
    limit: Limit = None,
    dense: Annotated[bool, typer.Option("--dense", help="Train the plain full model instead: the reference.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint in --out.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a dynamic model; leaves the model and report.json in --out."""
    from rich.console import Console

    from .compare.settings import listed_numbers
    from .config import TrainSettings
    from .report.table import print_report

    settings = TrainSettings(
        data=data, model=model, out=out, budget=budget, train_budget=train_budget, search=search, ffn=ffn,
        epochs=epochs, seed=seed, batch_size=batch_size, lr=lr, max_length=max_length, device=device, dtype=dtype,
        accumulate=accumulate, warm_start=warm_start, settle=settle, crop=crop, lexical=lexical,
        save_every=save_every, text_column=text_column, label_column=label_column, class_weights=class_weights,
        task=task, dense=dense, limit=listed_numbers("--limit", limit, int) if limit else None,
    )  # fmt: skip
    settings.check()
    from .checkpoints import complete_checkpoints
    from .train import train as run

    try:
        report = run(settings, resume=resume, overwrite=overwrite, say=_say)
    except KeyboardInterrupt:
        saved = complete_checkpoints(out / "checkpoints")
        if saved:
            _say(f"interrupted; {saved[-1]} is whole: go on with the same command and --resume")
        else:
            _say("interrupted before the first checkpoint; --save-every N makes them more often")
        raise typer.Exit(130) from None
    if report:  # only the first rank has one
        print_report(report, Console())


@app.command()
def fit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Fine-tuned classifier: a folder, a Hub id, or a finished run.")
    ],
    data: Annotated[
        str, typer.Option(help="As for train; with --unlabelled also a file with a text or JSON object a line.")
    ],
    out: Annotated[Path, typer.Option(help="Folder that the run is written to.")] = Path("runs/fit"),
    split: Annotated[str, typer.Option(help="Split to fit on; better not the one that MODEL was trained on.")] = (
        "validation"
    ),
    rows: Annotated[int, typer.Option(help="Texts to fit on, drawn by the seed; 0 = all.")] = 500,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Leave the labels of the fit rows unread; nothing is fitted to them.")
    ] = False,
    budget: Annotated[float, typer.Option(help="FLOPs to serve at until told otherwise, in (0, 1].")] = 0.5,
    max_length: MaxLength = 128,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Seed of the rows and the folds.")] = 0,
    device: Device = "auto",
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    overwrite: Overwrite = False,
) -> None:
    """Give a fine-tuned classifier a budget dial, its weights untouched: accuracy against budget, reported."""
    from rich.console import Console

    from .dial import FitSettings, fit_run
    from .report.dial import dial_table

    settings = FitSettings(
        model=model, data=data, out=out, split=split, rows=rows, unlabelled=unlabelled, budget=budget,
        max_length=max_length, batch_size=batch_size, seed=seed, device=device, text_column=text_column,
        label_column=label_column,
    )  # fmt: skip
    report = fit_run(settings, overwrite=overwrite, say=_say)
    Console().print(dial_table(report))
    _say(f"no budget goes below {report['lowest_fraction']:.2f} (one layer and its exit); serves {budget:g}: {out}")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished dht train.")],
    data: Annotated[
        str | None, typer.Option(help="As for train; default: the data that the run was trained on.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    budget: Annotated[float | None, typer.Option(help="Budget to serve; default: the one trained for.")] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="learned, dense, random, hash, length, confidence, patience or static:LxK (L layers, K units)."
        ),
    ] = "learned",
    json: Annotated[Path | None, typer.Option(help="Write the report here; otherwise JSON goes to stdout.")] = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    device: Device = "auto",
    dtype: Dtype = "float32",
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
) -> None:
    """Measure accuracy, FLOPs and seconds of a policy on a split, against the dense model."""
    from .evaluate import evaluate as run
    from .load import data_of

    report = run(
        folder, data or data_of(folder), split=split, budget=budget, policy=policy, batch_size=batch_size,
        max_length=max_length, device=device, dtype=dtype, text_column=text_column, label_column=label_column,
        seed=seed, say=_say,
    )  # fmt: skip
    from rich.console import Console

    from ._files import write_json
    from .report.table import print_report

    print_report(report, Console(stderr=json is None))
    if json is not None:
        write_json(json, report)
    else:
        import json as encoder

        typer.echo(encoder.dumps(report))


@app.command()
def bench(
    data: Annotated[
        str | None, typer.Option(help="Texts, as for train; default: those of a trained run, else vader.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: folders of trained runs, or encoders as for train, or random:bert-base|bert-large."
            " Default: minilm, on a GPU both random sizes."
        ),
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            help="inference, training (a step); whole: a dht train against transformers' Trainer; bandits: ours against"
            " mabwiser and vowpalwabbit."
        ),
    ] = "inference,training",
    fractions: Annotated[str, typer.Option("--fractions", "--budgets", help="FLOPs fractions.")] = "1.0,.5,.26,.12",
    plans: Annotated[
        str,
        typer.Option(
            help="depth, heads, both; policy: as a trained run's policy decides; worst: every row its own head sets."
        ),
    ] = "depth,heads,both,policy,worst",
    batch: Annotated[str | None, typer.Option(help="Rows a batch; default: 1,32,128, on a GPU 128,512.")] = None,
    training_batch: Annotated[
        str | None, typer.Option(help="The same for training steps; default: 32, on a GPU that of --batch.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Tokens a row; mix: rows as the data has them, in random order.")
    ] = "32,128,mix",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 (autocast; on a GPU inference has such weights); default: both, on a GPU bfloat16."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed runs of each batch, 5 or more; medians are reported.")] = 5,
    growth: Annotated[
        Path | None, typer.Option(help="Measure how cost grows instead, and draw the picture here (.svg).")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the full result here.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
) -> None:
    """Measure what saved FLOPs are worth in seconds: a table, and one line of JSON on stdout."""
    from .bench.settings import parse

    settings = parse(
        data=data, models=model, what=what, fractions=fractions, plans=plans, batch=batch,
        training_batch=training_batch, tokens=tokens, dtype=dtype, device=device, repeats=repeats, seed=seed,
        text_column=text_column, label_column=label_column,
    )  # fmt: skip
    settings.check()
    # Read when torch is loaded: its profiler, which measures memory here, would talk on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import json as encoder

    from rich.console import Console

    from ._files import write_json, write_text

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    if growth is not None:
        from .bench.growth import measure_growth
        from .report.growth import growth_chart, print_growth

        result = measure_growth(settings, _say)
        print_growth(result, console)
        write_text(growth, growth_chart(result))
        line: object = result
    else:
        from .bench.run import bench as run
        from .bench.run import brief
        from .report.speed import print_speed

        result = run(settings, _say)
        print_speed(result, console)
        line = {"header": result["header"], "rows": brief(result["rows"])} | {
            part: result[part] for part in ("whole", "bandits") if part in result
        }
    if json is not None:
        write_json(json, result)
    typer.echo(encoder.dumps(line, separators=(",", ":")))


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished dht train.")],
    file: Annotated[str, typer.Argument(metavar="[FILE|-]", help="One text or JSON object a line; - = stdin.")] = "-",
    budget: Annotated[float | None, typer.Option(help="Budget to serve; default: the one trained for.")] = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    device: Device = "auto",
    text_column: TextColumn = None,
) -> None:
    """Classify texts: one JSON object a line, with the layers and heads that each one took."""
    from .data import read_texts
    from .load import check_budget, load_run
    from .predict import predict as run
    from .predict import to_line

    model, tokenizer = load_run(folder, device)
    if budget is not None:
        model.policy.set_budget(check_budget(budget))
    texts = read_texts(file, text_column=text_column, tagged=model.tags)
    for row in run(model, tokenizer, texts, batch_size=batch_size, max_length=max_length):
        sys.stdout.write(to_line(row) + "\n")
        sys.stdout.flush()


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished dht train.")],
    out: Annotated[Path, typer.Option(help="File (onnx) or folder (transformers, onnx-chain) to write.")],
    format: Annotated[
        str,
        typer.Option(
            help="transformers: the dense model in its own family. onnx: a fixed plan in one graph. onnx-chain: the "
            "policy with a graph a layer, for dht.onnx.ChainRunner."
        ),
    ] = "transformers",
    plan: Annotated[
        str | None,
        typer.Option(help="Of onnx: LxK (layers, head units), or a budget. Default: the budget trained for."),
    ] = None,
    max_length: MaxLength = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a trained run for another runtime, after a check that it answers alike."""
    import json as encoder

    from .export.run import export as run
    from .export.run import told

    report = run(folder, format, out, plan=plan, max_length=max_length, overwrite=overwrite)
    _say(told(report))
    typer.echo(encoder.dumps(report))


@app.command()
def doctor(
    dtype: Annotated[str, typer.Option(help="Precision that you mean to use: float32 or bfloat16.")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print versions, devices, threads and the cache, and warn of what will make dht slow."""
    from .doctor import examine, print_findings

    found = examine(dtype)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found))
    else:
        from rich.console import Console

        print_findings(found, Console())


@app.command()
def compare(
    data: Data = "vader",
    model: Model = "minilm",
    out: Annotated[Path, typer.Option(help="Folder of the comparison; what is finished there is kept.")] = Path(
        "runs/compare"
    ),
    methods: Annotated[str, typer.Option(help="all, or names after commas; a wrong name lists them.")] = "all",
    budgets: Annotated[str, typer.Option(help="Fractions of the dense FLOPs, after commas.")] = ".5,.26,.15,.10",
    seeds: Annotated[str, typer.Option(help="Whole numbers, after commas; a claim needs five.")] = "0,1,2,3,4",
    ablations: Annotated[str, typer.Option(help="none, all, or names after commas: our method, one switch each.")] = (
        "none"
    ),
    jobs: Annotated[int, typer.Option(help="Processes side by side; seconds are measured last, one by one.")] = 1,
    epochs: Annotated[float, typer.Option(help="Passes over the training split.")] = 3.0,
    batch_size: BatchSize = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate, the same for every method.")] = 1e-4,
    max_length: MaxLength = 128,
    device: Device = "auto",
    dtype: Dtype = "float32",
    search: Annotated[str, typer.Option(help="tree or integrated.")] = "tree",
    ffn: Annotated[str, typer.Option(help="coupled or dense units.")] = "coupled",
    candidates: Annotated[int, typer.Option(help="Static shapes trained per budget; validation picks one.")] = 3,
    timed_batches: Annotated[int, typer.Option(help="Batches of the test split that are timed.")] = 12,
    repeats: Annotated[int, typer.Option(help="Timed runs of each of them; the median counts.")] = 5,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep weights that no cell needs.")] = False,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    limit: Limit = None,
) -> None:
    """Run every rival on the same splits and seeds, and say which claims hold, tie or fail."""
    import json as encoder

    from rich.console import Console

    from .compare.ablations import ABLATIONS
    from .compare.methods import DEFAULT
    from .compare.progress import shown_progress
    from .compare.run import gather, run_missing
    from .compare.settings import CompareSettings, listed_names, listed_numbers
    from .report.comparison import comparison_table, write_comparison

    settings = CompareSettings(
        data=data, model=model, out=out, methods=listed_names(methods, DEFAULT),
        budgets=listed_numbers("--budgets", budgets, float), seeds=listed_numbers("--seeds", seeds, int),
        ablations=listed_names(ablations, tuple(ABLATIONS)), jobs=jobs, epochs=epochs, batch_size=batch_size, lr=lr,
        max_length=max_length, device=device, dtype=dtype, search=search, ffn=ffn, candidates=candidates,
        timed_batches=timed_batches, repeats=repeats, keep_models=keep_models, text_column=text_column,
        label_column=label_column, limit=listed_numbers("--limit", limit, int) if limit else None,
    )  # fmt: skip
    interrupted = False
    try:
        with shown_progress(Console(stderr=True)) as report:
            run_missing(settings, report)
    except KeyboardInterrupt:
        interrupted = True
    result = gather(settings)
    write_comparison(out, result)
    Console().print(comparison_table(result))
    for verdict in result["verdicts"]:
        typer.echo(f"{verdict['claim']} at {verdict['budget']:g}: {verdict['sentence']}")
    kept = ("claim", "budget", "word", "tendency", "seeds")
    verdicts = [{key: verdict[key] for key in kept} for verdict in result["verdicts"]]
    typer.echo(encoder.dumps({"cells": result["cells"], "missing": result["missing"], "verdicts": verdicts}))
    _say(f"result: {out / 'compare.json'}; page: {out / 'page.html'}")
    if interrupted:
        _say("interrupted; the same command goes on where it stopped")
        raise typer.Exit(130)


def main() -> None:
    """Entry point: errors that a user can act on are one line on stderr and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except DHTError as error:
        typer.echo(f"dht: error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing is left to say, and flushing stdout again would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
