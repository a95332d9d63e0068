"""What a schedule remembers of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.history import LONGEST, History


def small() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(3, 8)


def trained(steps: int, total: int = 6) -> tuple[fxsparse.Schedule, list[float]]:
    torch.manual_seed(0)
    model, x = small()
    gm = fxsparse.rewrite(model, "nm-masks{storage=masked,dynamic=true}", (x,))
    optimizer = torch.optim.SGD(gm.parameters(), lr=1.0)
    schedule, losses = fxsparse.Schedule(gm, optimizer, total_steps=total), []
    for _ in range(steps):
        loss = gm(x).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step(loss)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return schedule, losses


def test_the_numbers_of_every_step_of_a_short_training() -> None:
    schedule, losses = trained(6)
    assert [point["step"] for point in schedule.history.points] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in schedule.history.series()["loss"]] == losses
    overlap = [value for _, value in schedule.history.series()["nm-masks.mask_overlap"]]
    assert all(0 < share <= 1 for share in overlap) and min(overlap) < 1  # masks moved


def test_it_goes_on_after_a_restart() -> None:
    whole, (part, _) = trained(6)[0], trained(3)
    state = part.state_dict()
    other = trained(0)[0]
    other.load_state_dict(state)
    assert other.history.points == part.history.points == whole.history.points[:3]
    del state["history"]  # as earlier versions wrote it
    trained(0)[0].load_state_dict(state)


@pytest.mark.parametrize("total", [1, 100, 1_000_000])
def test_it_stays_small(total: int) -> None:
    history = History(total)
    steps = [step for step in range(1, min(total, 20_000) + 1) if history.due(step)]
    assert steps[0] == 1 and history.due(total) and len(steps) <= LONGEST + 2


def test_the_tensors_that_were_trained() -> None:
    model, x = small()
    gm = fxsparse.rewrite(model, "select-tensors{rho=0.9,times=2}", (x,))
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=4)
    for _ in range(4):
        schedule.observe((x,), loss=lambda output: output.square().mean())
        gm(x).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    first = schedule.history.trained[1]
    assert first and set(first) < {name for name, _ in gm.named_parameters()}
    assert "loss" not in schedule.history.points[0]


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    schedule, _ = trained(6)
    schedule.history.chose(1, ["a", "b"])
    figure = fxsparse.plot_history(schedule, tmp_path / "plots" / "history.png")
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[:2] == ["loss", "nm-masks.mask_overlap"] and "2 ever trained" in labels[2]
    assert (tmp_path / "plots" / "history.png").stat().st_size > 1000
    with pytest.raises(fxsparse.OptionError, match="no history"):
        fxsparse.plot_history(trained(0)[0])
