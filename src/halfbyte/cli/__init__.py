"""The command line: parse, call, show. Verbs are loaded when used, so ``--help`` answers at
once."""

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

from ..errors import HalfbyteError, Interrupted, UsageError, first_line, is_exhaustion
from . import console

VERBS = {
    "demo": "the built-in model learns something real, offline, on a CPU: the whole path",
    "doctor": "what this machine can do, and why a fast path is off",
    "plan": "does it fit: memory and time of a training, before anything is downloaded",
    "train": "fine-tune a model in 4 bits on your rows",
    "chat": "talk to a model or a run; --prompt for one answer",
    "eval": "loss, perplexity and exact match; a run's base beside it",
    "merge": "add a run's adapter into the weights, verified",
    "export": "a run for other tools: peft, hf, bnb-4bit",
    "quantize": "a model's weights in 4 bits, as transformers and bitsandbytes open them",
    "data": "data check: what will be trained, token by token",
    "checkpoint": "checkpoint list | verify: what a run can be resumed from",
    "bench": "this machine's limits, and how near to them it computes",
    "explain": "int4, nf4, double-quant, paged, memory, tokens, quiz, or any option",
}


class _Verbs(click.Group):
    """Verbs by name, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f".{cmd_name}", __name__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="halfbyte")
def halfbyte() -> None:
    """Fine-tune large language models in 4 bits on whatever one machine has."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the codes of `errors`; a traceback only with --debug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """The exit code of a command line."""
    debug = "--debug" in arguments
    console.use_json("--json" in arguments)
    console.write_anything()
    with _terminated():
        return _run(arguments, debug)


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM and SIGHUP end a verb as Ctrl-C does: what is half done is cleaned up. Training
    handles all three by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("terminated", number)

    ending = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    numbers = [n for n in ending if n is not None and signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""Since click 8.2; before it shows its help and ends."""


def _run(arguments: list[str], debug: bool) -> int:
    try:
        result: Any = halfbyte.main([a for a in arguments if a != "--debug"], standalone_mode=False)
        return result if isinstance(result, int) else 0
    except HalfbyteError as error:
        if debug:
            raise
        return _fail(error)
    except NO_ARGUMENTS as error:
        console.say(error.format_message())
        return 0
    except click.ClickException as error:
        return _fail(UsageError(error.format_message(), ways_out=["see `halfbyte --help`"]))
    except (KeyboardInterrupt, click.Abort):
        return _fail(Interrupted("interrupted", signal.SIGINT))
    except Exception as error:
        if debug:
            raise
        return _out_of_memory(first_line(error)) if is_exhaustion(error) else _unforeseen(error)


def _fail(error: HalfbyteError) -> int:
    console.error(str(error))
    if console.JSON:
        console.result(error.as_dict())
    return error.exit_code


def _out_of_memory(found: str) -> int:
    error = HalfbyteError(
        "out of memory",
        found=found,
        ways_out=["lower --max_length", "lower --per_device_train_batch_size"],
    )
    error.exit_code = 3
    return _fail(error)


def _unforeseen(error: Exception) -> int:
    message = first_line(error)
    return _fail(
        HalfbyteError(
            f"unforeseen {type(error).__name__}: {message}",
            ways_out=["repeat with --debug and report the traceback"],
        )
    )
