"""Options of the trainer and of the launchers."""

import signal
import socket

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_resume import SHORT, train_py
from tiny_runs import QUANTIZERS, ROOT, program

import vistok
from vistok.cli.hydra_app import configs_folder
from vistok.training.run import check_trainer, compile_networks, make_trainer, train


@pytest.fixture(autouse=True)
def _precision():
    """The precision of matrix products is a setting of the process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_bf16_trains(tiny):
    config, folder = tiny("run", *QUANTIZERS["vq_ema"], "trainer.precision=bf16-mixed", "trainer.max_steps=4")
    assert train(config, folder)["psnr"] > 0
    assert {tensor.dtype for tensor in load_file(folder / "bundle" / "model.safetensors").values()} >= {torch.float32}


def test_the_precision_of_matrix_products_is_set(tiny):
    config, folder = tiny("run", "trainer.float32_matmul_precision=high")
    make_trainer(config, folder)
    assert torch.get_float32_matmul_precision() == "high"


def test_compiling_changes_no_state_of_the_networks(tiny):
    config, _ = tiny("run")
    tokenizer = vistok.build(OmegaConf.to_container(config.tokenizer, resolve=True))
    state = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    compile_networks(tokenizer, False)
    assert tokenizer.encoder._compiled_call_impl is None
    compile_networks(tokenizer, True)
    assert None not in (tokenizer.encoder._compiled_call_impl, tokenizer.decoder._compiled_call_impl)
    assert tokenizer.quantizer._compiled_call_impl is None
    assert tokenizer.state_dict().keys() == state.keys()


# In a program of its own: the checks of shapes in a test run cannot be compiled.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
def test_compiled_networks_train_as_uncompiled_ones(tiny, tmp_path, backend):
    overrides = ["trainer.max_steps=3", "data.num_workers=0"]
    config, folder = tiny("run", *overrides)
    train(config, folder)
    compiled = train_py(tmp_path / "compiled", *overrides, f"trainer.compile={backend}")
    assert compiled.returncode == 0, compiled.stderr
    expected, got = (load_file(each / "bundle" / "model.safetensors") for each in (folder, tmp_path / "compiled"))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_an_unknown_backend_is_refused_with_those_there_are(tiny):
    config, folder = tiny("run", "trainer.compile=fast")
    with pytest.raises(ValueError, match=r"trainer.compile must be true, false or a backend .* got 'fast': .*inductor"):
        train(config, folder)


def test_a_strategy_that_divides_all_parameters_is_refused_with_the_reason(tiny):
    config, _ = tiny("run", "trainer.strategy=deepspeed_stage_2")
    with pytest.raises(ValueError, match=r"strategy=deepspeed_stage_2 divides parameters .* use trainer.strategy=fsdp"):
        check_trainer(config)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ([], r"set callbacks.ema=null"),
        (["callbacks.ema=null", "trainer.compile=true"], r"set trainer.compile=false"),
        (
            ["callbacks.ema=null", "discriminator=patchgan"],
            r"use the fixed weight, discriminator.adversarial.max_adaptive_weight=null",
        ),
        (["callbacks.ema=null", "tokenizer=hierarchical"], r"cannot divide a HierarchicalTokenizer: use ddp"),
    ],
)
def test_what_needs_whole_parameters_is_refused_under_fsdp_with_what_to_write_instead(tiny, overrides, advice):
    config, folder = tiny("run", "trainer.strategy=fsdp", "trainer.devices=1", *overrides)
    with pytest.raises(ValueError, match=advice):
        train(config, folder)


def test_a_checkpoint_of_another_strategy_is_refused(tiny):
    config, folder = tiny("run", "trainer.max_steps=4")
    train(config, folder)
    path = folder / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True) | {"vistok_strategy": "fsdp"}, path)
    config, again = tiny("again", f"ckpt={path}")
    with pytest.raises(ValueError, match=r"written under trainer.strategy=fsdp.* resume with that strategy"):
        train(config, again)


def test_a_fused_optimiser_is_refused_where_it_scales_the_gradients_itself(tiny):
    config, _ = tiny("run", "trainer.precision=16-mixed", "optimizer.fused=true")
    with pytest.raises(ValueError, match=r"precision=16-mixed and optimizer.fused=true exclude each other"):
        check_trainer(config)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fused_optimiser_takes_the_steps_of_one_that_is_not(tiny, precision):
    weights = []
    for fused in (True, False):
        # A large epsilon keeps rounding errors of small gradients from becoming whole steps.
        options = (f"optimizer.fused={fused}", "+optimizer.eps=1e-2", f"trainer.precision={precision}")
        config, folder = tiny(f"fused_{fused}", *options, "trainer.max_steps=4", "trainer.gradient_clip_val=0.01")
        train(config, folder)
        weights.append(load_file(folder / "bundle" / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_slurm_launcher_composes_with_settings_it_knows():
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "ckpt=auto"]
        config = compose("train", overrides=overrides, return_hydra_config=True)
    launcher = config.hydra.launcher
    assert launcher._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert (launcher.partition, launcher.nodes, launcher.signal_delay_s) == ("gpu", 1, 120)
    # Of hydra-submitit-launcher 1.2.
    assert set(launcher) - {"_target_"} == {
        *("submitit_folder", "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"),
        *("name", "stderr_to_stdout", "partition", "qos", "comment", "constraint", "exclude", "gres", "cpus_per_gpu"),
        *("gpus_per_task", "mem_per_gpu", "mem_per_cpu", "account", "signal_delay_s", "max_num_timeout"),
        *("additional_parameters", "array_parallelism", "setup"),
    }


def torchrun(folder, *overrides):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launch = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    devices = ["trainer.devices=2", f"hydra.run.dir={folder}"]
    return program("-m", "torch.distributed.run", *launch, ROOT / "train.py", *SHORT, *devices, *overrides)


FSDP = (
    "trainer.strategy=fsdp",
    "callbacks.ema=null",
    "discriminator=patchgan",
    "discriminator.num_layers=1",
    "discriminator.base_channels=8",
    "discriminator.adversarial.discriminator_start=1",
    "discriminator.adversarial.start=2",
    "discriminator.adversarial.max_adaptive_weight=null",
)


@pytest.mark.timeout(1200)  # six programs that import torch
@pytest.mark.parametrize("strategy", [("trainer.strategy=ddp",), FSDP], ids=["ddp", "fsdp"])
def test_two_processes_of_torchrun_stop_together_and_resume_exactly(tmp_path, strategy):
    overrides = [*QUANTIZERS["vq_ema"], "data.batch_size=2", *strategy]
    # The second process alone gets the signal.
    end = f"{{_target_:end_a_run.EndARun,number:{signal.SIGUSR1:d},hook:batch_start,batch:7,rank:1}}"
    stopped = torchrun(tmp_path / "stopped", *overrides, f"+callbacks.end={end}")
    assert stopped.returncode != 0
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 7, stopped.stderr
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert torchrun(whole, *overrides).returncode == 0
    assert torchrun(resumed, *overrides, f"ckpt={last}").returncode == 0
    first, second = (load_file(folder / "bundle" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
