"""The command line: ``valr VERB`` or ``python -m valr_ops VERB``.

Every verb prints for people while it works and ends standard output with one line of JSON. Errors are one message
that says what, where and how to mend it; ``--debug`` adds the traceback. Exit status: 0 done; 2 wrong usage, or nothing
to read (check-data); 3 some records were rejected (check-data), or the gate refused (release); 42 a configuration or
data problem that a retry can't mend; 75 stopped at a checkpoint and ready to go on; 130 interrupted; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from valr_ops.exits import EXIT_CONFIGURATION, EXIT_INTERRUPTED, EXIT_REFUSED, exit_status, is_ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the verb, and return the exit status."""
    options = _parser().parse_args(arguments)
    if arguments is None:
        # What a person typed, for the lineage of all that is made by it; the processes of stages inherit it.
        os.environ.setdefault("VALR_COMMAND", shlex.join(["valr", *sys.argv[1:]]))
    verb: Callable[[argparse.Namespace], int] = options.verb
    try:
        if options.in_project:
            _enter_project()
        return verb(options)
    except KeyboardInterrupt:
        _complain("interrupted; nothing was lost, the same command goes on", options)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`valr plan | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and not is_ours(error):
            _complain(f"{error.strerror or error} {f'({error.filename})' if error.filename else ''}".strip(), options)
        elif is_ours(error):
            _complain(str(error), options)
        else:
            _complain(
                f"unexpected {type(error).__name__}: {error}\nThe same command with --debug shows where.", options
            )
        return exit_status(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="valr", description="Train, evaluate and operate vision-aligned latent reasoners.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str, function: Callable[[argparse.Namespace], int], summary: str, in_project: bool = True
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(verb=function, in_project=in_project)
        return added

    _add_pipeline(verb)
    _add_models(verb)
    _add_scoring(verb)
    _add_release(verb)
    verb("doctor", _doctor, "check this machine and say how to mend what is wrong")
    verb("env", _env, 'print the environment for other shells: eval "$(valr env)"')
    return parser


_Add = Callable[..., argparse.ArgumentParser]
"""Adds a verb, by its name, function and summary, and whether it works from the project's folder."""


def _with_set(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
    added.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a recipe field, e.g. seed=1"
    )
    return added


def _with_judge(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
    added.add_argument("--judge", metavar="MODEL", help="settles what the profile would ask a model, by its full name")
    added.add_argument("--judge-url", metavar="URL", help="its endpoint, such as https://api.openai.com/v1")
    added.add_argument(
        "--judge-max-dollars", type=float, default=10.0, metavar="X", help="asks nothing that costs more"
    )
    added.add_argument(
        "--judge-price",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="dollars for a million tokens, if not known",
    )
    return added


def _add_pipeline(verb: _Add) -> None:
    demo = _with_set(verb("demo", _demo, "run the main job, show the table and what to type next", in_project=False))
    demo.add_argument("--data", metavar="FOLDER", help="your own records: a folder with train.jsonl and test.jsonl")

    materialize = _with_set(verb("materialize", _materialize, "make artifacts through Dagster, with one bar a stage"))
    materialize.add_argument("selection", nargs="+", metavar="STAGE", help="a stage; +STAGE also makes what it needs")

    run = _with_set(verb("run", _run, "make one artifact in this process, unless it is up to date"))
    run.add_argument("stage")
    run.add_argument("--force", action="store_true", help="make it even if it is up to date")
    run.add_argument("--quick", action="store_true", help="of a study the main contrast only: --set study.quick=true")
    run.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="do the I-th of N parts (from 0), beside other processes; a run without --part then finishes",
    )
    run.add_argument(
        "--job", metavar="URL", help="on another machine: recipe and inputs come from this s3:// prefix, all goes there"
    )
    run.set_defaults(wrong_usage=run.error)

    stages = verb("stages", _stages, "list the stages and what is out of date")
    stages.add_argument("--write", action="store_true", help="write dvc.yaml from the table of stages")

    plan = _with_set(verb("plan", _plan, "show the recipe: every field, its value and where it comes from"))
    scales = ["tiny", "mini", "small", "paper"]
    plan.add_argument("--scale", choices=scales, help="another scale than the one in params.yaml")
    plan.add_argument("--assumptions", action="store_true", help="only the choices on which the paper is silent")
    plan.add_argument(
        "--stage", metavar="STAGE", help="instead: what a stage costs, before it runs; stage2_ablation sums its cells"
    )
    plan.add_argument(
        "--manifest",
        nargs="?",
        const="stage2_valr_m",
        metavar="STAGE",
        help="instead: the Kubernetes Job of a stage, as YAML; needs no cluster",
    )

    check = _with_set(
        verb("check-data", _check_data, "validate your records and show the first ones", in_project=False)
    )
    check.add_argument("path", metavar="FOLDER_OR_JSONL", help="a local folder or file, or an s3://bucket/prefix")
    check.add_argument(
        "--format",
        choices=("cogcom", "gcot", "jsonl", "monet", "onethinker", "refocus", "visual_cot", "zebra_cot"),
        help="where the file names do not tell",
    )
    check.add_argument("--pictures", metavar="FOLDER", help="write the first records' images with their targets drawn")

    trace = verb("trace", _trace, "show one record's whole journey, from its raw file to training tensors")
    trace.add_argument("record", metavar="RECORD_ID")
    trace.add_argument("--out", metavar="FOLDER", help="where its pictures go; .valr/trace/RECORD_ID without it")

    ui = verb("ui", _ui, "open the pages of Dagster and MLflow on this machine")
    ui.add_argument("--dagster-port", type=int, default=3000)
    ui.add_argument("--mlflow-port", type=int, default=5000)


def _add_models(verb: _Add) -> None:
    generate = verb("generate", _generate, "ask a model one question about images", in_project=False)
    generate.add_argument("--model", required=True, metavar="PATH_OR_STAGE", help="a model folder, or the stage of one")
    generate.add_argument("--image", action="append", default=[], type=Path, metavar="FILE", help="may be given again")
    generate.add_argument("--question", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="slots are not counted")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest ids only")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    generate.add_argument("--slots", type=int, metavar="K", help="another K than the model was trained with")
    generate.add_argument("--settle", type=float, metavar="COSINE", help="end a segment early at states this alike")
    generate.add_argument("--force-latent", action="store_true", help="begin with a latent segment")
    generate.add_argument("--no-latents", action="store_true", help="decode as the model without latent segments")
    generate.add_argument("--show-latents", action="store_true", help="a line about each latent segment in its place")
    generate.add_argument("--device", choices=["cpu", "cuda"], help="the GPU, if there is one")

    serve = verb("serve", _serve, "answer over HTTP as OpenAI's API does", in_project=False)
    serve.add_argument("--model", required=True, metavar="PATH_OR_STAGE", help="a model folder, or the stage of one")
    serve.add_argument("--host", default="127.0.0.1", help="address; one beyond loopback lets others in")
    serve.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    serve.add_argument("--batch", type=int, default=8, metavar="N", help="most requests decoded together")
    serve.add_argument("--wait-ms", type=int, default=10, metavar="MS", help="how long a request waits for neighbours")
    serve.add_argument("--queue", type=int, default=64, metavar="N", help="requests that wait; more are told to retry")
    serve.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="most tokens of an answer")
    serve.add_argument("--max-images", type=int, default=8, metavar="N", help="most images of a request")
    serve.add_argument("--max-body-mb", type=int, default=32, metavar="MIB", help="largest request")
    serve.add_argument("--device", choices=["cpu", "cuda"], help="the GPU, if there is one")
    serve.add_argument("--no-latents", action="store_true", help="decode as the model without latent segments")
    serve.add_argument("--settle", type=float, metavar="COSINE", help="end a segment early at states this alike")


def _add_scoring(verb: _Add) -> None:
    score = verb("score", _score, "score answers by a benchmark's published rules; needs no model", in_project=False)
    score.add_argument("--benchmark", required=True, metavar="NAME", help="such as vsi_bench, blink, mmvp or jsonl")
    score.add_argument("--profile", metavar="NAME", help="whose rules: official, lmms-eval@0.7.3, vlmevalkit@e8e78f0")
    score.add_argument("--in", dest="source", required=True, type=Path, metavar="JSONL", help="id, gold, output a line")
    score.add_argument("--out", required=True, type=Path, metavar="JSONL", help="id, score, extracted a line")
    score.add_argument("--aggregate", action="store_true", help="also the benchmark's totals")
    _with_judge(score)

    ask = _with_set(
        verb("ask", _ask, "ask a model the questions of benchmarks, into a run folder that can go on", False)
    )
    ask.add_argument(
        "--model", required=True, metavar="MODEL", help="a folder, a stage, hub:ID@COMMIT, or https://HOST/v1"
    )
    ask.add_argument("--served-as", metavar="NAME", help="the model's name at an endpoint")
    ask.add_argument("--name", metavar="NAME", help="what to call the model in scores")
    ask.add_argument("--engine", choices=["transformers"], help="decode a Qwen2.5-VL by its own class, without latents")
    ask.add_argument(
        "--benchmark",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="public files of a benchmark, NAME:jsonl=FOLDER for your own, NAME:records=FOLDER for the test records "
        "of a source; may be given again",
    )
    ask.add_argument("--limit", type=int, metavar="N", help="the first N questions of each benchmark only")
    ask.add_argument("--partial", action="store_true", help="take a data set that has not all of its rows")
    ask.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the run; the same command goes on")

    evaluate = _with_judge(
        _with_set(verb("evaluate", _evaluate, "score the answers of a run folder; needs no model", False))
    )
    evaluate.add_argument("run", type=Path, metavar="FOLDER", help="what `valr ask` wrote")
    evaluate.add_argument("--profile", metavar="NAME", help="whose rules; each benchmark's default without it")

    report = verb("report", _report, "put scored models side by side on one page, or trace where one came from", False)
    report.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="scores: of `valr evaluate` or a stage")
    report.add_argument("--out", type=Path, metavar="HTML", help="the page, one file")
    report.add_argument(
        "--lineage", metavar="STAGE", help="instead: what this artifact was made from, and what from it"
    )
    report.set_defaults(wrong_usage=report.error)
    report.add_argument("--reference", metavar="NAME", help="the model that others are compared with; SFT or the first")
    report.add_argument(
        "--allow-different",
        action="append",
        default=[],
        metavar="FIELD",
        help="compare though this differs; the page says so",
    )


def _add_release(verb: _Add) -> None:
    release = verb("release", _release, "which model is champion: promote one through the gate, roll back, or show")
    steps = release.add_subparsers(dest="step", metavar="STEP", required=True)
    promote = _with_set(steps.add_parser("promote", help="let the gate decide whether a scored model becomes champion"))
    promote.add_argument(
        "challenger", nargs="?", metavar="SCORES", help="of the new model: a stage or a folder; the recipe's without it"
    )
    promote.add_argument(
        "--champion", metavar="SCORES", help="instead of those that the champion was registered with, or the baseline's"
    )
    promote.add_argument("--target", metavar="BENCHMARK", help="the benchmark that has to rise; release.target")
    promote.add_argument("--delta", type=float, metavar="SHARE", help="loss to risk on any other; release.delta")
    moving = promote.add_mutually_exclusive_group()
    moving.add_argument("--overrule", metavar="REASON", help="promote although the gate refuses; the reason is kept")
    moving.add_argument("--propose", action="store_true", help="decide and register, but leave the champion as it is")
    promote.add_argument("--out", type=Path, metavar="FOLDER", help="for the decision; .valr/decisions without it")
    back = steps.add_parser("rollback", help="give the place back to the champion before; moves the alias only")
    back.add_argument("--reason", default="", metavar="TEXT", help="kept in the history")
    steps.add_parser("show", help="versions, aliases and the history of the champion")
    building = steps.add_parser("build", help="make one folder with which a stranger can use, judge and check a model")
    building.add_argument("scores", metavar="SCORES", help="of the model: a stage or a folder")
    building.add_argument("--out", type=Path, metavar="FOLDER", help="the bundle; dist/NAME-DIGEST without it")
    building.add_argument("--decision", type=Path, metavar="FOLDER", help="the gate's; the one about it without this")
    building.set_defaults(verb=_build_release, in_project=False)
    verifying = steps.add_parser("verify", help="check a bundle's files and ask its questions again; needs no project")
    verifying.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder")
    verifying.set_defaults(verb=_verify_release, in_project=False)


def _enter_project() -> None:
    """Paths in a recipe are relative to the project folder, wherever the verb was typed."""
    from valr_ops.store.artifacts import project_root

    os.chdir(project_root())


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    from valr_ops.recipe import recipes

    inherited = json.loads(os.environ.get("VALR_SET", "{}"))
    return {**inherited, **recipes.parse_set(options.set)}


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/4")
    return int(part), int(parts)


def _run(options: argparse.Namespace) -> int:
    if options.job:
        if options.set or options.force or options.part or options.quick:
            options.wrong_usage("--job takes everything from its request; leave out --set, --force, --part and --quick")
        from valr_ops.release import pod

        ended = pod.run_job(options.job, options.stage)
        _last_line(stage=options.stage, job=options.job, digest=ended.digest, size=ended.size, files=ended.files)
        return 0
    from valr_ops import runner
    from valr_ops.stages import stage
    from valr_ops.store.progress import reporting_to_dagster

    if options.quick:
        if stage(options.stage).group != "studies":
            options.wrong_usage(f"{options.stage} has no quick form; leave out --quick, which is for studies")
        options.set.append("study.quick=true")
    with reporting_to_dagster():
        if options.part is None:
            outcome = runner.run(options.stage, _overrides(options), force=options.force)
        else:
            outcome = runner.run_part(options.stage, options.part, _overrides(options), force=options.force)
    _last_line(
        stage=outcome.stage,
        how=outcome.how,
        digest=outcome.digest,
        reasons=list(outcome.reasons),
        seconds=round(outcome.seconds, 3),
        summary=dict(outcome.report.summary),
    )
    return 0


def _materialize(options: argparse.Namespace) -> int:
    from valr_ops import orchestration

    result = orchestration.materialize(options.selection, _overrides(options))
    print(result.line())
    _last_line(selected=list(result.selected), made=list(result.made), seconds=round(result.seconds, 1))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from valr_ops import orchestration
    from valr_ops.evaluation.ablation import terminal_table
    from valr_ops.store.artifacts import folder, project_root

    overrides = _overrides(options)
    if options.data:
        overrides |= orchestration.own_data(Path(options.data))
    _enter_project()
    result = orchestration.materialize(["+ablation_table"], overrides)
    console, table = Console(), folder(project_root(), "ablation_table")
    console.print(terminal_table(table))
    print(result.line())
    print("\nNext:")
    print("  make ui      the graph, the plots and the runs in your browser")
    print("  make demo    again: nothing that is up to date is done twice")
    print("  valr materialize +report    four studies of VaLR-M, and everything on one page")
    _last_line(selected=list(result.selected), made=list(result.made), seconds=round(result.seconds, 1))
    return 0


def _stages(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from valr_ops.stages import REQUESTED_PIPELINE, STAGES, ablation_cells, dvc_yaml, requested_yaml
    from valr_ops.store.artifacts import Ledger, project_root

    root = project_root()
    if options.write:
        (root / "dvc.yaml").write_text(dvc_yaml(), encoding="utf-8")
        (root / REQUESTED_PIPELINE).write_text(requested_yaml(), encoding="utf-8")
        asked = sum(row.on_request for row in STAGES)
        written = f"dvc.yaml: {len(STAGES) - asked} stages written; {REQUESTED_PIPELINE}: {asked} studies"
        print(f"{written} and {len(ablation_cells())} cells")
        _last_line(stages=len(STAGES))
        return 0
    states = Ledger(root).states(row.name for row in STAGES)
    table = Table("stage", "group", "state", "what it is", box=None, pad_edge=False)
    for row in STAGES:
        state = states[row.name]
        word = "up to date" if state.up_to_date else "edited" if state.edited else "; ".join(state.reasons)
        table.add_row(row.name, row.group, word, row.summary)
    Console().print(table)
    _last_line(up_to_date=[name for name, state in states.items() if state.up_to_date])
    return 0


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from valr_ops.recipe import cost, recipes
    from valr_ops.store.artifacts import project_root

    overrides = _overrides(options)
    recipe = recipes.load(project_root(), overrides | ({"scale": options.scale} if options.scale else {}))
    if options.stage:
        return _price(recipe, options.stage, project_root())
    if options.manifest:
        return _manifest(recipe, options.manifest, project_root())
    rows = [row for row in recipes.ledger(recipe) if not options.assumptions or not row.origin.startswith("Paper:")]
    table = Table("field", "value", "at scale paper", "where it comes from", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.field, row.value, row.paper, row.origin)
    Console().print(table)
    model = cost.shape(recipe)
    if model is not None:
        print(f"\n{model.decoder_parameters:,} parameters trained, {model.vision_parameters:,} frozen.")
        for name, training in (("stage 1", recipe.stage1), ("stage 2", recipe.stage2)):
            records = training.micro_batch * training.accumulation * recipe.runtime.processes
            flops = cost.train_step_flops(model, records=records, positions=1024, labelled=256, patches=1024)
            held = cost.training_bytes(model, training, recipe.runtime.processes) / 2**30
            print(
                f"{name}: {records} records an update, {flops:.2g} FLOPs for records of 1,024 positions with one image "
                f"of 1,024 patches; {held:.3g} GiB a process, activations not counted"
            )
    prices = {} if options.assumptions else _show_prices(recipe, project_root())
    _last_line(scale=recipe.scale, fingerprint=recipe.fingerprint, fields=len(rows), **prices)
    return 0


def _show_prices(recipe: Any, root: Path) -> dict[str, Any]:
    """Print what every stage costs; the same as plain values."""
    from rich.console import Console
    from rich.table import Column, Table

    from valr_ops.recipe import price

    try:
        found = price.overview(recipe, root)
    except price.PriceError as error:
        print(f"\nNo stage has a price: {error}")
        return {"unpriced": str(error)}
    titles = ("on", "hours", "dollars", "GB written", "GB read")
    columns = (Column(title, no_wrap=True, justify="right") for title in titles)
    table = Table(Column("stage", overflow="fold"), *columns, box=None, pad_edge=False)
    for row in found.rows():
        table.add_row(*row)
    print()
    console = Console()
    # In a file or a pipe nothing is narrow but rich's own guess.
    console.width = console.width if console.is_terminal else max(console.width, 100)
    console.print(table)
    print("", *found.remarks(), sep="\n")
    return found.document()


def _price(recipe: Any, stage: str, root: Path) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    from valr_ops.recipe import price
    from valr_ops.stages import ABLATION

    console = Console()
    if stage == ABLATION:
        cells = price.cell_prices(recipe, root)
        summed = Table(Column("cell", overflow="fold"), "hours", "GPU hours", "dollars", box=None, pad_edge=False)
        for row in price.sum_rows(cells):
            summed.add_row(*row)
        console.print(summed)
        gpu_hours, dollars = price.together(cells.values())
        each = {cell: {"hours": one.total_hours, "dollars": one.dollars} for cell, one in cells.items()}
        _last_line(stage=stage, cells=each, gpu_hours=gpu_hours, dollars=dollars)
        return 0
    priced = price.price(recipe, stage, root)
    figures = Table(Column(stage, overflow="fold"), "of it", "least to most", box=None, pad_edge=False)
    assumed = Table(Column("assumed", overflow="fold"), "value", "where it comes from", box=None, pad_edge=False)
    section = ""
    for named, part, figure in price.rows(priced):
        figures.add_row("" if named == section else named, part, figure)
        section = named
    for assumption in priced.assumptions:
        assumed.add_row(*assumption)
    console.print(figures)
    console.print()
    console.print(assumed)
    refused = price.refusal(recipe, priced, root)
    for remark in (*priced.remarks, *([refused] if refused else [])):
        print(f"\n{remark}")
    _last_line(**priced.document(), refused=refused)
    return 0


def _manifest(recipe: Any, name: str, root: Path) -> int:
    import yaml

    from valr_ops.release import manifest
    from valr_ops.stages import stage

    row = stage(name)
    request = manifest.request(row, recipe, root)
    print(yaml.safe_dump_all(manifest.documents(row, recipe, request.url), sort_keys=False, width=1000), end="")
    missing = [needed for needed, digest in request.inputs.items() if not digest]
    if missing:
        print(f"valr: the Job's name will be another one: {', '.join(missing)} not made yet", file=sys.stderr)
    _last_line(stage=name, job=manifest.job_name(name, request.url), location=request.url, missing=missing)
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from valr_ops.data import checking
    from valr_ops.recipe import recipes
    from valr_ops.store.artifacts import project_root
    from valr_ops.store.objects import is_remote

    recipe = recipes.load(project_root(), _overrides(options))
    location = options.path if is_remote(options.path) else str(Path(options.path).expanduser().absolute())
    pictures = Path(options.pictures).absolute() if options.pictures else None
    # What is typed counts from here, what the recipe says from the project.
    _enter_project()
    try:
        return checking.check_and_show(location, options.path, recipe.data, _last_line, options.format, pictures)
    except checking.SourceError as error:
        _complain(str(error), options)
        _last_line(path=options.path, read=0, kept=0, rejected={})
        return checking.EXIT_NOTHING_READ


def _trace(options: argparse.Namespace) -> int:
    from valr_ops import runner
    from valr_ops.store.artifacts import project_root
    from valr_ops.training import tracing

    root = project_root()
    tracing.require_corpus(root)
    out = Path(options.out) if options.out else None
    tracing.trace_and_show(options.record, root, runner.read_recipe(root), out, _last_line)
    return 0


def _ui(options: argparse.Namespace) -> int:
    from valr_ops import workspace
    from valr_ops.store.artifacts import project_root

    workspace.serve_pages(project_root(), options.dagster_port, options.mlflow_port)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from valr_ops.model.answering import Sampling
    from valr_ops.serving import answer

    asked = answer.Options(
        model=options.model,
        images=options.image,
        question=options.question,
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, options.top_p, options.seed),
        slots=options.slots,
        force_latent=options.force_latent,
        latents=not options.no_latents,
        settle=options.settle,
        show_latents=options.show_latents,
        device=options.device,
    )
    _last_line(**answer.answer(asked, sys.stdout))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from valr_ops.serving import server

    outcome = server.serve(
        server.Options(
            model=options.model,
            host=options.host,
            port=options.port,
            batch=options.batch,
            wait_ms=options.wait_ms,
            queue=options.queue,
            max_tokens=options.max_tokens,
            max_images=options.max_images,
            max_body_mb=options.max_body_mb,
            device=options.device,
            latents=not options.no_latents,
            settle=options.settle,
        )
    )
    _last_line(answered=outcome.answered, failed=outcome.failed, seconds=round(outcome.seconds, 1))
    return EXIT_INTERRUPTED if outcome.interrupted else 0


def _score(options: argparse.Namespace) -> int:
    from valr_ops.evaluation import scoring

    judge = _judge(options, options.out.parent)
    summary = scoring.score_file(
        options.source, options.out, options.benchmark, options.profile, options.aggregate, judge
    )
    print(
        f"{summary['benchmark']} by {summary['profile']}: n = {summary['n']:,}, mean {summary['mean']:.4f}, "
        f"{summary['unresolved']:,} unresolved"
    )
    for name, total in summary.get("totals", {}).items():
        words = ", ".join(total) if isinstance(total, list) else total or "not all of its parts are there"
        print(f"  {name}: {total:.4f}" if isinstance(total, float) else f"  {name}: {words}")
    if judge:
        print(judge.line())
    _last_line(**summary)
    return 0


def _judge(options: argparse.Namespace, folder: Path) -> Any:
    """The judge that was asked for, which keeps its judgements in `folder`; or None."""
    if not options.judge and not options.judge_url:
        return None
    from valr_ops.evaluation import judge

    return judge.open_judge(
        options.judge or "",
        options.judge_url or "",
        folder,
        print,
        price=tuple(options.judge_price) if options.judge_price else None,
        max_dollars=options.judge_max_dollars,
    )


def _ask(options: argparse.Namespace) -> int:
    from valr_ops.evaluation import asking
    from valr_ops.store.progress import ShowingProgress

    recipe, root = _recipe_of_project(options)
    asked = [asking.Asked.parse(one, options.limit, whole=not options.partial) for one in options.benchmark]
    answerer = asking.open_model(options.model, recipe, options.served_as, options.name, options.engine)
    cache, progress = root / ".valr" / "cache" / "frames", ShowingProgress("ask")
    outcome = asking.ask_run(answerer, asked, options.out, recipe, cache, progress)
    print(f"{outcome['items']} answers in {options.out}; score them: valr evaluate {options.out}")
    _last_line(**outcome)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from valr_ops.evaluation import asking

    recipe, root = _recipe_of_project(options)
    judge = _judge(options, options.run)
    scores, table = asking.score_run(options.run, recipe, root / ".valr" / "cache" / "frames", options.profile, judge)
    print(table)
    if judge:
        print(judge.line())
    _last_line(out=str(options.run), benchmarks=scores["benchmarks"])
    return 0


def _report(options: argparse.Namespace) -> int:
    if options.lineage:
        from valr_ops.store import tree
        from valr_ops.store.artifacts import project_root

        _last_line(**tree.show(tree.trace(project_root(), options.lineage)))
        return 0
    if not options.folders or options.out is None:
        options.wrong_usage("give folders of scores and --out HTML, or --lineage STAGE")
    from valr_ops.evaluation import report

    said = report.write_page(options.folders, options.out, options.reference, options.allow_different)
    print(f"{', '.join(said['models'])} side by side: {options.out}")
    _last_line(**said)
    return 0


def _recipe_of_project(options: argparse.Namespace) -> tuple[Any, Path]:
    """The project's recipe, for verbs whose paths are relative to where they were typed."""
    from valr_ops.recipe import recipes
    from valr_ops.store.artifacts import project_root

    root = project_root()
    return recipes.load(root, _overrides(options)), root


def _release(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from valr_ops.store import lineage
    from valr_ops.store.artifacts import project_root

    root = project_root()
    if options.step == "rollback":
        moved = lineage.roll_back(root, options.reason)
        print(f"champion is version {moved.version} again")
        _last_line(**asdict(moved))
        return 0
    if options.step == "show":
        return _show_release(lineage.registered(root))
    return _promote(options, root)


def _show_release(known: Any) -> int:
    from dataclasses import asdict
    from datetime import UTC, datetime

    named = {version: alias for alias, version in known.aliases.items()}
    for version, digest in known.digests.items():
        print(f"{version}  {known.stages[version]}  {digest}  {named.get(version, '')}".rstrip())
    for move in known.history:
        when = datetime.fromtimestamp(move.at, UTC).strftime("%Y-%m-%d %H:%M")
        why = f": {move.reason}" if move.reason else ""
        print(f"{when} UTC  version {move.version} champion, {move.how}, by {move.person or 'someone'}{why}")
    _last_line(
        aliases=dict(known.aliases), versions=dict(known.digests), history=[asdict(one) for one in known.history]
    )
    return 0


def _promote(options: argparse.Namespace, root: Path) -> int:
    from valr_ops.recipe import recipes
    from valr_ops.release import gate
    from valr_ops.store.artifacts import folder

    asked = {"release.target": options.target, "release.delta": options.delta}
    recipe = recipes.load(root, _overrides(options) | {key: value for key, value in asked.items() if value is not None})

    def scores(given: str) -> Path:
        return Path(given) if Path(given).is_dir() else folder(root, given)

    proposal = gate.propose(
        root,
        recipe,
        scores(options.challenger or f"scores_{recipe.release.challenger}"),
        champion=scores(options.champion) if options.champion else None,
        reason=options.overrule,
        moves=not options.propose,
        out=options.out,
    )
    if proposal.decision is None:
        print(f"this model is the champion already, as version {proposal.version}; nothing was decided")
        _last_line(version=proposal.version, promotes=False, moved=False, decision=None)
        return 0
    decision = proposal.decision
    print(gate.markdown(decision))
    print(f"version {proposal.version} is {'champion' if proposal.moved else 'challenger; no champion was made'}")
    _last_line(
        version=proposal.version,
        promotes=decision.promotes,
        moved=proposal.moved,
        reasons=decision.reasons,
        too_few=decision.too_few,
        decision=str(proposal.folder),
        url=proposal.url,
    )
    return 0 if decision.promotes else EXIT_REFUSED


def _build_release(options: argparse.Namespace) -> int:
    from valr_ops.release import bundle
    from valr_ops.store.artifacts import folder, project_root
    from valr_ops.store.progress import ShowingProgress

    root = project_root()
    # What is typed counts from here, what the recipe says from the project.
    scores = Path(options.scores).absolute() if Path(options.scores).is_dir() else folder(root, options.scores)
    out, decision = (given and given.absolute() for given in (options.out, options.decision))
    _enter_project()
    built = bundle.build(root, scores, out, decision, ShowingProgress("release"))
    for warning in built.warnings:
        print(f"valr: {warning}", file=sys.stderr)
    how = "is in" if built.made else "was there already, file by file the same:"
    print(f"the release {how} {built.folder}: {built.files} files, {built.bytes / 1e6:,.1f} MB")
    print(f"check it, here or anywhere else: valr release verify {built.folder}")
    _last_line(
        bundle=str(built.folder),
        made=built.made,
        files=built.files,
        bytes=built.bytes,
        warnings=list(built.warnings),
    )
    return 0


def _verify_release(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from valr_ops.release import verifying
    from valr_ops.store.progress import ShowingProgress

    verdict = verifying.verify(options.bundle, ShowingProgress("verify"))
    for line in verifying.lines(verdict):
        print(line)
    _last_line(**asdict(verdict), bundle=str(options.bundle), agreed=verdict.agreed, passes=verdict.passes)
    return 0 if verdict.passes else EXIT_REFUSED


def _doctor(options: argparse.Namespace) -> int:
    from valr_ops import doctor
    from valr_ops.store.artifacts import project_root

    findings = doctor.diagnose(project_root())
    doctor.show(findings)
    problems = [finding.name for finding in findings if finding.status == "problem"]
    _last_line(problems=problems, warnings=[finding.name for finding in findings if finding.status == "warning"])
    return EXIT_CONFIGURATION if problems else 0


def _env(options: argparse.Namespace) -> int:
    from valr_ops import workspace
    from valr_ops.store.artifacts import project_root

    root = project_root()
    workspace.prepare(root)
    for name, value in workspace.environment(root).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _last_line(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _complain(message: str, options: argparse.Namespace) -> None:
    # An error may quote an address with its password, or an endpoint that repeats the key it was sent.
    from valr_ops.recipe.secrets import redacted

    if getattr(options, "debug", False):
        print(redacted(traceback.format_exc()), file=sys.stderr)
    print(redacted(f"valr: {message}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
