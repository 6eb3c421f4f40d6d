"""FSDP2 on CPUs: accelerate shards there if it takes the processes for GPUs. Imported by workers before anything."""

import os

from accelerate import PartialState
from accelerate.utils import DistributedType


def switch_on(**environment: str) -> None:
    """From here on every accelerator of this process shards. `environment` are further variables of accelerate."""
    os.environ.update(
        ACCELERATE_USE_CPU="true",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_OFFLOAD_PARAMS="false",
    )
    os.environ.update(environment)
    plain = PartialState.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init
