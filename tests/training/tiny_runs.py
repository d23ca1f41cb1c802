"""Overrides of runs that take seconds."""

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
