"""Pretraining of a byte-level model and a progress bar, for several examples."""

from __future__ import annotations

import argparse

import torch
from corpus import random_windows
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def pretrain(
    model: torch.nn.Module, text: torch.Tensor, args: argparse.Namespace, draw: torch.Generator, console: Console
) -> None:
    """Trains a causal language model on random windows of a text; sizes and steps are taken from ``args``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.pretrain_steps)
    with progress_bar(console) as progress:
        task = progress.add_task("pretraining", total=args.pretrain_steps)
        for _ in range(args.pretrain_steps):
            batch = random_windows(text, args.batch, args.length, draw).to(args.device)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            progress.update(task, advance=1, description=f"pretraining, loss {loss.item():.2f}")


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
