"""SLoPe with lazy low-rank branches through the stock Trainer of transformers, killed, resumed, and checked by hand.

    python examples/trainer.py                  # the standard library's source; about two minutes on two CPU cores
    python examples/trainer.py --data my.txt    # your own text

A small Llama on bytes is pretrained with 2:4 weights in bf16, with gradient accumulation, clipping, a cosine learning
rate, evaluation and checkpoints. The training runs in a process of its own, which is killed in the middle; this one
resumes from the last checkpoint, and the low-rank branches start after that. A loop written by hand, which was never
interrupted, trains the same model on the same batches: its losses must be the Trainer's. In the end the model goes back
to a module of its class and writes some code.
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import random_windows, read_corpus
from pretraining import progress_bar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import fxsparse
from fxsparse.integrations import FxsparseCallback


class Windows(Dataset):
    """Windows of a text as input and labels of a language model."""

    def __init__(self, windows: Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class Kill(TrainerCallback):
    """Kills the process before an optimizer step, as a machine that fails would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Progress(TrainerCallback):
    """Shows the steps of a Trainer, from where it resumes."""

    def __init__(self, console: Console):
        self.bar = progress_bar(console)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task("Trainer", total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, completed=state.global_step, description=f"Trainer, loss {logs['loss']:.2f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


def make_model(args: argparse.Namespace) -> nn.Module:
    """The dense model, the same in every process."""
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4 * args.length, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make_sparse(model: nn.Module, args: argparse.Namespace) -> GraphModule:
    passes = f"nm-masks{{pattern=2:4}},double-prune{{every=10}},low-rank{{ratio=0.0625,start={args.low_rank_start}}}"
    ids = torch.zeros(2, args.length, dtype=torch.long)
    return fxsparse.rewrite(model, passes, kwargs={"input_ids": ids, "labels": ids})


def make_data(args: argparse.Namespace) -> tuple[Windows, Windows]:
    """The windows to train on, one for each row of each batch, and those to evaluate on."""
    corpus = read_corpus(args.data, seed=args.seed)
    draw = torch.Generator().manual_seed(args.seed)
    rows = args.steps * args.batch * args.accumulate
    return (
        Windows(random_windows(corpus.train, rows, args.length, draw)),
        Windows(random_windows(corpus.validation, 4 * args.batch, args.length, draw)),
    )


def make_trainer(gm: GraphModule, args: argparse.Namespace, folder: Path, *callbacks: TrainerCallback) -> Trainer:
    train, validation = make_data(args)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, gradient_accumulation_steps=args.accumulate, learning_rate=args.lr,
        lr_scheduler_type="cosine", warmup_steps=args.steps // 20, weight_decay=0.1, adam_beta2=0.95,
        optim="adamw_torch", max_grad_norm=1.0, bf16=True, use_cpu=args.device == "cpu", seed=args.seed,
        eval_strategy="steps", eval_steps=args.every, save_steps=args.every, save_total_limit=2, logging_steps=1,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        gm, arguments, train_dataset=train, eval_dataset=validation, callbacks=[FxsparseCallback(), *callbacks]
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def by_hand(gm: GraphModule, trainer: Trainer, args: argparse.Namespace, console: Console) -> list[float]:
    """The same training as a loop, without interruption; the loss of every step.

    Takes batches, groups of parameters and the device from a Trainer that never trains.
    """
    gm.to(trainer.args.device).train()
    decayed = set(trainer.get_decay_parameter_names(gm))
    groups = [
        {"params": [p for name, p in gm.named_parameters() if (name in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    decay = transformers.get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=args.steps)
    batches = iter(trainer.get_train_dataloader())
    losses = []
    with progress_bar(console) as bar:
        task = bar.add_task("by hand", total=args.steps)
        for _ in range(args.steps):
            micro_losses = []
            for _ in range(args.accumulate):
                with torch.autocast(trainer.args.device.type, torch.bfloat16):
                    loss = gm(**next(batches)).loss
                loss = loss.float() / args.accumulate
                loss.backward()
                micro_losses.append(loss.detach())
            nn.utils.clip_grad_norm_(gm.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            decay.step()
            losses.append(float(sum(micro_losses)))
            bar.update(task, advance=1, description=f"by hand, loss {losses[-1]:.2f}")
    return losses


def compare(trainer: Trainer, losses: list[float]) -> tuple[Table, str]:
    """The losses of both, every few steps, and how far they are apart."""
    table = Table(title="loss, as the Trainer logs it and by hand", title_justify="left")
    for heading in ("step", "Trainer", "by hand", "evaluation", "branches"):
        table.add_column(heading, justify="right")
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    for step in sorted({1, *evaluated}):
        entry = logged[step]
        branches = "train" if entry["fxsparse/low-rank.started"] else "wait"
        evaluation = f"{evaluated[step]:.4f}" if step in evaluated else ""
        table.add_row(str(step), f"{entry['loss']:.6f}", f"{losses[step - 1]:.6f}", evaluation, branches)
    difference = max(abs(entry["loss"] - losses[step - 1]) for step, entry in logged.items())
    return table, f"largest difference over all {len(logged)} steps: {difference:.1e}"


def write_code(gm: GraphModule, args: argparse.Namespace, prompt: str = "def ") -> str:
    """What the trained model makes of a prompt, as a module of its class, compressed and with a cache."""
    module = fxsparse.to_module(gm, make_model(args)).eval()
    ids = torch.tensor([list(prompt.encode())], device=module.device)
    torch.manual_seed(args.seed)
    options = {"max_new_tokens": args.length, "do_sample": True, "temperature": 0.7, "top_k": 20, "pad_token_id": 0}
    generated = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return bytes(generated[0].tolist()).decode(errors="replace")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file or folder of text; by default the standard library's source")
    parser.add_argument("--out", type=Path, help="folder of the checkpoints; by default a temporary one")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--length", type=int, default=128, help="bytes of a row")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--low-rank-start", type=float, default=0.75, help="share of the steps before branches train")
    parser.add_argument("--every", type=int, help="steps between evaluations, and between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kill-at", type=int, help=argparse.SUPPRESS)  # for the process that is killed
    return parser


def main() -> None:
    args = options().parse_args()
    args.every = args.every or max(1, args.steps // 6)
    console = Console(width=None if sys.stdout.isatty() else 110)
    transformers.logging.set_verbosity_error()
    model = make_model(args)
    if args.kill_at is not None:
        make_trainer(make_sparse(model, args), args, args.out, Kill(args.kill_at)).train()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        killed_at = args.steps // 2 + args.every // 2
        gm = make_sparse(copy.deepcopy(model), args)
        console.print(fxsparse.explain(gm), highlight=False, soft_wrap=True)
        console.print(f"\nA process trains until it is killed before step {killed_at + 1} of {args.steps} ...")
        begin = time.perf_counter()
        command = [sys.executable, __file__, *sys.argv[1:], "--out", str(folder), "--kill-at", str(killed_at)]
        ended = subprocess.run(command).returncode
        if ended != -signal.SIGKILL:
            raise SystemExit(f"the process was to be killed, and ended with {ended}")
        checkpoint = transformers.trainer_utils.get_last_checkpoint(folder)
        console.print(f"... after {time.perf_counter() - begin:.0f} s; this one resumes from {Path(checkpoint).name}")
        trainer = make_trainer(gm, args, folder, Progress(console))
        trainer.train(resume_from_checkpoint=checkpoint)
        hand = make_sparse(copy.deepcopy(model), args)
        losses = by_hand(hand, make_trainer(copy.deepcopy(hand), args, folder), args, console)
        for part in compare(trainer, losses):
            console.print(part, highlight=False)
        gm = trainer.accelerator.unwrap_model(gm, keep_fp32_wrapper=False)
        state, wanted = gm.state_dict(), hand.state_dict()
        same = all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
        console.print(f"weights and masks of both are {'equal bit for bit' if same else 'not equal'}")
        console.print("\nwhat it has learnt:", style="bold")
        console.print(write_code(gm, args), highlight=False, markup=False)


if __name__ == "__main__":
    main()
