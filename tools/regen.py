"""Makes `generated/` from `openapi/`: `python tools/regen.py [--check] [--accept-breaking] [--root FOLDER]`.

Exit status: 0 done or up to date; 1 `--check` found a difference, or the contract is faulty; 2 wrong usage;
3 the change would break clients and `--accept-breaking` is missing (nothing is written).
"""

import argparse
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # run as a script, the clone itself is not importable

from tools.contract import diff, rules, tree  # noqa: E402
from tools.contract.source import ContractError, load_contract  # noqa: E402

FAULTY, BREAKING = 1, 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes generated/ from openapi/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when generated/ differs")
    parser.add_argument("--accept-breaking", action="store_true", help="write even if clients would break")
    parser.add_argument("--root", type=Path, default=_ROOT, help="folder that holds openapi/ and generated/")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check(options.root)
        return regenerate(options.root, accept_breaking=options.accept_breaking)
    except ContractError as error:
        print(f"regen: {error}", file=sys.stderr)
        return FAULTY


def check(root: Path) -> int:
    """Compares whole trees both ways and names every file that differs."""
    found = tree.differences(_wanted(root), tree.read(root / "generated"))
    for line in found:
        print(f"generated/ is not what openapi/ says: {line}", file=sys.stderr)
    return FAULTY if found else 0


def regenerate(root: Path, *, accept_breaking: bool) -> int:
    """Writes `generated/`, after saying what changed and whether a client would break."""
    folder = root / "generated"
    wanted = _wanted(root)
    changes = diff.compare_trees(tree.read(folder), wanted)
    for change in changes:
        print(change)
    if any(change.breaking for change in changes) and not accept_breaking:
        print("regen: clients would break; nothing written. Decide: --accept-breaking", file=sys.stderr)
        return BREAKING
    for line in tree.replace(wanted, folder):
        print(f"written: {line}")
    return 0


def _wanted(root: Path) -> tree.Tree:
    contract = load_contract(root / "openapi")
    faults = rules.faults(contract)
    if faults:
        raise ContractError("the contract is faulty\n" + "\n".join(f"  {fault}" for fault in faults))
    return tree.build(contract)


if __name__ == "__main__":
    sys.exit(main())
