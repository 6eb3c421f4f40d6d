"""Curves of what was logged, with axes that do not enlarge noise."""

import math

import pytest
from tiny import build

from trl_ext.callbacks import Curves, curves, draw_curves
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

PNG = b"\x89PNG"
pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`drawn(log_history)`: title → axes of the picture."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(log_history):
        assert draw_curves(log_history, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
        return {axes.get_title(): axes for axes in figures[-1].axes if axes.get_title()}

    return draw


GRPO = [
    {"step": s, "loss": 0.0, "reward": 0.3 + s / 100, "kl": 1e-3 * s, "completions/mean_length": 45 + 0.1 * (s % 2),
     "entropy": 0.07}
    for s in range(1, 20)
]  # fmt: skip
DPO = [
    {"step": s, "loss": 0.7 - s / 100, "rewards/accuracies": 0.5, "rewards/margins": s / 10, "entropy": 1.0}
    for s in range(1, 20)
]


def test_of_grpo_and_ppo(drawn):
    panels = drawn([*GRPO, {"step": 19, "value/explained_variance": -3.0}, {"step": 19, "train_runtime": 2.0}])
    assert [*panels] == [
        "reward", "KL to the reference, nats", "completion length, tokens", "entropy, nats per token",
        "explained variance",
    ]  # fmt: skip
    assert panels["explained variance"].get_ylim() == pytest.approx((-3.16, 1.16)), "below 0 is seen, too"


def test_of_preferences_and_of_process_reward_models(drawn):
    assert [*drawn(DPO)] == ["loss", "accuracy", "reward margin", "entropy, nats per token"]
    assert [*drawn([{"step": 1, "loss": 0.6, "accuracy": 0.5}, {"step": 2, "loss": 0.5, "accuracy": 0.6}])] == [
        "loss", "accuracy",
    ]  # fmt: skip


def test_axes_begin_at_zero_and_shares_end_at_one(drawn):
    panels = drawn([*GRPO, {"step": 0, "held_out/greedy": 0.15}, {"step": 20, "held_out/greedy": 0.9}])
    for share in ("reward", "held-out accuracy"):
        assert panels[share].get_ylim() == pytest.approx((-0.04, 1.04)), share
    low, high = panels["completion length, tokens"].get_ylim()
    assert low < 0 < 45 < high < 50, "a tenth of a token is not to be seen"
    panels = drawn([{"step": step, "reward": 5.0 * step, "kl": 0.0} for step in range(3)])
    assert panels["reward"].get_ylim() == pytest.approx((-0.4, 10.4))
    assert panels["KL to the reference, nats"].get_ylim() == pytest.approx((-0.04, 0.04))


def test_evaluations_are_dots_and_only_then_is_there_a_legend(drawn):
    (axes,) = drawn([{"step": 1, "reward": 0.2}, {"step": 2, "reward": 0.3}, {"step": 2, "eval_reward": 0.4}]).values()
    assert [line.get_label() for line in axes.lines] == ["reward", "reward, evaluation"] and axes.get_legend()
    assert axes.lines[1].get_linestyle() == "None"
    assert drawn([{"step": 1, "reward": 0.2}])["reward"].get_legend() is None


def test_what_is_no_number_is_left_out(drawn, tmp_path):
    history = [
        {"step": 1, "reward": 0.2, "kl": None},
        {"step": 2, "reward": math.nan},
        {"step": 3, "reward": math.inf},
    ]
    (axes,) = drawn(history).values()
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 0.2]]
    assert not draw_curves([{"step": 1, "epoch": 0.1}], tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_by_dotted_path_on_the_main_process(tiny_model, tmp_path, capsys):
    trainer = build(GRPOTrainer, GRPOConfig, tiny_model, tmp_path / "out", max_steps=1,
                    callback_paths=["trl_ext.callbacks.Curves"])  # fmt: skip
    trainer.train()
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(PNG)
    assert f"Curves: {tmp_path}/out/curves.png" in capsys.readouterr().out
    trainer.state.is_world_process_zero = False
    (tmp_path / "out" / "curves.png").unlink()
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    assert not (tmp_path / "out" / "curves.png").exists()


def test_without_matplotlib_it_is_refused_before_a_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(curves.importlib.util, "find_spec", lambda name: None)
    message = r"^trl_ext\.callbacks\.Curves draws with matplotlib: pip install matplotlib\.$"
    with pytest.raises(ValueError, match=message):
        GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, callback_paths=["trl_ext.callbacks.Curves"])
    with pytest.raises(ValueError, match=message):
        Curves()
