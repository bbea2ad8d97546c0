"""The arguments of `hypenet <command>`; what the commands do is in cli.py."""

from __future__ import annotations

import argparse
import textwrap

# command -> (help, example); the order is that of a user's first day.
COMMANDS = {
    "doctor": ("versions, devices, which kernels work here, and a numerical self-check", "hypenet doctor"),
    "bench": (
        "measure the kernels, training steps, or attention over a divided row, on the devices here",
        "hypenet bench train --config configs/bench_2b.py --stage distill --json distill.json",
    ),
    "import": (
        "read a Hugging Face directory or a GGUF file, check it, and write a Hugging Face directory",
        "hypenet import SmolLM2-135M-Instruct.Q4_1.gguf smollm2",
    ),
    "pack": (
        "tokenize text into packed ArrayRecord files",
        "hypenet pack corpus/ --tokenizer smollm2 --out packed",
    ),
    "convert": (
        "all of HALO: align, select, distill, finetune, fit-scale, export, evaluate, report",
        "hypenet convert --config configs/demo.py --workdir runs/demo --set distill.steps=200",
    ),
    "align": ("stage 1 alone: hidden-state alignment", "hypenet align --config configs/demo.py --workdir runs/demo"),
    "select": ("layer selection alone", "hypenet select --config configs/demo.py --workdir runs/demo"),
    "compare-selection": (
        "every way to choose the layers, by what a short equal distillation makes of each choice",
        "hypenet compare-selection --config configs/demo.py --workdir runs/demo",
    ),
    "distill": ("stage 2 alone: distillation", "hypenet distill --config configs/demo.py --workdir runs/demo"),
    "finetune": (
        "stage 3 alone: long-context finetune",
        "hypenet finetune --config configs/demo.py --workdir runs/demo",
    ),
    "cache-teacher": (
        "write the teacher's output for stage 2, so that distill need not run it",
        "hypenet cache-teacher --config configs/demo.py --workdir runs/demo --form top-k --k 64",
    ),
    "fit-scale": (
        "fit the a of the attention scaling alone",
        "hypenet fit-scale --config configs/demo.py --workdir runs/demo",
    ),
    "export": (
        "write the finished student as a Hugging Face directory",
        "hypenet export --config configs/demo.py --workdir runs/demo",
    ),
    "evaluate": (
        "needles and perplexity of teacher and student",
        "hypenet evaluate --config configs/demo.py --workdir runs/demo",
    ),
    "ablate": (
        "compare recipes by short runs from one base: start, masters, kl, lengths, documents",
        "hypenet ablate --config configs/demo.py --workdir runs/demo --study start masters",
    ),
    "report": ("write the HTML report of a work directory", "hypenet report runs/demo"),
    "qk-restore": (
        "put the queries and keys of before a fine-tune back into the attention layers",
        "hypenet qk-restore runs/demo/distill runs/demo/export restored",
    ),
    "plan": (
        "compile a run for a machine that is not here: memory, collectives, time",
        "hypenet plan --config configs/hypenet_2b.py --topology v5e-16 --stages distill",
    ),
    "scaling": (
        "run steps on several meshes of the devices here: throughput, efficiency, where the time goes",
        "hypenet scaling --config configs/demo.py --meshes fsdp=1 fsdp=2 --steps 10",
    ),
    "pretrain": (
        "train from scratch with cross-entropy",
        "hypenet pretrain --config configs/demo_teacher.py --workdir runs/teacher",
    ),
    "compare-architectures": (
        "train several architectures from scratch and test them far beyond their training length",
        "hypenet compare-architectures --config configs/from_scratch.py --workdir runs/from_scratch",
    ),
    "generate": (
        "continue a prompt, streaming to the terminal",
        'hypenet generate runs/demo/export --prompt "def main" --max-new-tokens 64',
    ),
    "answer": (
        "answer questions as the assistant and write the conversations, for stage 3 to learn from",
        "hypenet answer teachers/smollm2 questions.txt answers.jsonl --batch-size 32",
    ),
}
PLAN_COMMANDS = ("plan", "scaling")
RUN_COMMANDS = (
    "convert", "align", "select", "compare-selection", "cache-teacher", "distill", "finetune", "fit-scale", "export",
    "evaluate", "ablate", "pretrain", "compare-architectures",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog="hypenet", description="Turn a pretrained Transformer into a long-context hybrid (HypeNet, by HALO)."
    )
    from hypenet_jax import __version__

    whole.add_argument("--version", action="version", version=f"hypenet {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    added = {
        name: commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n{textwrap.indent(example, '  ')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, (text, example) in COMMANDS.items()
    }
    for name in (*RUN_COMMANDS, *PLAN_COMMANDS):
        added[name].add_argument("--config", required=True, help="a Python program that defines get_config()")
        if name in RUN_COMMANDS:
            added[name].add_argument("--workdir", required=True, help="where everything is written, and continued from")
        added[name].add_argument(
            "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a config value"
        )
    cached = added["cache-teacher"]
    cached.add_argument("--form", choices=("hidden", "top-k"), default="hidden", help="what is kept of every token")
    cached.add_argument("--k", type=int, help="with --form top-k: how many of the likeliest tokens")
    added["evaluate"].add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=DIRECTORY",
        help="another model with the teacher's tokenizer, measured alike: fine-tuned, restored, ...; or several",
    )
    studies = ("start", "masters", "kl", "lengths", "documents")
    added["ablate"].add_argument(
        "--study", nargs="+", choices=studies, required=True, help="what is asked, one or more"
    )
    _add_bench(added["bench"])
    added["import"].add_argument("source", help="Hugging Face directory, GGUF file or a stage's directory")
    added["import"].add_argument("directory", help="the Hugging Face directory to write")
    added["import"].add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    added["pack"].add_argument("sources", nargs="+", help="files, folders, or built-in sources such as stdlib")
    added["pack"].add_argument("--tokenizer", default="bytes", help='"bytes", a model directory or a GGUF file')
    added["pack"].add_argument("--out", required=True, help="the directory to write")
    added["pack"].add_argument("--seed", type=int, default=0, help="order of the documents")
    added["pack"].add_argument(
        "--heldout-share", type=float, help="write OUT/train and OUT/heldout, this share of the documents held out"
    )
    added["report"].add_argument("workdir")
    restore = added["qk-restore"]
    for name, text in (("before", "the model before the fine-tune"), ("after", "the fine-tuned model")):
        restore.add_argument(name, help=f"{text}: Hugging Face directory, GGUF file or a stage's directory")
    restore.add_argument("directory", metavar="out", help="the Hugging Face directory to write; must not exist")
    restore.add_argument("--method", choices=("copy", "procrustes"), default="copy")
    restore.add_argument("--layers", default="attention", help='"attention" (all of them), or numbers such as 2,3')
    _add_planning(added["plan"], added["scaling"])
    _add_decoding(added["generate"], added["answer"])
    return whole


def _add_decoding(generate: argparse.ArgumentParser, answer: argparse.ArgumentParser) -> None:
    for command in (generate, answer):
        command.add_argument("model", help="Hugging Face directory, GGUF file or a stage's directory")
    generate.add_argument("--prompt", required=True, help='the text to continue; "-" reads standard input')
    generate.add_argument("--max-new-tokens", type=int, default=128)
    answer.add_argument("questions", help='a .txt with one a line, or a .jsonl with "messages", answered anew')
    answer.add_argument("out", help="the .jsonl to write; must not exist")
    answer.add_argument("--max-new-tokens", type=int, default=256, help="answers that have not ended are left out")
    for command in (generate, answer):
        command.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
        command.add_argument("--top-k", type=int)
        command.add_argument("--top-p", type=float)
        command.add_argument("--seed", type=int, default=0)
    generate.add_argument("--max-len", type=int, help="slots of the cache; by default as many as are needed")
    answer.add_argument("--batch-size", type=int, default=64, help="questions answered at once")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(dest="what", required=True, metavar="what")
    kernels = kinds.add_parser("kernels", help="the kernels, at the shapes of HypeNet's training and decoding")
    train = kinds.add_parser("train", help="steps of a conversion's stages, with random weights and documents")
    names = ("lightning", "attention", "decode", "linear_kl")
    kernels.add_argument("--only", nargs="+", choices=names, default=names, help="some of the kernels")
    kernels.add_argument("--small", action="store_true", help="small shapes, in seconds; always so on a CPU")
    train.add_argument("--config", required=True, help="a Python program that defines get_config()")
    train.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a config value"
    )
    stages = ("align", "distill", "finetune")
    train.add_argument("--stage", nargs="+", choices=stages, default=stages, help="some of the stages")
    train.add_argument("--steps", type=int, default=10, help="measured steps of each, after a warm-up")
    train.add_argument(
        "--documents",
        nargs="+",
        type=int,
        default=[1000],
        metavar="TOKENS",
        help="tokens a document on average, each measured; 0: every row is one document",
    )
    exchange = kinds.add_parser(
        "exchange", help="attention over a row divided between the devices, by ring and by gather"
    )
    exchange.add_argument(
        "--lengths", nargs="+", type=int, default=[16_384, 65_536, 131_072], metavar="TOKENS", help="tokens of a row"
    )
    exchange.add_argument("--heads", type=int, default=16, help="query heads")
    exchange.add_argument("--kv-heads", type=int, default=8, help="key heads")
    exchange.add_argument("--width", type=int, default=128, help="of a head")
    for kind in (kernels, train, exchange):
        kind.add_argument("--json", metavar="FILE", help="write the measurements there as well")


def _add_planning(plan: argparse.ArgumentParser, scaling: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="MACHINE",
        help="v5e-16, v5p-64, 2xv6e-64, h100x8, cpu8, ... or several",
    )
    plan.add_argument("--mesh", action="append", default=[], metavar="AXIS=SIZE,...", help="again for a sweep")
    training = ("align", "distill", "finetune")
    plan.add_argument(
        "--stages",
        nargs="+",
        choices=(*training, "train", "prefill", "decode"),
        help="some of the stages; train is the one of a config for training from scratch",
    )
    plan.add_argument("--full", action="store_true", help="compile as the run will: several times slower")
    scaling.add_argument("--meshes", nargs="+", required=True, metavar="AXIS=SIZE,...", help="the smallest first")
    scaling.add_argument("--steps", type=int, default=10, help="measured steps on each mesh")
    scaling.add_argument("--stage", choices=training, default="distill")
    scaling.add_argument("--weak", action="store_true", help="as many rows a device on every mesh, not in all")
    for command in (plan, scaling):
        command.add_argument("--json", metavar="FILE", help="write the figures there as well")
        command.add_argument("--out", metavar="DIR", help="write a page with the table and the plot there")
