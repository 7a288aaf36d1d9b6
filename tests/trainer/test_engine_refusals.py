"""What an engine can't do is refused by its configuration and by what lies in a checkpoint's folder."""

from types import SimpleNamespace

import pytest

from hf_recycle.engines import replica_checksum as agreement
from hf_recycle.engines.checks import check_deepspeed
from hf_recycle.engines.resume import EngineCheckpointMixin, check_resumable
from hf_recycle.errors import UserError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization.stage=0 .* use stage 1, 2 or 3"),
        ({}, r"zero_optimization.stage=0 "),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer.device='nvme'",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, r"offload_param.device='nvme'"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.3}}}, r"offload_optimizer.ratio=0.3"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, r"zero_hpz_partition_size=8"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, r"zero_quantized_weights=True"),
        ({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}, r"autotp_size=2"),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
            r"stage3_gather_16bit_weights_on_model_save=False",
        ),
    ],
)
def test_deepspeed_configurations_out_of_reach(config, message):
    with pytest.raises(ValueError, match=message):
        check_deepspeed(config)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_configurations_that_work(stage):
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 1}
    check_deepspeed({"zero_optimization": zero})
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint("name", ...)`: a folder with such files in it, empty; "zero2:N" for the partitions of N processes."""

    def make(*names: str):
        for name in names:
            stage, _, processes = name.partition(":")
            for rank in range(int(processes or 0)):
                folder = tmp_path / "global_step4"
                folder.mkdir(exist_ok=True)
                (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
                model = f"zero_pp_rank_{rank}_mp_rank_00" if stage == "zero3" else "mp_rank_00"
                (folder / f"{model}_model_states.pt").touch()
                (tmp_path / "latest").write_text("global_step4")
            if not processes:
                (tmp_path / name).touch()
        return tmp_path

    return make


def _trainer(engine: str, processes: int = 2, **config):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": int(engine[-1])}} | config)
    return SimpleNamespace(
        is_deepspeed_enabled=engine.startswith("zero"),
        is_fsdp_enabled=engine == "fsdp2",
        accelerator=SimpleNamespace(num_processes=processes, state=SimpleNamespace(deepspeed_plugin=plugin)),
    )


UNIVERSAL = {"checkpoint": {"load_universal": True}}


@pytest.mark.parametrize(
    ("names", "trainer", "message"),
    [
        (["zero2:2"], _trainer("ddp0"), "was written by DeepSpeed"),
        (["zero3:2"], _trainer("fsdp2"), "was written by DeepSpeed"),
        (["optimizer.pt"], _trainer("zero2"), "was not written by DeepSpeed"),
        (["zero2:2"], _trainer("zero3"), "ZeRO stage 1 or 2 and this run has stage 3"),
        (["zero3:2"], _trainer("zero1"), "ZeRO stage 3 and this run has stage 1 or 2"),
        (["zero2:2"], _trainer("zero2", 3), "of 2 processes and this run has 3: .*ds_to_universal"),
        (["zero2:2"], _trainer("zero2", 3, **UNIVERSAL), "holds no universal checkpoint"),
        (["pytorch_model_fsdp.bin"], _trainer("ddp0"), "without plain weights"),
    ],
)
def test_checkpoints_out_of_reach(names, trainer, message, checkpoint):
    with pytest.raises(UserError, match=message):
        check_resumable(trainer, checkpoint(*names))


@pytest.mark.parametrize(
    ("names", "trainer"),
    [
        (["zero2:2"], _trainer("zero1")),
        (["zero3:2"], _trainer("zero3")),
        (["zero2:2", "latest_universal"], _trainer("zero2", 3, **UNIVERSAL)),
        (["optimizer.pt", "model.safetensors"], _trainer("fsdp2")),
        (["pytorch_model_fsdp.bin", "model.safetensors"], _trainer("ddp0")),
        (["pytorch_model_fsdp.bin"], _trainer("fsdp2")),
    ],
)
def test_checkpoints_within_reach(names, trainer, checkpoint):
    check_resumable(trainer, checkpoint(*names))


def test_what_another_process_can_not_go_on_from_is_refused_here_too(checkpoint, monkeypatch):
    """Or this one would wait for it without end: machines may have checkpoints of their own."""

    def gather(everyone, mine):
        everyone[:] = [mine, UserError("the other has no optimizer.pt")]

    monkeypatch.setattr(agreement, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.dist, "all_gather_object", gather)
    here = SimpleNamespace(_check_can_resume=lambda folder: None)
    with pytest.raises(UserError, match="the other has no optimizer"):
        EngineCheckpointMixin.train(here, str(checkpoint()))
