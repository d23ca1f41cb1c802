"""Runs that take seconds: their overrides, and how to start one as a program."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

TINY = [
    "encoder.base_channels=32",
    "encoder.num_blocks=1",
    "decoder.num_blocks=1",
    "data.image_size=16",
    "data.eval_size=128",
    "data.batch_size=4",
    "data.eval_batch_size=17",
    "data.samples_per_epoch=20",
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "scheduler.warmup_steps=2",
    "callbacks.progress=null",
    "callbacks.pictures=null",
    "logger=csv",
    "final.lpips=null",
    "final.usage_tokens_per_code=1",
]
QUANTIZERS = {
    "fsq": ["quantizer=fsq", "quantizer.levels=[5,5]"],
    "vq_ema": ["quantizer=vq_ema", "quantizer.codebook_size=32", "quantizer.dim=4", "quantizer.revive_below=0.5"],
}


def program(*arguments):
    """Run Python as a user would: without the checks of a test run, which imports vistok in its own way."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tokenizers"), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, start_new_session=True
    )
