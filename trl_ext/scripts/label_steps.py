"""`trl-ext label-steps …`: TRL has no such script; the options are those of [`LabelStepsConfig`] alone."""

from typing import Any

from accelerate import PartialState

from trl_ext.labels import LabelStepsConfig, label_steps


def make_parser(subparsers: Any = None, prog: str | None = None) -> Any:
    from trl import TrlParser  # a strict one, while `trl-ext` reads the options

    if subparsers is not None:
        return subparsers.add_parser("label-steps", help="Label steps", dataclass_types=(LabelStepsConfig,))
    return TrlParser((LabelStepsConfig,), prog=prog)


def main(config: LabelStepsConfig) -> None:
    label_steps(config)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
