"""The command line of the benchmark: runs scenarios, prints tables, writes out/bench.json.

Exit codes: 0 every bar is met, 1 one is not, 2 the run is not valid.
"""

import argparse
import sys
from collections.abc import Sequence

import uvloop

from bench import post, streams, tokens
from bench.processes import ROOT, BenchError, pin_load_process, raise_file_limit
from bench.report import Table, log, show, write

SCENARIOS = ("tokens", "post", "streams")


async def _run(scenarios: Sequence[str], *, rounds: int, quick: bool) -> list[Table]:
    raise_file_limit()
    pin_load_process()
    tables = []
    if "tokens" in scenarios:
        tables.append(await tokens.measure(rounds=rounds, with_litellm=not quick))
    if "post" in scenarios:
        tables.append(await post.measure(rounds=rounds + 2, requests=600 if quick else 1500))
    if "streams" in scenarios:
        tables.append(await streams.measure())
    return tables


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=f"any of {', '.join(SCENARIOS)}; default all")
    parser.add_argument("--quick", action="store_true", help="shorter: by default only the token path, without LiteLLM")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    scenarios = options.scenarios or (SCENARIOS[:1] if options.quick else SCENARIOS)
    try:
        tables = uvloop.run(_run(scenarios, rounds=options.rounds, quick=options.quick))
    except BenchError as exc:
        log(str(exc))
        return 2
    show(tables)
    write(tables, ROOT / "out" / "bench.json")
    return 0 if all(bar.is_met for table in tables for bar in table.bars) else 1


if __name__ == "__main__":
    sys.exit(main())
