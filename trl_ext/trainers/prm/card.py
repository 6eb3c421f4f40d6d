"""The quick start in the model card: how steps are scored. TRL's template shows a model of whole texts."""

from pathlib import Path

_QUICK_START = """## Quick start

```python
from trl_ext import ProcessRewardModel

score = ProcessRewardModel({model!r})
print(score(prompts=["What is 2 + 3, twice?"], completion_steps=[["2 + 3 = 5", "5 + 5 = 10"]]))
```

"""


def show_scoring(card: Path, model_id: str | None) -> None:
    """Puts our quick start in the place of TRL's; `model_id`, on the hub, may be unknown."""
    before, heading, rest = card.read_text(encoding="utf-8").partition("## Quick start\n")
    _, procedure, after = rest.partition("## Training procedure\n")
    if heading and procedure:
        shown = _QUICK_START.format(model=model_id or card.parent.name)
        card.write_text(before + shown + procedure + after, encoding="utf-8")
