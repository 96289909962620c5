#!/usr/bin/env python3
"""The command line. Each verb is a module's function, imported only when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollout.chat_client import ServerOptions
    from sqlrl_jax.config import Config

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

EXAMPLES = """\
examples:
  python launch.py --config configs/quickstart.yaml
  python launch.py --config configs/quickstart.yaml trainer.resume_mode=latest
  python launch.py eval --config configs/quickstart.yaml --model runs/quickstart/export
  python launch.py ask --model runs/quickstart/export --database shop.sqlite "How many customers are there?"
  python launch.py serve --model runs/quickstart/export
  python launch.py prepare --list
  python launch.py report runs/quickstart
  python launch.py check --config configs/sql_fsdp.yaml --topology v5p:2x2x1
  python launch.py config --config configs/quickstart.yaml
`python launch.py VERB --help` lists what a verb takes. Settings are given as key=value."""


def _train(args: argparse.Namespace) -> int:
    config = _config(args)
    from sqlrl_jax.distributed import place_of, run
    from sqlrl_jax.trainer import train

    settings = config.trainer.distributed
    place = place_of(args.coordinator, args.process_id, args.process_count, settings.start_timeout)
    return run(place, settings, lambda world: train(config, world), _explained)


def _serve(args: argparse.Namespace) -> int:
    from rollout.errors import UserError

    config = _config(args)
    if args.model is not None:
        from sqlrl_jax import serve_model

        settings = (*(("--config", args.config) if args.config else ()), *args.settings)
        chosen = (args.model, args.listen, args.served_model, args.api_key_env)
        return serve_model.main(config, serve_model.Request(*chosen, settings))
    if args.config is None:
        raise UserError(
            "name what to serve: --config FILE, episodes for a run, or --model DIR, a trained model for anybody"
        )
    from rollout.server import main

    return main(config, args.port_file)


def _eval(args: argparse.Namespace) -> int:
    questions = [name for name in args.questions or () if "=" not in name]
    args.settings += [setting for setting in args.questions or () if "=" in setting]  # --questions took them for files
    config = _config(args)
    from sqlrl_jax.evaluate import Request, main

    server = _server(args)
    names = ("model", "databases", "samples", "max_questions", "out", "resume", "markdown")
    chosen = {name: getattr(args, name) for name in names}
    return main(config, Request(**chosen, questions=questions, turns=args.turns or (), server=server))


def _server(args: argparse.Namespace) -> ServerOptions | None:
    """The served model that the options name. Raises UserError for options that do not go together."""
    from rollout.chat_client import ServerOptions, checked_key, json_object
    from rollout.errors import UserError

    if args.server is None:
        for name in ("served_model", "server_extra"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --server, the address of a served model")
        return None
    if args.model is not None:
        raise UserError("--model is hosted here; the model of a --server is named with --served-model")
    return ServerOptions(
        url=args.server,
        model=args.served_model or "",
        api_key=checked_key(args.api_key_env, os.environ.get(args.api_key_env, "")),
        extra=json_object("--server-extra", args.server_extra) if args.server_extra else {},
        timeout=args.server_timeout,
        concurrency=args.concurrency,
    )


def _ask(args: argparse.Namespace) -> int:
    from rollout.errors import UserError
    from sqlrl_jax.ask import Question, config_of, main

    if args.config is None and args.model is not None:
        args.config = config_of(args.model)
    elif args.config is None and args.server is None:
        raise UserError("name who is to answer: --model DIR, such as a run's export/, or --server URL")
    loose = [word for word in args.settings if "=" not in word]
    if loose:
        raise UserError(f"put the question in quotes: {shlex.join([' '.join([args.question, *loose])])}")
    question = Question(args.database, args.question, args.evidence, args.model, _server(args))
    return main(_config(args), question)


def _sft(args: argparse.Namespace) -> int:
    config = _config(args)
    from sqlrl_jax.sft import main

    return main(config)


def _demo(args: argparse.Namespace) -> int:
    from sqlrl_jax.data.demo.generate import ensure

    print(ensure(_config(args).data.demo))
    return 0


def _import(args: argparse.Namespace) -> int:
    from sqlrl_jax.export import import_model

    print(import_model(args.model, args.out))
    return 0


def _export(args: argparse.Namespace) -> int:
    from sqlrl_jax.export import export_adapter, export_checkpoint

    write = export_adapter if args.adapter else export_checkpoint
    print(write(args.checkpoint, args.out, best=args.best, base=args.base))
    return 0


def _check(args: argparse.Namespace) -> int:
    from sqlrl_jax import topology

    topology.prepare()  # before anything imports jax
    config = _config(args)
    from sqlrl_jax.check import Request, main

    names = ("topology", "model_config", "episode_tokens", "trained_share", "json")
    return main(config, Request(**{name: getattr(args, name) for name in names}))


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sqlrl_jax.report import write_report

    print(write_report(Path(args.run_dir)))
    return 0


def _show_config(args: argparse.Namespace) -> int:
    from sqlrl_jax.config_file import settings

    for setting in settings(_config(args)):
        changed = "" if setting.value == setting.default else f"  (default {setting.default!r})"
        print(f"{setting.key} = {setting.value!r}{changed}\n    {setting.meaning} [{setting.allowed}]")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from sqlrl_jax.data.prepare import Request, main

    given = {name: value for name, value in vars(args).items() if name not in ("verb", "what")}
    sets = tuple(word for word in args.what if "=" not in word)
    settings = tuple(word for word in args.what if "=" in word)
    return main(Request(sets=sets, settings=settings, **{**given, "null": tuple(args.null)}))


def _config(args: argparse.Namespace) -> Config:
    from sqlrl_jax.config_file import load

    return load(args.config, args.settings)


VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "train": ("train by reinforcement learning (the default verb)", _train),
    "serve": ("run a rollout service alone, or serve a trained model to anybody", _serve),
    "eval": ("measure accuracy on questions; prints one JSON line last", _eval),
    "ask": ("ask your own database a question", _ask),
    "sft": ("train a small model from nothing on demonstrations (the cold start)", _sft),
    "demo": ("generate the demo databases and questions", _demo),
    "prepare": ("make questions of public sets or of your own databases; check gold queries", _prepare),
    "import": ("check a Hugging Face checkpoint and rewrite it in our layout", _import),
    "export": ("write a checkpoint as safetensors, config.json and tokenizer", _export),
    "check": ("say what a step costs and whether it fits a TPU slice; needs neither", _check),
    "report": ("write a run's report.html", _report),
    "config": ("print every setting with its value, default and meaning", _show_config),
}


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, found {text!r}")
    return value


def _limits(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


PREPARE = """\
usage: launch.py prepare SET [SET …] --data DIR --out DIR [--download] [--skip-bad] [--sample N]
       launch.py prepare own --databases FILE_OR_DIR --questions FILE --out DIR [--valid SHARE]
       launch.py prepare --check --questions FILE [--databases DIR] [--out FILE] [--config FILE] [key=value …]
       launch.py prepare --list"""


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = PREPARE.removeprefix("usage: ")
    parser.add_argument("what", nargs="*", metavar="SET", help="sets by name (see --list), or `own`")
    parser.add_argument("--list", action="store_true", help="show the sets")
    sets = parser.add_argument_group("public sets, in the layout of OmniSQL's data.zip")
    sets.add_argument(
        "--data", default="", metavar="DIR", help="folder that holds spider/, bird/, …, or the data/ they are in"
    )
    sets.add_argument("--download", action="store_true", help="fetch what the sets need into --data first")
    sets.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of refusing the set")
    sets.add_argument(
        "--sample", type=_positive, default=0, metavar="N", help="keep this many questions of each set, drawn evenly"
    )
    own = parser.add_argument_group("your own databases")
    own.add_argument(
        "--databases",
        default="",
        metavar="PATH",
        help="a SQLite file, or a folder of SQLite or CSV files; --check: root",
    )
    own.add_argument(
        "--questions", default="", metavar="FILE", help="CSV or JSON lines of question and SQL; --check: prepared file"
    )
    own.add_argument(
        "--out", default="", metavar="PATH", help="folder to write, also for sets; --check: file of the good questions"
    )
    own.add_argument("--valid", type=float, metavar="SHARE", help="part of the questions kept for validation (0.2)")
    own.add_argument("--encoding", default="", metavar="NAME", help="of CSV files that are neither UTF-8 nor UTF-16")
    own.add_argument("--null", action="append", default=[], metavar="TEXT", help="text in CSV files that means NULL")
    check = parser.add_argument_group("checking gold queries")
    check.add_argument("--check", action="store_true", help="run every gold query, list those that cannot be graded")
    check.add_argument(
        "--config", default="", metavar="FILE", help="YAML file of settings, which key=value pairs override"
    )


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    description = "Train language models to answer questions with SQL, by multi-turn reinforcement learning."
    parser = argparse.ArgumentParser("launch.py", description=description, epilog=EXAMPLES, formatter_class=form)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    parsers = {name: verbs.add_parser(name, help=text, description=text) for name, (text, _) in VERBS.items()}
    parsers["ask"].add_argument("question", help="what you want to know")
    for name in ("train", "serve", "eval", "ask", "sft", "demo", "check", "config"):
        optional = name in ("ask", "config", "serve")
        parsers[name].add_argument("--config", required=not optional, help="YAML file of settings")
        parsers[name].add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file")
    _process_options(parsers["train"])
    _serve_options(parsers["serve"])
    _evaluation_options(parsers["eval"])
    _ask_options(parsers["ask"])
    _check_options(parsers["check"])
    _prepare_arguments(parsers["prepare"])
    parsers["import"].add_argument("--model", required=True, help="Hugging Face checkpoint folder")
    parsers["import"].add_argument("--out", required=True, help="folder to write; must not exist")
    parsers["export"].add_argument("--checkpoint", required=True, help="run folder or one of its checkpoints")
    parsers["export"].add_argument("--best", action="store_true", help="of a run folder: the most accurate checkpoint")
    parsers["export"].add_argument("--out", required=True, help="folder to write; must not exist")
    parsers["export"].add_argument("--adapter", action="store_true", help="write the adapters alone, as a PEFT folder")
    parsers["export"].add_argument(
        "--base", metavar="DIR", help="the model that the adapters belong to, where it is no longer where it was"
    )
    parsers["report"].add_argument("run_dir", help="run folder")
    return parser


def _process_options(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("several hosts: the same command on each, which differs in --process-id alone")
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens, or auto (TPU pod, SLURM, Kubernetes)"
    )
    group.add_argument("--process-id", type=int, metavar="I", help="this process, 0 to N-1")
    group.add_argument("--process-count", type=_positive, metavar="N", help="how many there are")


def _serve_options(serve: argparse.ArgumentParser) -> None:
    add = serve.add_argument
    add("--port-file", help="file for host:port once ready; the service then stops when its standard input closes")
    group = serve.add_argument_group("a trained model for anybody, by SGLang's OpenAI-compatible server")
    add = group.add_argument
    add("--model", metavar="DIR", help="model folder, run folder or checkpoint (which is exported first)")
    add("--listen", metavar="HOST:PORT", default="127.0.0.1:30000", help="where (%(default)s)")
    add("--served-model", metavar="NAME", default="", help="what it is called there (default: the folder's name)")
    add("--api-key-env", metavar="NAME", default="", help="environment variable of a key that every request must show")


def _evaluation_options(evaluate: argparse.ArgumentParser) -> None:
    add = evaluate.add_argument
    add("--model", help="model folder to evaluate (default: trainer.policy.model.path)")
    add(
        "--questions",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="JSON lines of questions, each file a set (default: data.val_data)",
    )
    add("--databases", help="folder of <db_id>/<db_id>.sqlite (default: the configured one)")
    add("--max-questions", type=_positive, help="evaluate on a seeded sample of this many")
    add("--samples", type=_positive, help="samples for each question; above 1 gives pass@k and majority voting")
    add("--turns", type=_limits, help="turn limits to compare, such as 1,5 (default: generator.max_turns)")
    add("--out", help="file for every episode, one JSON line each; must not exist")
    add("--resume", action="store_true", help="go on with the episodes that --out holds")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    _server_options(evaluate)


def _ask_options(ask: argparse.ArgumentParser) -> None:
    add = ask.add_argument
    add("--database", required=True, metavar="PATH", help="a SQLite file, a CSV file, or a folder of CSV files")
    add("--model", help="model folder, such as a run's export/, whose settings are then used unless --config is given")
    add("--evidence", default="", help="what one has to know to understand the question")
    _server_options(ask)


def _check_options(check: argparse.ArgumentParser) -> None:
    add = check.add_argument
    add("--topology", metavar="NAME", help="compile the step for this slice, such as v5p:2x2x1 or v5e:4x4 (extra tpu)")
    add(
        "--model-config",
        metavar="NAME",
        help="a model's config.json, or a published model such as qwen2.5-coder-7b (default: the configured one)",
    )
    add("--episode-tokens", type=_positive, metavar="N", help="tokens of a mean episode (default: as many as may be)")
    add("--trained-share", type=_share, default=0.25, metavar="S", help="part of them that is trained (%(default)s)")
    add("--json", action="store_true", help="print one JSON object")


def _server_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--server", metavar="URL", help="use a served model: http://HOST:PORT/v1 of an OpenAI-compatible server")
    add("--served-model", metavar="NAME", help="the model's name there (default: the only one)")
    add("--api-key-env", metavar="NAME", default="OPENAI_API_KEY", help="environment variable of the key (%(default)s)")
    add("--concurrency", type=_positive, default=16, help="conversations with the server at one time (%(default)s)")
    add("--server-timeout", type=_positive, default=600, help="seconds that one answer may take (%(default)s)")
    add("--server-extra", metavar="JSON", help="object merged into each request; null takes a key out")


def main(argv: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the letter shows a question mark
    args = _parse(argv)
    return _explained(lambda: VERBS[args.verb][1](args))


def _explained(work: Callable[[], int]) -> int:
    """The exit status of `work`; what a person can mend is printed as one sentence."""
    from rollout.errors import UserError

    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a folder that may not be looked into, a full disk behind `> FILE`
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parses one verb's arguments; options and key=value pairs may come in any order."""
    parser = _parser()
    first = argv[0] if argv else "--help"
    if first.startswith("-h") or first == "--help":
        parser.print_help()
        sys.exit(0)
    if first not in VERBS:
        if not first.startswith("-") and "=" not in first:
            near = difflib.get_close_matches(first, VERBS, n=1)
            parser.error(f"unknown verb {first!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        argv = ["train", *argv]
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "what"):  # names of sets may come after options too
        args.what += [a for a in rest if not a.startswith("-")]
        rest = [a for a in rest if a.startswith("-")]
    stray = [a for a in rest if a.startswith("-") or "=" not in a or not hasattr(args, "settings")]
    if stray:
        parser.error(f"unknown argument {stray[0]!r}; settings are given as key=value")
    if rest:
        args.settings = [*args.settings, *rest]
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
