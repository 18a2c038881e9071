"""The command line of the persister, and its process from the settings to the exit code."""

from __future__ import annotations

import argparse
import os

import uvloop

from fiq.errors import ConfigurationError, FiqError
from services.core import logs
from services.core.command import load_or_exit, memory_limit, parser, report_error
from services.core.lifecycle import Stop, stop_on_signals
from services.persister.memory import needed_bytes, variables, within
from services.persister.settings import PersisterSettings

PROGRAM = "fiq-persister"
#: more processes than this on one volume are a mistake
MAX_WORKERS = 64
#: the last TCP port; worker i takes FI_PERSISTER_PORT + i
MAX_PORT = 65535


def main(arguments: list[str] | None = None) -> int:
    """Persist until a signal comes, and return the exit code."""
    options = _parser().parse_args(arguments)
    settings = load_or_exit(PROGRAM, PersisterSettings, os.environ)
    if settings.port + options.workers - 1 > MAX_PORT:
        return report_error(
            PROGRAM, ConfigurationError([f"FI_PERSISTER_PORT={settings.port}: no {options.workers} ports"])
        )
    logs.configure("persister", level=settings.log_level)
    bounded = _bounded(settings, options.workers)
    try:
        return uvloop.run(_run(bounded, options))
    except FiqError as error:
        return report_error(PROGRAM, error)


def _bounded(settings: PersisterSettings, workers: int) -> PersisterSettings:
    """Return *settings* as far as the container's memory allows them for each of *workers*."""
    limit = memory_limit()
    bounded = within(settings, None if limit is None else limit // workers)
    if bounded != settings:
        log = logs.get_logger("persister")
        log.warning("MEMORY_BOUNDED", limit=limit, workers=workers, needed=needed_bytes(settings), **variables(bounded))
    return bounded


def _parser() -> argparse.ArgumentParser:
    result = parser(PROGRAM, "Follows the log and writes its events into HDF5.", PersisterSettings)
    result.add_argument(
        "--workers",
        type=_workers,
        default=1,
        metavar="N",
        help="processes that share the volume's partitions; one a core is a good number (default: 1)",
    )
    result.add_argument("--worker-of", type=int, help=argparse.SUPPRESS)
    return result


async def _run(settings: PersisterSettings, options: argparse.Namespace) -> int:
    stop = Stop()
    stop_on_signals(stop)
    # only now: these imports take a while, and from here on a signal ends the process in an orderly way
    if options.workers > 1:
        from services.persister.supervisor import Supervisor

        await Supervisor(options.workers, port=settings.port, env=os.environ | variables(settings), stop=stop).run()
    else:
        from services.core.tracing import open_spans
        from services.persister.service import serve
        from services.persister.supervisor import stop_with_parent

        if options.worker_of is not None:
            stop_with_parent(options.worker_of)
        with open_spans(PROGRAM, os.environ) as spans:
            await serve(settings, stop, spans=spans)
    return stop.exit_code


def _workers(value: str) -> int:
    if not value.isdigit() or not 1 <= int(value) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"a whole number from 1 to {MAX_WORKERS}")
    return int(value)
