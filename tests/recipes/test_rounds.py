"""Training in rounds: a round that is there is skipped, so that a run that was stopped goes on."""

import json

import pytest

from recipes.clock.rounds import parser_of, play_rounds


def test_a_run_that_was_stopped_goes_on(tmp_path, capsys):
    args = parser_of("", steps=2, output=str(tmp_path / "out")).parse_args(["--rounds", "2", "--seed", "7"])
    played, stop_at = [], [1]

    def play_round(number, output, given):
        if number in stop_at:
            raise KeyboardInterrupt
        assert given is args and (given.steps, given.seed) == (2, 7)
        played.append(number)
        folder = output / f"round_{number}"
        folder.mkdir(parents=True)
        (folder / "found.json").write_text(json.dumps({"greedy": number / 10}))
        return {"greedy": number / 10}

    with pytest.raises(KeyboardInterrupt):
        play_rounds(play_round, args)
    assert not (tmp_path / "out/rounds.json").exists()
    stop_at.clear()
    play_rounds(play_round, args)
    assert played == [0, 1, 2]
    assert json.loads((tmp_path / "out/rounds.json").read_text()) == [{"greedy": n / 10} for n in range(3)]
    assert capsys.readouterr().out.count("round 0: greedy 0.000") == 2
