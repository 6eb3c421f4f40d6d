"""
FSDP2 and DeepSpeed on CPUs, over gloo, for tests. Called by workers before anything else is imported.

What stands in the way there is taken away in the process of the test, never in the package: accelerate shards by FSDP
only if it takes the processes for GPUs, DeepSpeed compiles an operation that it does not need, and accelerate finds no
backend for it.
"""

import collections
import faulthandler
import os

ENGINES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}
LIMIT = float(
    os.environ.get("ENGINE_TEST_LIMIT", 240)
)  # seconds without a finished case, after which a process that hangs ends with its stack


def switch_on(engine: str) -> dict:
    """From here on every accelerator of this process is one of `engine`. Returns options that configs need for it."""
    still_alive()
    if engine == "fsdp2":
        import fsdp2

        fsdp2.switch_on()
    return zero(int(engine[-1])) if engine.startswith("zero") else {}


def still_alive() -> None:
    """Starts the clock anew."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)


def deepspeed_on_cpus() -> None:
    """If a compilation of its operations is killed, a file `lock` lets every later one wait for ever: none begins."""
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with which accelerate does not ask for DeepSpeed
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)  # no compiler, no cache
    deepspeed.utils.logger.setLevel("ERROR")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def zero(stage: int) -> dict:
    """DeepSpeed, and the options for a stage of it."""
    deepspeed_on_cpus()
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
    }
    return {"deepspeed": config, "use_cpu": False}
