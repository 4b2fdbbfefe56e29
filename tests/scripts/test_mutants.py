"""Faults that are planted are faults of the present code."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))


def test_every_planted_fault_has_its_place():
    import mutants
    from planted import PLANTED

    found = mutants.planted(mutants.all_files())
    assert len(found) == len({mutant.key for mutant in found}) == len(PLANTED)
    for mutant in found:
        ast.parse(mutant.text)


def test_every_drawn_fault_changes_its_file_and_can_be_read():
    import mutants

    file = "verl/trainer/ppo/core_algos/kl.py"
    unchanged = ast.unparse(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    found = mutants.mutants(file)
    assert len(found) > 20
    for mutant in found:
        assert mutant.text != unchanged
        ast.parse(mutant.text)
