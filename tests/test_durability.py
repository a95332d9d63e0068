"""A sample of what `tests.durability` tries many times: kills, full disks, damage."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import durability


@pytest.mark.parametrize("pretrained", [False, True], ids=["save", "save_pretrained"])
def test_kills_full_disks_and_damage_lose_nothing_and_let_nothing_in(pretrained: bool, tmp_path: Path) -> None:
    """One of each kind of damage; ``python -m tests.durability`` tries 100 kills, 10 full disks and 250 damages."""
    draw, saved = random.Random(), durability.Saved(tmp_path, pretrained)
    kinds = durability._FOLDER if pretrained else durability._FILE
    assert sum(durability.kills(saved, 4, draw, every=4).values()) == 4
    assert durability.full_disks(saved, 1, draw) == {"old": 1}
    assert durability.damaged(saved, len(kinds), draw).keys() == kinds.keys()
