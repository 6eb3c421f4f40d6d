"""`trl-ext rejection-sampling …`: the options are those of [`RejectionSamplingConfig`] alone."""

from typing import Any

from accelerate import PartialState

from trl_ext.rejection_sampling import RejectionSamplingConfig, rejection_sampling


def make_parser(subparsers: Any = None, prog: str | None = None) -> Any:
    from trl import TrlParser  # a strict one, while `trl-ext` reads the options

    types = (RejectionSamplingConfig,)
    if subparsers is not None:
        return subparsers.add_parser("rejection-sampling", help="Keep right answers", dataclass_types=types)
    return TrlParser(types, prog=prog)


def main(config: RejectionSamplingConfig) -> None:
    rejection_sampling(config)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
