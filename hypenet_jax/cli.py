"""`hypenet <command>`: parses, calls one function, prints.

Exit codes: 0 done, 2 a mistake of the user's, 75 preempted (the same command continues), 76 another process of the run
was lost (it continues too, if the cause is gone), 130 interrupted, 141 the reader of the output has left. Commands
without a work directory have nothing to continue from: the system ends them at SIGTERM (143).
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hypenet_jax.cli_arguments import RUN_COMMANDS, parser
from hypenet_jax.errors import HypenetError

EXIT_USAGE, EXIT_INTERRUPTED, EXIT_UNREAD = 2, 130, 141

FULL = (errno.ENOSPC, errno.EDQUOT)
# What the system says about a path of the user's; other errors of the system are bugs.
REFUSALS = (
    *FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
    errno.ELOOP, errno.EEXIST,
)  # fmt: skip

# XLA's words, also where a library wraps them. A kernel that asks for too much of a core's own memory is a bug of ours.
OUT_OF_MEMORY = (
    r"RESOURCE_EXHAUSTED:[^\n]*?((?:Out of memory|Ran out of memory|Failed to allocate)(?! in memory space [vs]mem)"
    r" [^\n\[]{0,120})"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    arguments = parser().parse_args(argv)
    # A failed save is logged with the tracebacks of a dozen threads before it is raised here.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        _run(arguments)
    except HypenetError as error:
        print(f"hypenet: {error}", file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:
        # The reader has left (`| head`); the interpreter must not try to write there again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNREAD
    except KeyboardInterrupt:
        remedy = "; the same command continues from the last checkpoint" if arguments.command in RUN_COMMANDS else ""
        print(f"hypenet: interrupted{remedy}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        print(f"hypenet: {refusal}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _refusal(error: BaseException | None) -> str | None:
    """What the system refused, in a sentence; None where the error is of another kind.

    Libraries that write in C++ report a full disk inside messages of their own, so the words are looked for, too.
    """
    while error is not None:
        if any(os.strerror(code) in str(error) for code in FULL):
            return "the disk is full; make room or choose another place (what was complete is kept)"
        if isinstance(error, OSError) and error.errno in REFUSALS:
            return f"cannot use {error.filename or 'a file'} ({error.strerror}); choose another place"
        if spent := re.search(OUT_OF_MEMORY, str(error)):
            return (
                f"the device's memory is used up ({spent[1].strip(' .')}); take less at once (batch_size, "
                "gradient_accumulation, remat=True, evaluate.row_tokens) or more devices, or end what else runs there"
            )
        error = error.__cause__ or error.__context__
    return None


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command in RUN_COMMANDS:
        from hypenet_jax.parallel import startup
        from hypenet_jax.train.preemption import ends_at_sigterm

        with ends_at_sigterm():
            startup.start()
            _run_config(arguments)
    else:
        SINGLE[arguments.command](arguments)


def _run_config(arguments: argparse.Namespace) -> None:
    from hypenet_jax.halo import pipeline
    from hypenet_jax.halo.ablate import ablate
    from hypenet_jax.halo.compare import compare
    from hypenet_jax.halo.compare_selection import compare as compare_selection
    from hypenet_jax.halo.compare_settings import ComparisonConfig
    from hypenet_jax.halo.pretrain import pretrain
    from hypenet_jax.halo.run import open_run
    from hypenet_jax.halo.settings import ConvertConfig, PretrainConfig
    from hypenet_jax.train.metrics import Reporter

    wanted = {"pretrain": PretrainConfig, "compare-architectures": ComparisonConfig}
    config = _config(arguments, wanted.get(arguments.command, ConvertConfig))
    others = _named_models(arguments.model) if arguments.command == "evaluate" else {}
    reporter = Reporter()
    if isinstance(config, ComparisonConfig):
        reporter.message(f"the report is {compare(config, arguments.workdir, reporter)}")
        return
    if isinstance(config, PretrainConfig):
        reporter.message(f"the report is {pretrain(config, arguments.workdir, reporter, _whole_run(arguments))}")
        return
    steps: dict[str, Callable] = {
        "convert": pipeline.run_all,
        "align": pipeline.align,
        "select": pipeline.select_layers,
        "compare-selection": compare_selection,
        "cache-teacher": lambda run: pipeline.cache_teacher(run, arguments.form, arguments.k),
        "distill": pipeline.distill,
        "finetune": pipeline.finetune,
        "fit-scale": pipeline.fit,
        "export": pipeline.export,
        "evaluate": lambda run: pipeline.evaluate(run, others),
        "ablate": lambda run: ablate(run, arguments.study),
    }
    steps[arguments.command](open_run(config, arguments.workdir, reporter, _whole_run(arguments)))


def _named_models(given: Sequence[str]) -> dict[str, str]:
    """NAME=DIRECTORY of `evaluate --model`, by name."""
    named: dict[str, str] = {}
    for word in given:
        name, _, source = word.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or not source or name in named:
            raise HypenetError(
                f"--model is {word!r}; write NAME=DIRECTORY, each name once, of letters, digits, '-', '_' and '.'"
            )
        named[name] = source
    return named


def _whole_run(arguments: argparse.Namespace) -> str:
    """The command that does everything that this one is a part of, for the model card."""
    whole = "pretrain" if arguments.command == "pretrain" else "convert"
    words = ["hypenet", whole, "--config", arguments.config, "--workdir", arguments.workdir]
    return shlex.join([*words, *(word for setting in arguments.set for word in ("--set", setting))])


def _doctor(arguments: argparse.Namespace) -> None:
    from hypenet_jax.doctor import examine

    if not examine(print):
        raise HypenetError("the self-check found a kernel outside its tolerance; see the table above")


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.json == "":
        raise HypenetError("--json is empty; name a file for the measurements")
    path = arguments.json and pathlib.Path(arguments.json)
    if path and (path.exists() or not path.parent.is_dir()):
        raise HypenetError(f"cannot write {path}: it exists, or its directory does not; name a new file")
    if arguments.what == "train":
        _bench_train(arguments)
        return
    if arguments.what == "exchange":
        _bench_exchange(arguments)
        return
    from hypenet_jax.halo.workdir import write_json
    from kernels_pallas.bench import bench

    result = bench(tuple(arguments.only), small=arguments.small or None, say=partial(print, flush=True))
    if path:
        write_json(path, result)


def _bench_train(arguments: argparse.Namespace) -> None:
    from hypenet_jax.parallel import startup
    from hypenet_jax.plan.bench import bench_train

    startup.start(resumable=False)
    bench_train(
        _conversion(arguments),
        arguments.stage,
        arguments.steps,
        documents=arguments.documents,
        json_file=arguments.json,
        say=partial(print, flush=True),
    )


def _bench_exchange(arguments: argparse.Namespace) -> None:
    from hypenet_jax.plan.exchange import bench_exchange

    bench_exchange(
        arguments.lengths,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        width=arguments.width,
        json_file=arguments.json,
        say=partial(print, flush=True),
    )


def _import(arguments: argparse.Namespace) -> None:
    from hypenet_jax import hub
    from hypenet_jax.hub.card import short_card, source_of

    model, params = hub.load(arguments.source)
    card = short_card(model.config, arguments.dtype, source_of(arguments.source))
    hub.save(model, params, arguments.directory, dtype=arguments.dtype, card=card)
    config = model.config
    print(
        f"{arguments.directory}: {config.family}, {config.num_layers} layers of width {config.hidden_size}, "
        f"{config.num_heads} query and {config.num_kv_heads} key heads, "
        f"vocabulary {config.vocab_size}, {arguments.dtype}"
    )


def _pack(arguments: argparse.Namespace) -> None:
    from hypenet_jax import hub
    from hypenet_jax.data.packing import pack
    from hypenet_jax.data.sources import read_documents
    from hypenet_jax.halo.corpus import packed_corpus
    from hypenet_jax.halo.settings import DataConfig

    tokenizer = hub.tokenizer_of(arguments.tokenizer)
    if arguments.heldout_share is not None:
        data = DataConfig(sources=tuple(arguments.sources), heldout_share=arguments.heldout_share, seed=arguments.seed)
        packed_corpus(data, tokenizer, pathlib.Path(arguments.out), print)
        return
    documents = (document for source in arguments.sources for document in read_documents(source))
    info = pack(documents, tokenizer, arguments.out, seed=arguments.seed, sources=tuple(arguments.sources))
    print(f"{arguments.out}: {info.tokens:,} tokens of {info.documents:,} documents")


def _report(arguments: argparse.Namespace) -> None:
    from hypenet_jax.evals.report import write_report

    print(write_report(arguments.workdir))


def _qk_restore(arguments: argparse.Namespace) -> None:
    from hypenet_jax.halo.qk_restore import restore_directory

    a = arguments
    layers = restore_directory(a.before, a.after, a.directory, a.method, a.layers)
    print(f"{a.directory}: queries and keys of {a.before} in layers {', '.join(map(str, layers))} ({a.method})")


def _generate(arguments: argparse.Namespace) -> None:
    from hypenet_jax import hub
    from hypenet_jax.inference import stream
    from hypenet_jax.inference.console import print_stream

    model, params = hub.load(arguments.model)
    if model.tokenizer is None:
        raise HypenetError(f"{arguments.model} has no tokenizer.json; put one beside the weights")
    prompt = model.tokenizer.encode(_prompt(arguments.prompt), special_tokens=True)
    ids = stream(
        model,
        params,
        prompt,
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_len=arguments.max_len,
    )
    print_stream(ids, model.tokenizer, sys.stdout, after=prompt)


def _answer(arguments: argparse.Namespace) -> None:
    from hypenet_jax.inference.answers import answer

    a = arguments
    counts = answer(
        a.model,
        a.questions,
        a.out,
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        seed=a.seed,
        batch_size=a.batch_size,
        say=partial(print, flush=True),
    )
    print(f"{a.out}: {counts}")


def _plan(arguments: argparse.Namespace) -> None:
    from hypenet_jax.halo.settings import ConvertConfig, PretrainConfig
    from hypenet_jax.plan.compile import FULL, QUICK
    from hypenet_jax.plan.planning import plan

    plan(
        _config(arguments, ConvertConfig, PretrainConfig),
        [name for names in arguments.topology for name in names.split(",")],
        arguments.mesh,
        arguments.stages,
        effort=FULL if arguments.full else QUICK,
        json_file=arguments.json,
        directory=arguments.out,
        say=partial(print, flush=True),
    )


def _scaling(arguments: argparse.Namespace) -> None:
    from hypenet_jax.parallel import startup
    from hypenet_jax.plan.scaling import scaling

    startup.start(resumable=False)
    scaling(
        _conversion(arguments),
        arguments.meshes,
        arguments.steps,
        stage=arguments.stage,
        weak=arguments.weak,
        json_file=arguments.json,
        directory=arguments.out,
        say=partial(print, flush=True),
    )


def _conversion(arguments: argparse.Namespace) -> Any:
    from hypenet_jax.halo.settings import ConvertConfig

    return _config(arguments, ConvertConfig)


def _config(arguments: argparse.Namespace, *wanted: type) -> Any:
    """The config that the command names, which has to be of a kind that is wanted."""
    from hypenet_jax.config import KINDS, load_config

    config = load_config(arguments.config, arguments.set)
    if not isinstance(config, wanted):
        needed = " or ".join(KINDS[kind] for kind in wanted)
        raise HypenetError(
            f"{arguments.config} is a config for {KINDS[type(config)]}; hypenet {arguments.command} needs one for "
            f"{needed}"
        )
    return config


def _prompt(argument: str) -> str:
    """The text itself, or standard input for "-"; HypenetError where it is no text."""
    try:
        text = sys.stdin.read() if argument == "-" else argument
        text.encode()
    except UnicodeError as error:
        raise HypenetError(f"the prompt is no UTF-8 text ({error}); convert it") from None
    if not text:
        raise HypenetError("the prompt is empty; give a text to continue")
    return text


SINGLE: dict[str, Callable[[argparse.Namespace], None]] = {
    "doctor": _doctor,
    "bench": _bench,
    "import": _import,
    "pack": _pack,
    "report": _report,
    "qk-restore": _qk_restore,
    "generate": _generate,
    "answer": _answer,
    "plan": _plan,
    "scaling": _scaling,
}


def entry() -> None:
    """The console script."""
    from hypenet_jax.parallel import processes
    from hypenet_jax.plan.machines import GPU_SHARE

    # JAX would take three quarters of a GPU. It reads this when it first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))
    sys.exit(processes.ended(main))


if __name__ == "__main__":
    entry()
